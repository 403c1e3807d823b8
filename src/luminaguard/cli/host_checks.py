"""What of this host weakens the isolation of machines on KVM, as Firecracker's guide for production names it.

Source: docs/prod-host-setup.md of Firecracker. These are the user's to change and no fault of the
installation, so each is a note with its remedy and never a failure.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["host_notes"]


def host_notes(system: Path = Path("/")) -> Iterator[tuple[str, str]]:
    """What was found, and the remedy, of each point that is not as it should be."""
    swaps = _read(system / "proc/swaps").splitlines()[1:]
    if swaps:
        yield "swap is on: guest memory can reach a disk", "swapoff -a, or encrypt the swap"
    if _read(system / "sys/kernel/mm/ksm/run").strip() not in {"", "0"}:
        yield "equal memory pages are merged (KSM): one guest can learn of another's", "echo 0 > /sys/kernel/mm/ksm/run"
    if _read(system / "sys/devices/system/cpu/smt/control").strip() == "on":
        yield "processor threads share cores (SMT)", "for guests that distrust each other: boot with nosmt"
    if weak := sorted(_vulnerabilities(system / "sys/devices/system/cpu/vulnerabilities")):
        yield f"the processor is reported vulnerable to {', '.join(weak)}", "update microcode and kernel"
    device = system / "dev/kvm"
    if device.exists() and stat.S_IMODE(os.stat(device).st_mode) & 0o007:
        yield "/dev/kvm is open to everyone", "chmod 660 /dev/kvm, with the group kvm"


def _vulnerabilities(folder: Path) -> Iterator[str]:
    for path in folder.glob("*"):
        if _read(path).startswith("Vulnerable"):
            yield path.name


def _read(path: Path) -> str:
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            return file.read(1 << 16)
    except OSError:
        return ""
