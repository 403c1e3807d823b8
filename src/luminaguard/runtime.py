"""The composition root: builds the parts from Settings, owns their lifetimes, runs one action.

The order in :meth:`Runtime.exec` is the promise: the state is read and packed, the command runs in
a clone, its changes come out, the machine is destroyed, and only then is there anything to decide.
Each step is in the ledger or the database before the next one begins.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import anyio
import anyio.to_thread

from luminaguard import log
from luminaguard.errors import (
    ChangesetRefused,
    GuestProtocolError,
    LuminaGuardError,
    OutcomeUnknown,
    RequestNotFound,
    WorkspaceError,
)
from luminaguard.settings import Folders, Settings

if TYPE_CHECKING:
    from luminaguard.approvals import Request
    from luminaguard.effects import Changeset
    from luminaguard.effects.card import DiffCard
    from luminaguard.images.build import ImageStore
    from luminaguard.images.manifest import Image
    from luminaguard.microvm.channel import Call
    from luminaguard.microvm.machine import Command, MicroVM, Outcome
    from luminaguard.microvm.pool import Pool, PoolLimits, Template
    from luminaguard.microvm.port import SavedMachine
    from luminaguard.microvm.qemu.backend import QemuHypervisor
    from luminaguard.microvm.tracker import VMTracker
    from luminaguard.storage.repositories import Approvals, Ledger
    from luminaguard.workspaces.blobs import BlobStore
    from luminaguard.workspaces.publish import Publisher
    from luminaguard.workspaces.state import WorkspaceState

__all__ = ["Execution", "Runtime", "Status"]

T = TypeVar("T")

_ORPHAN_AGE_S = 3600
Status = Literal["published", "pending", "denied", "unchanged", "refused"]
Output = Callable[[int, bytes], Awaitable[None]]
Feed = Callable[["Call"], Awaitable[None]]
Progress = Callable[[str], None]


@dataclass(slots=True)
class Execution:
    """What one action did, and where its effects stand.

    ``spawn_ms`` is from the start of the hypervisor process to a woken guest, in milliseconds.
    ``jail`` names each layer around the hypervisor and ``on``, or why it is missing.
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


