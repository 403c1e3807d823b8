"""A task: what a person asked for, how far it came, and what it waits for. Plain values, no I/O.

    RUNNING ──turns──> FINISHED         its answer stands, and what it changed was published, or was nothing
       │ ▲ │ │
       │ │ │ └──a person says no──> DENIED      finished, and its changes were not published
       │ │ └──a budget is used up, no model answers──> PAUSED ──resume──> RUNNING
       │ └──the answer── WAITING        a request at the cliff, or a question: nothing is held meanwhile
       └──cancel──> CANCELLED, ──stop at the cliff──> STOPPED, ──what cannot go on──> FAILED

What comes next follows from the history alone: calls that nobody has answered yet are done; without any,
the model is asked; an answer without calls ends the task. So a step that was not saved is the same step
again. The number of finished steps is the version that every save compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

from luminaguard.effects.changes import Changeset
from luminaguard.reasoning.budget import Budget, Usage
from luminaguard.reasoning.messages import Message, ToolCall
from luminaguard.workspaces.snapshots import Snapshot

__all__ = ["ENDED", "AskedFor", "Publish", "Status", "Task", "open_calls", "with_distinct_ids"]

Publish = Literal["on-finish", "per-action", "never"]
"""When a person is asked to let changes into the folder."""


AskedFor = Literal["", "finish", "publish", "action", "run", "call"]
"""The outcome of all, a call of ``publish``, what single calls changed, a call that a rule holds back, or one of
another server's tool."""


class Status(Enum):
    """Where a task stands; the value is what people and programs see."""

    RUNNING = "running"
    WAITING = "waiting"
    PAUSED = "paused"
    FINISHED = "finished"
    DENIED = "denied"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    FAILED = "failed"


ENDED = frozenset({Status.FINISHED, Status.DENIED, Status.CANCELLED, Status.STOPPED, Status.FAILED})


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        workspace: absolute path of the folder.
        models: which are asked, as a person wrote it.
        step: how many durable steps are finished.
        turns, max_turns: answers of the model, and how many there may be.
        snapshot: the state of the workspace that the next call works on.
        published: what of it is in the folder already.
        request: the request at the cliff that it waits for; it may not be stored yet.
        asked_for: what that request is about.
        question: what the model asks a person.
        why: how it ended, or why it does not go on.
        denied: a person said no to changes that are still in the snapshot: the next time a person is asked, whatever
            rules and grants say.
        created_ns, updated_ns: nanoseconds since the epoch.
        home: the host that has the folder; empty where there is one host only.
    """

    id: str
    prompt: str
    workspace: str
    models: str
    created_ns: int
    status: Status = Status.RUNNING
    step: int = 0
    turns: int = 0
    max_turns: int = 40
    publish: Publish = "on-finish"
    budget: Budget = field(default_factory=Budget)
    usage: Usage = field(default_factory=Usage)
    snapshot: Snapshot = field(default_factory=Snapshot)
    published: Changeset = field(default_factory=lambda: Changeset(()))
    request: str = ""
    asked_for: AskedFor = ""
    question: str = ""
    why: str = ""
    denied: bool = False
    updated_ns: int = 0
    home: str = ""

    @property
    def unpublished(self) -> Changeset:
        """What a person has not let into the folder yet."""
        return self.snapshot.changes.since(self.published)

    def running(self) -> Task:
        """The task after what it waited for."""
        return replace(self, status=Status.RUNNING, request="", asked_for="")

    def ended(self, status: Status, why: str = "") -> Task:
        """The task after its end."""
        return replace(self, status=status, why=why, request="", asked_for="", question="")

    def paused(self, why: str) -> Task:
        """The task where it can go on later, by a person's command."""
        return replace(self, status=Status.PAUSED, why=why)

    def to_json(self) -> dict[str, Any]:
        """All that is stored beside the columns of its row."""
        return {
            "prompt": self.prompt, "models": self.models, "turns": self.turns, "max_turns": self.max_turns,
            "publish": self.publish, "budget": self.budget.to_json(), "usage": self.usage.to_json(),
            "snapshot": self.snapshot.to_json(), "published": self.published.to_json(), "request": self.request,
            "asked_for": self.asked_for, "question": self.question, "why": self.why, "denied": self.denied,
        }  # fmt: skip

    @classmethod
    def from_json(cls, row: Any, raw: Any) -> Task:
        """The inverse of :meth:`to_json`; raises what a value that is none raises."""
        return cls(
            id=str(row.id), workspace=str(row.workspace), created_ns=int(row.created_ns), status=Status(row.status),
            step=int(row.step), updated_ns=int(row.updated_ns), prompt=str(raw["prompt"]), models=str(raw["models"]),
            turns=int(raw["turns"]), max_turns=int(raw["max_turns"]), publish=raw["publish"],
            budget=Budget.from_json(raw["budget"]), usage=Usage.from_json(raw["usage"]),
            snapshot=Snapshot.from_json(raw["snapshot"]), published=Changeset.from_json(raw["published"]),
            request=str(raw["request"]), asked_for=raw["asked_for"], question=str(raw["question"]), why=str(raw["why"]),
            denied=bool(raw["denied"]), home=str(row.home),
        )  # fmt: skip


def open_calls(history: Sequence[Message]) -> list[ToolCall]:
    """The calls of the last answer that have no result yet, in their order."""
    answered = set()
    for message in reversed(history):
        if message.role == "assistant":
            return [call for call in message.calls if call.id not in answered]
        if message.role == "tool":
            answered.add(message.call_id)
    return []


def with_distinct_ids(message: Message) -> Message:
    """The message with ids of its own for calls that bear the same one: each must get its own result."""
    seen: set[str] = set()
    calls = []
    for number, call in enumerate(message.calls):
        name, more = call.id[:200] or f"call-{number}", 0
        while name in seen:
            more += 1
            name = f"{call.id[:200]}#{more}"
        seen.add(name)
        calls.append(replace(call, id=name))
    return message if tuple(calls) == message.calls else replace(message, calls=tuple(calls), opaque={})
