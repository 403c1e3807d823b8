"""The workbench of tasks: each call in a machine of this runtime, on the task's state, within the rules."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from luminaguard.effects.changes import Changeset, DirEntry, LinkEntry
from luminaguard.errors import TaskStopped
from luminaguard.reasoning.messages import ToolCall
from luminaguard.runtime.rehearsal import Background, Prepared, Rehearsal, Stopwatch, prepare_template
from luminaguard.tasks.model import Task
from luminaguard.tasks.ports import Evaluated
from luminaguard.tools.builtin import as_asked

if TYPE_CHECKING:
    from luminaguard.effects.changes import Entry
    from luminaguard.runtime.core import Runtime
    from luminaguard.tools.builtin import Plan
    from luminaguard.workspaces.snapshots import Snapshots

__all__ = ["MachineBench"]

_MOST_OUTPUT = 4 << 20


class MachineBench:
    """Evaluates calls in machines of the runtime.

    Args:
        runtime: its parts.
        snapshots: the tasks' states.
        slots: how many machines run at once; as many as calls are evaluated, if not given.
    """

    def __init__(self, runtime: Runtime, snapshots: Snapshots, slots: anyio.CapacityLimiter | None = None) -> None:
        self._runtime, self._snapshots = runtime, snapshots
        self._slots = slots or anyio.CapacityLimiter(math.inf)
        self._checked: set[str] = set()

    def check_first(self, task: Task) -> None:
        """Have the task's first state and its folder's rules as they were recorded; raises StorageError."""
        if not self._runtime.host or task.id in self._checked:
            return
        self._snapshots.expect(task.id, self._runtime.tasks.first_state(task.id))
        self._checked.add(task.id)

    async def begin(self, task: Task) -> str:
        """Keep the first state of the task's workspace; one that is kept stays. Its digest, where hosts share it."""
        if task.id not in self._snapshots.tasks():
            await anyio.to_thread.run_sync(self._begin, task)
        return await anyio.to_thread.run_sync(self._snapshots.digest, task.id) if self._runtime.host else ""

    def _begin(self, task: Task) -> None:
        from luminaguard.runtime.policy import own_rules
        from luminaguard.workspaces.pack import WorkspaceImages
        from luminaguard.workspaces.state import read_state

        runtime, workspace = self._runtime, Path(task.workspace)
        runtime.policy(workspace)  # rules that cannot be read stop it here
        state = read_state(workspace, runtime.limits("workspace"), own=runtime.own_paths(workspace),
                           indexes=runtime.folders.cache / "indexes")  # fmt: skip
        image = WorkspaceImages(runtime.folders.cache).open(state)
        try:
            self._snapshots.begin(task.id, state, image)
            if runtime.host:
                self._snapshots.keep_rules(task.id, own_rules(workspace))
        finally:
            os.close(image)

    def runs_unasked(self, task: Task, call: ToolCall, changed: Changeset) -> bool:
        """Whether the rules let a call run without anybody's answer, after these changes."""
        from luminaguard.effects.outside import ToolRun
        from luminaguard.runtime.policy import marked_labels

        runtime = self._runtime
        self.check_first(task)
        policy = runtime.policy(Path(task.workspace), home=task.home, task=task.id)
        marked = marked_labels(policy, (change.path for change in changed.changes))
        labels = runtime.tasks.labels(task.id) | {label for label, _ in marked}
        run = ToolRun(call.name, as_asked(call.name, call.arguments), task.workspace)
        return runtime.permits.runs_unasked(run, policy, task.id, labels)

    async def evaluate(self, task: Task, call: ToolCall, work: Plan) -> Evaluated:
        """Evaluate a call on the task's state, in a machine of its own."""
        from luminaguard.microvm.broker import has_pool
        from luminaguard.microvm.channel import Call, CallFailed
        from luminaguard.microvm.machine import Command

        runtime, workspace = self._runtime, Path(task.workspace)
        said = _Said()

        async def feed(running: Call) -> None:
            await running.write(work.stdin)
            await running.write_eof()

        async with AsyncExitStack() as stack:
            prepared = Prepared(stack)
            prepared.image = runtime.images.current()
            await anyio.to_thread.run_sync(self.check_first, task)
            disks, entries = await anyio.to_thread.run_sync(self._snapshots.open, task.id, task.snapshot)
            prepared.disks = tuple(prepared.keep(fd) for fd in disks)
            self.permit(task, call, workspace, entries)
            if not has_pool(runtime.folders.run):
                await prepare_template(runtime, prepared, lambda _: None)
                if prepared.failures:
                    raise prepared.failures[0]
            command = Command(work.argv, processes=runtime.settings.processes, profile=runtime.settings.profile)
            rehearsal = Rehearsal(runtime, workspace, command, entries, said.take, feed,
                                  timeout_s=min(work.timeout_s, runtime.settings.timeout_s))  # fmt: skip
            await stack.enter_async_context(_slot(self._slots))
            with Background(lambda: runtime.ledger) as opening:
                try:
                    execution, _, writer = await rehearsal.once(prepared, opening, Stopwatch(), task.id)
                except CallFailed as error:
                    return Evaluated(f"It could not be started ({error.code}).", failed=True, changes=Changeset(()))
        outcome, changes = execution.outcome, execution.changeset
        if outcome.timed_out or not len(changes):
            writer.discard()
            changes = Changeset(())
        text = said.text()
        if outcome.timed_out:
            text += f"\n[stopped after {work.timeout_s:.0f} s; nothing that it changed was kept]"
        elif outcome.exit_code:
            text += f"\n[exit status {outcome.exit_code}]"
        if outcome.out_of_memory:
            text += "\n[the machine ran out of memory]"
        return Evaluated(text, failed=outcome.timed_out or outcome.exit_code != 0, changes=changes,
                         owner=execution.vm_id if len(changes) else "")  # fmt: skip

    def permit(self, task: Task, call: ToolCall, workspace: Path, entries: dict[str, Entry]) -> None:
        """Judge the call, with all the untrusted input that the task has read by now."""
        from luminaguard.effects.outside import ToolRun
        from luminaguard.runtime.policy import marked_labels

        runtime = self._runtime
        why, labels = runtime.tasks.standing(task.id)
        if why is not None:
            raise TaskStopped(task.id, why, kept="Nothing ran.")
        policy = runtime.policy(workspace, home=task.home, task=task.id)
        found = marked_labels(policy, entries)
        if not {label for label, _ in found} <= labels:
            labels = runtime.tasks.add_labels(task.id, found)
        run = ToolRun(call.name, as_asked(call.name, call.arguments), task.workspace)
        runtime.permits.permit(run, policy, task.id, labels, home=task.home)

    def links_on(self, task: Task, path: str) -> bool:
        """Whether a path goes through a link in the task's state."""
        entries = task.snapshot.changes.applied_to(self._snapshots.first(task.id).entries)
        parts = path.split("/")
        found = [entries.get("/".join(parts[: count + 1])) for count in range(len(parts))]
        return any(isinstance(entry, LinkEntry) for entry in found) or not all(
            isinstance(entry, DirEntry) or entry is None for entry in found[:-1]
        )

    def take(self, task: Task, owner: str) -> None:
        """Make the contents of an evaluation part of the task."""
        self._snapshots.take(task.id, owner, step=task.step)

    def drop(self, owner: str) -> None:
        """Forget the contents of an evaluation."""
        self._runtime.blobs.forget(owner)

    def collect(self, task: Task) -> None:
        """Delete contents that the task's state does not need."""
        self._snapshots.collect(task.id, task.step, task.snapshot, task.published, task.unpublished)


@asynccontextmanager
async def _slot(limiter: anyio.CapacityLimiter) -> AsyncIterator[None]:
    """One of the slots, whatever task waits for it: a task may wait for several."""
    borrower = object()
    await limiter.acquire_on_behalf_of(borrower)
    try:
        yield
    finally:
        limiter.release_on_behalf_of(borrower)


class _Said:
    """What a command prints, both streams as they come, the first of it."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._lost = 0

    async def take(self, _stream: int, data: bytes) -> None:
        room = _MOST_OUTPUT - len(self._data)
        self._data += data[:room]
        self._lost += max(0, len(data) - room)

    def text(self) -> str:
        text = self._data.decode("utf-8", "replace").rstrip("\n")
        return f"{text}\n[{self._lost:,} more bytes were not kept]" if self._lost else text
