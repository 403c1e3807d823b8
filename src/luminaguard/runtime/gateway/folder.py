"""A folder's own tools for a program that brings its own model: each call a step of a task of ours.

The task is one like any other, but that its turns come from outside: calls run in machines on the task's state,
rules and people are asked as always, and what was changed is asked for when the program leaves or publishes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from luminaguard.actions.tools import ToolSpec
from luminaguard.approvals import Verdict
from luminaguard.errors import ApprovalError, McpServerFailed, TaskBusy
from luminaguard.mcp.definitions import Definition
from luminaguard.reasoning.budget import Budget, Usage
from luminaguard.reasoning.context import HOST_TOOLS
from luminaguard.reasoning.messages import Message, ToolCall, Turn
from luminaguard.runtime.decisions import Answer
from luminaguard.runtime.tasks import LocalTasks
from luminaguard.tasks.model import ENDED, Status, Task, open_calls
from luminaguard.tasks.ports import Watcher
from luminaguard.tools import IN_MACHINE

if TYPE_CHECKING:
    from luminaguard.runtime.core import Runtime

__all__ = ["OUTSIDE", "FolderTools", "Waiting", "settle"]

OUTSIDE = "mcp"
"""The model of such a task: whoever is connected."""
_MANY = 1 << 40
_UNBOUNDED = Budget(None, None, None, None, None)
"""Whoever is connected has budgets of their own."""
_READS = frozenset({"read_file", "list_files", "search_files", "read_output"})
_SPECS: dict[str, ToolSpec] = {
    ("exec" if tool.name == "shell" else tool.name): tool
    for tool in (*IN_MACHINE.values(), *HOST_TOOLS)
    if tool.name != "ask_user"  # whoever is connected has a person of their own
}


@dataclass(frozen=True, slots=True)
class Waiting:
    """A call that waits for a person.

    Attributes:
        request: which request.
        call_id: of the call; empty for one that was not begun, because another one waits.
    """

    request: str
    call_id: str


class _Outside:
    """A model whose turns come from outside, one at a time."""

    name = OUTSIDE

    def __init__(self) -> None:
        self.next: Message | None = None

    async def turn(
        self, instructions: str, history: Sequence[Message], tools: Sequence[ToolSpec], told: Any = None
    ) -> Turn:
        """What was put there."""
        del instructions, history, tools, told
        assert self.next is not None
        said, self.next = self.next, None
        return Turn(said, Usage(), OUTSIDE)


class FolderTools:
    """The tools of one folder, for one program."""

    def __init__(self, runtime: Runtime, workspace: Path) -> None:
        self._runtime, self._workspace = runtime, workspace
        self._tasks = LocalTasks(runtime, servers=False)  # the program has the tools of servers beside these
        self._outside = _Outside()
        self._lock = anyio.Lock()
        self._held = ExitStack()
        self._waits_for: ToolCall | None = None
        self._broken = False
        self.task: Task | None = None

    @staticmethod
    def tools() -> dict[str, Definition]:
        """Their definitions."""
        return {
            name: {"name": name, "description": spec.description, "inputSchema": dict(spec.parameters),
                   "annotations": {"readOnlyHint": name in _READS, "openWorldHint": False}}
            for name, spec in _SPECS.items()
        }  # fmt: skip

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Message | Waiting:
        """Do a call, one at a time; the message that answers it, or what it waits for.

        Raises:
            LuminaGuardError: it was not done; what was done before is kept.
        """
        async with self._lock:
            with self._seen_through():
                task = self._as_it_stands() or await self._begin()
                if (before := self._waits_for) is not None:  # a person may have answered by now
                    answer = await self._until_answered(before.id)
                    if (before.name, before.arguments) == (_SPECS[name].name, arguments):
                        return answer
                    if isinstance(answer, Waiting):  # a call after it would work on what is not decided yet
                        return replace(answer, call_id="")
                    task = self._as_it_stands() or task
                if task.status is not Status.RUNNING:
                    raise self._ended(task, kept="It was not called.")
                call = ToolCall(f"call-{secrets.token_hex(8)}", _SPECS[name].name, dict(arguments))
                self._outside.next = Message("assistant", "", (call,))
                self._waits_for = call
                return await self._until_answered(call.id)

    async def again(self, waiting: Waiting) -> Message | Waiting:
        """What became by now of a call that waited."""
        async with self._lock:
            with self._seen_through():
                return await self._until_answered(waiting.call_id)

    @contextmanager
    def _seen_through(self) -> Iterator[None]:
        """Whatever ends a call in the middle, be it the program that gives it up, the next one begins anew."""
        self._broken, unbroken = True, self._broken
        if unbroken:
            self._give_up()
        yield
        self._broken = False

    def _as_it_stands(self) -> Task | None:
        """The task by what is stored: a person may have ended it."""
        if self.task is not None:
            self.task = self._tasks.engine.get(self.task.id)
        return self.task

    def _give_up(self) -> None:
        """Let a call that was left in the middle be, and not be done again."""
        self._waits_for = self._outside.next = None
        task = self._as_it_stands()
        if task is not None and task.status not in ENDED and open_calls(self._tasks.engine.history(task)):
            self.task = self._tasks.engine.give_up(task, "The program gave this call up; what it did was not kept.")

    async def _until_answered(self, call_id: str) -> Message | Waiting:
        engine = self._tasks.engine
        while True:
            assert self.task is not None
            answers = [one for one in engine.history(self.task) if one.role == "tool" and one.call_id == call_id]
            if answers:
                if self._waits_for is not None and self._waits_for.id == call_id:
                    self._waits_for = None
                return answers[-1]
            if self.task.status not in {Status.RUNNING, Status.WAITING}:
                raise self._ended(self.task)
            self.task, moved = await engine.step(self.task, self._outside, Watcher())
            if not moved and self.task.status is Status.WAITING:
                return Waiting(self.task.request, call_id)

    @staticmethod
    def _ended(task: Task, kept: str = "") -> McpServerFailed:
        return McpServerFailed(
            f"The task of this folder is {task.status.value}: {task.why}",
            hint=f"See 'luminaguard tasks show {task.id}'; connect again to begin another.", kept=kept,
        )  # fmt: skip

    async def _begin(self) -> Task:
        runtime = self._runtime
        task = Task(
            self._tasks.new_id(), "tools for another program (MCP)", str(self._workspace), OUTSIDE,
            runtime.ledger.current_time(), max_turns=_MANY, home=runtime.host, budget=_UNBOUNDED,
        )  # fmt: skip
        self._held.enter_context(self._tasks.worker(task.id))
        self.task = await self._tasks.engine.create(task)
        return self.task

    async def close(self) -> str:
        """The program has left: what was changed is asked for; the id of that request, or nothing."""
        try:
            async with self._lock:
                task = self._as_it_stands()
                if task is None or task.status in ENDED:
                    return ""
                if task.asked_for == "run":  # nobody runs it any more, whatever is answered
                    with suppress(ApprovalError):
                        request = self._runtime.approvals.get(task.request)
                        self._runtime.decisions.deny(request, Answer(Verdict.DENY, "gateway", "the program has left"))
                if (
                    self._broken
                    or task.asked_for == "run"
                    or (task.status is Status.RUNNING and self._waits_for is not None)
                ):
                    self._give_up()
                return (await _leave(self._tasks, self._as_it_stands() or task, self._outside)).request
        finally:
            self._held.close()


async def settle(runtime: Runtime) -> list[str]:
    """Ask for what programs changed whose gateway was killed; the ids of the requests."""
    tasks = LocalTasks(runtime, servers=False)
    found, _ = tasks.store.all(Task.from_json, [Status.RUNNING.value, Status.WAITING.value])
    asked = []
    for task in found:
        if task.models != OUTSIDE or task.home != runtime.host:
            continue
        with suppress(TaskBusy), tasks.worker(task.id):
            now = tasks.engine.get(task.id)
            if now.status is Status.WAITING:
                now, _ = await tasks.engine.step(now, _Outside(), Watcher())
            if now.status is not Status.RUNNING:
                continue
            if open_calls(tasks.engine.history(now)):
                now = tasks.engine.give_up(now, "The program left in the middle of this call.")
            left = await _leave(tasks, now, _Outside())
            asked += [left.request] if left.request else []
    return asked


async def _leave(tasks: LocalTasks, task: Task, outside: _Outside) -> Task:
    """Let a task without a program come to its end, or to the request that waits."""
    if task.status is Status.RUNNING:
        outside.next = Message("assistant", "The program has left.")
        task = await tasks.engine.run(task, outside, Watcher())
    return task
