"""A worker: does the steps of all tasks that can be done on this host, and publishes into its folders.

One for each state folder. Alone, it looks at the table of tasks; in a fleet it takes its part of the queue, holds
its host's lease and runs no more machines than it has slots, from a pool of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from luminaguard import log
from luminaguard.approvals.model import State
from luminaguard.effects.text import visible
from luminaguard.errors import (
    DatabaseUnreachable,
    GuestUnresponsive,
    HypervisorUnavailable,
    LeaseLost,
    LuminaGuardError,
    MachineError,
    TaskError,
    first_of,
)
from luminaguard.runtime.bench import MachineBench
from luminaguard.runtime.tasks import WORKER_LOCK, LocalTasks
from luminaguard.tasks.ports import Watcher, Workbench
from luminaguard.tasks.queues import Later, Queue
from luminaguard.tasks.queues.embedded import EmbeddedQueue
from luminaguard.workspaces.locks import Busy, locked

if TYPE_CHECKING:
    from luminaguard.reasoning.messages import Turn
    from luminaguard.runtime.core import Runtime
    from luminaguard.storage.tasks import Due
    from luminaguard.workspaces.snapshots import Snapshots

__all__ = ["Worker", "slots_of"]

_TURNS = 8
"""Steps without a machine that are done at once: they wait for models, mostly."""
_MOST_TRIES = 5
_RESERVE_MIB = 512
_AROUND_MIB = 96
"""What a machine needs beside its memory: its hypervisor, and pages that are not shared."""
_PUBLISH_S = 1.0
Tell = Callable[[str], None]


def slots_of(runtime: Runtime) -> int:
    """How many machines run here at once: as set, or as many as the memory that is free now and the cores allow."""
    if runtime.settings.slots:
        return runtime.settings.slots
    each = runtime.settings.memory_mib + _AROUND_MIB
    return max(1, min(2 * (os.cpu_count() or 1), (_free_mib() - _RESERVE_MIB) // each))


def _free_mib() -> int:
    """Memory that can be had without swapping (proc_meminfo(5): MemAvailable)."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 1 << 20


