"""One command in one machine on one state of a workspace; its effects come out, and nothing goes anywhere."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, cast

import anyio
import anyio.to_thread

from luminaguard import log
from luminaguard.errors import ChangesetRefused, GuestProtocolError, LuminaGuardError

if TYPE_CHECKING:
    from luminaguard.actions.policy import Policy
    from luminaguard.approvals import Request
    from luminaguard.effects import Changeset
    from luminaguard.effects.changes import Entry
    from luminaguard.images.layers.store import LayerStore
    from luminaguard.images.manifest import Image
    from luminaguard.microvm.channel import Call
    from luminaguard.microvm.machine import Command, MicroVM, Outcome
    from luminaguard.microvm.port import SavedMachine
    from luminaguard.microvm.relay import RelayedConnection
    from luminaguard.runtime.core import Runtime
    from luminaguard.storage.ledger import Ledger
    from luminaguard.workspaces.blobs import BlobWriter
    from luminaguard.workspaces.state import WorkspaceState

__all__ = ["PROXY_PORT", "Background", "Execution", "Feed", "Output", "Outside", "Prepared", "Progress", "Rehearsal",
           "Status", "Stopwatch", "once_it_takes_long", "prepare_template", "shown"]  # fmt: skip

T = TypeVar("T")
Status = Literal["published", "pending", "denied", "unchanged", "refused"]
Output = Callable[[int, bytes], Awaitable[None]]
Feed = Callable[["Call"], Awaitable[None]]
Progress = Callable[[str], None]
Handler = Callable[["RelayedConnection"], Awaitable[None]]
Outside = Callable[[frozenset[str]], Handler]
"""Answers connections of a machine whose workspace bears these labels."""
PROXY_PORT = 3128
"""Of a machine's loopback, where programs find the way out, if they are given one."""
_LONG_S = 1.5


@dataclass(slots=True)
class Execution:
    """What one action did, and where its effects stand.

    ``spawn_ms`` is from the start of the hypervisor process to a woken guest, in milliseconds.
    ``requests`` has one for each folder in which something changed. ``jail`` names each layer around the hypervisor
    and ``on``, or why it is missing. ``recovered`` says what was found of publishes that a crash had interrupted.
    ``refusal`` is why nobody is asked.
    """

    vm_id: str
    backend: str
    accelerator: str
    spawn_ms: float
    outcome: Outcome
    changeset: Changeset
    requests: list[Request] = field(default_factory=list)
    status: Status = "unchanged"
    detail: str = ""
    timings_ms: dict[str, float] = field(default_factory=dict)
    jail: dict[str, str] = field(default_factory=dict)
    recovered: list[str] = field(default_factory=list)
    refusal: LuminaGuardError | None = None

    @property
    def request(self) -> Request | None:
        """The request, where there is one folder; None if there is none."""
        return self.requests[0] if self.requests else None


@dataclass(slots=True)
class Rehearsal:
    """One command on one state of a workspace, in a machine that ends with it.

    Attributes:
        workspace: whose state it is: absolute path of the folder.
        entries: what the disks show.
    """

    runtime: Runtime
    workspace: Path
    command: Command
    entries: Mapping[str, Entry]
    output: Output
    feed: Feed | None = None
    progress: Progress = lambda _: None
    timeout_s: float | None = None
    """Another limit than the settings', in seconds."""
    outside: Handler | None = None
    beside: Mapping[str, Path] = field(default_factory=dict)
    """Folders that lie in the workspace under these names."""

    async def once(
        self, prepared: Prepared, opening: Background[Ledger], marks: Stopwatch, task: str = ""
    ) -> tuple[Execution, int | None, BlobWriter]:
        """Run it; return what it did, the mode that the folder itself has now, and where the contents are.

        Raises:
            ChangesetRefused, GuestProtocolError: what the guest reported cannot be.
            LuminaGuardError: the machine failed; all is recorded.
        """
        from luminaguard.workspaces.joined import split
        from luminaguard.workspaces.own import refuse_changes

        runtime, vm_id, argv = self.runtime, "", shown(self.command.argv)
        writer: BlobWriter | None = None
        try:
            async with _machine(runtime, prepared, self.workspace, argv, self.progress) as vm:
                vm_id, spawn_ms = vm.id, marks.lap("spawn")
                ledger = await opening.result()
                ledger.append("exec.started", vm=vm_id, workspace=str(self.workspace), command=argv, task=task,
                              image=prepared.image.folder.name, backend=vm.backend,
                              accelerator=vm.accelerator, profile=self.command.profile)  # fmt: skip
                marks.lap("ledger")
                command = self.command.within(prepared.image.manifest.environment)
                way_out = vm.relaying(PROXY_PORT, self.outside) if self.outside else nullcontext()
                async with way_out:
                    outcome = await vm.run(command, output=self.output, feed=self.feed,
                                           timeout_s=self.timeout_s or runtime.settings.timeout_s)  # fmt: skip
                marks.lap("command")
                writer = runtime.blobs.writer(vm_id)
                changeset, mode = await self._take_out(vm, writer, timed_out=outcome.timed_out)
                marks.lap("changes")
            refuse_changes(changeset, self._own_paths())
            split(changeset, self.beside)  # raises for a folder that is none any more
        except BaseException as error:
            if writer is not None:
                writer.discard()
            log.event("exec.failed", vm=vm_id, error=repr(error), notes=getattr(error, "__notes__", []))
            kind = "exec.refused" if isinstance(error, ChangesetRefused | GuestProtocolError) else "exec.failed"
            # Not awaited: this may be a cancellation, and the record is owed all the same.
            opening.join().append(kind, vm=vm_id, reason=type(error).__name__, message=ascii(str(error))[:500])
            raise
        try:
            ledger.append("exec.finished", vm=vm_id, exit_code=outcome.exit_code, timed_out=outcome.timed_out,
                          out_of_memory=outcome.out_of_memory, changes=len(changeset),
                          digest=changeset.digest)  # fmt: skip
        except BaseException:  # what is not recorded did not happen
            writer.discard()
            raise
        execution = Execution(vm_id, vm.backend, vm.accelerator, spawn_ms, outcome, changeset, jail=vm.process.layers)
        return execution, mode, writer

    def _own_paths(self) -> frozenset[str]:
        beside = (f"{name}/{path}" for name, folder in self.beside.items() for path in self.runtime.own_paths(folder))
        return self.runtime.own_paths(self.workspace) | frozenset(beside)

    async def _take_out(self, vm: MicroVM, writer: BlobWriter, *, timed_out: bool) -> tuple[Changeset, int | None]:
        """What changed, and the mode of the folder itself; nothing of a command that was stopped."""
        from luminaguard.workspaces.collect import Collector

        collector = Collector(writer, self.runtime.limits("changeset"))
        told = once_it_takes_long(self.progress, "taking the changes out")

        def content(data: bytes) -> None:
            collector.content(data)
            told(f"{collector.size >> 20:,} MiB")

        mode = None
        if not timed_out:
            mode = await vm.changes(
                lambda e: collector.entry(e.path, e.kind, e.mode, e.size, e.target, e.opaque), content
            )
        return collector.changeset(self.entries), mode


