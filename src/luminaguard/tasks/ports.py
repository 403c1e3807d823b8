"""What the engine needs from elsewhere: where calls are evaluated, where effects are asked for, who watches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from luminaguard.actions.tools import ToolSpec
from luminaguard.approvals.model import Request
from luminaguard.effects.changes import Changeset
from luminaguard.reasoning.messages import ToolCall
from luminaguard.tasks.model import Task
from luminaguard.tools.builtin import Plan

__all__ = ["Cliff", "Evaluated", "RemoteTools", "Watcher", "Workbench"]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What came of one call in a machine; its contents are kept under ``owner`` until they are taken or dropped."""

    text: str
    failed: bool
    changes: Changeset
    owner: str = ""


class Workbench(Protocol):
    """Where calls are evaluated, each in a machine of its own."""

    async def begin(self, task: Task) -> str:
        """Keep the first state of the task's workspace; its digest, or nothing, for the record.

        Raises:
            WorkspaceError: the folder cannot be read.
        """

    def runs_unasked(self, task: Task, call: ToolCall, changed: Changeset) -> bool:
        """Whether the rules let a call run without anybody's answer, after these changes; raises PolicyInvalid."""

    async def evaluate(self, task: Task, call: ToolCall, work: Plan) -> Evaluated:
        """Evaluate a call on the task's state.

        Raises:
            Forbidden: a rule forbids it.
            ApprovalNeeded: a person must be asked first.
        """

    def links_on(self, task: Task, path: str) -> bool:
        """Whether a path goes through a link in the task's state."""

    def take(self, task: Task, owner: str) -> None:
        """Make the contents of an evaluation part of the task."""

    def drop(self, owner: str) -> None:
        """Forget the contents of an evaluation."""

    def collect(self, task: Task) -> None:
        """Delete contents that the task's state does not need; all of them once it has ended."""


class RemoteTools(Protocol):
    """Tools of servers that somebody else runs; their calls are asked for at the cliff by themselves."""

    async def specs(self) -> Sequence[ToolSpec]:
        """What a model is told of them; their names have ``__`` in them."""

    async def call(self, task: Task, call: ToolCall, request_id: str) -> Evaluated:
        """Make a call, once; the same request id is the same call.

        Raises:
            ApprovalNeeded: a person must answer, or look at what became of it.
            Forbidden, McpServerFailed: it is not made, or nobody knows whether it was.
        """


class Cliff(Protocol):
    """Where effects are asked for."""

    def ask_to_publish(self, task: Task, request_id: str, changes: Changeset) -> Request:
        """Ask to publish changes, or find that it was asked.

        Raises:
            Forbidden: a rule forbids it, or the task was stopped.
        """

    def look(self, request_id: str) -> tuple[Request | None, str, tuple[str, ...] | None]:
        """A request as it stands, how it ended in words, and the part that was approved."""

    def let_through(self, task: Task, request: Request) -> None:
        """Publish what was approved and not published yet, or what rules and grants let through."""

    def stop(self, task: Task, why: str) -> None:
        """Let nothing more be asked, approved or done for a task; what it asked for ends. Safe to repeat."""

    def withdraw(self, task: Task, why: str) -> None:
        """End all requests of a task that still wait."""


@dataclass(slots=True)
class Watcher:
    """Told what happens, for people; it changes nothing."""

    text: Callable[[str], None] = lambda _: None
    call: Callable[[ToolCall], None] = lambda _: None
    outcome: Callable[[ToolCall, Evaluated | None, str], None] = lambda *_: None
    note: Callable[[str], None] = lambda _: None
