"""What a task may use, and what it has used. Pure: the time comes in as a number."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from luminaguard.errors import SettingsError

__all__ = ["Budget", "Usage", "parse_budget"]

_UNITS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used.

    Attributes:
        requests: answers of models that were asked for, failed ones included.
        input_tokens, output_tokens: as the providers counted them.
        dollars: by the published prices; None once a model's price is not known.
        tool_calls: calls that models made.
        seconds: of work; not those in which a person was waited for.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    dollars: float | None = 0.0
    tool_calls: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        dollars = None if self.dollars is None or other.dollars is None else self.dollars + other.dollars
        return Usage(
            self.requests + other.requests, self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens, dollars, self.tool_calls + other.tool_calls,
            round(self.seconds + other.seconds, 3),
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Both kinds together."""
        return self.input_tokens + self.output_tokens

    def to_json(self) -> dict[str, Any]:
        """For storage and for people's programs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, raw: Any) -> Usage:
        """The inverse of :meth:`to_json`; raises KeyError, TypeError or ValueError."""
        dollars = None if raw["dollars"] is None else float(raw["dollars"])
        return cls(int(raw["requests"]), int(raw["input_tokens"]), int(raw["output_tokens"]), dollars,
                   int(raw["tool_calls"]), float(raw["seconds"]))  # fmt: skip

    def words(self) -> str:
        """For people: ``3 requests, 4,567 tokens, $0.0123, 5 tool calls, 12 s``."""
        money = "unknown cost" if self.dollars is None else f"${self.dollars:.4f}"
        return (f"{self.requests} requests, {self.tokens:,} tokens, {money}, {self.tool_calls} tool calls, "
                f"{self.seconds:.0f} s")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be used; None is without a limit. The defaults end an agent that runs in circles."""

    requests: int | None = 50
    tokens: int | None = None
    dollars: float | None = None
    tool_calls: int | None = 200
    seconds: float | None = 3600.0

    def used_up(self, usage: Usage) -> str:
        """Which limit was reached, in words; empty while there is something left.

        A limit of money cannot be kept with a model whose price is not known: that is said, too.
        """
        for name in ("requests", "tokens", "tool_calls", "seconds"):
            limit, used = getattr(self, name), getattr(usage, name)
            if limit is not None and used >= limit:
                return f"the budget of {limit:,} {name.replace('_', ' ')} is used up"
        if self.dollars is not None:
            if usage.dollars is None:
                return "there is a budget of money, and a model of unknown price"
            if usage.dollars >= self.dollars:
                return f"the budget of ${self.dollars:g} is used up"
        return ""

    def to_json(self) -> dict[str, Any]:
        """For storage and for people's programs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, raw: Any) -> Budget:
        """The inverse of :meth:`to_json`; raises KeyError or TypeError."""
        return cls(**{field.name: raw[field.name] for field in fields(cls)})


def parse_budget(words: list[str], budget: Budget | None = None) -> Budget:
    """A budget with what a person wrote: ``tokens=200000``, ``dollars=1.50``, ``time=30min``, ``requests=none``.

    Raises:
        SettingsError: it is none.
    """
    budget = budget or Budget()
    for word in (part for text in words for part in text.split(",")):
        name, _, value = word.strip().partition("=")
        name = {"time": "seconds", "calls": "tool_calls", "money": "dollars"}.get(name, name)
        if name not in {field.name for field in fields(Budget)}:
            raise _wrong(word)
        if value == "none":
            limit: float | int | None = None
        elif name == "dollars" and re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value):
            limit = float(value)
        elif name == "seconds" and (found := re.fullmatch(r"(\d{1,7})(s|min|h)?", value)):
            limit = float(int(found[1]) * _UNITS[found[2] or "s"])
        elif name not in {"dollars", "seconds"} and re.fullmatch(r"\d{1,12}", value):
            limit = int(value)
        else:
            raise _wrong(word)
        budget = Budget.from_json(budget.to_json() | {name: limit})
    return budget


def _wrong(word: str) -> SettingsError:
    return SettingsError(
        f"{word[:60]!a} is no budget.",
        hint="Write requests=50, tokens=200000, dollars=1.50, calls=200 or time=30min; none is without a limit.",
    )
