"""Firecracker as a :class:`luminaguard.microvm.port.Hypervisor`.

Layers around each machine, from the outside in:

* bubblewrap gives pid, net, ipc and uts namespaces, ends everything with its owner, and holds the
  start until a cgroup holds the process; of root's capabilities it leaves what the jailer needs.
* Firecracker's own jailer gives the machine a uid and gid of its own, a chroot with nothing in it but
  hard links to read-only parts, limits on files and descriptors, and drops every privilege.
* Firecracker confines its threads by seccomp; that is read back from each live process.

A machine is saved by Firecracker's full snapshot. A clone maps the saved memory privately, so clones
share what they do not write. One that waits in a pool is loaded but has not run: on 1.16, a machine that
was paused and resumed cannot be connected to any more (see :mod:`probe`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread

from luminaguard.errors import HypervisorUnavailable, JailUnavailable, MachineError, StorageError
from luminaguard.microvm.firecracker import bodies
from luminaguard.microvm.firecracker.api import Api
from luminaguard.microvm.firecracker.probe import Firecracker
from luminaguard.microvm.firecracker.sinks import Sink
from luminaguard.microvm.firecracker.vsock import connect_guest
from luminaguard.microvm.jail import Follow, Jail, JailedProcess, JailFolders, Limits, not_followed, unused_uid
from luminaguard.microvm.jail.folders import JailFolder, Parts, copy_data, open_inside
from luminaguard.microvm.port import BootSource, Capabilities, SavedMachine, processor

__all__ = ["FirecrackerHypervisor", "FirecrackerMachine"]

_API_TIMEOUT_S = 10.0
_BOOT_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 20.0
_CHECK_TIMEOUT_S = 5.0
_SETTLE_S = 0.2
_OVERHEAD_MIB = 64  # the program itself, the jailer and bubblewrap, beside the guest's memory
_MAX_STATE = 16 << 20
_UNFILTERED = "this build of Firecracker has no filters: use a release"
_FILES_MIB = 4  # what a machine may write that is not being saved
_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "MKNOD", "SETGID", "SETUID", "SYS_ADMIN", "SYS_CHROOT")
"""Those of the jailer until it drops them: device nodes, their owner, the mount namespace, the uid."""


class FirecrackerMachine:
    """A running, or loaded, machine; made by :class:`FirecrackerHypervisor` only."""

    def __init__(self, process: JailedProcess, folder: JailFolder, api: Api, parts: Parts, sinks: list[Sink], ram: int,
                 pausable: bool) -> None:  # fmt: skip
        self.process = process
        self._folder = folder
        self._root = folder.root
        self._api = api
        self._parts = parts
        self._sinks = sinks
        self._ram = ram
        self._pausable = pausable
        self._channel: socket.socket | None = None
        self._replaced = 0

    @property
    def channel(self) -> socket.socket:
        """The connection to the guest; there is one once the machine runs."""
        assert self._channel is not None, "the machine has not been started"
        return self._channel

    async def connect(self, timeout_s: float) -> None:
        """Connect to the guest's supervisor."""
        self._channel = await connect_guest(self._root, bodies.VSOCK, lambda: self.process.running, timeout_s)

    def disconnect(self) -> None:
        """Hang up on the guest; the socket stays open, because others still wait for it."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close what was opened; nobody waits for it any more."""
        if self._channel is not None:
            self._channel.close()
        self._api.close()

    async def load(self, *, resume: bool, override_vsock: bool) -> None:
        """Load the saved machine that was laid into the jail; connect to its guest if it runs."""
        await self._api.put("/logger", bodies.logger())
        await self._api.put("/metrics", bodies.metrics())
        await self._api.put("/snapshot/load", bodies.load(resume=resume, override=override_vsock))
        if resume:
            await self.connect(_CONNECT_TIMEOUT_S)

    def seal(self) -> None:
        """Its sockets are made: from here on it makes no file, whoever is in command of it."""
        self._folder.seal()

    async def save(self, state: int) -> None:
        """Pause for good; memory goes into the memfd that the machine was booted with, the rest to ``state``."""
        self.disconnect()  # saving resets the guest's end; this way it is at rest before
        await anyio.sleep(_SETTLE_S)
        await self._api.patch("/vm", {"state": "Paused"})
        await self._api.put("/snapshot/create", bodies.snapshot())
        await anyio.to_thread.run_sync(self._fetch, bodies.RAM, self._ram, os.fstat(self._ram).st_size)
        await anyio.to_thread.run_sync(self._fetch, bodies.STATE, state, _MAX_STATE)

    async def check(self) -> None:
        """Raise MachineError unless Firecracker answers."""
        with anyio.move_on_after(_CHECK_TIMEOUT_S):
            await self._api.get("/")
            return
        raise MachineError("Firecracker does not answer any more.", hint="Run the command again.")

    async def pause(self) -> None:
        """Stop the guest until :meth:`resume`; raises MachineError where this version cannot go on then."""
        if not self._pausable:
            raise MachineError(
                "This version of Firecracker loses its guest when it is paused without being saved.",
                hint="Use Firecracker 1.15, or 1.17 and later, where that is needed.",
            )
        await self._api.patch("/vm", {"state": "Paused"})

    async def resume(self) -> None:
        """Let a paused or loaded guest run, and connect to it if that was not done yet."""
        await self._api.patch("/vm", {"state": "Resumed"})
        if self._channel is None:
            await self.connect(_CONNECT_TIMEOUT_S)

    async def replace_disk(self, index: int, disk: int) -> None:
        """Put another read-only file behind a disk that nothing has open in the guest."""
        self._replaced += 1
        name = f"{bodies.DISKS[index]}-{self._replaced}"
        try:
            await anyio.to_thread.run_sync(self._parts.lay, disk, self._root, name)
        except OSError as error:
            raise _disk(error) from error
        await self._api.patch(f"/drives/{bodies.DISKS[index]}", bodies.replacement(index, name))

    async def diagnosis(self) -> str:
        """Firecracker's last words and how it ended."""
        ended = "it is still running" if self.process.running else "it has ended"
        words = " ".join([self.process.words(), *(sink.words() for sink in self._sinks[:1])]).strip()
        return f"{ended}; it said: {words or 'nothing'}"

    def _fetch(self, name: str, target: int, limit: int) -> None:
        try:
            source = open_inside(self._root, name, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise MachineError(f"Firecracker saved no '{name}': {error.strerror}.", hint="Run it again.") from error
        try:
            info = os.fstat(source)
            size = info.st_size if stat.S_ISREG(info.st_mode) else -1
            if not 0 < size <= limit or (target == self._ram and size != limit):
                raise MachineError(f"Firecracker saved {size} bytes as '{name}'.", hint="Run 'luminaguard doctor'.")
            copy_data(source, target, size)
        finally:
            os.close(source)


class FirecrackerHypervisor:
    """Firecracker on KVM; raises HypervisorUnavailable for anyone but root, who alone can use its jailer."""

    name = "firecracker"
    accelerator = "kvm"

    def __init__(self, firecracker: Firecracker, jail: Jail, folders: JailFolders) -> None:
        if os.geteuid() != 0:
            raise HypervisorUnavailable(
                "Firecracker's jailer needs root.", hint="Run LuminaGuard as root, or set backend to 'qemu'."
            )
        folders.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.statvfs(folders.folder).f_flag
        if flags & (os.ST_NODEV | os.ST_NOEXEC):
            raise HypervisorUnavailable(
                f"{folders.folder} is mounted nodev or noexec: no jail can be made there.",
                hint="Set LUMINAGUARD_HOME, or XDG_STATE_HOME, to a folder on a file system without these options.",
            )
        self.firecracker = firecracker
        self._jail = jail
        self._folders = folders
        self._parts = Parts(folders)
        self.capabilities = Capabilities(snapshot=True, clone=True, pause=firecracker.can_pause, random_addresses=True)
        folders.sweep()

    def close(self) -> None:
        """Remove the copies of parts that were laid into jails."""
        self._parts.close()

    @property
    def fingerprint(self) -> str:
        """Of the versions, the host's kernel and processor, and all that a machine is configured with."""
        text = [str(self.firecracker.version), self.firecracker.snapshot_version, os.uname().release, processor(),
                json.dumps(bodies.boot(0, len(bodies.DISKS)))]  # fmt: skip
        return hashlib.sha256("\0".join(text).encode()).hexdigest()

    @asynccontextmanager
    async def boot(
        self, name: str, source: BootSource, ram: int, *, follow: Follow
    ) -> AsyncIterator[FirecrackerMachine]:
        """Boot from a configuration file; see :class:`luminaguard.microvm.port.Hypervisor`."""
        parts = {bodies.KERNEL: source.kernel, bodies.INITRAMFS: source.initramfs}
        parts |= dict(zip(bodies.DISKS, source.disks, strict=False))
        config = json.dumps(bodies.boot(source.memory_mib, len(source.disks), source.options)).encode()
        # A machine that will be saved writes as much as its memory, once.
        files_mib = source.memory_mib + _FILES_MIB
        async with self._start(name, source.memory_mib, parts, config, files_mib, ram, follow) as machine:
            await machine.connect(_BOOT_TIMEOUT_S)
            self._check_filters(machine.process)
            yield machine

    @asynccontextmanager
    async def clone(
        self, name: str, saved: SavedMachine, disks: tuple[int, ...], *, follow: Follow, running: bool = True
    ) -> AsyncIterator[FirecrackerMachine]:
        """Load a saved machine; see :class:`luminaguard.microvm.port.Hypervisor`."""
        parts = {bodies.RAM: saved.ram, bodies.STATE: saved.state} | dict(zip(bodies.DISKS, disks, strict=False))
        async with self._start(name, saved.memory_mib, parts, b"", _FILES_MIB, -1, follow) as machine:
            await machine.load(resume=running, override_vsock=self.firecracker.can_override_vsock)
            self._check_filters(machine.process)
            machine.seal()
            yield machine

    @asynccontextmanager
    async def try_jail(self) -> AsyncIterator[JailedProcess]:
        """Firecracker in the jail of a machine, without a guest."""
        async with self._start(f"doctor-{os.getpid()}", 0, {}, b"", _FILES_MIB, -1) as machine:
            # Its other threads are confined once there is a guest.
            machine.process.layers["seccomp"] = "on" if 2 in _seccomp_modes(machine.process.pid) else _UNFILTERED
            machine.process.kill()
            yield machine.process

    @asynccontextmanager
    async def _start(
        self, name: str, memory_mib: int, parts: dict[str, int], config: bytes, files_mib: int, ram: int,
        follow: Follow = not_followed,
    ) -> AsyncIterator[FirecrackerMachine]:  # fmt: skip
        """Firecracker in its jail, answering on its API."""
        try:
            folder = self._folders.create(os.path.basename(self.firecracker.path), name)
        except OSError as error:
            raise _disk(error) from error
        try:
            async with self._furnished(name, folder, memory_mib, parts, config, files_mib, ram, follow) as machine:
                yield machine
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(folder.remove)

    @asynccontextmanager
    async def _furnished(
        self, name: str, folder: JailFolder, memory_mib: int, parts: dict[str, int], config: bytes, files_mib: int,
        ram: int, follow: Follow,
    ) -> AsyncIterator[FirecrackerMachine]:  # fmt: skip
        uid, root = unused_uid(), folder.root
        with ExitStack() as stack:
            try:
                await anyio.to_thread.run_sync(self._furnish, root, parts, config)
                sinks = [Sink.make(root / pipe, uid, stack) for pipe in (bodies.LOG, bodies.METRICS)]
            except OSError as error:
                raise _disk(error) from error
            # What it writes counts as its memory where the jails lie on a tmpfs.
            limits = Limits(memory_bytes=(memory_mib + files_mib + _OVERHEAD_MIB) << 20, address_bytes=0)
            layers = dict.fromkeys(("uid", "privileges", "namespaces", "files", "rlimits"), "on")

            def command(info: int, gate: int) -> list[str]:
                return self._command(name, uid, info, gate, files_mib, limits, with_config=bool(config))

            async with self._jail.launch(name, command, (), limits, layers, follow) as process:
                api = Api(root, bodies.SOCKET)
                machine = FirecrackerMachine(process, folder, api, self._parts, sinks, ram, self.capabilities.pause)
                stack.callback(machine.close)
                try:
                    await api.open(lambda: machine.process.running, _API_TIMEOUT_S)
                    process.pid = _child_of(process.pid)
                    await self._check_start(name, process, api)
                    yield machine
                except MachineError as error:
                    error.add_note(await machine.diagnosis())
                    raise
                finally:
                    machine.disconnect()

    async def _check_start(self, name: str, process: JailedProcess, api: Api) -> None:
        """What runs is the version that was found, and still in its cgroup: the jailer may have moved it."""
        running = (await api.get("/version")).get("firecracker_version")
        if running != ".".join(map(str, self.firecracker.version)):
            raise MachineError(
                f"Firecracker was exchanged: {str(running)[:40]} runs instead of the version that was found.",
                hint="Run the command again.",
            )
        if process.layers["cgroup"] == "on" and f"/{name}\n" not in _read(f"/proc/{process.pid}/cgroup"):
            raise JailUnavailable(
                "Firecracker left its cgroup while it was started.",
                hint="Remove the group 'firecracker' from the cgroup hierarchy; see 'luminaguard doctor'.",
                kept="No machine was started.",
            )

    def _furnish(self, root: Path, parts: dict[str, int], config: bytes) -> None:
        for name, fd in parts.items():
            self._parts.lay(fd, root, name)
        if config:
            fd = os.open(root / bodies.CONFIG, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
            with os.fdopen(fd, "wb") as file:
                file.write(config)

    def _command(
        self, name: str, uid: int, info: int, gate: int, files_mib: int, limits: Limits, *, with_config: bool
    ) -> list[str]:
        return [
            *self._jail.around_jailer(name, info, gate, _CAPABILITIES),
            self.firecracker.jailer, "--id", name, "--exec-file", self.firecracker.path,
            "--uid", str(uid), "--gid", str(uid), "--chroot-base-dir", str(self._folders.folder),
            # The cgroup is ours: with version 2 the jailer would move it to /firecracker where there is one.
            "--cgroup-version", "1", "--resource-limit", f"fsize={files_mib << 20}",
            "--resource-limit", f"no-file={limits.descriptors}", "--",
            *(["--config-file", f"/{bodies.CONFIG}"] if with_config else []),
        ]  # fmt: skip

    def _check_filters(self, process: JailedProcess) -> None:
        """Every thread of a release is confined by seccomp once there is a guest; a build for development may not be.

        Raises:
            JailUnavailable: a thread is not, and the jail is required.
        """
        if all(mode == 2 for mode in _seccomp_modes(process.pid)):
            process.layers["seccomp"] = "on"
            return
        process.layers["seccomp"] = _UNFILTERED
        if self._jail.required:
            raise JailUnavailable(
                f"Firecracker is not confined: {process.layers['seccomp']}.",
                hint="Install a release; 'require_jail = false' runs without the filters.",
                kept="No machine was started.",
            )


def _seccomp_modes(pid: int) -> list[int]:
    """The seccomp mode of each thread (proc(5)); 2 is a filter. Raises MachineError when it has ended."""
    modes = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            rows = dict(line.split(":", 1) for line in (thread / "status").read_text(encoding="utf-8").splitlines())
            modes.append(int(rows["Seccomp"]))
    except OSError as error:
        raise MachineError("Firecracker ended while it was being started.", hint="Run 'luminaguard doctor'.") from error
    return modes


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 16)
    except OSError:
        return ""


def _disk(error: OSError) -> StorageError:
    what = "the disk is full" if error.errno == errno.ENOSPC else str(error)
    return StorageError(
        f"The jail of a machine could not be furnished: {what}.",
        hint="Free some space in the run-time folder (LUMINAGUARD_HOME, or XDG_STATE_HOME), and check who owns it.",
        kept="No machine was started.",
    )


def _child_of(pid: int) -> int:
    """The only child of bubblewrap's init: what was the jailer and is now Firecracker."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        return int(children[0])
    except (OSError, ValueError, IndexError):
        raise MachineError(
            "Firecracker ended while it was being started.",
            hint="Run 'luminaguard doctor'.",
            kept="Nothing was started.",
        ) from None