class Worker:
    """The worker of one runtime.

    Args:
        runtime: its parts; nothing of its database was used yet.
        tell: told in a sentence what happens.
        bench: where calls are evaluated; in machines if not given.
    """

    def __init__(
        self, runtime: Runtime, tell: Tell = lambda _: None,
        bench: Callable[[Runtime, Snapshots], Workbench] | None = None,
    ) -> None:  # fmt: skip
        self._runtime, self._tell = runtime, tell
        self._bench = bench
        self.slots = slots_of(runtime)
        self._machines = anyio.CapacityLimiter(self.slots)
        self._unpublished: dict[str, tuple[int, float]] = {}
        """Approved requests that could not be published: how often it was tried, and when it is tried again."""

    @cached_property
    def tasks(self) -> LocalTasks:
        """The tasks, with this worker's queue."""
        return LocalTasks(self._runtime, self._bench or self._machine_bench, self.queue.enqueue)

    def _machine_bench(self, runtime: Runtime, snapshots: Snapshots) -> Workbench:
        return MachineBench(runtime, snapshots, self._machines)

    @cached_property
    def queue(self) -> Queue:
        """Whose steps it does."""
        s = self._runtime.settings
        if not self._runtime.host:
            return EmbeddedQueue(lambda: self.tasks.store, machines=self.slots, turns=_TURNS)
        from luminaguard.tasks.queues.fleet import FleetQueue

        queue = FleetQueue(
            self._runtime.ledger.database, s.database_url, self._runtime.host, lambda: self.tasks.store,
            machines=self.slots, turns=_TURNS, lease_s=s.lease_s,
            busy=lambda: int(self._machines.borrowed_tokens), kill=self.kill_machines, tell=self._tell,
        )  # fmt: skip
        self._runtime.guard = queue.guard
        return queue

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            TaskError: another worker has this state folder, or this host's name.
            LuminaGuardError: no machine can be had here, or the database cannot be used.
        """
        runtime = self._runtime
        try:
            with locked(runtime.folders.run / WORKER_LOCK, "worker"):
                queue = await self._opened()
                async with anyio.create_task_group() as group:
                    if self._bench is None:
                        await group.start(self._lend)
                    group.start_soon(self._look_after_folders)
                    if not runtime.host:
                        self._tell(f"{self.slots} machines at once; waiting for tasks")
                    await queue.run(self._handle)
        except Busy:
            raise TaskError(
                "A worker is at work with this state folder.", hint="One is enough; it does all tasks of this user."
            ) from None

    async def _opened(self) -> Queue:
        """The queue, once its database answers."""
        said = False
        while True:
            try:
                _ = self._runtime.ledger
                return self.queue
            except DatabaseUnreachable as error:
                if not said:
                    self._tell(f"{error.message} It is tried again until it answers.")
                said = True
                await anyio.sleep(1)

    async def _lend(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """A pool of its own, from which also every exec of this user takes its machines."""
        from luminaguard.microvm.broker import Lender
        from luminaguard.microvm.pool import PoolLimits

        s = self._runtime.settings
        most = min(s.pool_maximum, self.slots)
        limits = PoolLimits(min(s.pool_minimum, most), most, s.pool_max_age_s, s.pool_memory_mib)
        async with self._runtime.open_pool(limits) as pool:
            await Lender(pool, self._runtime.folders.run, self._runtime.kind).serve(on_ready=task_status.started)

    def kill_machines(self) -> None:
        """End this worker's machines: by now another host may do what they are at."""
        for record in self._runtime.tracker.running():
            if record.owner == os.getpid():
                self._runtime.tracker.kill(record.id)

    async def _handle(self, due: Due, tries: int) -> None:
        """Do one step."""
        if due.needs == "machine" and self._bench is None and _free_mib() < self._runtime.settings.memory_mib:
            raise Later(1.0)  # no memory for it here, just now
        try:
            with self.tasks.worker(due.task):
                await self._step(due)
        except Later:
            raise
        except LeaseLost:
            return  # whoever has it by now does it
        except TaskError as error:  # somebody else works on it, or has done this step
            self._tell(f"{due.task}: {error.message}")
            raise Later(1.0) from error
        except DatabaseUnreachable as error:
            self._tell(f"{due.task}: {error.message}")
            raise Later(1.0) from error
        except LuminaGuardError as error:
            self._failed(due, tries, error)
        except Exception as raised:  # noqa: BLE001  # what nobody foresaw of one task must not stop the others
            first = first_of(raised)
            unforeseen = TaskError(
                f"Something went wrong that LuminaGuard did not foresee: {type(first).__name__}: {visible(str(first))}",
                hint="See the log, and report it.",
            )
            self._failed(due, tries, unforeseen)

    async def _step(self, due: Due) -> None:
        from luminaguard.runtime.models import open_models

        engine = self.tasks.engine
        task = engine.get(due.task)
        if task.step != due.step:
            return
        if due.needs == "turn":
            async with open_models(task.models, lambda note: self._tell(f"{task.id}: {note}")) as model:
                after, moved = await engine.step(task, model, Watcher())
        else:
            after, moved = await engine.step(task, _NotAsked(), Watcher())
        if not moved:  # it still waits, such as for a lock
            raise Later(1.0)
        why = f" ({after.why})" if after.why else ""
        self._tell(f"{task.id}: step {after.step}: {after.status.value}{why}")

    def _failed(self, due: Due, tries: int, error: LuminaGuardError) -> None:
        """Try it again, here or elsewhere; a task that nobody can go on with rests."""
        log.event("worker.step_failed", task=due.task, step=due.step, tries=tries, error=error.message)
        self._tell(f"{due.task}: {error.message}")
        if tries < _MOST_TRIES or isinstance(error, HypervisorUnavailable):
            broken = isinstance(error, MachineError) and not isinstance(error, GuestUnresponsive)
            raise Later(min(30.0, 0.5 * 2 ** min(tries, 8)), elsewhere=broken or due.needs != "folder") from error
        try:
            task = self.tasks.engine.get(due.task)
            if task.step == due.step:
                self.tasks.engine.pause(task, f"{error.message} {error.hint}")
        except LuminaGuardError as second:  # such as a row that cannot be read: it stays as it is
            raise Later(60.0) from second

    async def _look_after_folders(self) -> None:
        """Settle what was interrupted, and publish what people approved elsewhere; a task's next step does its own."""
        while True:
            try:
                here = [one for one in self._runtime.approvals.list(readable=True)
                        if one.effect == "changeset" and one.home == self._runtime.host]  # fmt: skip
                # A publish may have lost its database in the middle, in this very process.
                if any(one.state is State.CLAIMED for one in here) or self._runtime.publisher.interrupted():
                    for sentence in self._runtime.decisions.recover():
                        self._tell(sentence)
                for request in here if self._runtime.host else ():
                    if request.state is State.APPROVED and not request.task:
                        self._publish(request.id)
            except LeaseLost:
                pass
            except Exception as error:  # noqa: BLE001  # whatever it is, the next look may do better
                log.event("worker.not_published", error=repr(error)[:500])
            await anyio.sleep(_PUBLISH_S)

    def _publish(self, request_id: str) -> None:
        """Publish one; what cannot be published is tried again ever later, and stops no other."""
        tries, at = self._unpublished.get(request_id, (0, 0.0))
        if time.monotonic() < at:
            return
        try:
            self._runtime.decisions.publish(request_id)
        except (LeaseLost, DatabaseUnreachable):
            raise
        except LuminaGuardError as error:
            self._unpublished[request_id] = (tries + 1, time.monotonic() + min(300.0, 2.0 ** min(tries, 9)))
            if not tries:
                self._tell(f"{request_id}: it is approved, and not published: {error.message} {error.hint}")
        else:
            self._unpublished.pop(request_id, None)
            self._tell(f"{request_id}: published")


class _NotAsked:
    """The model of a step that asks none."""

    name = "none"

    async def turn(self, *_: object, **__: object) -> Turn:
        """Nobody calls it: what a step needs is known before it."""
        raise TaskError("A step that was to ask no model asks one.", hint="It is tried again.")
