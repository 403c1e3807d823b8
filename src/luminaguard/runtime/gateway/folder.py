"""A folder's own tools for a program that brings its own model: each call a step of a task of ours.

The task is one like any other, but that its turns come from outside: calls run in machines on the task's state,
rules and people are asked as always, and what was changed is asked for when the program leaves or publishes.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from luminaguard.actions.tools import ToolSpec
from luminaguard.errors import McpServerFailed
from luminaguard.mcp.definitions import Definition
from luminaguard.reasoning.budget import Usage
from luminaguard.reasoning.context import HOST_TOOLS
from luminaguard.reasoning.messages import Message, ToolCall, Turn
from luminaguard.tasks.model import ENDED, Status, Task
from luminaguard.tasks.ports import Watcher
from luminaguard.tools import IN_MACHINE

if TYPE_CHECKING:
    from luminaguard.runtime.core import Runtime

__all__ = ["OUTSIDE", "FolderTools", "Waiting"]

OUTSIDE = "mcp"
"""The model of such a task: whoever is connected."""
_MANY = 1 << 40
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
        self._outside, self._watcher = _Outside(), Watcher()
        self._lock = anyio.Lock()
        self._held = ExitStack()
        self._waits_for: ToolCall | None = None
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
        """Do a call, one at a time; the message that answers it, or what it waits for."""
        async with self._lock:
            task = self.task or await self._begin()
            if (before := self._waits_for) is not None:  # a person may have answered by now
                answer = await self._until_answered(before.id)
                if (before.name, before.arguments) == (_SPECS[name].name, arguments):
                    return answer
                if isinstance(answer, Waiting):  # a call after it would work on what is not decided yet
                    return replace(answer, call_id="")
                assert self.task is not None
                task = self.task
            if task.status is not Status.RUNNING:
                raise self._ended(task, kept="It was not called.")
            call = ToolCall(f"call-{secrets.token_hex(8)}", _SPECS[name].name, dict(arguments))
            self._outside.next = Message("assistant", "", (call,))
            self._waits_for = call
            return await self._until_answered(call.id)

    async def again(self, waiting: Waiting) -> Message | Waiting:
        """What became by now of a call that waited."""
        async with self._lock:
            return await self._until_answered(waiting.call_id)

    async def _until_answered(self, call_id: str) -> Message | Waiting:
        engine = self._runtime.agent_tasks.engine
        while True:
            assert self.task is not None
            answers = [one for one in engine.history(self.task) if one.role == "tool" and one.call_id == call_id]
            if answers:
                if self._waits_for is not None and self._waits_for.id == call_id:
                    self._waits_for = None
                return answers[-1]
            if self.task.status not in {Status.RUNNING, Status.WAITING}:
                raise self._ended(self.task)
            self.task, moved = await engine.step(self.task, self._outside, self._watcher)
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
        tasks = runtime.agent_tasks
        task = Task(
            tasks.new_id(), "tools for another program (MCP)", str(self._workspace), OUTSIDE,
            runtime.ledger.current_time(), max_turns=_MANY, home=runtime.host,
        )  # fmt: skip
        self._held.enter_context(tasks.worker(task.id))
        self.task = await tasks.engine.create(task)
        return self.task

    async def close(self) -> str:
        """The program has left: what was changed is asked for; the id of that request, or nothing."""
        try:
            async with self._lock:
                task = self.task
                if task is None or task.status in ENDED:
                    return ""
                engine = self._runtime.agent_tasks.engine
                if task.status is Status.RUNNING:
                    self._outside.next = Message("assistant", "The program has left.")
                    task = await engine.run(task, self._outside, self._watcher)
                self.task = replace(task)
                return task.request
        finally:
            self._held.close()
