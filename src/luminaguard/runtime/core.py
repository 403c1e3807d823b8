"""The composition root: builds the parts from Settings and owns their lifetimes."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread

from luminaguard.settings import Folders, Settings

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from luminaguard.actions.policy import Policy
    from luminaguard.images.build import ImageStore
    from luminaguard.images.layers.store import LayerStore
    from luminaguard.microvm.machine import Command
    from luminaguard.microvm.pool import Pool, PoolLimits, Template
    from luminaguard.microvm.port import Hypervisor
    from luminaguard.microvm.template import TemplateStore
    from luminaguard.microvm.tracker import VMTracker
    from luminaguard.runtime.decisions import Decisions
    from luminaguard.runtime.permits import Permits
    from luminaguard.runtime.rehearsal import Execution, Feed, Output, Outside, Progress
    from luminaguard.runtime.tasks import LocalTasks
    from luminaguard.storage.approvals import Approvals
    from luminaguard.storage.approvers import Approvers
    from luminaguard.storage.contents import Contents
    from luminaguard.storage.database import Database
    from luminaguard.storage.grants import Grants, Tasks
    from luminaguard.storage.ledger import Ledger
    from luminaguard.workspaces.blobs import BlobStore
    from luminaguard.workspaces.publish import Publisher

__all__ = ["Runtime"]


class Runtime:
    """All parts, made when first needed: a command that needs no database opens none."""

    def __init__(self, settings: Settings, folders: Folders) -> None:
        self.settings = settings
        self.folders = folders.ensure()
        self._closing = ExitStack()
        self.guard: Callable[[Connection], None] | None = None
        """Of a worker: refuses to write anything once its lease is lost."""

    def close(self) -> None:
        """Close what was opened; the runtime is of no more use."""
        self._closing.close()

    @property
    def host(self) -> str:
        """What this host is called in its fleet; empty where there is none."""
        if not self.settings.database_url:
            return ""
        return self.settings.host or socket.gethostname().lower()[:36]

    # -- the parts ------------------------------------------------------------------------------

    @cached_property
    def images(self) -> ImageStore:
        """The guest images."""
        from luminaguard.images.build import ImageStore

        return ImageStore(self.folders.cache)

    @cached_property
    def layers(self) -> LayerStore:
        """Programs that machines have beside their image."""
        from luminaguard.images.layers.store import LayerStore

        return LayerStore(self.folders.data / "layers")

    @cached_property
    def hypervisor(self) -> Hypervisor:
        """The hypervisor with its accelerator; raises HypervisorUnavailable."""
        from luminaguard.microvm.jail import Jail
        from luminaguard.microvm.select import choose_hypervisor

        jail = Jail(required=self.settings.require_jail)
        hypervisor = choose_hypervisor(self.settings, self.folders.run, jail)
        self._closing.callback(hypervisor.close)
        return hypervisor

    @cached_property
    def templates(self) -> TemplateStore:
        """The machines that clones are copied from."""
        from luminaguard.microvm.template import TemplateStore
        from luminaguard.storage.keys import load_secret

        return TemplateStore(self.folders.cache, load_secret(self.folders.state / "keys", "templates"), self.tracker)

    @cached_property
    def tracker(self) -> VMTracker:
        """Running machines."""
        from luminaguard.microvm.tracker import VMTracker

        return VMTracker(self.folders.run)

    @cached_property
    def blobs(self) -> BlobStore:
        """Contents that wait for a decision."""
        from luminaguard.workspaces.blobs import BlobStore

        return BlobStore(self.data, self.shared)

    @cached_property
    def shared(self) -> Contents | None:
        """What the hosts of a fleet share; None where there is one host only."""
        from luminaguard.storage.contents import Contents

        return Contents(self.ledger.database, self._check_lease) if self.host else None

    @cached_property
    def publisher(self) -> Publisher:
        """Publishes into workspaces."""
        from luminaguard.workspaces.publish import Publisher

        return Publisher(self.data, self.blobs, self.folders.state)

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger; opening it opens the database."""
        from luminaguard.storage.database import Database
        from luminaguard.storage.keys import load_key
        from luminaguard.storage.ledger import Ledger

        database = Database.open(self.settings.database_url or self.folders.state / "luminaguard.db")
        self._closing.callback(database.close)
        key = load_key(self.folders.state / "keys", "ledger")
        data = self.folders.state if not self.host else self._data_of(database)
        ledger = Ledger(database, key, data / "ledger-head.json", host=self.host, guard=self._check_lease)
        if self.host:
            ledger.refuse_other_key(self.folders.state / "keys")
            self._claim_name(database, data)
        return ledger

    def _data_of(self, database: Database) -> Path:
        """What is kept for one fleet's database: of another one's it must collect and settle nothing."""
        data = self.folders.state / "fleets" / database.id
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        return data

    def _claim_name(self, database: Database, data: Path) -> None:
        """Make sure that this host's name is this state folder's; raises SettingsError."""
        from luminaguard.storage.hosts import Hosts
        from luminaguard.storage.keys import load_secret

        mine = load_secret(data, "folder").hex()[:32]
        Hosts(database, self.host, "", self.settings.lease_s).claim_name(mine)

    def _check_lease(self, connection: Connection) -> None:
        if self.guard is not None:
            self.guard(connection)

    @property
    def data(self) -> Path:
        """Where contents, states and journals lie: each fleet's database has a folder of its own."""
        return self._data_of(self.ledger.database) if self.host else self.folders.state

    @cached_property
    def approvals(self) -> Approvals:
        """Requests and decisions."""
        from luminaguard.storage.approvals import Approvals

        return Approvals(self.ledger.database, self.ledger, self._check_lease, self.host)

    @cached_property
    def grants(self) -> Grants:
        """Answers that hold for what comes again."""
        from luminaguard.storage.grants import Grants

        return Grants(self.approvals)

    @cached_property
    def tasks(self) -> Tasks:
        """What tasks have read, and which were stopped."""
        from luminaguard.storage.grants import Tasks

        return Tasks(self.approvals)

    @cached_property
    def agent_tasks(self) -> LocalTasks:
        """Tasks that an agent works on, in this process."""
        from luminaguard.runtime.tasks import LocalTasks

        return LocalTasks(self)

    @cached_property
    def approvers(self) -> Approvers:
        """Whose approvals count."""
        from luminaguard.storage.approvers import Approvers

        return Approvers(self.folders.state / "keys")

    def policy(self, workspace: Path | None, *, home: str = "", task: str = "") -> Policy:
        """The rules that hold for a folder now; raises PolicyInvalid.

        Args:
            workspace: the folder; None where there is none.
            home: the host that has it; on another one hold the rules that it had when its task began.
            task: that task.
        """
        from luminaguard.runtime.policy import load_policy

        kept = self.agent_tasks.snapshots.rules(task) if home and home != self.host else None
        return load_policy(self.folders.config, workspace, kept)

    @asynccontextmanager
    async def open_pool(self, limits: PoolLimits | None = None) -> AsyncIterator[Pool]:
        """A warm pool of this runtime's machines, for as long as the context lasts."""
        from luminaguard.microvm.pool import Pool, PoolLimits

        store, s = self.templates, self.settings
        limits = limits or PoolLimits(s.pool_minimum, s.pool_maximum, s.pool_max_age_s, s.pool_memory_mib)

        def current() -> str:
            return store.key(self.hypervisor, self.images.current(), s.memory_mib)

        async with Pool.open(self.hypervisor, self._pool_template, current, self.tracker, limits) as pool:
            yield pool

    @asynccontextmanager
    async def _pool_template(self) -> AsyncIterator[Template]:
        from luminaguard.images.manifest import ROOT
        from luminaguard.microvm.pool import Template

        store, image = self.templates, self.images.current()
        async with AsyncExitStack() as stack:
            root = await anyio.to_thread.run_sync(image.open_part, ROOT)
            stack.callback(os.close, root)
            rehearsal = await anyio.to_thread.run_sync(self.open_rehearsal)
            stack.callback(os.close, rehearsal)
            saved = await stack.enter_async_context(
                store.saved(self.hypervisor, image, self.settings.memory_mib, lambda _: None)
            )
            yield Template(store.key(self.hypervisor, image, self.settings.memory_mib), saved, root, rehearsal)

    def open_rehearsal(self) -> int:
        """An empty workspace on a disk as large as any can be, for clones to rehearse on."""
        from luminaguard.microvm.template import placeholder
        from luminaguard.workspaces.pack import WorkspaceImages
        from luminaguard.workspaces.state import read_state

        folder = self.folders.cache / "rehearsal"
        folder.mkdir(mode=0o700, exist_ok=True)
        image = WorkspaceImages(self.folders.cache).open(read_state(folder, self.limits("workspace")))
        try:
            return placeholder(os.pread(image, 1 << 20, 0))
        finally:
            os.close(image)

    @property
    def kind(self) -> dict[str, Any]:
        """What a borrowed machine must have in common with one that this runtime would make."""
        s = self.settings
        return {"memory_mib": s.memory_mib, "backend": s.backend, "accelerator": s.accelerator,
                "programs": [s.qemu, s.firecracker, s.jailer], "jail": s.require_jail}  # fmt: skip

    def own_paths(self, workspace: Path) -> frozenset[str]:
        """Which of LuminaGuard's own folders lie in a workspace; raises WorkspaceError if it lies in one."""
        from luminaguard.workspaces.own import own_paths

        f = self.folders
        return own_paths(workspace, (f.config, f.state, f.cache, f.run))

    def limits(self, of: Literal["workspace", "changeset"]) -> Any:
        """How large a workspace, or a changeset, may be."""
        from luminaguard.workspaces.state import Limits

        s = self.settings
        if of == "workspace":
            return Limits(s.workspace_max_files, s.workspace_max_mib << 20)
        return Limits(s.changeset_max_files, s.changeset_max_mib << 20)

    def try_jail(self) -> dict[str, str]:
        """Start the hypervisor in its jail, without a guest; return each layer: ``on``, or why it is missing.

        Raises:
            JailUnavailable: a layer that is required cannot be had.
            HypervisorUnavailable: there is none.
        """

        async def attempt() -> dict[str, str]:
            async with self.hypervisor.try_jail() as process:
                await process.wait()
                return process.layers

        return anyio.run(attempt)

    # -- what it does -----------------------------------------------------------------------------

    @cached_property
    def decisions(self) -> Decisions:
        """Cards, decisions, publishing, recovery."""
        from luminaguard.runtime.decisions import Decisions

        return Decisions(self)

    @cached_property
    def permits(self) -> Permits:
        """What is let be done by whoever asks for it."""
        from luminaguard.runtime.permits import Permits

        return Permits(self)

    async def exec(
        self,
        workspace: Path,
        command: Command,
        *,
        output: Output,
        feed: Feed | None = None,
        progress: Progress = lambda _: None,
        task: str = "",
        taint: tuple[str, ...] = (),
        layer: str = "",
        outside: Outside | None = None,
        beside: Mapping[str, Path] | None = None,
    ) -> Execution:
        """Run one action; see :func:`luminaguard.runtime.action.run`."""
        from luminaguard.runtime.action import run

        return await run(self, workspace, command, output=output, feed=feed, progress=progress, task=task, taint=taint,
                         layer=layer, outside=outside, beside=beside)  # fmt: skip
