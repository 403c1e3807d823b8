"""Tasks on this machine, in this process: the store, the states and the engine, and their effects at the cliff."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from luminaguard import log
from luminaguard.actions.model import Risk
from luminaguard.approvals.model import Request, State, Verdict
from luminaguard.effects.changes import Changeset, FileEntry
from luminaguard.errors import (
    ApprovalError,
    DatabaseUnreachable,
    Forbidden,
    LuminaGuardError,
    RequestNotFound,
    TaskBusy,
    TaskError,
    WorkspaceError,
)
from luminaguard.reasoning.messages import Message, ToolCall
from luminaguard.reasoning.model import Model
from luminaguard.runtime.bench import MachineBench
from luminaguard.runtime.decisions import Answer
from luminaguard.tasks.engine import Engine
from luminaguard.tasks.model import ENDED, Status, Task
from luminaguard.tasks.ports import Evaluated, RemoteTools, Watcher, Workbench
from luminaguard.workspaces.locks import Busy, locked

if TYPE_CHECKING:
    from luminaguard.runtime.core import Runtime
    from luminaguard.storage.tasks import Enqueue, TaskStore
    from luminaguard.workspaces.snapshots import Snapshots

__all__ = ["WORKER_LOCK", "LocalTasks"]

WORKER_LOCK = "host.lock"
"""The file, in the folder of what runs, that a worker holds the lock of."""

_KEPT_S = 7 * 86400
"""How long the first states of tasks that ended are kept, for replays."""
_FOLLOW_S = 0.3
_NOBODY_S = 2.0


class LocalTasks:
    """The tasks of one runtime, in this process.

    Args:
        runtime: its parts.
        bench: where calls are evaluated; in machines if not given.
        enqueue: told of each step that can be done; in a fleet, its queue is, if nothing is given.
        here: new tasks are done by this process alone.
        servers: their models are offered the tools of other servers.
    """

    def __init__(
        self, runtime: Runtime, bench: Callable[[Runtime, Snapshots], Workbench] | None = None,
        enqueue: Enqueue | None = None, *, here: bool = False, servers: bool = True,
    ) -> None:  # fmt: skip
        self._runtime = runtime
        self._here, self._servers = here, servers
        self._make_bench = bench or MachineBench
        self._enqueue = enqueue

    @cached_property
    def store(self) -> TaskStore:
        """Their rows."""
        from luminaguard.storage.tasks import TaskStore

        enqueue = self._enqueue
        if enqueue is None and self._runtime.host and not self._here:
            from luminaguard.storage.queue import Jobs

            enqueue = Jobs(self._runtime.ledger.database).enqueue
        return TaskStore(self._runtime.approvals, enqueue, here=self._here)

    @cached_property
    def snapshots(self) -> Snapshots:
        """Their states."""
        from luminaguard.workspaces.snapshots import Snapshots

        return Snapshots(self._runtime.data, self._runtime.blobs, self._runtime.shared)

    @cached_property
    def engine(self) -> Engine:
        """Moves them on."""
        bench, cliff = self._make_bench(self._runtime, self.snapshots), _TaskCliff(self._runtime, self.snapshots)
        return Engine(self.store, bench, cliff, parallel=self._runtime.settings.parallel_calls,
                      now_ns=self._runtime.ledger.current_time, remote=self._remote)  # fmt: skip

    @property
    def _remote(self) -> RemoteTools | None:
        """The tools of the servers that were set up; None if there are none."""
        if not (self._servers and self._runtime.settings.mcp_servers):
            return None
        from luminaguard.runtime.mcp.agent import ServerTools

        return ServerTools(self._runtime)

    @staticmethod
    def new_id() -> str:
        """An id that no other task has."""
        return f"task-{secrets.token_hex(5)}"

    @contextmanager
    def worker(self, task_id: str) -> Iterator[None]:
        """Only one process works on a task at a time; the kernel lets go for a process that was killed.

        Raises:
            TaskBusy: another one does.
        """
        try:
            with locked(self._runtime.folders.run / "tasks.lock", task_id):
                yield
        except Busy:
            raise TaskBusy(
                f"Another process works on {task_id}.", hint=f"See 'luminaguard tasks show {task_id}'."
            ) from None

    def is_worked_on(self, task_id: str) -> bool:
        """Whether a process works on a task now."""
        try:
            with self.worker(task_id):
                return False
        except TaskError:
            return True

    async def run(self, task: Task, model: Model, watcher: Watcher, *, held: bool = False) -> Task:
        """Move a task on, as the only worker; see :meth:`luminaguard.tasks.engine.Engine.run`.

        Args:
            task: which.
            model: whom to ask.
            watcher: told what happens.
            held: the caller is its :meth:`worker`.
        """
        with nullcontext() if held else self.worker(task.id):
            return await self.engine.run(self.engine.get(task.id), model, watcher)

    async def follow(self, task: Task, watcher: Watcher) -> Task:
        """Watch what other processes make of a task, until it waits for a person, pauses or ends."""
        calls: dict[str, ToolCall] = {}
        seen, step, since = len(self.engine.history(task)), task.step, time.monotonic()
        said = ""
        while True:
            try:
                task = self.engine.get(task.id)
                if task.step != step:
                    step, since = task.step, time.monotonic()
                    history = self.engine.history(task)
                    for message in history[seen:]:
                        _tell(message, calls, watcher)
                    seen = len(history)
                if self._rests(task):
                    return task
                why = self._held_up(task) if time.monotonic() - since > _NOBODY_S else ""
            except DatabaseUnreachable as error:
                why = f"{error.message} {task.id} goes on when it answers again; this waits for it"
            if why and why != said:
                watcher.note(why)
            said = why or said
            await anyio.sleep(_FOLLOW_S)

    def _rests(self, task: Task) -> bool:
        """Whether a task goes no further without a person, or without somebody who works on it."""
        if task.status not in {Status.RUNNING, Status.WAITING} or task.question:
            return True
        request = self.stopped_at(task)
        if request is not None and request.state in {State.PENDING, State.UNKNOWN}:
            judged = request.judged  # what a rule lets through is let through in a moment
            return judged.risk is not Risk.GREEN or judged.people > 1 or task.denied
        return not self._runtime.host and not self.worker_lives() and not self.is_worked_on(task.id)

    def _held_up(self, task: Task) -> str:
        """Why nobody does the next step of a task of the fleet, if nobody can."""
        from luminaguard.storage.hosts import Hosts

        runtime = self._runtime
        if not runtime.host:
            return ""
        hosts = Hosts(runtime.ledger.database, runtime.host, "", runtime.settings.lease_s)
        alive = {host.name for host in hosts.all() if host.alive}
        if not alive:
            return "no host of the fleet is alive: start 'luminaguard worker' on one; the task waits"
        if task.request and task.home not in alive:
            return f"the folder is on {task.home}, where no worker is alive: the task waits for it"
        return ""

    def worker_lives(self) -> bool:
        """Whether a worker is at work with this state folder."""
        try:
            with locked(self._runtime.folders.run / WORKER_LOCK, "worker"):
                return False
        except Busy:
            return True

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


def _tell(message: Message, calls: dict[str, ToolCall], watcher: Watcher) -> None:
    """Show a part of a history as if it happened now."""
    if message.role == "assistant":
        if message.text:
            watcher.text(message.text)
        for call in message.calls:
            calls[call.id] = call
            watcher.call(call)
    elif message.role == "tool" and message.call_id in calls:
        text = message.text.partition("\n")[2] or message.text
        outcome = Evaluated(text, failed=message.failed, changes=Changeset(()))
        watcher.outcome(calls[message.call_id], outcome, "")


class _TaskCliff:
    """The cliff of the runtime, for tasks."""

    def __init__(self, runtime: Runtime, snapshots: Snapshots) -> None:
        self._runtime, self._snapshots = runtime, snapshots

    def ask_to_publish(self, task: Task, request_id: str, changes: Changeset) -> Request:
        """Ask to publish changes."""
        runtime = self._runtime
        if runtime.host:
            self._keep_before(task, request_id, changes)
        self._snapshots.lend(task.id, request_id, changes)
        now = runtime.ledger.current_time()
        request = Request(
            id=request_id, workspace=task.workspace, inode=self._snapshots.first(task.id).inode, digest=changes.digest,
            command=("run", task.prompt[:500]), exit_code=0, created_ns=now,
            expires_ns=now + runtime.settings.approval_ttl_s * 1_000_000_000, state=State.PENDING, task=task.id,
            home=task.home,
            taint=tuple(sorted(runtime.tasks.labels(task.id))),
        )  # fmt: skip
        try:
            return runtime.decisions.ask(request, changes)
        except Forbidden:
            runtime.blobs.forget(request_id)
            raise

    def _keep_before(self, task: Task, request_id: str, changes: Changeset) -> None:
        """Let whoever looks on another host see what texts were before."""
        from luminaguard.effects.card import MAX_TEXT
        from luminaguard.workspaces.base import base_contents

        writer = self._runtime.blobs.writer(request_id)
        with base_contents(Path(task.workspace), changes, MAX_TEXT) as before:
            for change in changes.changes:
                if isinstance(change.before, FileEntry) and (data := before(change.before.sha256)) is not None:
                    writer.begin()
                    writer.write(data)
                    writer.end()

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
