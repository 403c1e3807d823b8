"""One rule: what it looks at, what it says, and why it does not match.

Every condition that a rule names must hold. A condition with several patterns holds if one of them
matches; whether all paths of an effect must match, or one is enough, is in the condition's name.
"""

from __future__ import annotations

import datetime as dt
import shlex
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from luminaguard.actions.model import Action, EffectKind, FileFact, Risk, Severity
from luminaguard.actions.patterns import (
    check_pattern,
    host_forms,
    is_deceptive,
    matches,
    matches_path,
    name_words,
    plain,
    url_parts,
)
from luminaguard.effects.changes import Kind
from luminaguard.effects.marks import Mark

__all__ = ["Range", "Rule", "When"]

_MOST = 10**15
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SEEN_ONLY = frozenset({"binary", "unseen", "control"})
"""Marks that only the contents show: to judge by them, the card must be made first."""


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


Pattern = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(check_pattern)]
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(_listed),
                     Field(min_length=1, max_length=1000)]  # fmt: skip
Words = Annotated[frozenset[str], BeforeValidator(_listed), Field(min_length=1)]
Ports = Annotated[frozenset[Annotated[int, Field(ge=1, le=65535)]], BeforeValidator(_listed), Field(min_length=1)]
_CONFIG = ConfigDict(extra="forbid", frozen=True)


class Range(BaseModel):
    """How many: at least, at most, or both."""

    model_config = _CONFIG

    at_least: int | None = Field(default=None, ge=0, le=_MOST)
    at_most: int | None = Field(default=None, ge=0, le=_MOST)

    def problem(self, count: int, what: str) -> str:
        """Why a count is outside of it; empty if it is not."""
        if self.at_least is not None and count < self.at_least:
            return f"{count:,} {what}, fewer than {self.at_least:,}"
        if self.at_most is not None and count > self.at_most:
            return f"{count:,} {what}, more than {self.at_most:,}"
        return ""


class Hours(BaseModel):
    """A span of the day, local time: from, up to and without; it may go over midnight."""

    model_config = _CONFIG

    start: dt.time
    end: dt.time

    @field_validator("start", "end")
    @classmethod
    def _local(cls, value: dt.time) -> dt.time:
        if value.tzinfo is not None:
            raise ValueError("hours are local time, without a zone")
        return value

    def holds(self, at: dt.time) -> bool:
        """Whether a time of the day is in it."""
        inside = (self.start <= at, at < self.end)
        return all(inside) if self.start <= self.end else any(inside)


def _hours(value: Any) -> Any:
    if isinstance(value, str):
        start, dash, end = value.partition("-")
        if dash:
            return {"start": start.strip(), "end": end.strip()}
    return value


class When(BaseModel):
    """The conditions of a rule; one that names no effect speaks of all that leave the machine."""

    model_config = _CONFIG

    effect: Annotated[frozenset[EffectKind], BeforeValidator(_listed), Field(min_length=1)] | None = None
    tool: Patterns | None = None
    any_tool_word: Words | None = None
    any_tool_part: Words | None = None
    server: Patterns | None = None
    trusted: bool | None = None
    read_only: bool | None = None
    destructive: bool | None = None
    open_world: bool | None = None
    deceptive: bool | None = None
    arguments: dict[str, Patterns] | None = None
    any_argument: Patterns | None = None
    any_argument_name: Patterns | None = None
    any_path: Patterns | None = None
    every_path: Patterns | None = None
    any_path_outside: Patterns | None = None
    any_kind: Annotated[frozenset[Kind], BeforeValidator(_listed)] | None = None
    every_kind: Annotated[frozenset[Kind], BeforeValidator(_listed)] | None = None
    any_mark: Words | None = None
    no_mark: Words | None = None
    files: Range | None = None
    deleted: Range | None = None
    lines: Range | None = None
    bytes: Range | None = None
    port: Ports | None = None
    host: Patterns | None = None
    method: Patterns | None = None
    url_path: Patterns | None = None
    secret: Patterns | None = None
    command: Patterns | None = None
    workspace: Patterns | None = None
    taint: Patterns | None = None
    untainted: bool | None = None
    days: Annotated[frozenset[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]], BeforeValidator(_listed),
                    Field(min_length=1)] | None = None  # fmt: skip
    hours: Annotated[Hours, BeforeValidator(_hours)] | None = None
    until: dt.date | None = None

    @field_validator("any_mark", "no_mark")
    @classmethod
    def _marks_exist(cls, value: frozenset[str] | None) -> frozenset[str] | None:
        known = {mark.name.lower() for mark in Mark}
        if unknown := (value or frozenset()) - known:
            raise ValueError(f"there is no mark {min(unknown)!r}; they are {', '.join(sorted(known))}")
        return value

    @cached_property
    def stated(self) -> tuple[tuple[str, Any], ...]:
        """The conditions that there are, in their order."""
        found = ((name, getattr(self, name)) for name in When.model_fields)
        return tuple((name, wanted) for name, wanted in found if wanted is not None)


