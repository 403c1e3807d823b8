"""Find QEMU and an accelerator that really runs guest code.

``/dev/kvm`` can exist, open, and still be a software imitation on which a stock guest never comes
up. So the probe runs the smallest guest there is, a real-mode loop, and times it: well under a
millisecond on hardware, tens of milliseconds where a hypervisor above imitates the extension.
It runs in a process of its own, because a broken KVM can hang in an uninterruptible ioctl.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

from luminaguard.errors import HypervisorUnavailable
from luminaguard.microvm.qemu import kvm_guest

__all__ = [
    "KVM_LIMIT_MS",
    "MINIMUM",
    "RECOMMENDED",
    "KvmProbe",
    "Qemu",
    "find_qemu",
    "probe_kvm",
    "tsc_khz",
]

MINIMUM, RECOMMENDED = (7, 2), (10, 0)
KVM_LIMIT_MS = 5.0
_DEVICE = "/dev/kvm"
_PROBE_TIMEOUT_S, _KILL_TIMEOUT_S = 3.0, 1.0


@dataclass(frozen=True, slots=True)
class Qemu:
    """A usable QEMU: where it is, which version, and what a jail must show it.

    ``folders`` are those of its libraries and modules, ``firmware`` is qboot.
    """

    path: str
    version: tuple[int, int, int]
    build: str
    folders: tuple[str, ...]
    firmware: str


@dataclass(frozen=True, slots=True)
class KvmProbe:
    """Whether KVM runs guest code at the speed of hardware, and how that was found."""

    usable: bool
    reason: str
    milliseconds: float | None = None


def find_qemu(name: str) -> Qemu:
    """Locate QEMU and ask its version.

    Raises:
        HypervisorUnavailable: it is missing, cannot be run, or is older than :data:`MINIMUM`.
    """
    install = "Install it: apt-get install qemu-system-x86"
    path = shutil.which(name)
    if path is None:
        raise HypervisorUnavailable(f"'{name}' was not found.", hint=install)
    path = os.path.realpath(path)
    said = _said([path, "--version"])
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", said)
    if not match:
        raise HypervisorUnavailable(f"'{path}' does not say a QEMU version.", hint=install)
    version = (int(match[1]), int(match[2]), int(match[3]))
    if version[:2] < MINIMUM:
        raise HypervisorUnavailable(
            f"QEMU {match[0][8:]} is too old; {MINIMUM[0]}.{MINIMUM[1]} or newer is needed.",
            hint=install,
        )
    return Qemu(path, version, said.splitlines()[0].strip(), _library_folders(path), _firmware(path))


def _library_folders(path: str) -> tuple[str, ...]:
    """Folders of the shared libraries that QEMU is linked to, and of the loader."""
    listed = _said(["ldd", path])
    folders = {os.path.dirname(found) for found in re.findall(r"(/\S+) \(0x", listed)}
    # The same folder may have two names where /lib is a link to /usr/lib; QEMU's modules use the real one.
    return tuple(sorted(folders | {os.path.realpath(folder) for folder in folders}))


def _firmware(path: str) -> str:
    """qboot, in one of the folders that QEMU searches: a PVH kernel under SeaBIOS boots one time in eight."""
    for folder in _said([path, "-L", "help"]).splitlines():
        candidate = os.path.join(folder.strip(), "qboot.rom")
        if os.path.isfile(candidate):
            return candidate
    raise HypervisorUnavailable(
        f"'{path}' has no qboot.rom.", hint="Install QEMU's firmware: apt-get install qemu-system-data"
    )


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise HypervisorUnavailable(
            f"'{command[0]}' cannot be run: {error}.", hint="Install it again: apt-get install qemu-system-x86"
        ) from error


def probe_kvm() -> KvmProbe:
    """Time a tiny guest on /dev/kvm, in a process of its own."""
    if not os.path.exists(_DEVICE):
        return KvmProbe(False, f"there is no {_DEVICE}")
    guest = subprocess.Popen(
        [sys.executable, "-I", kvm_guest.__file__], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    errors = ""
    try:
        said, errors = guest.communicate(timeout=_PROBE_TIMEOUT_S)
        took = float(said or "nan")
    except subprocess.TimeoutExpired:
        guest.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            guest.communicate(timeout=_KILL_TIMEOUT_S)  # in an uninterruptible ioctl it stays: it is left behind
        return KvmProbe(False, f"a six-byte guest did not end within {_PROBE_TIMEOUT_S:g} s")
    except ValueError:
        took = math.nan
    if guest.returncode or math.isnan(took):
        reason = errors.strip().splitlines()[-1:] or [f"it ended with status {guest.returncode}"]
        return KvmProbe(False, f"a six-byte guest could not run: {reason[0][:200]}")
    if took > KVM_LIMIT_MS:
        return KvmProbe(False, f"a six-byte guest took {took:.1f} ms: no hardware runs it", took)
    return KvmProbe(True, f"a six-byte guest took {took:.2f} ms", took)


def tsc_khz() -> int:
    """The host's time-stamp counter frequency in kHz, measured over 100 ms.

    Under TCG the guest reads the host's counter, and a guest without PIT or kvmclock cannot
    calibrate it: the kernel is told instead (``tsc_early_khz``).
    """
    code = bytes.fromhex("0f3148c1e2204809d0c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
        best = []
        for _ in range(3):
            clock, ticks = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW), read()
            time.sleep(0.033)
            best.append((read() - ticks) * 1_000_000 // (time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - clock))
        del read
        # The buffer's export must end before the page can be unmapped.
        import gc  # noqa: PLC0415  # needed in this one place

        gc.collect()
    return int(sorted(best)[1])
