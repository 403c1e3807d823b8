"""What is sent to Firecracker, as pure functions of what the machine is made of.

Paths are those inside the jail, the same for every machine, so that a saved machine finds its disks
and its socket at the same places in any other jail. There is no network interface, ever. Fields are
those of Firecracker's API description 1.16; older and newer versions that are accepted know them all.
"""

from __future__ import annotations

from typing import Any

from luminaguard.images.initramfs import VSOCK_OPTION
from luminaguard.microvm import guest_kernel

__all__ = [
    "CONFIG", "DISKS", "INITRAMFS", "KERNEL", "LOG", "METRICS", "RAM", "SOCKET", "STATE", "VSOCK", "boot", "disk",
    "load", "logger", "metrics", "replacement", "snapshot",
]  # fmt: skip

KERNEL, INITRAMFS, CONFIG, RAM, STATE = "vmlinux", "initramfs", "config.json", "ram", "state"
LOG, METRICS, VSOCK, SOCKET = "log.fifo", "metrics.fifo", "v.sock", "run/firecracker.socket"
DISKS = ("vda", "vdb", "vdc", "vdd")
_GUEST_CID = 3

# Those of Firecracker itself, which it adds only when none are given: no legacy keyboard to probe for,
# and a reset through it ends the machine.
_KERNEL_OPTIONS = (
    f"{guest_kernel.OPTIONS} {guest_kernel.MITIGATIONS} reboot=k i8042.noaux i8042.nomux i8042.dumbkbd i8042.nopnp "
    f"swiotlb=noforce {VSOCK_OPTION}"
)


def boot(memory_mib: int, disks: int, options: str = "") -> dict[str, Any]:
    """The configuration file of a machine that boots; ``options`` are those of its image."""
    return {
        "boot-source": {"kernel_image_path": f"/{KERNEL}", "initrd_path": f"/{INITRAMFS}",
                        "boot_args": f"{_KERNEL_OPTIONS} {options}".rstrip()},
        "drives": [disk(index) for index in range(disks)],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": memory_mib, "smt": False, "track_dirty_pages": False},
        "vsock": {"guest_cid": _GUEST_CID, "uds_path": f"/{VSOCK}"},
        "entropy": {},
        "balloon": {"amount_mib": 0, "deflate_on_oom": True, "stats_polling_interval_s": 0},
        "logger": logger(),
        "metrics": metrics(),
    }  # fmt: skip


def disk(index: int) -> dict[str, Any]:
    """A read-only disk; the guest sees them in order."""
    name = DISKS[index]
    return {"drive_id": name, "path_on_host": f"/{name}", "is_root_device": False, "is_read_only": True,
            "cache_type": "Unsafe", "io_engine": "Sync"}  # fmt: skip


def replacement(index: int, name: str) -> dict[str, Any]:
    """Another file behind a disk of a machine that has been started or loaded."""
    return {"drive_id": DISKS[index], "path_on_host": f"/{name}"}


def logger() -> dict[str, Any]:
    """Errors, into a pipe that holds a bounded number of them."""
    return {"log_path": f"/{LOG}", "level": "Error", "show_level": True, "show_log_origin": False}


def metrics() -> dict[str, Any]:
    """Counters, into a pipe as well."""
    return {"metrics_path": f"/{METRICS}"}


def snapshot() -> dict[str, Any]:
    """Write a paused machine to files."""
    return {"snapshot_type": "Full", "snapshot_path": f"/{STATE}", "mem_file_path": f"/{RAM}"}


def load(*, resume: bool, override: bool) -> dict[str, Any]:
    """Load a machine whose memory is mapped privately from its file.

    ``override`` says again where its vsock socket belongs, which Firecracker knows from 1.16 on; before,
    the path that was saved is used, and is the same one.
    """
    body: dict[str, Any] = {
        "snapshot_path": f"/{STATE}",
        "mem_backend": {"backend_type": "File", "backend_path": f"/{RAM}"},
        "track_dirty_pages": False,
        "resume_vm": resume,
    }
    return body | ({"vsock_override": {"uds_path": f"/{VSOCK}"}} if override else {})
