"""Rules that your own answers suggest: the narrowest ones that would have let through what you approved.

From the history: commands whose changes to a folder a person approved again and again, and never
denied, returned or stopped. The rule takes that folder, that command, those paths and kinds of change,
nothing that was marked otherwise, and no more files and bytes than there were at most.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luminaguard.actions.model import Severity, mark_words
from luminaguard.actions.patterns import literal
from luminaguard.approvals.model import Request, State
from luminaguard.effects.changes import Changeset, FileEntry
from luminaguard.effects.marks import Mark, marks_of
from luminaguard.errors import LuminaGuardError

if TYPE_CHECKING:
    from luminaguard.runtime.core import Runtime

__all__ = ["Suggestion", "suggestions"]

_BY_NOBODY = frozenset({"rule", "grant"})
_MOST_PATHS = 50
_OF_CONTENTS = frozenset({"binary"})
"""Marks that only contents show, which are not kept: who approved them has seen this one; the others stay asked."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A rule as text for ``luminaguard.toml``, and how often it would have answered."""

    name: str
    toml: str
    approved: int


@dataclass(slots=True)
class _Seen:
    """What was approved of one command in one folder."""

    approved: int = 0
    otherwise: bool = False
    paths: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    marks: set[str] = field(default_factory=lambda: set(_OF_CONTENTS))
    types: bool = False
    files: int = 0
    bytes: int = 0
    severity: Severity = Severity.LOW

    def add(self, request: Request, changeset: Changeset) -> None:
        self.approved += 1
        self.paths |= {change.path for change in changeset.changes}
        self.kinds |= {change.kind for change in changeset.changes}
        self.types |= any(Mark.TYPE in marks_of(change) for change in changeset.changes)
        for change in changeset.changes:
            self.marks |= mark_words(marks_of(change))
        self.files = max(self.files, len(changeset))
        sizes = (c.after.size for c in changeset.changes if isinstance(c.after, FileEntry))
        self.bytes = max(self.bytes, sum(sizes))
        self.severity = max(self.severity, request.judged.severity)


def suggestions(runtime: Runtime, at_least: int) -> list[Suggestion]:
    """The rules that the history suggests, most often approved first."""
    seen: dict[tuple[str, tuple[str, ...]], _Seen] = defaultdict(_Seen)
    for request, decision in runtime.approvals.history():
        if request.effect != "changeset" or decision is None or decision.person in _BY_NOBODY:
            continue
        found = seen[request.workspace, request.command]
        if request.taint:
            continue  # what follows untrusted input is looked at each time
        if request.state is not State.PUBLISHED or decision.part is not None:
            found.otherwise |= request.state in {State.DENIED, State.RETURNED, State.STOPPED, State.PUBLISHED}
            continue
        try:
            found.add(request, runtime.approvals.changeset(request.id))
        except LuminaGuardError:
            found.otherwise = True  # what cannot be read any more proves nothing
    good = [(key, found) for key, found in seen.items()
            if found.approved >= max(1, at_least) and not found.otherwise and len(found.paths) <= _MOST_PATHS
            and found.severity is not Severity.CRITICAL and not found.types
            and _is_text(key[0], *key[1], *found.paths)]  # fmt: skip
    good.sort(key=lambda item: -item[1].approved)
    return [_suggestion(workspace, command, found) for (workspace, command), found in good]


def _is_text(*words: str) -> bool:
    """Whether a file of rules can name them: bytes that are no text have no spelling there."""
    return all(word.encode("utf-8", "replace").decode() == word for word in words)


def _suggestion(workspace: str, command: tuple[str, ...], seen: _Seen) -> Suggestion:
    line = shlex.join(command)
    words = "-".join(re.findall(r"[a-z0-9]+", line.lower())[:4]) or "command"
    told = json.dumps([workspace, line])
    name = f"{words[:50]}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"
    others = sorted({mark.name.lower() for mark in Mark} - seen.marks)
    conditions = {
        "effect": "changeset", "workspace": literal(workspace), "command": literal(line),
        "every_path": [literal(path) for path in sorted(seen.paths)], "every_kind": sorted(seen.kinds),
        "no_mark": others, "untainted": True,
    }  # fmt: skip
    when = [f"when.{key} = {_toml(value)}" for key, value in conditions.items()]
    when += [f"when.files.at_most = {seen.files}", f"when.bytes.at_most = {seen.bytes}"]
    toml = "\n".join([
        "[[policy.rules]]", f'name = "{name}"', 'risk = "GREEN"', f'severity = "{seen.severity.value}"',
        f'reason = "Approved {seen.approved} times, and never denied."', *when, "",
    ])  # fmt: skip
    return Suggestion(name, toml, seen.approved)


def _toml(value: object) -> str:
    """A value as TOML writes it; its strings are those of JSON, less the escapes that TOML has not got."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
