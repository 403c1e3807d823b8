"""The hypervisor port: the little that LuminaGuard asks of a program that runs machines.

A backend boots a kernel with read-only disks, gives one byte channel to the guest, and stops. What
else it can do is said in :class:`Capabilities`; a caller that needs more than a backend has gets a
typed refusal, never something weaker.

Everything is handed over as open descriptors, so a backend can run under a uid and in a root that
sees none of the host's paths. Descriptors belong to the caller, who keeps them open until the call
has returned.
"""

from __future__ import annotations

import socket
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from luminaguard.microvm.jail import Follow, JailedProcess, ProcessInfo

__all__ = ["BootSource", "Capabilities", "Hypervisor", "ProcessInfo", "SavedMachine", "VirtualMachine",
           "processor"]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do beyond booting and stopping.

    ``random_addresses`` is whether the guest should give each command random addresses: an emulator
    that translates code again for each address at which it appears makes that cost half of an exec.
    """

    snapshot: bool
    clone: bool
    pause: bool
    random_addresses: bool


@dataclass(frozen=True, slots=True)
class BootSource:
    """Descriptors of what a machine boots from, and its disks in order (vda, vdb, ...).

    ``options`` is what this image needs on the kernel's command line, besides what every machine gets.
    """

    kernel: int
    initramfs: int
    disks: tuple[int, ...]
    memory_mib: int
    options: str = ""


@dataclass(frozen=True, slots=True)
class SavedMachine:
    """A stopped machine: its RAM as a sealed memfd and its device state as a file."""

    ram: int
    state: int
    memory_mib: int


class VirtualMachine(Protocol):
    """A running machine; it dies with the context that made it."""

    @property
    def process(self) -> JailedProcess:
        """The hypervisor's process."""
        ...

    @property
    def channel(self) -> socket.socket:
        """The host's end of the byte channel to the guest, non-blocking."""
        ...

    async def save(self, state: int) -> None:
        """Pause the machine for good and write its device state to the descriptor ``state``."""
        ...

    async def check(self) -> None:
        """Raise MachineError unless the hypervisor answers within seconds."""
        ...

    async def pause(self) -> None:
        """Stop the guest until :meth:`resume`."""
        ...

    async def resume(self) -> None:
        """Let a paused guest run."""
        ...

    async def replace_disk(self, index: int, disk: int) -> None:
        """Put another read-only file behind disk ``index``, which the guest has not open."""
        ...

    async def diagnosis(self) -> str:
        """What the hypervisor said and how it ended, for an error message."""
        ...


class Hypervisor(Protocol):
    """A backend."""

    @property
    def name(self) -> str:
        """Such as ``qemu``."""
        ...

    @property
    def accelerator(self) -> str:
        """Such as ``tcg`` or ``kvm``."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever a saved machine of this backend must not be used any more."""
        ...

    def boot(
        self, name: str, source: BootSource, ram: int, *, follow: Follow
    ) -> AbstractAsyncContextManager[VirtualMachine]:
        """Start a machine whose RAM is the memfd ``ram``; ``follow`` is for its record."""
        ...

    def clone(
        self, name: str, saved: SavedMachine, disks: tuple[int, ...], *, follow: Follow, running: bool = True
    ) -> AbstractAsyncContextManager[VirtualMachine]:
        """Start a copy-on-write copy of a saved machine with these disks behind it.

        One that is not ``running`` waits for :meth:`VirtualMachine.resume`, and has no channel before.
        """
        ...

    def try_jail(self) -> AbstractAsyncContextManager[JailedProcess]:
        """Start the hypervisor in the jail of a machine, without a guest; it ends by itself."""
        ...

    def close(self) -> None:
        """Give back what was kept for machines to come."""
        ...


def processor() -> str:
    """The host's processor: a machine that was saved on another one must not be loaded."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return next((line.strip() for line in file if line.startswith("model name")), "")
