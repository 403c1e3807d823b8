"""A warm pool: clones that are restored, rehearsed and paused, so that a hit costs little more than ``cont``.

Rules:

1. A clone that was ever given to a workload is destroyed, never returned.
2. A miss gets a clone made on demand: slower, counted, and just as isolated.
3. Before a clone waits it is rehearsed: our own command runs in it through every step of a real
   action, over a workspace of ours. Then it rests, and is paused; a real action wakes it anew, with
   a clock, entropy and names that no other machine has. With a hypervisor that cannot pause, a clone
   waits loaded and has never run.
4. Clones expire by age, and all of them when the template changes.
5. The size follows demand: what arrives while one clone is made, and one more, between a minimum and
   a maximum; the maximum is bounded by memory. One clone is made at a time, and while callers wait
   for on-demand clones only one for every four of them.

Each clone lives in a task of its own, which owns all its contexts and ends them, whoever used it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.abc

from luminaguard import log
from luminaguard.errors import MachineError
from luminaguard.microvm.channel import CallFailed, open_channel
from luminaguard.microvm.machine import Command, MicroVM, all_disks, clone, new_id, watch
from luminaguard.microvm.port import Hypervisor, SavedMachine, VirtualMachine
from luminaguard.microvm.tracker import Tracked, VMTracker

__all__ = ["Pool", "PoolLimits", "PoolStatus", "Template"]

WORKSPACE_DISK = 1
_REHEARSAL = (("/bin/true",),)
_MIB_EACH = 96  # private memory of a kept clone and its hypervisor, with room
_DEMAND_WINDOW_S = 20.0
_CHECK_S = 1.0
_END_S = 5.0
_ATTEMPTS = 2  # a workspace that no clone can take must not use up all of them
_QUIET_S = 0.15
_MISSES_A_REFILL = 4  # so many callers may come before one refill runs beside them
_RETRY_S = (0.5, 1, 2, 5, 10, 30)


@dataclass(frozen=True, slots=True)
class Template:
    """What clones are made of: the saved machine, its root disk, and a small workspace to rehearse on.

    ``key`` changes when any of them does.
    """

    key: str
    saved: SavedMachine
    root: int
    rehearsal: int


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How many clones may wait, how long (seconds), and the memory that all of them may take (MiB)."""

    minimum: int = 1
    maximum: int = 8
    max_age_s: float = 600
    memory_mib: int = 2048

    @property
    def most(self) -> int:
        """The maximum that the memory allows."""
        return max(0, min(self.maximum, self.memory_mib // _MIB_EACH))


@dataclass(slots=True)
class PoolStatus:
    """Counters since the pool began, and what it is doing now. Times are seconds; callers wait until woken."""

    ready: int = 0
    making: int = 0
    in_use: int = 0
    waiting: int = 0
    target: int = 0
    hits: int = 0
    misses: int = 0
    made: int = 0
    expired: int = 0
    died: int = 0
    failures: int = 0
    refill_s: float = 0.0
    waited_s: float = 0.0
    longest_wait_s: float = 0.0
    last_failure: str = ""
    template: str = ""


@dataclass(slots=True, eq=False)
class _Kept:
    """A clone that waits. ``next_call`` is the number of the first call that its guest has not seen."""

    id: str
    machine: VirtualMachine
    tracked: Tracked
    template: str
    born: float
    next_call: int
    taken: anyio.Event = field(default_factory=anyio.Event)
    done: anyio.Event = field(default_factory=anyio.Event)
    ended: anyio.Event = field(default_factory=anyio.Event)


class Pool:
    """Made with :func:`Pool.open`; :meth:`machine` lends clones."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        templates: Callable[[], AbstractAsyncContextManager[Template]],
        current: Callable[[], str],
        tracker: VMTracker,
        limits: PoolLimits,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._hypervisor = hypervisor
        self._templates = templates
        self._current = current
        self._tracker = tracker
        self._limits = limits
        self._clock = clock
        self._ready: deque[_Kept] = deque()
        self._arrivals: deque[float] = deque(maxlen=256)
        self._changed = anyio.Event()
        self._template: Template | None = None
        self._keepers: anyio.abc.TaskGroup
        self._cloning = 0
        self._checked = 0.0
        self._unfilled = 0  # misses since a refill began
        self._template_failures = 0
        self.status = PoolStatus()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        hypervisor: Hypervisor,
        templates: Callable[[], AbstractAsyncContextManager[Template]],
        current: Callable[[], str],
        tracker: VMTracker,
        limits: PoolLimits,
        *,
        clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> AsyncIterator[Pool]:
        """A pool that fills itself for as long as the context lasts.

        Args:
            hypervisor: what runs the clones; it must be able to pause.
            templates: opens the template, building it when needed.
            current: key of the template that would be opened now.
            tracker: where the machines are recorded.
            limits: how many.
            clock: seconds; it has to go on while the computer sleeps, as the age of a clone does.
        """
        pool = cls(hypervisor, templates, current, tracker, limits, clock=clock)
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            pool._keepers = tasks
            tasks.start_soon(pool._fill)
            try:
                yield pool
            except Exception as error:  # noqa: BLE001  # raised again below, outside the task group's wrapping
                failure = error
            finally:
                tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure

    @asynccontextmanager
    async def machine(
        self, *disks: int, vm_id: str | None = None, folder: str = "", task: Sequence[str] = ()
    ) -> AsyncIterator[MicroVM]:
        """A woken machine with a workspace; destroyed with the context.

        Args:
            disks: of the workspace: its image, and perhaps one that lies on it; open for reading only,
                the caller's.
            vm_id: its name; only a clone that is made on demand takes it.
            folder: for the record: the folder that it works on.
            task: for the record: what it is for.
        """
        arrival = self._clock()
        self._arrivals.append(arrival)
        async with AsyncExitStack() as stack:
            vm = await self._wake_one(stack, disks, folder, task)
            self._notify()
            if vm is None:
                vm = await stack.enter_async_context(self._on_demand(disks, vm_id, folder, task))
            self.status.in_use += 1
            waited = self._clock() - arrival
            self.status.waited_s += waited
            self.status.longest_wait_s = max(self.status.longest_wait_s, waited)
            self._notify()
            try:
                yield vm
            finally:
                self.status.in_use -= 1

    @asynccontextmanager
    async def _on_demand(
        self, disks: tuple[int, ...], vm_id: str | None, folder: str, task: Sequence[str]
    ) -> AsyncIterator[MicroVM]:
        """What a miss gets."""
        self.status.misses += 1
        self._unfilled += 1
        self.status.waiting += 1
        waiting, template = True, None
        try:
            template = await self._wait_for_template()
            self._cloning += 1
            async with clone(self._hypervisor, template.saved, (template.root, *disks), self._tracker,
                             vm_id=vm_id, workspace=folder, task=task) as vm:  # fmt: skip
                self.status.waiting, self._cloning, waiting = self.status.waiting - 1, self._cloning - 1, False
                yield vm
        finally:
            if waiting:
                self.status.waiting -= 1
                self._cloning -= template is not None
            self._notify()

    async def wait_ready(self, count: int) -> None:
        """Wait until ``count`` clones wait (or as many as the limits allow)."""
        while len(self._ready) < min(count, self._limits.most):
            await self._changed.wait()

    # -- keeping clones -----------------------------------------------------------------------------

    async def _wake_one(
        self, stack: AsyncExitStack, disks: tuple[int, ...], folder: str, task: Sequence[str]
    ) -> MicroVM | None:
        """A kept clone, woken on a workspace; one that fails before it was used makes room for the next."""
        for _ in range(_ATTEMPTS):
            kept = self._take()
            if kept is None:
                return None
            try:
                vm = await stack.enter_async_context(self._woken(kept, disks, folder, task))
            except MachineError as error:
                self.status.died += 1
                log.event("pool.clone_failed", vm=kept.id, error=str(error))
            else:
                self.status.hits += 1
                return vm
        return None

    @asynccontextmanager
    async def _woken(
        self, kept: _Kept, disks: tuple[int, ...], folder: str, task: Sequence[str]
    ) -> AsyncIterator[MicroVM]:
        """The clone at work; whatever happens, it is not used again."""
        try:
            kept.tracked.update(workspace=folder, task=list(task), state="starting")
            for number, disk in enumerate(disks, WORKSPACE_DISK):
                await kept.machine.replace_disk(number, disk)
            await kept.machine.resume()
            async with open_channel(kept.machine.channel, first_call=kept.next_call) as channel:
                vm = MicroVM(kept.id, kept.machine, channel, kept.tracked, backend=self._hypervisor.name,
                             accelerator=self._hypervisor.accelerator)  # fmt: skip
                await vm.wake(layer=len(disks) > 1)
                yield vm
        except MachineError as error:
            error.add_note(f"{self._hypervisor.name}: {await kept.machine.diagnosis()}")
            raise
        finally:
            kept.done.set()
            with anyio.move_on_after(_END_S, shield=True):  # destroyed with the context
                await kept.ended.wait()

    def _take(self) -> _Kept | None:
        while self._ready:
            kept = self._ready.popleft()
            self.status.ready = len(self._ready)
            kept.taken.set()
            if kept.template == self.status.template and kept.machine.process.running and not self._is_old(kept):
                return kept
            if kept.machine.process.running:
                self.status.expired += 1
            else:
                self.status.died += 1
            kept.done.set()
        return None

    def _is_old(self, kept: _Kept) -> bool:
        return self._clock() - kept.born > self._limits.max_age_s

    def _target(self) -> int:
        """Clones that should wait: what arrives while one is made, and one more."""
        now = self._clock()
        recent = sum(1 for moment in self._arrivals if now - moment < _DEMAND_WINDOW_S)
        demand = recent / _DEMAND_WINDOW_S * max(self.status.refill_s, 0.5)
        wanted = math.ceil(demand) + 1 if recent else 0
        self.status.target = min(max(self._limits.minimum, wanted), self._limits.most)
        return self.status.target

    async def _fill(self) -> None:
        """Open the template, keep clones of it, and start over when it is not the current one any more."""
        failures = 0
        while True:
            try:
                async with self._templates() as template:
                    self._template, self.status.template = template, template.key
                    self._notify()
                    try:
                        await self._fill_from(template)
                    finally:
                        self._template = None
                        while self._cloning:  # they still use its descriptors; clones that run do not
                            await self._changed.wait()
                failures = 0
            except Exception as error:  # noqa: BLE001  # whatever it is, those who run must not end with it
                self._template_failures += 1
                failures = self._failed(_first(error), failures)
                await self._pause(_RETRY_S[min(failures, len(_RETRY_S)) - 1])

    async def _fill_from(self, template: Template) -> None:
        """One clone at a time, until the template is out of date; then none of its clones waits any more."""
        failures = 0
        try:
            while self._is_current(template):
                self._drop([kept for kept in self._ready if self._is_old(kept)])
                surplus = len(self._ready) - self._target()
                if surplus > 0:
                    self._drop([self._ready[-1]])
                elif surplus < 0 and (quiet := self._until_quiet()) > 0:
                    await anyio.sleep(quiet)
                    continue
                elif surplus < 0 and (not self.status.waiting or self._unfilled >= _MISSES_A_REFILL):
                    self._unfilled = 0
                    made, before = anyio.Event(), self.status.failures
                    self.status.making, self._cloning = 1, self._cloning + 1
                    self._keepers.start_soon(self._keep, template, made)
                    await made.wait()
                    self.status.making = 0
                    failures = failures + 1 if self.status.failures > before else 0
                    if failures:
                        await self._pause(_RETRY_S[min(failures, len(_RETRY_S)) - 1])
                    continue
                with anyio.move_on_after(1.0):
                    await self._changed.wait()
        finally:
            self._drop(list(self._ready))

    def _is_current(self, template: Template) -> bool:
        """Asked of the disk at most once a second."""
        if self._clock() - self._checked > _CHECK_S:
            self._checked = self._clock()
            return self._current() == template.key
        return True

    def _until_quiet(self) -> float:
        """Seconds to leave the processors to whoever has just come, unless nobody could be served next."""
        if not self._ready or not self._arrivals:
            return 0.0
        return self._arrivals[-1] + _QUIET_S - self._clock()

    async def _keep(self, template: Template, made: anyio.Event) -> None:
        """The life of one clone: make, rehearse, pause, wait, be used, end."""
        start, name = self._clock(), new_id()
        disks = all_disks((template.root, template.rehearsal))
        kept: _Kept | None = None
        try:
            rehearsed = self._hypervisor.capabilities.pause
            tracked = self._tracker.track(name, self._hypervisor, task=["pool"])
            async with self._hypervisor.clone(
                name, template.saved, disks, follow=tracked.follow, running=rehearsed
            ) as machine:
                tracked.started(machine.process)
                next_call = 1
                if rehearsed:
                    next_call = await self._rehearse(name, machine)
                    await machine.pause()
                tracked.update(state="ready")
                kept = _Kept(name, machine, tracked, template.key, start, next_call)
                self._ready.append(kept)
                self.status.ready, self.status.made = len(self._ready), self.status.made + 1
                self.status.refill_s = self._clock() - start
                self._cloning -= 1
                made.set()
                self._notify()
                await self._until_taken(kept)
                if kept.taken.is_set():
                    await kept.done.wait()
        except Exception as error:  # noqa: BLE001  # of one clone; the others must not end with it
            # One that dies while it is used raises where it is used.
            if kept is None:
                self._failed(_first(error), 0)
        finally:
            if not made.is_set():
                self._cloning -= 1
            if kept is not None:
                kept.ended.set()
                if kept in self._ready:
                    self._ready.remove(kept)
            self.status.ready = len(self._ready)
            made.set()
            self._notify()

    async def _rehearse(self, name: str, machine: VirtualMachine) -> int:
        """Run our own command through every step of an action, over our own workspace.

        Returns:
            The number of the next call on the channel.
        """
        async with open_channel(machine.channel) as channel:
            vm = MicroVM(name, machine, channel, backend=self._hypervisor.name,
                         accelerator=self._hypervisor.accelerator)  # fmt: skip
            await vm.wake()
            for argv in _REHEARSAL:
                try:
                    outcome = await vm.run(Command(argv, cwd="/workspace"), output=_discard, timeout_s=30)
                except CallFailed:  # a container image may lack it; our own cannot, or it would be no template
                    continue
                if outcome.exit_code:
                    raise MachineError(
                        f"A rehearsal ended with status {outcome.exit_code}.", hint="Run 'luminaguard doctor'."
                    )
            await vm.changes(lambda _: None, lambda _: None)
            await vm.rest()
            return channel.release()

    async def _until_taken(self, kept: _Kept) -> None:
        """Wait until it is taken, too old, or dead; remove it from the ready ones in the latter cases."""
        async with anyio.create_task_group() as first:

            async def dies() -> None:
                await watch(kept.machine, kept.id)
                first.cancel_scope.cancel()

            first.start_soon(dies)
            with anyio.move_on_after(self._limits.max_age_s):
                await kept.taken.wait()
            first.cancel_scope.cancel()
        if kept.taken.is_set():
            return
        self._ready.remove(kept)
        if kept.machine.process.running:
            self.status.expired += 1
        else:
            self.status.died += 1
            log.event("pool.clone_died", vm=kept.id)

    def _drop(self, unwanted: list[_Kept]) -> None:
        for kept in unwanted:
            self._ready.remove(kept)
            self.status.expired += 1
            kept.taken.set()
            kept.done.set()
        self.status.ready = len(self._ready)

    def _failed(self, error: BaseException, failures: int) -> int:
        self.status.failures += 1
        self.status.last_failure = str(error)[:300]
        log.event("pool.failure", error=repr(error), notes=getattr(error, "__notes__", []))
        return failures + 1

    async def _wait_for_template(self) -> Template:
        """The template that clones are made from now; it may be being built.

        Raises:
            MachineError: it cannot be built.
        """
        before = self._template_failures
        while self._template is None:
            if self._template_failures > before:
                raise MachineError(
                    f"The machine that clones are copied from cannot be made: {self.status.last_failure}",
                    hint="Run 'luminaguard doctor'.",
                    kept="Nothing was started.",
                )
            await self._changed.wait()
        return self._template

    async def _pause(self, seconds: float) -> None:
        self._notify()
        await anyio.sleep(seconds)

    def _notify(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _discard(_stream: int, _data: bytes) -> None:
    return
