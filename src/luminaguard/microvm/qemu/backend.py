"""QEMU as a :class:`luminaguard.microvm.port.Hypervisor`.

A QEMU process is created inside a context and cannot outlive it: see :mod:`luminaguard.microvm.jail`.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager

import anyio

from luminaguard.errors import BootFailed, MachineError
from luminaguard.microvm.jail import Follow, Jail, JailedProcess, Limits, Program, not_followed
from luminaguard.microvm.port import BootSource, Capabilities, SavedMachine, processor
from luminaguard.microvm.qemu import command, probe
from luminaguard.microvm.qemu.qmp import Qmp

__all__ = ["QemuHypervisor", "QemuMachine"]

_RESTORE_TIMEOUT_S = 20.0
_SAVE_TIMEOUT_S = 60.0
_SPARE_FDSET = 64  # beyond those of the disks that it was started with
_OVERHEAD_MIB = 128  # QEMU itself, beside the guest's memory and the translated code
_ADDRESS_MIB = 2048  # what it maps and mostly does not touch: libraries, stacks, arenas

_Started = AbstractAsyncContextManager[JailedProcess]


class QemuMachine:
    """A running QEMU; made by :class:`QemuHypervisor` only."""

    def __init__(self, process: JailedProcess, channel: socket.socket, qmp: Qmp) -> None:
        self.process = process
        self._channel = channel
        self._qmp = qmp

    @property
    def channel(self) -> socket.socket:
        """The host's end of the agent channel."""
        return self._channel

    async def handshake(self) -> None:
        """Wait for QEMU's greeting."""
        await self._qmp.handshake()

    async def save(self, state: int) -> None:
        """Stop the guest and write the device state to ``state``; the RAM stays in its memfd."""
        await self._qmp.execute("stop")
        await self._ignore_shared()
        await self._qmp.execute_all(("getfd", {"fdname": "state"}), fd=state)
        await self._qmp.execute("migrate", uri="fd:state")
        await self._migrated(_SAVE_TIMEOUT_S)

    async def restore(self, state: int) -> None:
        """Load a device state; the guest stays paused."""
        with _deadline(_RESTORE_TIMEOUT_S, "QEMU did not load the saved machine in time"):
            await self._qmp.handshake()
            await self._ignore_shared()
            await self._qmp.execute("migrate-incoming", uri=f"fd:{state}")
            await self._migrated(_RESTORE_TIMEOUT_S)

    async def check(self) -> None:
        """Raise MachineError unless QEMU answers."""
        await self._qmp.execute("query-status")

    async def pause(self) -> None:
        """Stop the guest; it uses no processor until :meth:`resume`."""
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        """Let a paused guest run."""
        await self._qmp.execute("cont")

    async def replace_disk(self, index: int, disk: int) -> None:
        """Put another read-only file behind a disk that nothing has open in the guest."""
        fdset = _SPARE_FDSET + index
        node = f"spare{index}"
        spare = {"driver": "file", "node-name": node, "filename": f"/dev/fdset/{fdset}", "read-only": True,
                 "locking": "off"}  # fmt: skip
        options = {"driver": "raw", "node-name": f"disk{index}", "file": node, "read-only": True}
        with ExitStack() as stack:
            await self._qmp.execute_all(
                ("add-fd", {"fdset-id": fdset}),
                ("blockdev-add", spare),
                ("blockdev-reopen", {"options": [options]}),
                fd=_reopened(stack, disk),
            )

    async def diagnosis(self) -> str:
        """QEMU's last words and how it ended."""
        ended = "it is still running" if self.process.running else "it has ended"
        return f"{ended}; it said: {self.process.words() or 'nothing'}"

    async def _ignore_shared(self) -> None:
        capability = {"capability": "x-ignore-shared", "state": True}
        await self._qmp.execute("migrate-set-capabilities", capabilities=[capability])

    async def _migrated(self, timeout_s: float) -> None:
        with _deadline(timeout_s, "QEMU did not finish moving the machine's state in time"):
            while True:
                status = (await self._qmp.execute("query-migrate")).get("status")
                if status == "completed":
                    return
                if status in {"failed", "cancelled"}:
                    raise MachineError(
                        "QEMU could not load or save the machine's state.",
                        hint="Delete the template cache ('luminaguard image build --force' rebuilds it).",
                    )
                await anyio.sleep(0.001)


