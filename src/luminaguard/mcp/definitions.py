"""Tool definitions, pinned: what a server says of its tools is what a person accepted, or the tool is not called.

A model reads definitions as instructions; a server that changes them after it was accepted changes what the agent
does. So each is compared whole, in a canonical form, with the one that was seen last.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Comparison", "Definition", "compare", "difference", "digest_of"]

Definition = Mapping[str, Any]
"""One tool as a server describes it, all fields."""


def digest_of(definition: Definition) -> str:
    """``sha256:`` and 64 hex digits over all fields, in whatever order they came."""
    return f"sha256:{hashlib.sha256(_canonical(definition).encode()).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What became of a server's tools, by name."""

    same: tuple[str, ...]
    new: tuple[str, ...]
    changed: tuple[str, ...]
    gone: tuple[str, ...]

    @property
    def quarantined(self) -> tuple[str, ...]:
        """What is not called before a person has seen it."""
        return tuple(sorted((*self.new, *self.changed)))


def compare(pinned: Mapping[str, Definition], now: Mapping[str, Definition]) -> Comparison:
    """Compare what was accepted with what a server says now."""
    both = sorted(pinned.keys() & now.keys())
    same = tuple(name for name in both if digest_of(pinned[name]) == digest_of(now[name]))
    return Comparison(
        same, tuple(sorted(now.keys() - pinned.keys())), tuple(name for name in both if name not in set(same)),
        tuple(sorted(pinned.keys() - now.keys())),
    )  # fmt: skip


def difference(name: str, pinned: Definition | None, now: Definition | None) -> Iterator[str]:
    """The lines of a unified diff between two definitions of a tool."""
    before, after = (_lines(one) if one is not None else [] for one in (pinned, now))
    yield from difflib.unified_diff(before, after, f"{name} (accepted)", f"{name} (now)", lineterm="")


def _canonical(definition: Definition) -> str:
    return json.dumps(definition, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _lines(definition: Definition) -> list[str]:
    return json.dumps(definition, sort_keys=True, indent=2, ensure_ascii=True).splitlines()
