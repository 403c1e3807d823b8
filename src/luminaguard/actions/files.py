"""Files of rules: TOML text to a :class:`Policy`, with the line and column of whatever is wrong.

The user's rules are the ``[policy]`` table of ``luminaguard.toml``:

    [policy]
    trusted_servers = ["files"]

    [[policy.rules]]
    name = "notes"
    risk = "GREEN"
    reason = "Notes may change without asking."
    when = { effect = "changeset", every_path = "notes/**", deleted = { at_most = 0 } }

A workspace's ``.luminaguard.toml`` has rules of the same shape, RED and FORBIDDEN ones only.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luminaguard.actions.model import Risk, Severity
from luminaguard.actions.policy import Layer, Policy
from luminaguard.actions.positions import Place, places
from luminaguard.actions.rules import Pattern, Rule
from luminaguard.errors import PolicyInvalid

__all__ = ["MAX_FILE", "RulesFile", "parse_policy"]

MAX_FILE = 1 << 18
_MOST_DOTS = 32
_MAX_RULES = 1000


class RulesFile(NamedTuple):
    """A file's name as people know it, and its text."""

    name: str
    text: str


class _Table(BaseModel):
    """What every ``[policy]`` table may have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[Rule, ...] = Field(default=(), max_length=_MAX_RULES)


T = TypeVar("T", bound=_Table)


class _UserTable(_Table):
    trusted_servers: frozenset[str] = frozenset()
    marked_folders: dict[Pattern, str] = Field(default_factory=dict)
    two_people_from: Severity | None = None
    built_in: bool = True


@lru_cache(maxsize=8)
def parse_policy(user: RulesFile | None, built_in: RulesFile, workspace: RulesFile | None = None) -> Policy:
    """Build the policy.

    Args:
        user: ``luminaguard.toml``; what it says besides ``[policy]`` is not looked at.
        built_in: the rules that come with LuminaGuard; they come after the user's.
        workspace: ``.luminaguard.toml`` of the folder that is worked on.

    Raises:
        PolicyInvalid: with file, line and column.
    """
    mine = _table(user, _UserTable, alone=False) if user else _UserTable()
    layers = [_layer(user, mine.rules)] if user else []
    if mine.built_in:
        layers.append(_layer(built_in, _table(built_in, _Table).rules))
    stricter: tuple[Layer, ...] = ()
    if workspace:
        theirs = _table(workspace, _Table)
        for index, rule in enumerate(theirs.rules):
            if rule.risk is Risk.GREEN:
                raise _invalid(
                    workspace, ("policy", "rules", index, "risk"), "a workspace can only make things stricter"
                )
        stricter = (_layer(workspace, theirs.rules),)
    return Policy(tuple(layers), stricter, mine.trusted_servers, tuple(mine.marked_folders.items()),
                  mine.two_people_from)  # fmt: skip


def _layer(file: RulesFile, rules: Sequence[Rule]) -> Layer:
    found = places(file.text)
    nowhere = Place(1, 1)  # a key that is written with escapes
    lines = tuple(found.get(("policy", "rules", index), nowhere).line for index in range(len(rules)))
    return Layer(file.name, tuple(rules), lines)


def _table(file: RulesFile, model: type[T], *, alone: bool = True) -> T:
    if len(file.text) > MAX_FILE:
        raise PolicyInvalid(f"{file.name} is larger than {MAX_FILE >> 10} KiB.", hint="Shorten it.")
    for number, line in enumerate(file.text.split("\n"), 1):
        if line.partition("=")[0].count(".") > _MOST_DOTS:  # a parser's time grows with their square
            raise _told(file, number, 1, "a key has too many parts")
    try:
        data = tomllib.loads(file.text)
    except (ValueError, RecursionError) as error:
        raise _syntax(file, str(error)) from error
    if alone and (others := data.keys() - {"policy"}):
        raise _invalid(file, (min(others),), f"it may have a [policy] table only, and has {min(others)!a}")
    try:
        table = model.model_validate(data.get("policy", {}))
    except ValidationError as error:
        issue = error.errors()[0]
        where = ("policy", *(part for part in issue["loc"] if not str(part).startswith("function-")))
        message = str(issue["msg"]).removeprefix("Value error, ")
        raise _invalid(file, where, message[:1].lower() + message[1:]) from error
    names: set[str] = set()
    for index, rule in enumerate(table.rules):
        if rule.name in names:
            raise _invalid(file, ("policy", "rules", index, "name"), f"a second rule is named {rule.name!r}")
        names.add(rule.name)
    return table


def _syntax(file: RulesFile, said: str) -> PolicyInvalid:
    """The parser says where in its message, except at the end of the file."""
    place = re.search(r"\(at line (\d+), column (\d+)\)", said)
    lines = file.text.splitlines() or [""]
    line, column = (int(place[1]), int(place[2])) if place else (len(lines), len(lines[-1]) + 1)
    return _told(file, line, column, re.sub(r" ?\(at .*\)$", "", said) or "it is not TOML")


def _invalid(file: RulesFile, where: tuple[Any, ...], why: str) -> PolicyInvalid:
    found = places(file.text)
    nearest = next((where[:end] for end in range(len(where), 0, -1) if where[:end] in found), None)
    line, column = found[nearest] if nearest else (1, 1)
    names = ".".join(str(part) if isinstance(part, str) else f"[{part + 1}]" for part in where[1:]).replace(".[", "[")
    return _told(file, line, column, f"{names}: {why}" if names else why)


def _told(file: RulesFile, line: int, column: int, why: str) -> PolicyInvalid:
    return PolicyInvalid(
        f"{file.name}, line {line}, column {column}: {why}.",
        hint="Correct it; nothing runs and nothing is published while the rules cannot be read. "
        "'luminaguard policy check' says when they can.",
    )
