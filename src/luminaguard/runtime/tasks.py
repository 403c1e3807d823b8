"""Tasks on this machine: their calls in machines of this runtime, their effects at its cliff, their models."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from luminaguard import log
from luminaguard.approvals.model import Request, State, Verdict
from luminaguard.effects.changes import DirEntry, LinkEntry
from luminaguard.errors import (
    ApprovalError,
    Forbidden,
    LuminaGuardError,
    ModelUnavailable,
    RequestNotFound,
    TaskError,
    TaskStopped,
    WorkspaceError,
)
from luminaguard.reasoning.messages import ToolCall
from luminaguard.reasoning.model import Model
from luminaguard.runtime.decisions import Answer
from luminaguard.runtime.rehearsal import Background, Prepared, Rehearsal, Stopwatch, prepare_template
from luminaguard.tasks.engine import Engine, Evaluated, Watcher, Workbench
from luminaguard.tasks.model import ENDED, Task
from luminaguard.tools.builtin import as_asked
from luminaguard.workspaces.locks import Busy, locked

if TYPE_CHECKING:
    from luminaguard.effects.changes import Changeset, Entry
    from luminaguard.runtime.core import Runtime
    from luminaguard.storage.tasks import TaskStore
    from luminaguard.tools.builtin import Plan
    from luminaguard.workspaces.snapshots import Snapshots

__all__ = ["LocalTasks", "MachineBench", "check_models", "open_models"]

_MOST_OUTPUT = 4 << 20
_NOTHING_WORKS = (
    "nothing yet: set ANTHROPIC_API_KEY, OPENAI_API_KEY or GOOGLE_API_KEY, or start Ollama or llama.cpp's server"
)
_KEPT_S = 7 * 86400
"""How long the first states of tasks that ended are kept, for replays."""


class LocalTasks:
    """The tasks of one runtime, in this process.

    Args:
        runtime: its parts.
        bench: where calls are evaluated; in machines if not given.
    """

    def __init__(self, runtime: Runtime, bench: Callable[[Runtime, Snapshots], Workbench] | None = None) -> None:
        self._runtime = runtime
        self._make_bench = bench or MachineBench

    @cached_property
    def store(self) -> TaskStore:
        """Their rows."""
        from luminaguard.storage.tasks import TaskStore

        return TaskStore(self._runtime.approvals)

    @cached_property
    def snapshots(self) -> Snapshots:
        """Their states."""
        from luminaguard.workspaces.snapshots import Snapshots

        return Snapshots(self._runtime.folders.state, self._runtime.blobs)

    @cached_property
    def engine(self) -> Engine:
        """Moves them on."""
        bench, cliff = self._make_bench(self._runtime, self.snapshots), _TaskCliff(self._runtime, self.snapshots)
        return Engine(self.store, bench, cliff, parallel=self._runtime.settings.parallel_calls,
                      now_ns=self._runtime.ledger.current_time)  # fmt: skip

    @staticmethod
    def new_id() -> str:
        """An id that no other task has."""
        return f"task-{secrets.token_hex(5)}"

    @contextmanager
    def worker(self, task_id: str) -> Iterator[None]:
        """Only one process works on a task at a time; the kernel lets go for a process that was killed.

        Raises:
            TaskError: another one does.
        """
        try:
            with locked(self._runtime.folders.run / "tasks.lock", task_id):
                yield
        except Busy:
            raise TaskError(
                f"Another process works on {task_id}.", hint=f"See 'luminaguard tasks show {task_id}'."
            ) from None

    async def run(self, task: Task, model: Model, watcher: Watcher) -> Task:
        """Move a task on, as the only worker; see :meth:`luminaguard.tasks.engine.Engine.run`."""
        with self.worker(task.id):
            return await self.engine.run(self.engine.get(task.id), model, watcher)

    def check_folder(self, task: Task) -> None:
        """Refuse to go on with a task whose folder is gone, or is another one.

        Raises:
            WorkspaceError: so it is.
        """
        try:
            found = os.stat(task.workspace, follow_symlinks=False).st_ino
        except OSError:
            found = -1
        if found != self.snapshots.first(task.id).inode:
            raise WorkspaceError(
                f"The folder of {task.id}, {task.workspace}, is gone or is another one.",
                hint=f"Put it back where it was, or end the task: 'luminaguard tasks cancel {task.id}'.",
            )

    def stopped_at(self, task: Task) -> Request | None:
        """The request that a task waits for, if it is stored."""
        try:
            return self._runtime.approvals.get(task.request) if task.request else None
        except RequestNotFound:
            return None

    def collect(self) -> None:
        """Delete the states of tasks that nobody can go on with: of none, or of ones that ended a while ago."""
        found, damaged = self.store.all(Task.from_json)
        known = {task.id: task for task in found}
        for name in self.snapshots.tasks():
            task = known.get(name)
            if name in damaged:  # its states may be all that is left of it
                continue
            age_s = time.time() - (task.updated_ns / 1e9 if task else self._touched(name))
            if (task is None or task.status in ENDED) and age_s > _KEPT_S:
                self.snapshots.forget(name)

    def _touched(self, name: str) -> float:
        with contextlib.suppress(OSError):
            return (self.snapshots.folder / name).stat().st_mtime
        return time.time()


class MachineBench:
    """Evaluates calls in machines of the runtime."""

    def __init__(self, runtime: Runtime, snapshots: Snapshots) -> None:
        self._runtime, self._snapshots = runtime, snapshots

    async def begin(self, task: Task) -> None:
        """Keep the first state of the task's workspace; one that is kept stays."""
        if task.id in self._snapshots.tasks():
            return
        await anyio.to_thread.run_sync(self._begin, task)

    def _begin(self, task: Task) -> None:
        from luminaguard.workspaces.pack import WorkspaceImages
        from luminaguard.workspaces.state import read_state

        runtime, workspace = self._runtime, Path(task.workspace)
        runtime.policy(workspace)  # rules that cannot be read stop it here
        state = read_state(workspace, runtime.limits("workspace"), own=runtime.own_paths(workspace),
                           indexes=runtime.folders.cache / "indexes")  # fmt: skip
        image = WorkspaceImages(runtime.folders.cache).open(state)
        try:
            self._snapshots.begin(task.id, state, image)
        finally:
            os.close(image)

    def runs_unasked(self, task: Task, call: ToolCall, changed: Changeset) -> bool:
        """Whether the rules let a call run without anybody's answer, after these changes."""
        from luminaguard.effects.outside import ToolRun
        from luminaguard.runtime.policy import marked_labels

        runtime = self._runtime
        policy = runtime.policy(Path(task.workspace))
        marked = marked_labels(policy, (change.path for change in changed.changes))
        labels = runtime.tasks.labels(task.id) | {label for label, _ in marked}
        run = ToolRun(call.name, as_asked(call.name, call.arguments), task.workspace)
        return runtime.decisions.runs_unasked(run, policy, task.id, labels)

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
            with Background(lambda: runtime.ledger) as opening:
                try:
                    execution, _, writer = await rehearsal.once(prepared, opening, Stopwatch(), task.id)
                except CallFailed as error:
                    return Evaluated(f"It could not be started ({error.code}).", failed=True, changes=_NOTHING())
        outcome, changes = execution.outcome, execution.changeset
        if outcome.timed_out or not len(changes):
            writer.discard()
            changes = _NOTHING()
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
        policy = runtime.policy(workspace)
        found = marked_labels(policy, entries)
        if not {label for label, _ in found} <= labels:
            labels = runtime.tasks.add_labels(task.id, found)
        run = ToolRun(call.name, as_asked(call.name, call.arguments), task.workspace)
        runtime.decisions.permit(run, policy, task.id, labels)

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
        self._snapshots.take(task.id, owner)

    def drop(self, owner: str) -> None:
        """Forget the contents of an evaluation."""
        self._runtime.blobs.forget(owner)

    def collect(self, task: Task) -> None:
        """Delete contents that the task's state does not need."""
        self._snapshots.collect(task.id, task.snapshot, task.published, task.unpublished)