class QemuHypervisor:
    """QEMU with one accelerator, chosen before (see :mod:`luminaguard.microvm.select`)."""

    name = "qemu"

    def __init__(self, qemu: probe.Qemu, accelerator: str, jail: Jail) -> None:
        self.qemu = qemu
        self.accelerator = accelerator
        self._jail = jail
        devices = ("/dev/null", "/dev/urandom", *(("/dev/kvm",) if accelerator == "kvm" else ()))
        self._program = Program(qemu.path, qemu.folders, (qemu.firmware,), devices)
        # Measured with 7.2: a warm exec takes 29 ms without random addresses and 52 ms with them.
        moves_freely = accelerator != "tcg" or qemu.version >= (8, 0, 0)
        self.capabilities = Capabilities(snapshot=True, clone=True, pause=True, random_addresses=moves_freely)

    @property
    def fingerprint(self) -> str:
        """Of the QEMU build, the accelerator, the device list and the host's processor."""
        example = command.boot_command(
            self.qemu.firmware, self.accelerator, 0, ram=0, channel=0, control=0, disks=(0, 0), kernel=0,
            initramfs=0, append=command.kernel_command_line(self.accelerator, 0),
        )  # fmt: skip
        text = "\0".join([self.qemu.build, self.accelerator, processor(), *example])
        return hashlib.sha256(text.encode()).hexdigest()

    @asynccontextmanager
    async def boot(self, name: str, source: BootSource, ram: int, *, follow: Follow) -> AsyncIterator[QemuMachine]:
        """Cold-boot a machine; see :class:`luminaguard.microvm.port.Hypervisor`."""
        append = command.kernel_command_line(self.accelerator, probe.tsc_khz() if self.accelerator == "tcg" else 0)
        with ExitStack() as stack:
            agent, channel = _socketpair(stack)
            monitor, control = _socketpair(stack)
            arguments = command.boot_command(
                self.qemu.firmware, self.accelerator, source.memory_mib, ram=ram, channel=channel.fileno(),
                control=control.fileno(), disks=source.disks, kernel=source.kernel,
                initramfs=source.initramfs, append=f"{append} {source.options}".rstrip(),
            )  # fmt: skip
            inherited = (
                ram,
                channel.fileno(),
                control.fileno(),
                source.kernel,
                source.initramfs,
                *source.disks,
            )
            async with self._start(name, source.memory_mib, arguments, inherited, follow) as process:
                channel.close()
                control.close()
                machine = QemuMachine(process, agent, Qmp(monitor))
                with _deadline(_RESTORE_TIMEOUT_S, "QEMU did not start in time"):
                    await machine.handshake()
                yield machine

    @asynccontextmanager
    async def clone(
        self, name: str, saved: SavedMachine, disks: tuple[int, ...], *, follow: Follow, running: bool = True
    ) -> AsyncIterator[QemuMachine]:
        """Start a copy-on-write copy; see :class:`luminaguard.microvm.port.Hypervisor`."""
        with ExitStack() as stack:
            agent, channel = _socketpair(stack)
            monitor, control = _socketpair(stack)
            # A descriptor of its own: restoring moves the file offset, and siblings share it.
            # And of the disks: a hijacked sibling could change the flags of a shared one (F_SETFL).
            state, *own = (_reopened(stack, fd) for fd in (saved.state, *disks))
            disks = tuple(own)
            arguments = command.clone_command(
                self.qemu.firmware, self.accelerator, saved.memory_mib, ram=saved.ram,
                channel=channel.fileno(), control=control.fileno(), disks=disks,
            )  # fmt: skip
            inherited = (saved.ram, state, channel.fileno(), control.fileno(), *disks)
            async with self._start(name, saved.memory_mib, arguments, inherited, follow) as process:
                channel.close()
                control.close()
                machine = QemuMachine(process, agent, Qmp(monitor))
                try:
                    await machine.restore(state)
                    if running:
                        await machine.resume()
                except MachineError as error:
                    error.add_note(await machine.diagnosis())
                    raise
                yield machine

    def try_jail(self) -> _Started:
        """QEMU in the jail of a machine, printing its version."""
        return self._start(f"doctor-{os.getpid()}", 0, ["--version"], ())

    def close(self) -> None:
        """Nothing is kept."""

    def _start(
        self, name: str, memory_mib: int, arguments: list[str], inherited: tuple[int, ...],
        follow: Follow = not_followed,
    ) -> _Started:  # fmt: skip
        mib = memory_mib + (command.TRANSLATION_MIB if self.accelerator == "tcg" else 0)
        # A page of the guest may count twice: in the template's memory file, where the first to look at it
        # makes it, and as the clone's own copy.
        most = mib + memory_mib + _OVERHEAD_MIB
        limits = Limits(memory_bytes=most << 20, address_bytes=(mib + _ADDRESS_MIB) << 20)
        return self._jail.start(name, self._program, ["-name", name, *arguments], inherited, limits, follow)


def _reopened(stack: ExitStack, fd: int) -> int:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, again)
    return again


def _socketpair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stack.enter_context(ours)
    stack.enter_context(theirs)
    return ours, theirs


class _deadline:  # noqa: N801  # reads as a word at its uses
    """``anyio.fail_after`` that ends in a :class:`BootFailed`."""

    def __init__(self, seconds: float, message: str) -> None:
        self._scope = anyio.move_on_after(seconds)
        self._message = message

    def __enter__(self) -> None:
        self._scope.__enter__()

    def __exit__(self, *exception: object) -> bool | None:
        swallowed = self._scope.__exit__(*exception)  # type: ignore[arg-type]  # passed through as it came
        if self._scope.cancelled_caught:
            raise BootFailed(f"{self._message}.", hint="Run the command again; see 'luminaguard doctor'.")
        return swallowed
