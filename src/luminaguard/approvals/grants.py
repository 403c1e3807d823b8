"""Grants: the same answer for what comes again, within what was shown and no wider.

A grant is made from one decision. Its scope is what that request showed: this folder, this command or
tool, these paths with what became of them and what they were marked with. A person may loosen single
values by a pattern; the pattern must match what was shown, cannot be everything, and is shown itself
before the grant is made. It is limited in time and in count, can be revoked, and never answers for
what is critical or forbidden.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luminaguard.actions.model import Action, EffectKind, Risk, Severity
from luminaguard.actions.patterns import literal, matches_path, plain_characters
from luminaguard.approvals.model import Judged
from luminaguard.errors import ApprovalError

__all__ = ["LONGEST_S", "MOST_USES", "Grant", "Limits", "Scope"]

MOST_USES = 1000
LONGEST_S = 30 * 86400
_LEAST = 3
"""So many letters or digits a pattern asks for at least."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long and how often: nanoseconds since the epoch, and how many uses."""

    expires_ns: int
    uses: int


@dataclass(frozen=True, slots=True)
class Scope:
    """What a grant is for.

    Attributes:
        values: name to pattern of everything that has one value: workspace, task, server, tool, host,
            method, url, secret, command, and each argument as ``arguments.NAME``.
        files: path, the kind of change, the marks that were shown, and where a link points.
        bytes: at most so many are sent with a request.
        exact: what cannot be loosened: a body's and a definition's digest, a secret's purpose.
        taint: no other untrusted input than this may have been read.
        severity: nothing that is judged more severe than what was shown.
    """

    effect: EffectKind
    values: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str, tuple[str, ...], str], ...] = ()
    bytes: int | None = None
    exact: tuple[tuple[str, str], ...] = ()
    taint: tuple[str, ...] = ()
    severity: Severity = Severity.HIGH

    @classmethod
    def of(cls, action: Action, judged: Judged, patterns: Mapping[str, str] | None = None) -> Scope:
        """The scope of exactly what an action is, with single values loosened to ``patterns``.

        Raises:
            ApprovalError: there is no such value, the pattern does not match what was shown, or it
                would match everything.
        """
        shown = _values(action)
        chosen = {name: literal(value) for name, value in shown.items()}
        for name, pattern in (patterns or {}).items():
            if name not in shown:
                raise _too_wide(f"nothing is called {name!a}; there is {', '.join(sorted(shown))}")
            if not _fits(pattern, shown[name]):
                raise _too_wide(f"the pattern {pattern!a} does not match what was shown, {shown[name][:80]!a}")
            letters = sum(c.isalnum() for c in shown[name])
            if pattern != literal(shown[name]) and plain_characters(pattern) < max(1, min(_LEAST, letters)):
                raise _too_wide(f"the pattern {pattern!a} would match nearly everything")
            chosen[name] = pattern
        files = tuple((file.path, file.kind, tuple(sorted(file.marks)), file.target) for file in action.files)
        sized = action.bytes if action.effect == "request" else None
        return cls(action.effect, tuple(sorted(chosen.items())), files, sized, action.exact,
                   tuple(sorted(action.taint)), judged.severity)  # fmt: skip

    def problem(self, action: Action, judged: Judged) -> str:
        """Why an action is outside of it; empty if it is inside."""
        if action.effect != self.effect:
            return f"it is for another effect than {action.effect}"
        if self.severity < judged.severity:
            return f"it is {judged.severity.value} now, and was {self.severity.value} when it was shown"
        if read := action.taint - set(self.taint):
            return f"it follows {min(read)}, which it did not when it was shown"
        if action.exact != self.exact:
            return "what is sent, or the tool's definition, is not as it was shown"
        found, patterns = _values(action), dict(self.values)
        if more := found.keys() ^ patterns.keys():
            return f"{min(more)} is not as it was shown"
        for name, pattern in patterns.items():
            if not _fits(pattern, found[name]):
                return f"{name} is not as it was shown"
        if self.bytes is not None and action.bytes > self.bytes:
            return f"more than {self.bytes:,} bytes would be sent"
        shown = {path: (kind, set(marks), target) for path, kind, marks, target in self.files}
        for file in action.files:
            kind, marks, target = shown.get(file.path, ("", set(), ""))
            if (file.kind, file.target) != (kind, target):
                return f"{file.path} was not shown, or something else became of it"
            if new := file.marks - marks:
                return f"{file.path} was not marked {min(new)}"
        return ""

    def to_json(self) -> dict[str, Any]:
        """As it is stored, signed and shown to programs."""
        return {"effect": self.effect, "values": dict(self.values), "bytes": self.bytes, "exact": dict(self.exact),
                "taint": list(self.taint), "severity": self.severity.value,
                "files": [[path, kind, list(marks), target] for path, kind, marks, target in self.files]}  # fmt: skip

    @classmethod
    def from_json(cls, raw: Any) -> Scope:
        """The inverse of :meth:`to_json`; raises ValueError, KeyError or TypeError."""
        files = tuple((str(path), str(kind), tuple(map(str, marks)), str(target))
                      for path, kind, marks, target in raw["files"])  # fmt: skip
        values, exact = (tuple(sorted((str(name), str(value)) for name, value in raw[key].items()))
                         for key in ("values", "exact"))  # fmt: skip
        most = None if raw["bytes"] is None else int(raw["bytes"])
        return cls(raw["effect"], values, files, most, exact, tuple(map(str, raw["taint"])), Severity(raw["severity"]))


@dataclass(frozen=True, slots=True)
class Grant:
    """A scoped, expiring rule that a person made from an answer."""

    id: str
    made_from: str
    scope: Scope
    limits: Limits
    created_ns: int
    nonce: str
    approver: str
    person: str = ""
    signature: bytes = b""

    def problem(self, action: Action, judged: Judged, *, now_ns: int, uses: int) -> str:
        """Why it does not answer for an action; empty if it does.

        Args:
            action: what is asked for.
            judged: what the policy says of it.
            now_ns: by the ledger's clock.
            uses: how often it was used already.
        """
        if judged.risk is Risk.FORBIDDEN or judged.severity is Severity.CRITICAL or judged.people > 1:
            return f"what is {judged.severity.value} is asked for each time"
        if now_ns >= self.limits.expires_ns:
            return "it has expired"
        if uses >= self.limits.uses:
            return "it is used up"
        return self.scope.problem(action, judged)


def _values(action: Action) -> dict[str, str]:
    values = {
        "workspace": action.workspace, "task": action.task, "server": action.server, "tool": action.tool,
        "host": action.host, "method": action.method, "secret": action.secret,
        "url": action.url,
    }  # fmt: skip
    arguments = action.arguments
    if action.effect == "changeset" and isinstance(arguments, dict) and isinstance(arguments.get("command"), list):
        values["command"] = shlex.join(map(str, arguments["command"]))  # type: ignore[arg-type]  # a list, just checked
    else:
        for name, value in action.leaves:
            key = f"arguments.{name}"
            while key in values:  # an array: each of its values is one of its own
                key += "'"
            values[key] = value
    return {name: value for name, value in values.items() if value or name.startswith("arguments.")}


def _fits(pattern: str, value: str) -> bool:
    return pattern == literal(value) or matches_path(pattern, value, wide=False)


def _too_wide(why: str) -> ApprovalError:
    return ApprovalError(f"No such grant can be made: {why}.", hint="Grant what was shown, or a narrower pattern.")