class Runtime:
    """All parts, made when first needed: a command that needs no database opens none."""

    def __init__(self, settings: Settings, folders: Folders) -> None:
        self.settings = settings
        self.folders = folders.ensure()

    # -- the parts ------------------------------------------------------------------------------

    @cached_property
    def images(self) -> ImageStore:
        """The guest images."""
        from luminaguard.images.build import ImageStore

        return ImageStore(self.folders.cache)

    @cached_property
    def hypervisor(self) -> QemuHypervisor:
        """The hypervisor with its accelerator; raises HypervisorUnavailable."""
        from luminaguard.microvm.jail import Jail
        from luminaguard.microvm.select import choose_hypervisor

        jail = Jail(required=self.settings.require_jail)
        return choose_hypervisor(self.settings.qemu, self.settings.accelerator, self.folders.run, jail)

    @cached_property
    def tracker(self) -> VMTracker:
        """Running machines."""
        from luminaguard.microvm.tracker import VMTracker

        return VMTracker(self.folders.run)

    @cached_property
    def blobs(self) -> BlobStore:
        """Contents that wait for a decision."""
        from luminaguard.workspaces.blobs import BlobStore

        return BlobStore(self.folders.state)

    @cached_property
    def publisher(self) -> Publisher:
        """Publishes into workspaces."""
        from luminaguard.workspaces.publish import Publisher

        return Publisher(self.folders.state, self.blobs)

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger; opening it opens the database."""
        from luminaguard.storage.database import Database
        from luminaguard.storage.keys import load_key
        from luminaguard.storage.repositories import Ledger

        self._database = Database.open(self.folders.state / "luminaguard.db")
        key = load_key(self.folders.state / "keys", "ledger")
        return Ledger(self._database, key, self.folders.state / "ledger-head.json")

    @cached_property
    def approvals(self) -> Approvals:
        """Requests and decisions."""
        from luminaguard.storage.repositories import Approvals

        ledger = self.ledger
        return Approvals(self._database, ledger)

    @asynccontextmanager
    async def open_pool(self, limits: PoolLimits | None = None) -> AsyncIterator[Pool]:
        """A warm pool of this runtime's machines, for as long as the context lasts."""
        from luminaguard.microvm.pool import Pool, PoolLimits
        from luminaguard.microvm.template import TemplateStore

        store, s = TemplateStore(self.folders.cache), self.settings
        limits = limits or PoolLimits(s.pool_minimum, s.pool_maximum, s.pool_max_age_s, s.pool_memory_mib)

        def current() -> str:
            return store.key(self.hypervisor, self.images.current(), s.memory_mib)

        async with Pool.open(self.hypervisor, self._pool_template, current, self.tracker, limits) as pool:
            yield pool

    @asynccontextmanager
    async def _pool_template(self) -> AsyncIterator[Template]:
        from luminaguard.images.manifest import ROOT
        from luminaguard.microvm.pool import Template
        from luminaguard.microvm.template import TemplateStore

        store, image = TemplateStore(self.folders.cache), self.images.current()
        async with AsyncExitStack() as stack:
            root = await anyio.to_thread.run_sync(image.open_part, ROOT)
            stack.callback(os.close, root)
            rehearsal = await anyio.to_thread.run_sync(self._open_rehearsal)
            stack.callback(os.close, rehearsal)
            saved = await stack.enter_async_context(
                store.saved(self.hypervisor, image, self.settings.memory_mib, lambda _: None)
            )
            yield Template(store.key(self.hypervisor, image, self.settings.memory_mib), saved, root, rehearsal)

    def _open_rehearsal(self) -> int:
        """An empty workspace on a disk as large as any can be, for clones to rehearse on."""
        from luminaguard.microvm.template import placeholder
        from luminaguard.workspaces.pack import WorkspaceImages
        from luminaguard.workspaces.state import read_state

        folder = self.folders.cache / "rehearsal"
        folder.mkdir(mode=0o700, exist_ok=True)
        image = WorkspaceImages(self.folders.cache).open(read_state(folder, self._limits("workspace")))
        try:
            return placeholder(os.pread(image, 1 << 20, 0))
        finally:
            os.close(image)

    # -- one action -------------------------------------------------------------------------------

    async def exec(
        self,
        workspace: Path,
        command: Command,
        *,
        output: Output,
        feed: Feed | None = None,
        progress: Progress = lambda _: None,
    ) -> Execution:
        """Run a command on a copy of the workspace and take its effects out; publish nothing.

        Args:
            workspace: absolute path of the folder.
            command: what to run.
            output: receives standard output (1) and standard error (2) as they come.
            feed: writes standard input and signals.
            progress: told in a few words what is being done, for anything that may take long.

        Returns:
            The execution; its status is ``unchanged``, ``pending`` (there is a request), or
            ``refused`` (timed out, or its effects may not be published).

        Raises:
            CallFailed: the command could not be started in the guest.
            LuminaGuardError: anything else that went wrong; the workspace was not touched.
        """
        from luminaguard.microvm.broker import has_pool
        from luminaguard.workspaces.collect import Collector

        marks = _Stopwatch()
        self.tracker.running()
        argv = _shown(command.argv)
        async with AsyncExitStack() as stack:
            prepared = _Prepared(stack)
            if self.publisher.interrupted():  # what is half published must be settled before it is read
                await anyio.to_thread.run_sync(self.recover)
            # The database is opened beside what takes longer: nothing runs in a machine before that is recorded.
            opening, pooled = _Background(self._open_ledger), has_pool(self.folders.run)
            if pooled:
                stack.enter_context(opening)
            await self._prepare(prepared, workspace, progress, template=not pooled)
            if not pooled:
                stack.enter_context(opening)
            assert prepared.state is not None
            marks.lap("prepare")
            state, writer, vm_id = prepared.state, None, ""
            try:
                async with self._machine(prepared, workspace, argv, progress) as vm:
                    vm_id, spawn_ms = vm.id, marks.lap("spawn")
                    ledger = await opening.result()
                    ledger.append("exec.started", vm=vm_id, workspace=str(workspace), command=argv,
                                  image=prepared.image.folder.name, backend=vm.backend,
                                  accelerator=vm.accelerator)  # fmt: skip
                    marks.lap("ledger")
                    outcome = await vm.run(command, output=output, feed=feed, timeout_s=self.settings.timeout_s)
                    marks.lap("command")
                    writer = self.blobs.writer(vm_id)
                    collector = Collector(writer, self._limits("changeset"))
                    if not outcome.timed_out:
                        await vm.changes(
                            lambda e: collector.entry(e.path, e.kind, e.mode, e.size, e.target, e.opaque),
                            collector.content,
                        )
                    marks.lap("changes")
                changeset = collector.changeset(state.entries)
                execution = Execution(vm_id, vm.backend, vm.accelerator, spawn_ms, outcome, changeset,
                                      jail=vm.process.layers)  # fmt: skip
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
        elif len(changeset):
            execution.request = await anyio.to_thread.run_sync(self._request, execution, state, command)
            execution.status = "pending"
        if execution.request is None:
            writer.discard()
        marks.lap("record")
        execution.timings_ms = marks.laps
        log.detail("exec.finished", vm=vm_id, status=execution.status, **marks.laps)
        return execution

    async def _prepare(self, prepared: _Prepared, workspace: Path, progress: Progress, *, template: bool) -> None:
        """Read and pack the workspace, and load the template beside it; all ends before anything is raised."""
        prepared.image = self.images.current()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, self._prepare_workspace, workspace, prepared, progress)
            if template:
                await self._prepare_template(prepared, progress)
        if prepared.failures:
            raise prepared.failures[0]

    async def _prepare_template(self, prepared: _Prepared, progress: Progress) -> None:
        from luminaguard.microvm.template import TemplateStore

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, prepared.open_root)
            try:
                prepared.saved = await prepared.stack.enter_async_context(
                    TemplateStore(self.folders.cache).saved(
                        self.hypervisor, prepared.image, self.settings.memory_mib, progress
                    )
                )
            except LuminaGuardError as error:
                prepared.failures.append(error)

    @asynccontextmanager
    async def _machine(
        self, prepared: _Prepared, workspace: Path, task: list[str], progress: Progress
    ) -> AsyncIterator[MicroVM]:
        """A woken machine: from a pool that another process serves, else a clone of our own."""
        from luminaguard.microvm.broker import borrow
        from luminaguard.microvm.machine import clone

        if prepared.saved is None:
            async with borrow(self.folders.run, prepared.disk, self.kind, folder=str(workspace), task=task) as vm:
                if vm is not None:
                    yield vm
                    return
            await self._prepare_template(prepared, progress)
            if prepared.failures:
                raise prepared.failures[0]
        assert prepared.saved is not None
        disks = (prepared.root, prepared.disk)
        async with clone(self.hypervisor, prepared.saved, disks, self.tracker,
                         workspace=str(workspace), task=task) as vm:  # fmt: skip
            yield vm

    @property
    def kind(self) -> dict[str, Any]:
        """What a borrowed machine must have in common with one that this runtime would make."""
        s = self.settings
        return {"memory_mib": s.memory_mib, "accelerator": s.accelerator, "qemu": s.qemu, "jail": s.require_jail}

    def _prepare_workspace(self, workspace: Path, prepared: _Prepared, progress: Progress) -> None:
        from luminaguard.workspaces.pack import WorkspaceImages
        from luminaguard.workspaces.state import read_state

        start = time.monotonic()

        def told(count: int) -> None:
            if time.monotonic() - start > 1:
                progress(f"reading the workspace: {count:,} entries")

        try:
            prepared.state = read_state(workspace, self._limits("workspace"), told)
            prepared.disk = prepared.keep(WorkspaceImages(self.folders.cache).open(prepared.state))
        except LuminaGuardError as error:
            prepared.failures.append(error)
        except OSError as error:
            failure = WorkspaceError(
                f"The workspace could not be read or packed: {error}.",
                hint="Check the folder, and that the cache folder has free space.",
            )
            prepared.failures.append(failure)

    def _open_ledger(self) -> Ledger:
        self.recover()
        return self.ledger

    def _request(self, execution: Execution, state: WorkspaceState, command: Command) -> Request:
        """Store the effects and ask for approval: after this they survive a reboot."""
        from luminaguard.approvals import Request, State

        self.blobs.persist(execution.vm_id)
        now = time.time_ns()
        request = Request(
            id=execution.vm_id.replace("vm-", "req-"), workspace=str(state.path), device=state.device,
            inode=state.inode, digest=execution.changeset.digest, command=tuple(_shown(command.argv)),
            exit_code=execution.outcome.exit_code, created_ns=now,
            expires_ns=now + self.settings.approval_ttl_s * 1_000_000_000, state=State.PENDING,
        )  # fmt: skip
        # Contents are kept under the request's name from here on.
        source = self.blobs.folder / execution.vm_id
        if source.is_dir():
            source.rename(self.blobs.folder / request.id)
        self.approvals.create(request, execution.changeset)
        return request

    def _limits(self, of: Literal["workspace", "changeset"]) -> Any:
        from luminaguard.workspaces.state import Limits

        s = self.settings
        if of == "workspace":
            return Limits(s.workspace_max_files, s.workspace_max_mib << 20)
        return Limits(s.changeset_max_files, s.changeset_max_mib << 20)

    # -- deciding and publishing ------------------------------------------------------------------

    def card(self, request: Request) -> DiffCard:
        """The diff card of a request, from the stored contents and the base on the host."""
        from luminaguard.effects.card import MAX_TEXT, make_card
        from luminaguard.workspaces.base import base_contents

        changeset = self.approvals.changeset(request.id)
        with base_contents(Path(request.workspace), changeset, MAX_TEXT) as before:
            return make_card(changeset, before, lambda sha: self.blobs.read(request.id, sha, MAX_TEXT))

    def decide(self, request: Request, *, approve: bool, means: str) -> None:
        """Sign and store a decision about a request, as the approver of this installation.

        Raises:
            ApprovalError: the request is not pending any more.
        """
        from luminaguard.approvals import Decision, Verdict, sign

        now = time.time_ns()
        verdict = Verdict.APPROVE if approve else Verdict.DENY
        decision = Decision(
            request_id=request.id, digest=request.digest, workspace=request.workspace, verdict=verdict,
            means=means, decided_ns=now, expires_ns=request.expires_ns, nonce=secrets.token_hex(16), approver="",
        )  # fmt: skip
        key = self._approver()
        self.approvals.decide(sign(decision, key), key.public_key())
        if not approve:
            self.blobs.forget(request.id)

    def publish(self, request_id: str, step: Progress = lambda _: None) -> None:
        """Publish an approved request, once.

        Raises:
            ApprovalError: there is no valid, unused approval.
            Conflict: the host's files are not the base any more; nothing was written.
            PublishError: nothing was published, or (OutcomeUnknown) a person must look.
        """
        from luminaguard.approvals import State

        request = self.approvals.get(request_id)
        changeset = self.approvals.changeset(request_id)
        with self.publisher.lock(request.workspace):
            self._recover_workspace(request.workspace)
            self.approvals.claim(request_id, changeset.digest, self._approver().public_key())
            try:
                self.publisher.publish(request_id, request.workspace, request.device, request.inode, changeset, step)
            except OutcomeUnknown as error:
                self.approvals.finish(request_id, State.UNKNOWN, error.message)
                raise
            except LuminaGuardError as error:
                self._close(request_id, State.REFUSED, error.message)
                raise
            self._close(request_id, State.PUBLISHED, "published")

    def _close(self, request_id: str, state: Any, outcome: str) -> None:
        """Record the end first; only then may the journal and the contents go."""
        self.approvals.finish(request_id, state, outcome)
        self.publisher.close(request_id)
        self.blobs.forget(request_id)

    # -- after a crash ------------------------------------------------------------------------------

    def recover(self) -> list[str]:
        """Undo or finish what crashed processes left; return what was done, in sentences."""
        from luminaguard.approvals import State
        from luminaguard.workspaces.journal import Journal

        told: list[str] = []
        for path in self.publisher.interrupted():
            # One that cannot be recovered blocks its own workspace, not the others.
            try:
                workspace = Journal.load(path).workspace
                with self._if_free(workspace) as free:
                    if free and path.exists():
                        told.append(self._recover_one(path))
            except LuminaGuardError as error:
                self._mark_unknown(path.stem, error.message)
                told.append(f"{path.stem}: {error.message} {error.hint}")
        self._forget_orphans()
        for sentence in told:
            log.event("publish.recovered", what=sentence)
        for request in self.approvals.list():
            if request.state is not State.CLAIMED or (self.folders.state / "journal" / f"{request.id}.json").exists():
                continue
            with self._if_free(request.workspace) as free:
                # Claimed, nobody at it, and no journal: it ended before anything was written.
                if free and self.approvals.get(request.id).state is State.CLAIMED:
                    self._close(request.id, State.REFUSED, "interrupted before anything was written")
                    told.append(f"{request.id}: interrupted before anything was written")
        return told

    @contextmanager
    def _if_free(self, workspace: str) -> Iterator[bool]:
        from luminaguard.errors import PublishError

        try:
            lock = self.publisher.lock(workspace)
            lock.__enter__()
        except PublishError:
            yield False  # its publisher lives: nothing was interrupted
            return
        try:
            yield True
        finally:
            lock.__exit__(None, None, None)

    def _recover_workspace(self, workspace: str) -> None:
        from luminaguard.workspaces.journal import Journal

        for path in self.publisher.interrupted():
            try:
                concerned = Journal.load(path).workspace == workspace
            except LuminaGuardError as error:
                self._mark_unknown(path.stem, error.message)
                concerned = False
            if concerned:
                self._recover_one(path)

    def _mark_unknown(self, request_id: str, why: str) -> None:
        from luminaguard.approvals import State

        try:
            if self.approvals.get(request_id).state is State.CLAIMED:
                self.approvals.finish(request_id, State.UNKNOWN, why)
        except RequestNotFound:
            pass  # the database is newer than the journal: the file alone says that something is open

    def _forget_orphans(self) -> None:
        """Delete contents that no open request and no running machine needs any more."""
        kept = {request.id for request in self.approvals.list()} | {vm.id for vm in self.tracker.running()}
        # A request that is being made has its contents for a moment before its row.
        kept |= {vm_id.replace("vm-", "req-") for vm_id in kept}
        for owner in self.blobs.owners():
            if owner not in kept and self.blobs.age_s(owner) > _ORPHAN_AGE_S:
                self.blobs.forget(owner)

    def _recover_one(self, path: Path) -> str:
        from luminaguard.approvals import State

        request_id, published = self.publisher.recover(path)
        state = State.PUBLISHED if published else State.REFUSED
        what = "finished after an interruption" if published else "undone after an interruption; nothing was published"
        if self.approvals.get(request_id).state in {State.CLAIMED, State.UNKNOWN}:
            self.approvals.finish(request_id, state, what)
        self.publisher.close(request_id)
        self.blobs.forget(request_id)
        return f"{request_id}: {what}"

    def _approver(self) -> Any:
        from luminaguard.storage.keys import load_key

        return load_key(self.folders.state / "keys", "approver")


class _Prepared:
    """What the preparations hand over; all of them end before the first failure is raised."""

    image: Image

    def __init__(self, stack: AsyncExitStack) -> None:
        self.stack = stack
        self.state: WorkspaceState | None = None
        self.saved: SavedMachine | None = None
        self.disk = self.root = -1
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


def _shown(argv: Any) -> list[str]:
    """The command line for records: bounded, and without bytes that are not text."""
    return [ascii(word)[1:-1][:500] if not word.isprintable() else word[:500] for word in argv][:100]