def _NOTHING() -> Changeset:  # noqa: N802  # a constant whose module is loaded late
    from luminaguard.effects.changes import Changeset

    return Changeset(())


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


class _TaskCliff:
    """The cliff of the runtime, for tasks."""

    def __init__(self, runtime: Runtime, snapshots: Snapshots) -> None:
        self._runtime, self._snapshots = runtime, snapshots

    def ask_to_publish(self, task: Task, request_id: str, changes: Changeset) -> Request:
        """Ask to publish changes."""
        runtime = self._runtime
        self._snapshots.lend(task.id, request_id, changes)
        now = runtime.ledger.current_time()
        request = Request(
            id=request_id, workspace=task.workspace, inode=self._snapshots.first(task.id).inode, digest=changes.digest,
            command=("run", task.prompt[:500]), exit_code=0, created_ns=now,
            expires_ns=now + runtime.settings.approval_ttl_s * 1_000_000_000, state=State.PENDING, task=task.id,
            taint=tuple(sorted(runtime.tasks.labels(task.id))),
        )  # fmt: skip
        try:
            return runtime.decisions.ask(request, changes)
        except Forbidden:
            runtime.blobs.forget(request_id)
            raise

    def look(self, request_id: str) -> tuple[Request | None, str, tuple[str, ...] | None]:
        """A request as it stands, how it ended in words, and the part that was approved."""
        try:
            request = self._runtime.approvals.get(request_id)
        except RequestNotFound:
            return None, "", None
        decisions = self._runtime.approvals.decisions(request_id)
        part = next((one.part for one in decisions if one.verdict is Verdict.APPROVE), None)
        return request, self._runtime.approvals.outcome(request_id), part

    def let_through(self, task: Task, request: Request) -> None:
        """Publish what was approved and not published yet, or what rules and grants let through."""
        decisions = self._runtime.decisions
        try:
            if request.state is State.APPROVED:
                decisions.publish(request.id)
                return
            request = decisions.looked_at(request)
            if not task.denied and (answer := decisions.without_asking(request)):
                decisions.approve_and_publish(request, answer)
        except LuminaGuardError as error:  # what came of it stands with the request, where the task reads it
            log.event("task.publish", request=request.id, error=repr(error))

    def stop(self, task: Task, why: str) -> None:
        """Let nothing more be asked, approved or done for a task; what it asked for ends."""
        self._runtime.approvals.stop_task(task.id, why)

    def withdraw(self, task: Task, why: str) -> None:
        """End all requests of a task that still wait."""
        for request in self._runtime.approvals.list():
            if request.task == task.id and request.state in {State.PENDING, State.APPROVED}:
                with contextlib.suppress(ApprovalError):
                    self._runtime.decisions.deny(request, Answer(Verdict.DENY, "command tasks cancel", reason=why))


