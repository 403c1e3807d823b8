"""The policy: ordered rules, and the judgement that they come to.

The rules that hold for everything come first to last: the user's, then the built-in ones. The first
that matches decides; none is RED. Rules of a workspace are judged beside them and can only make
things stricter. Four things hold whatever the rules say:

* A call to a server that the user does not trust is never GREEN: its names and hints are its own claims.
* A name or path that hides characters or mixes alphabets is never GREEN, nor a tool's name of other letters than
  those of MCP (modelcontextprotocol.io, tool names).
* A request with headers that can change what it does is never GREEN.
* A changeset that touches rules of ours is never GREEN.
* A file of rules that cannot be read stops everything.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from luminaguard.actions.model import Action, Risk, Severity
from luminaguard.actions.patterns import TooLarge, is_deceptive
from luminaguard.actions.rules import Rule

__all__ = ["NO_RULE", "WORKSPACE_FILE", "Judgement", "Layer", "Policy", "Step"]

WORKSPACE_FILE = ".luminaguard.toml"
NO_RULE = "no rule"
OWN_FILES = frozenset({WORKSPACE_FILE, ".luminaguardignore"})
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_./-]{1,128}")
_PLAIN_HEADERS = frozenset({"accept", "accept-encoding", "accept-language", "connection", "host", "user-agent"})


@dataclass(frozen=True, slots=True)
class Layer:
    """The rules of one file; ``lines`` are where they stand in it."""

    origin: str
    rules: tuple[Rule, ...]
    lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One rule that was looked at; ``why`` is why it did not match, empty if it did."""

    rule: str
    origin: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the policy says of an action.

    ``rule`` is the one that decided, with its file and line; ``steps`` are all that were looked at.
    """

    risk: Risk
    severity: Severity
    reason: str
    rule: str
    steps: tuple[Step, ...] = ()

    def stricter(self, other: Judgement) -> Judgement:
        """The one of two that lets less through; its own on a tie."""
        chosen = other if (self.risk, self.severity) < (other.risk, other.severity) else self
        severity = max(self.severity, other.severity)  # by which it is decided how many people must approve
        return Judgement(chosen.risk, severity, chosen.reason, chosen.rule, (*self.steps, *other.steps))


@dataclass(frozen=True)
class Policy:
    """Everything that judges.

    Attributes:
        layers: the user's rules, then the built-in ones.
        stricter: the rules of a workspace.
        trusted_servers: whose names and annotations are taken at their word.
        marked_folders: glob to label: whoever sees such files has read untrusted input.
        two_people_from: from this severity on, two different people must approve; None is never.
    """

    layers: tuple[Layer, ...]
    stricter: tuple[Layer, ...] = ()
    trusted_servers: frozenset[str] = frozenset()
    marked_folders: tuple[tuple[str, str], ...] = ()
    two_people_from: Severity | None = None

    def judge(self, action: Action, now: dt.datetime) -> Judgement:
        """Judge an action at a time.

        Args:
            action: what the agent wants, or what it did.
            now: local time with its zone.
        """
        judgement = self._first(self.layers, action, now)
        strict = self._first(self.stricter, action, now) if self.stricter else None
        if strict is None:
            return judgement
        if strict.rule == NO_RULE:  # a workspace that says nothing makes nothing stricter
            return dataclasses.replace(judgement, steps=judgement.steps + strict.steps)
        return judgement.stricter(strict)

    def _first(self, layers: tuple[Layer, ...], action: Action, now: dt.datetime) -> Judgement:
        """What the first rule that matches says."""
        trusted = action.effect != "call" or action.server in self.trusted_servers
        steps = []
        for layer in layers:
            for rule, line in zip(layer.rules, layer.lines, strict=True):
                origin = f"{layer.origin}:{line}"
                try:
                    why = rule.problem(action, trusted=trusted, now=now)
                except TooLarge as error:  # what cannot be looked through is let through by nothing, and stopped by all
                    why = str(error) if rule.risk is Risk.GREEN else ""
                if not why and rule.risk is Risk.GREEN:
                    why = _never_green(action, trusted=trusted)
                steps.append(Step(rule.name, origin, why))
                if not why:
                    return Judgement(rule.risk, rule.severity, rule.reason, f"{rule.name} ({origin})", tuple(steps))
        return Judgement(Risk.RED, Severity.MEDIUM, "No rule speaks of this.", NO_RULE, tuple(steps))

    @cached_property
    def digest(self) -> str:
        """``sha256:...`` of all that decides: a request names the policy that it was shown under."""
        told = [[rule.model_dump(mode="json", exclude_none=True) for layer in layers for rule in layer.rules]
                for layers in (self.layers, self.stricter)]  # fmt: skip
        rest = [sorted(self.trusted_servers), self.marked_folders,
                self.two_people_from.value if self.two_people_from else None]  # fmt: skip
        text = json.dumps(_ordered([told, rest]), sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def needs_card(self) -> bool:
        """Whether a changeset must be compared line by line before it can be judged."""
        return any(rule.needs_card for layer in (*self.layers, *self.stricter) for rule in layer.rules)


def _never_green(action: Action, *, trusted: bool) -> str:
    """Why no rule may let this through, whatever it matches; empty if one may."""
    try:
        _ = action.leaves
    except TooLarge as error:
        return str(error)
    if action.effect == "call" and not trusted:
        return f"server {action.server!a} is not trusted: what it says of its tools is no reason to let them through"
    if action.effect == "call" and not _PLAIN_NAME.fullmatch(action.tool):
        return "the tool has a name that is not of plain letters and digits"
    if any(map(is_deceptive, (action.tool, action.server, action.host, action.secret))):
        return "a name hides characters or mixes alphabets"
    if action.effect == "run":  # what it does to files is judged when they are to leave the machine
        return ""
    if deceptive := next((file.path for file in action.files if is_deceptive(file.path)), None):
        return f"the path {deceptive!a} hides characters or mixes alphabets"
    if own := next((file.path for file in action.files if OWN_FILES & set(file.path.casefold().split("/"))), None):
        return f"it changes {own}, by which LuminaGuard judges itself"
    if action.effect == "request" and (header := _odd_header(action)):
        return f"it has a header {header!a}"
    return ""


_LONGEST_HEADER = 256
"""Of one that is not odd: a longer one can carry data."""


def _odd_header(action: Action) -> str:
    """A header that can change what a request does; empty if there is none."""
    headers = action.arguments.get("headers") if isinstance(action.arguments, dict) else None
    found = headers.items() if isinstance(headers, dict) else ()
    return next((str(name).lower() for name, value in found
                 if str(name).lower() not in _PLAIN_HEADERS or len(str(value)) > _LONGEST_HEADER), "")  # fmt: skip


def _ordered(value: Any) -> Any:
    """The same value on every run: sets have become lists whose order is an accident."""
    if isinstance(value, dict):
        return {key: _ordered(inner) for key, inner in value.items()}
    if isinstance(value, list) and all(isinstance(inner, str) for inner in value):
        return sorted(value)
    return [_ordered(inner) for inner in value] if isinstance(value, list | tuple) else value