class Rule(BaseModel):
    """What becomes of the actions that it matches, and why."""

    model_config = _CONFIG

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    risk: Risk
    severity: Severity = Severity.MEDIUM
    reason: str = Field(min_length=1, max_length=500)
    when: When = When()

    @property
    def needs_card(self) -> bool:
        """Whether lines, or marks that only contents show, decide."""
        marks = (self.when.any_mark or frozenset()) | (self.when.no_mark or frozenset())
        return self.when.lines is not None or bool(marks & _SEEN_ONLY)

    def problem(self, action: Action, *, trusted: bool, now: dt.datetime) -> str:
        """Why it does not match; empty if it does.

        Args:
            action: what is judged.
            trusted: whether the user trusts what the action's server says.
            now: local time, with its zone.
        """
        if self.when.effect is None and action.effect == "run":
            return "it names no effect: it speaks of what leaves the machine"
        if self.when.effect is not None and action.effect not in self.when.effect:
            return f"the effect is {action.effect}"
        matcher = _Matcher(action, wide=self.risk is not Risk.GREEN, trusted=trusted, now=now, ports=self.when.port)
        for name, wanted in self.when.stated:
            if why := _CHECKS[name](matcher, wanted):
                return why
        return ""


class _Matcher:
    """The conditions, one method each, on one action; each returns why it does not hold."""

    def __init__(
        self, action: Action, *, wide: bool, trusted: bool, now: dt.datetime, ports: frozenset[int] | None
    ) -> None:
        self.action, self.wide, self.is_trusted, self.now = action, wide, trusted, now
        self.oddity = action.oddity if ports is None else action.oddity_but_port

    def effect(self, wanted: frozenset[str]) -> str:
        return "" if self.action.effect in wanted else f"the effect is {self.action.effect}"

    def tool(self, wanted: tuple[str, ...]) -> str:
        return self._named("the tool", self.action.tool, wanted)

    def any_tool_part(self, wanted: frozenset[str]) -> str:
        name = "".join(c for c in plain(self.action.tool) if c.isalnum())
        return "" if any(part in name for part in wanted) else "no part of the tool's name is in its list"

    def any_tool_word(self, wanted: frozenset[str]) -> str:
        found = name_words(self.action.tool) & {word.casefold() for word in wanted}
        return "" if found else "no word of the tool's name is in its list"

    def server(self, wanted: tuple[str, ...]) -> str:
        return self._named("the server", self.action.server, wanted)

    def trusted(self, wanted: bool) -> str:
        return "" if self.is_trusted is wanted else f"the server is {'' if self.is_trusted else 'not '}trusted"

    def read_only(self, wanted: bool) -> str:
        return self._hint("read_only", wanted)

    def destructive(self, wanted: bool) -> str:
        return self._hint("destructive", wanted)

    def open_world(self, wanted: bool) -> str:
        return self._hint("open_world", wanted)

    def deceptive(self, wanted: bool) -> str:
        names = (self.action.tool, self.action.server, self.action.host, self.action.secret)
        found = any(map(is_deceptive, names)) or any("name" in file.marks for file in self.action.files)
        return "" if found is wanted else f"names are {'' if found else 'not '}deceptive"

    def arguments(self, wanted: dict[str, tuple[str, ...]]) -> str:
        given = self.action.leaves
        for name, patterns in wanted.items():
            values = [value for key, value in given if key == name or (self.wide and _loose(key) == _loose(name))]
            fits = [any(self._value(pattern, value) for pattern in patterns) for value in values]
            if not values:
                return f"there is no argument {name}"
            if not (any(fits) if self.wide else all(fits)):
                return f"argument {name} matches none of its patterns"
        if not self.wide and (others := {key for key, _ in given} - wanted.keys()):
            return f"it does not speak of argument {min(others)}, and lets through only what it names"
        return ""

    def any_argument(self, wanted: tuple[str, ...]) -> str:
        texts = [text for name, value in self.action.leaves for text in (value, *name.split("."))]
        found = any(self._value(pattern, text) for text in texts for pattern in wanted)
        return "" if found else "no argument matches its patterns"

    def any_argument_name(self, wanted: tuple[str, ...]) -> str:
        names = {part for name, _ in self.action.leaves for part in name.split(".")}
        found = any(matches(pattern, name, wide=self.wide) for name in names for pattern in wanted)
        return "" if found else "no argument has such a name"

    def any_path(self, wanted: tuple[str, ...]) -> str:
        return "" if any(self._path(file, wanted) for file in self.action.files) else "no path matches its patterns"

    def every_path(self, wanted: tuple[str, ...]) -> str:
        other = next((file.path for file in self.action.files if not self._path(file, wanted)), None)
        if not self.action.files:
            return "no file is changed"
        return "" if other is None else f"{other} matches none of its patterns"

    def any_path_outside(self, wanted: tuple[str, ...]) -> str:
        # The other way round: what a wide reading puts inside is not let go as inside.
        outside = any(not any(matches_path(pattern, file.path, wide=not self.wide) for pattern in wanted)
                      for file in self.action.files)  # fmt: skip
        return "" if outside else "no path is outside"

    def any_kind(self, wanted: frozenset[str]) -> str:
        return "" if any(file.kind in wanted for file in self.action.files) else "no change is of such a kind"

    def every_kind(self, wanted: frozenset[str]) -> str:
        if not self.action.files:
            return "no file is changed"
        for file in self.action.files:
            if file.kind not in wanted:
                return f"{file.path} is of kind {file.kind}"
            if "type" in file.marks and not self.wide:  # what was there is gone, which is more than a change of it
                return f"{file.path} became another type of entry"
        return ""

    def any_mark(self, wanted: frozenset[str]) -> str:
        return "" if any(wanted & file.marks for file in self.action.files) else "no change has such a mark"

    def no_mark(self, wanted: frozenset[str]) -> str:
        marked = next((file for file in self.action.files if wanted & file.marks), None)
        return "" if marked is None else f"{marked.path} is marked {min(wanted & marked.marks)}"

    def files(self, wanted: Range) -> str:
        return wanted.problem(len(self.action.files), "files are changed")

    def deleted(self, wanted: Range) -> str:
        return wanted.problem(sum(file.kind == "delete" for file in self.action.files), "files are deleted")

    def lines(self, wanted: Range) -> str:
        if self.action.lines is None:
            # Not counted is neither few nor many: what stops, stops.
            return "" if self.wide else "its lines were not counted"
        return wanted.problem(self.action.lines, "lines are changed")

    def bytes(self, wanted: Range) -> str:
        return wanted.problem(self.action.bytes + sum(file.bytes for file in self.action.files), "bytes are written")

    def port(self, wanted: frozenset[int]) -> str:
        return "" if self.action.port in wanted else f"the port is {self.action.port}"

    def host(self, wanted: tuple[str, ...]) -> str:
        hosts = {self.action.host} | ({host for host, _ in url_parts(self.action.url)} if self.wide else set())
        forms = {form for host in hosts - {""} for form in (host_forms(host) if self.wide else {host.lower()})}
        if not forms:
            return "it has no host"
        if not self.wide and self.oddity:
            return f"its address {self.oddity}"
        found = any(matches(pattern.lower(), form, wide=self.wide) for pattern in wanted for form in forms)
        return "" if found else f"the host is {self.action.host!a}"

    def method(self, wanted: tuple[str, ...]) -> str:
        return self._named("the method", self.action.method, wanted)

    def url_path(self, wanted: tuple[str, ...]) -> str:
        paths = {self.action.url_path} | ({path for _, path in url_parts(self.action.url)} if self.wide else set())
        found = any(matches_path(pattern, path, wide=self.wide) for pattern in wanted for path in paths)
        if found and not self.wide and self.oddity:
            return f"its address {self.oddity}"
        return "" if found else "the path of its address matches none of its patterns"

    def secret(self, wanted: tuple[str, ...]) -> str:
        return self._named("the secret", self.action.secret, wanted)

    def command(self, wanted: tuple[str, ...]) -> str:
        arguments = self.action.arguments
        name = "code" if self.action.tool == "python" else "command"
        words = arguments.get(name) if isinstance(arguments, dict) else None
        line = shlex.join(map(str, words)) if isinstance(words, list) else str(words or "")
        return self._named("the command", line, wanted)

    def workspace(self, wanted: tuple[str, ...]) -> str:
        found = any(matches_path(pattern, self.action.workspace, wide=self.wide) for pattern in wanted)
        return "" if found else "it is for other workspaces"

    def taint(self, wanted: tuple[str, ...]) -> str:
        found = any(matches(pattern, label, wide=self.wide) for label in self.action.taint for pattern in wanted)
        return "" if found else "it follows no such input"

    def untainted(self, wanted: bool) -> str:
        if wanted is not bool(self.action.taint):
            return ""
        labels = ", ".join(sorted(self.action.taint))
        return f"it follows input from {labels}" if wanted else "it follows no untrusted input"

    def days(self, wanted: frozenset[str]) -> str:
        today = _DAYS[self.now.weekday()]
        return "" if today in wanted else f"today is {today}"

    def hours(self, wanted: Hours) -> str:
        return "" if wanted.holds(self.now.time()) else f"it is {self.now:%H:%M}"

    def until(self, wanted: dt.date) -> str:
        return "" if self.now.date() <= wanted else f"it was over on {wanted}"

    # -- helpers ------------------------------------------------------------------------------------

    def _named(self, what: str, value: str, wanted: tuple[str, ...]) -> str:
        if value and any(matches(pattern, value, wide=self.wide) for pattern in wanted):
            return ""
        return f"{what} is {value!a}" if value else f"it has no {what.removeprefix('the ')}"

    def _hint(self, name: str, wanted: bool) -> str:
        said = getattr(self.action.annotations, name)
        words = name.replace("_", "-")
        if said is None:
            return f"the server does not say whether it is {words}"
        return "" if said is wanted else f"the server says it is {'' if said else 'not '}{words}"

    def _path(self, file: FileFact, wanted: tuple[str, ...]) -> bool:
        return any(matches_path(pattern, file.path, wide=self.wide) for pattern in wanted)

    def _value(self, pattern: str, value: str) -> bool:
        if self.wide:
            return matches(pattern, value, wide=True)
        if "%" in value and "%" not in pattern:  # it may be decoded into something else
            return False
        return matches_path(pattern, value, wide=False) and not is_deceptive(value)


def _loose(name: str) -> str:
    """The name of an argument wherever its value stands in lists, or in text."""
    return name.replace("[]", "").replace("!", "").casefold()


_CHECKS: dict[str, Callable[[_Matcher, Any], str]] = {name: getattr(_Matcher, name) for name in When.model_fields}