def check_models(models: str) -> None:
    """Check, without loading their libraries, that models could be opened.

    Raises:
        SettingsError: it names no model, or a script that cannot be read.
        ModelUnavailable: none was chosen, or a key is missing.
    """
    from luminaguard.reasoning.choice import find_key, parse_choices, what_would_work
    from luminaguard.reasoning.script import ScriptModel

    if not models:
        works = "; ".join(what_would_work()) or _NOTHING_WORKS
        raise ModelUnavailable(
            "No language model is chosen.",
            hint=f"Give --model PROVIDER:NAME, or set model in luminaguard.toml. On this machine: {works}.",
        )
    for choice in parse_choices(models):
        if choice.provider == "script":
            ScriptModel.load(Path(choice.name))
        else:
            find_key(choice)


@asynccontextmanager
async def open_models(models: str) -> AsyncIterator[Model]:
    """The models that a person chose, in their order; their connections end with this context.

    Args:
        models: as it was written; see :mod:`luminaguard.reasoning.choice`.

    Raises:
        SettingsError: it names none, or a script that cannot be read.
        ModelUnavailable: a key is missing.
    """
    from luminaguard.reasoning.choice import find_key, parse_choices
    from luminaguard.reasoning.retry import Persistent
    from luminaguard.reasoning.script import ScriptModel

    async with AsyncExitStack() as stack:
        opened: list[Model] = []
        for choice in parse_choices(models):
            if choice.provider == "script":
                opened.append(await anyio.to_thread.run_sync(ScriptModel.load, Path(choice.name)))
                continue
            from luminaguard.reasoning.providers import open_provider

            key = await anyio.to_thread.run_sync(partial(find_key, choice))
            opened.append(await stack.enter_async_context(open_provider(choice, key)))
        yield Persistent(opened)
