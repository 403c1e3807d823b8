"""QEMU as a :class:`luminaguard.microvm.port.Hypervisor`.

A QEMU process is created inside a context and cannot outlive it: the context kills and reaps it on
every way out, and the kernel does (PR_SET_PDEATHSIG) if this process is killed.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import anyio

from luminaguard.errors import BootFailed, HypervisorUnavailable, MachineError
from luminaguard.microvm.port import BootSource, Capabilities, SavedMachine
from luminaguard.microvm.qemu import command, probe
from luminaguard.microvm.qemu.qmp import Qmp

__all__ = ["QemuHypervisor", "QemuMachine"]

_RESTORE_TIMEOUT = 20.0
_SAVE_TIMEOUT = 60.0
_MAX_DIAGNOSIS = 2000


class QemuMachine:
    """A running QEMU; made by :class:`QemuHypervisor` only."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, qmp: Qmp, said: int) -> None:
        self._process = process
        self._channel = channel
        self._qmp = qmp
        self._said = said

    @property
    def pid(self) -> int:
        """QEMU's process id (setpriv has become QEMU by exec)."""
        return self._process.pid

    @property
    def channel(self) -> socket.socket:
        """The host's end of the agent channel."""
        return self._channel

    async def save(self, state: int) -> None:
        """Stop the guest and write the device state to ``state``; the RAM stays in its memfd."""
        await self._qmp.handshake()
        await self._qmp.execute("stop")
        await self._ignore_shared()
        await self._qmp.pass_descriptor("state", state)
        await self._qmp.execute("migrate", uri="fd:state")
        await self._migrated(_SAVE_TIMEOUT)

    async def restore(self, state: int) -> None:
        """Load a device state and let the guest run."""
        with _deadline(_RESTORE_TIMEOUT, "QEMU did not load the saved machine in time"):
            await self._qmp.handshake()
            await self._ignore_shared()
            await self._qmp.execute("migrate-incoming", uri=f"fd:{state}")
            await self._migrated(_RESTORE_TIMEOUT)
            await self._qmp.execute("cont")

    async def diagnosis(self) -> str:
        """QEMU's last words and how it ended."""
        status = self._process.poll()
        words = os.pread(self._said, _MAX_DIAGNOSIS, 0).decode("utf-8", "replace").strip()
        ended = "it is still running" if status is None else f"it ended with status {status}"
        return f"{ended}; it said: {words or 'nothing'}"

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

    def __init__(self, qemu: probe.Qemu, accelerator: str) -> None:
        self.qemu = qemu
        self.accelerator = accelerator
        # Measured with 7.2: a warm exec takes 29 ms without random addresses and 52 ms with them.
        moves_freely = accelerator != "tcg" or qemu.version >= (8, 0, 0)
        self.capabilities = Capabilities(snapshot=True, clone=True, pause=True, random_addresses=moves_freely)

    @property
    def fingerprint(self) -> str:
        """Of the QEMU build, the accelerator, the device list and the host's processor."""
        example = command.boot_command(
            self.qemu.path, self.accelerator, 0, ram=0, channel=0, control=0, disks=(0, 0), kernel=0,
            initramfs=0, append=command.kernel_command_line(self.accelerator, 0),
        )  # fmt: skip
        text = "\0".join([self.qemu.build, self.accelerator, _processor(), *example])
        return hashlib.sha256(text.encode()).hexdigest()

    @asynccontextmanager
    async def boot(self, source: BootSource, ram: int) -> AsyncIterator[QemuMachine]:
        """Cold-boot a machine; see :class:`luminaguard.microvm.port.Hypervisor`."""
        append = command.kernel_command_line(self.accelerator, probe.tsc_khz() if self.accelerator == "tcg" else 0)
        with ExitStack() as stack:
            agent, channel = _socketpair(stack)
            monitor, control = _socketpair(stack)
            arguments = command.boot_command(
                self.qemu.path, self.accelerator, source.memory_mib, ram=ram, channel=channel.fileno(),
                control=control.fileno(), disks=source.disks, kernel=source.kernel,
                initramfs=source.initramfs, append=append,
            )  # fmt: skip
            inherited = (
                ram,
                channel.fileno(),
                control.fileno(),
                source.kernel,
                source.initramfs,
                *source.disks,
            )
            async with self._process(arguments, inherited) as (process, said):
                channel.close()
                control.close()
                yield QemuMachine(process, agent, Qmp(monitor), said)

    @asynccontextmanager
    async def clone(self, saved: SavedMachine, disks: tuple[int, ...]) -> AsyncIterator[QemuMachine]:
        """Start a copy-on-write copy; see :class:`luminaguard.microvm.port.Hypervisor`."""
        with ExitStack() as stack:
            agent, channel = _socketpair(stack)
            monitor, control = _socketpair(stack)
            # A descriptor of its own: restoring moves the file offset, and siblings share it.
            state = os.open(f"/proc/self/fd/{saved.state}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, state)
            arguments = command.clone_command(
                self.qemu.path, self.accelerator, saved.memory_mib, ram=saved.ram,
                channel=channel.fileno(), control=control.fileno(), disks=disks,
            )  # fmt: skip
            inherited = (saved.ram, state, channel.fileno(), control.fileno(), *disks)
            async with self._process(arguments, inherited) as (process, said):
                channel.close()
                control.close()
                machine = QemuMachine(process, agent, Qmp(monitor), said)
                try:
                    await machine.restore(state)
                except MachineError as error:
                    error.add_note(await machine.diagnosis())
                    raise
                yield machine

    @asynccontextmanager
    async def _process(
        self, arguments: list[str], inherited: tuple[int, ...]
    ) -> AsyncIterator[tuple[subprocess.Popen[bytes], int]]:
        said = os.memfd_create("qemu-stderr", os.MFD_CLOEXEC)
        try:
            process = subprocess.Popen(  # noqa: ASYNC220  # a vfork of about 1 ms; the owner must be this thread (pdeathsig)
                [*command.jail_prefix(os.geteuid()), *arguments],
                pass_fds=inherited, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
                cwd="/", env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": tempfile.gettempdir()},
                start_new_session=True,  # a terminal's Ctrl-C is ours to handle, not QEMU's
            )  # fmt: skip
        except OSError as error:
            os.close(said)
            raise HypervisorUnavailable(
                f"QEMU could not be started: {error}.", hint="Run 'luminaguard doctor'."
            ) from error
        try:
            yield process, said
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()  # SIGKILL is not ignored: this takes as long as freeing the memory
            os.close(said)


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


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return next((line.strip() for line in file if line.startswith("model name")), "")
