"""One action: the state is read, the command runs in a machine, its changes come out, the machine ends.

The order in :func:`run` is the promise: nothing runs before it is recorded, the machine is destroyed
before there is anything to decide, and what there is to decide survives a reboot.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, cast

import anyio
import anyio.to_thread

from luminaguard import log
from luminaguard.errors import (
    ChangesetRefused,
    Forbidden,
    GuestProtocolError,
    LuminaGuardError,
    TaskStopped,
    WorkspaceChanged,
    WorkspaceError,
)

if TYPE_CHECKING:
    from luminaguard.actions.policy import Policy
    from luminaguard.approvals import Request
    from luminaguard.effects import Changeset
    from luminaguard.images.manifest import Image
    from luminaguard.microvm.channel import Call
    from luminaguard.microvm.machine import Command, MicroVM, Outcome
    from luminaguard.microvm.port import SavedMachine
    from luminaguard.runtime.core import Runtime
    from luminaguard.storage.ledger import Ledger
    from luminaguard.workspaces.state import WorkspaceState

__all__ = ["Execution", "Feed", "Output", "Progress", "Status", "run"]

T = TypeVar("T")
Status = Literal["published", "pending", "denied", "unchanged", "refused"]
Output = Callable[[int, bytes], Awaitable[None]]
Feed = Callable[["Call"], Awaitable[None]]
Progress = Callable[[str], None]
_LONG_S = 1.5
_MOST_COMMAND = 64 << 10


@dataclass(slots=True)
class Execution:
    """What one action did, and where its effects stand.

    ``spawn_ms`` is from the start of the hypervisor process to a woken guest, in milliseconds.
    ``jail`` names each layer around the hypervisor and ``on``, or why it is missing. ``recovered`` says
    what was found of publishes that a crash had interrupted. ``refusal`` is why nobody is asked.
    """

    vm_id: str
    backend: str
    accelerator: str
    spawn_ms: float
    outcome: Outcome
    changeset: Changeset
    request: Request | None = None
    status: Status = "unchanged"
    detail: str = ""
    timings_ms: dict[str, float] = field(default_factory=dict)
    jail: dict[str, str] = field(default_factory=dict)
    recovered: list[str] = field(default_factory=list)
    refusal: LuminaGuardError | None = None


async def run(
    runtime: Runtime,
    workspace: Path,
    command: Command,
    *,
    output: Output,
    feed: Feed | None = None,
    progress: Progress = lambda _: None,
    task: str = "",
    taint: tuple[str, ...] = (),
) -> Execution:
    """Run a command on a copy of the workspace and take its effects out; publish nothing.

    Args:
        runtime: the parts.
        workspace: absolute path of the folder.
        command: what to run.
        output: receives standard output (1) and standard error (2) as they come.
        feed: writes standard input and signals.
        progress: told in a few words what is being done, for anything that may take long.
        task: what the action belongs to; labels of untrusted input stay with it.
        taint: labels of untrusted input that the command line itself follows.

    Returns:
        The execution; its status is ``unchanged``, ``pending`` (there is a request), or
        ``refused`` (timed out, or its effects may not be published).

    Raises:
        Forbidden: a rule forbids to run it; nothing ran.
        ApprovalNeeded: a rule wants to be asked first; nothing ran.
        PolicyInvalid: the rules cannot be read; nothing ran.
        CallFailed: the command could not be started in the guest.
        LuminaGuardError: anything else that went wrong; the workspace was not touched.
    """
    from luminaguard.microvm.broker import has_pool
    from luminaguard.workspaces.collect import Collector
    from luminaguard.workspaces.own import refuse_changes

    marks = _Stopwatch()
    recovered: list[str] = []
    runtime.tracker.reap()
    argv = _shown(command.argv)
    async with AsyncExitStack() as stack:
        prepared = _Prepared(stack)
        if runtime.publisher.interrupted():  # what is half published must be settled before it is read
            recovered += await anyio.to_thread.run_sync(runtime.decisions.recover)
        # The database is opened beside what takes longer: nothing runs in a machine before that is recorded.
        opening, pooled = _Background(lambda: _open_ledger(runtime, recovered)), has_pool(runtime.folders.run)
        if pooled:
            stack.enter_context(opening)
        await _prepare(runtime, prepared, workspace, progress, template=not pooled)
        if not pooled:
            stack.enter_context(opening)
        assert prepared.state is not None and prepared.policy is not None
        labels = await anyio.to_thread.run_sync(_admit, runtime, prepared, opening, workspace, command, task, taint)
        marks.lap("prepare")
        state, writer, vm_id = prepared.state, None, ""
        try:
            async with _machine(runtime, prepared, workspace, argv, progress) as vm:
                vm_id, spawn_ms = vm.id, marks.lap("spawn")
                ledger = await opening.result()
                ledger.append("exec.started", vm=vm_id, workspace=str(workspace), command=argv,
                              image=prepared.image.folder.name, backend=vm.backend,
                              accelerator=vm.accelerator, profile=command.profile)  # fmt: skip
                marks.lap("ledger")
                command = command.within(prepared.image.manifest.environment)
                outcome = await vm.run(command, output=output, feed=feed, timeout_s=runtime.settings.timeout_s)
                marks.lap("command")
                writer = runtime.blobs.writer(vm_id)
                collector = Collector(writer, runtime.limits("changeset"))
                told = _once_it_takes_long(progress, "taking the changes out")

                def content(data: bytes) -> None:
                    collector.content(data)
                    told(f"{collector.size >> 20:,} MiB")

                mode: int | None = None
                if not outcome.timed_out:
                    mode = await vm.changes(
                        lambda e: collector.entry(e.path, e.kind, e.mode, e.size, e.target, e.opaque), content
                    )
                marks.lap("changes")
            changeset = collector.changeset(state.entries)
            refuse_changes(changeset, runtime.own_paths(workspace))
            execution = Execution(vm_id, vm.backend, vm.accelerator, spawn_ms, outcome, changeset,
                                  jail=vm.process.layers, recovered=recovered)  # fmt: skip
        except BaseException as error:
            if writer is not None:
                writer.discard()
            log.event("exec.failed", vm=vm_id, error=repr(error), notes=getattr(error, "__notes__", []))
            kind = "exec.refused" if isinstance(error, ChangesetRefused | GuestProtocolError) else "exec.failed"
            # Not awaited: this may be a cancellation, and the record is owed all the same.
            opening.join().append(kind, vm=vm_id, reason=type(error).__name__, message=ascii(str(error))[:500])
            raise
    ledger.append("exec.finished", vm=vm_id, exit_code=outcome.exit_code, timed_out=outcome.timed_out,
                  out_of_memory=outcome.out_of_memory, changes=len(changeset), digest=changeset.digest)  # fmt: skip
    if outcome.timed_out:
        execution.status, execution.detail = (
            "refused",
            "the command was stopped at its time limit",
        )
    elif mode is not None and mode != state.mode | 0o700:
        execution.detail = f"the mode of the folder itself became {mode:04o} in the machine; that is not published"
    if len(changeset) and not outcome.timed_out:
        with anyio.CancelScope(shield=True):  # it ran to its end: what it did is kept, whoever wants to leave now
            await anyio.to_thread.run_sync(_request, runtime, execution, state, command, task, labels)
    if execution.request is None:
        writer.discard()
    marks.lap("record")
    execution.timings_ms = marks.laps
    log.detail("exec.finished", vm=vm_id, status=execution.status, **marks.laps)
    return execution


async def _prepare(
    runtime: Runtime, prepared: _Prepared, workspace: Path, progress: Progress, *, template: bool
) -> None:
    """Read and pack the workspace, and load the template beside it; all ends before anything is raised."""
    prepared.image = runtime.images.current()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, _prepare_workspace, runtime, workspace, prepared, progress)
        tasks.start_soon(anyio.to_thread.run_sync, _prepare_policy, runtime, workspace, prepared)
        if template:
            await _prepare_template(runtime, prepared, progress)
    if prepared.failures:
        raise prepared.failures[0]


async def _prepare_template(runtime: Runtime, prepared: _Prepared, progress: Progress) -> None:
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
    runtime: Runtime, prepared: _Prepared, workspace: Path, task: list[str], progress: Progress
) -> AsyncIterator[MicroVM]:
    """A woken machine: from a pool that another process serves, else a clone of our own."""
    from luminaguard.microvm.broker import borrow
    from luminaguard.microvm.machine import clone

    if prepared.saved is None:
        async with borrow(runtime.folders.run, prepared.disks, runtime.kind, folder=str(workspace), task=task) as vm:
            if vm is not None:
                yield vm
                return
        await _prepare_template(runtime, prepared, progress)
        if prepared.failures:
            raise prepared.failures[0]
    assert prepared.saved is not None
    disks = (prepared.root, *prepared.disks)
    async with clone(runtime.hypervisor, prepared.saved, disks, runtime.tracker,
                     workspace=str(workspace), task=task) as vm:  # fmt: skip
        yield vm


def _prepare_workspace(runtime: Runtime, workspace: Path, prepared: _Prepared, progress: Progress) -> None:
    from luminaguard.workspaces.index import HashIndex
    from luminaguard.workspaces.pack import WorkspaceImages
    from luminaguard.workspaces.state import read_state

    told = _once_it_takes_long(progress, "reading the workspace")
    try:
        prepared.state = read_state(
            workspace, runtime.limits("workspace"), lambda count: told(f"{count:,} entries"),
            own=runtime.own_paths(workspace), indexes=runtime.folders.cache / "indexes",
        )  # fmt: skip
        told = _once_it_takes_long(progress, "packing the workspace")
        images = WorkspaceImages(runtime.folders.cache).open_layered(
            prepared.state, lambda count: told(f"{count:,} entries")
        )
        prepared.disks = tuple(prepared.keep(fd) for fd in images if fd >= 0)
    except WorkspaceChanged as error:
        HashIndex(runtime.folders.cache / "indexes", workspace).forget()
        prepared.failures.append(error)
    except LuminaGuardError as error:
        prepared.failures.append(error)
    except OSError as error:
        failure = WorkspaceError(
            f"The workspace could not be read or packed: {error}.",
            hint="Check the folder, and that the cache folder has free space.",
        )
        prepared.failures.append(failure)


def _prepare_policy(runtime: Runtime, workspace: Path, prepared: _Prepared) -> None:
    try:
        prepared.policy = runtime.policy(workspace)
    except LuminaGuardError as error:
        prepared.failures.insert(0, error)


def _admit(
    runtime: Runtime, prepared: _Prepared, opening: _Background[Ledger], workspace: Path, command: Command, task: str,
    taint: tuple[str, ...],
) -> frozenset[str]:  # fmt: skip
    """Refuse what may not even be rehearsed; return the labels that the action carries."""
    from luminaguard.actions.model import Action, Risk
    from luminaguard.effects.outside import ToolRun
    from luminaguard.runtime.policy import judge, marked_labels

    assert prepared.policy is not None and prepared.state is not None
    found = [(label, "given on the command line") for label in taint]
    found += marked_labels(prepared.policy, prepared.state.entries)
    labels = frozenset(label for label, _ in found)
    if task:
        opening.join()
        if (why := runtime.tasks.stopped(task)) is not None:
            raise TaskStopped(task, why, kept="Nothing ran.")
        labels = runtime.tasks.add_labels(task, found)
    run_it = ToolRun("exec", {"command": _text(command.argv)}, str(workspace))
    action = Action.from_json({"effect": "run", "tool": run_it.tool, "arguments": run_it.arguments,
                               "workspace": run_it.workspace, "task": task, "taint": sorted(labels)})  # fmt: skip
    _, judged = judge(prepared.policy, action)
    if judged.risk is not Risk.GREEN or judged.people > 1:
        opening.join()
        runtime.decisions.permit(run_it, prepared.policy, task, labels)
    return labels


def _once_it_takes_long(progress: Progress, what: str) -> Progress:
    """Tell how far something is, but not of what is over in a moment."""
    start = time.monotonic()

    def told(amount: str) -> None:
        if time.monotonic() - start > _LONG_S:
            progress(f"{what}: {amount}")

    return told


def _open_ledger(runtime: Runtime, recovered: list[str]) -> Ledger:
    recovered += runtime.decisions.recover()
    return runtime.ledger


def _request(
    runtime: Runtime, execution: Execution, state: WorkspaceState, command: Command, task: str, labels: frozenset[str]
) -> None:
    """Store the effects and ask for approval: after this they survive a reboot. What is forbidden is not kept."""
    from luminaguard.approvals import Request, State

    runtime.blobs.persist(execution.vm_id)
    # By the ledger's clock: it never goes back, and expiry is judged by it.
    now = runtime.ledger.current_time()
    request = Request(
        id=execution.vm_id.replace("vm-", "req-"), workspace=str(state.path), inode=state.inode,
        digest=execution.changeset.digest, command=_kept(command.argv),
        exit_code=execution.outcome.exit_code, created_ns=now,
        expires_ns=now + runtime.settings.approval_ttl_s * 1_000_000_000, state=State.PENDING,
        task=task, taint=tuple(sorted(labels)),
    )  # fmt: skip
    # Contents are kept under the request's name from here on.
    source = runtime.blobs.folder / execution.vm_id
    if source.is_dir():
        source.rename(runtime.blobs.folder / request.id)
    try:
        execution.request = runtime.decisions.ask(request, execution.changeset)
        execution.status = "pending"
    except Forbidden as error:
        runtime.blobs.forget(request.id)
        execution.status, execution.detail, execution.refusal = "refused", error.message, error


class _Prepared:
    """What the preparations hand over; all of them end before the first failure is raised."""

    image: Image

    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack
        self.state: WorkspaceState | None = None
        self.policy: Policy | None = None
        self.saved: SavedMachine | None = None
        self.root = -1
        self.disks: tuple[int, ...] = ()
        self.failures: list[LuminaGuardError] = []

    def open_root(self) -> None:
        from luminaguard.images.manifest import ROOT

        try:
            self.root = self.keep(self.image.open_part(ROOT))
        except LuminaGuardError as error:
            self.failures.append(error)

    def keep(self, fd: int) -> int:
        self.stack.callback(os.close, fd)
        return fd


class _Background(Generic[T]):
    """A function that runs in a thread of its own, which ends before this context does."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._value: T | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background")

    def __enter__(self) -> _Background[T]:
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


class _Stopwatch:
    """Milliseconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> float:
        now = time.perf_counter()
        self.laps[name] = round((now - self._last) * 1000, 1)
        self._last = now
        return self.laps[name]


def _text(argv: Sequence[str]) -> list[str]:
    """The whole command line, bytes that are no text as escapes."""
    return [word.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for word in argv]


def _kept(argv: Sequence[str]) -> tuple[str, ...]:
    """The command line of a request: all of it, or its beginning and the digest of all, for no two are the same."""
    whole = _text(argv)
    if sum(map(len, whole)) <= _MOST_COMMAND:
        return tuple(whole)
    return (*_shown(argv), f"sha256:{hashlib.sha256(json.dumps(whole).encode()).hexdigest()}")


def _shown(argv: Sequence[str]) -> list[str]:
    """The command line for records: bounded, and without bytes that are not text."""
    return [ascii(word)[1:-1][:500] if not word.isprintable() else word[:500] for word in argv][:100]