async def prepare_template(runtime: Runtime, prepared: Prepared, progress: Progress) -> None:
    """Open the root and the machine that is copied; a failure is kept with what is prepared."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, prepared.open_root)
        try:
            prepared.saved = await prepared.stack.enter_async_context(
                runtime.templates.saved(runtime.hypervisor, prepared.image, runtime.settings.memory_mib, progress)
            )
        except LuminaGuardError as error:
            prepared.failures.append(error)


@asynccontextmanager
async def _machine(
    runtime: Runtime, prepared: Prepared, workspace: Path, task: list[str], progress: Progress
) -> AsyncIterator[MicroVM]:
    """A woken machine: from a pool that another process serves, else a clone of our own."""
    from luminaguard.microvm.broker import borrow
    from luminaguard.microvm.machine import clone

    if prepared.saved is None:
        async with borrow(runtime.folders.run, prepared.disks, runtime.kind, folder=str(workspace), task=task) as vm:
            if vm is not None:
                yield vm
                return
        await prepare_template(runtime, prepared, progress)
        if prepared.failures:
            raise prepared.failures[0]
    assert prepared.saved is not None
    disks = (prepared.root, *prepared.disks)
    async with clone(runtime.hypervisor, prepared.saved, disks, runtime.tracker, packages=prepared.packages,
                     workspace=str(workspace), task=task) as vm:  # fmt: skip
        yield vm


def once_it_takes_long(progress: Progress, what: str) -> Progress:
    """Tell how far something is, but not of what is over in a moment."""
    start = time.monotonic()

    def told(amount: str) -> None:
        if time.monotonic() - start > _LONG_S:
            progress(f"{what}: {amount}")

    return told


class Prepared:
    """What the preparations hand over; all of them end before the first failure is raised."""

    image: Image

    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack
        self.states: dict[str, WorkspaceState] = {}
        """Of each folder, by the name that it has in the machine; "" is the working folder."""
        self.state: WorkspaceState | None = None
        """Of all of them together."""
        self.policies: dict[str, Policy] = {}
        self.saved: SavedMachine | None = None
        self.root = self.packages = -1
        self.disks: tuple[int, ...] = ()
        self.failures: list[LuminaGuardError] = []

    def open_root(self) -> None:
        """Open the root of the image."""
        from luminaguard.images.manifest import ROOT

        try:
            self.root = self.keep(self.image.open_part(ROOT))
        except LuminaGuardError as error:
            self.failures.append(error)

    def open_packages(self, layers: LayerStore, layer: str) -> None:
        """Open the programs that lie beside the image."""
        try:
            self.packages = self.keep(layers.load(layer).open_on(self.image))
        except LuminaGuardError as error:
            self.failures.append(error)

    def keep(self, fd: int) -> int:
        """A descriptor that is closed with all the others."""
        self.stack.callback(os.close, fd)
        return fd


class Background(Generic[T]):
    """A function that runs in a thread of its own, which ends before this context does."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._value: T | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background")

    def __enter__(self) -> Background[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def join(self) -> T:
        """Block until it has ended; return or raise what it did."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return cast("T", self._value)

    async def result(self) -> T:
        """Like :meth:`join`, without blocking the event loop."""
        return await anyio.to_thread.run_sync(self.join)

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001  # raised where the value is asked for
            self._failure = error


class Stopwatch:
    """Milliseconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> float:
        """End a lap; return how long it was."""
        now = time.perf_counter()
        self.laps[name] = round((now - self._last) * 1000, 1)
        self._last = now
        return self.laps[name]


def shown(argv: Sequence[str]) -> list[str]:
    """The command line for records: bounded, and without bytes that are not text."""
    return [ascii(word)[1:-1][:500] if not word.isprintable() else word[:500] for word in argv][:100]
