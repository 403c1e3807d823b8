"""What is said between a person, a model and its tools: plain values that are stored as JSON, once each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from luminaguard.reasoning.budget import Usage

__all__ = ["Message", "Role", "ToolCall", "Turn", "parse_arguments"]

Role = Literal["user", "assistant", "tool"]
_MAX_ARGUMENTS = 16 << 20
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call as a model made it.

    Attributes:
        id: the provider's name of it, which the result must bear.
        arguments: the object; empty where there was none.
        malformed: why the arguments cannot be read; they are then what ``raw`` says.
    """

    id: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    malformed: str = ""
    raw: str = ""

    def to_json(self) -> dict[str, Any]:
        """For storage."""
        return {"id": self.id, "name": self.name, "arguments": dict(self.arguments), "malformed": self.malformed,
                "raw": self.raw}  # fmt: skip

    @classmethod
    def from_json(cls, raw: Any) -> ToolCall:
        """The inverse of :meth:`to_json`; raises KeyError or TypeError."""
        return cls(str(raw["id"]), str(raw["name"]), dict(raw["arguments"]), str(raw["malformed"]), str(raw["raw"]))


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a task's history.

    Attributes:
        text: what is said; of a tool, its outcome as the model reads it.
        calls: what the assistant asks for beside the text.
        call_id, tool: which call a tool's message answers.
        failed: the call did not do what it should.
        origin: where a tool's outcome comes from; it is data, and untrusted, in any case.
        covers: of a summary: so many messages after the first one it stands for.
        opaque: what a provider wants back with its own message, such as a signed thought; by its name.
    """

    role: Role
    text: str
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    tool: str = ""
    failed: bool = False
    origin: str = ""
    covers: int = 0
    opaque: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For storage."""
        return {"role": self.role, "text": self.text, "calls": [call.to_json() for call in self.calls],
                "call_id": self.call_id, "tool": self.tool, "failed": self.failed, "origin": self.origin,
                "covers": self.covers, "opaque": dict(self.opaque)}  # fmt: skip

    @classmethod
    def from_json(cls, raw: Any) -> Message:
        """The inverse of :meth:`to_json`; raises KeyError, TypeError or ValueError."""
        if raw["role"] not in {"user", "assistant", "tool"}:
            raise ValueError(f"{raw['role']!r} is no role")
        return cls(raw["role"], str(raw["text"]), tuple(map(ToolCall.from_json, raw["calls"])), str(raw["call_id"]),
                   str(raw["tool"]), bool(raw["failed"]), str(raw["origin"]), int(raw["covers"]),
                   dict(raw["opaque"]))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of a model: its message, what it cost, and which model it was."""

    message: Message
    usage: Usage
    model: str


def parse_arguments(text: str) -> tuple[dict[str, Any], str]:
    """A call's arguments from the JSON that a model wrote, and what is wrong with it, or an empty text.

    Nothing is repaired: a guess at what was meant would be an action that nobody asked for.
    """
    if not text.strip():
        return {}, ""
    try:
        if len(text) > _MAX_ARGUMENTS:
            raise ValueError(f"they have more than {_MAX_ARGUMENTS >> 20} MiB")
        found = json.loads(text)
        if _depth(found) > _MAX_DEPTH:
            raise ValueError(f"they are nested deeper than {_MAX_DEPTH}")
        json.dumps(found, ensure_ascii=False).encode()  # raises for halves of characters, which nobody takes back
    except (ValueError, RecursionError) as error:
        return {}, f"the arguments are no JSON: {str(error)[:200]!a}"
    if not isinstance(found, dict):
        return {}, "the arguments are no JSON object"
    return found, ""


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        found, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(found, dict | list):
            waiting += [(inner, depth + 1) for inner in (found.values() if isinstance(found, dict) else found)]
    return deepest
