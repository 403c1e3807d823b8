"""Choose the hypervisor and its accelerator by trying them, and remember the result until reboot."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luminaguard.errors import HypervisorUnavailable
from luminaguard.microvm.jail import Jail
from luminaguard.microvm.qemu.backend import QemuHypervisor
from luminaguard.microvm.qemu.probe import KvmProbe, Qemu, find_qemu, probe_kvm

__all__ = ["choose_hypervisor"]

_MAX_MEMO = 1 << 16


def choose_hypervisor(qemu: str, accelerator: str, run: Path, jail: Jail) -> QemuHypervisor:
    """QEMU with the wanted accelerator; ``auto`` takes KVM where a timed probe shows hardware.

    Args:
        qemu: name or path of the program.
        accelerator: ``auto``, ``kvm`` or ``tcg``.
        jail: what QEMU is started in.
        run: folder for what was found out, valid until reboot or until QEMU changes.

    Raises:
        HypervisorUnavailable: there is no usable QEMU, or KVM was demanded and does not work.
    """
    memo = _Memo(run / "hypervisor.json", qemu)
    found = memo.get("qemu")
    program = _remembered(found) if found else find_qemu(qemu)
    memo.put("qemu", asdict(program))
    if accelerator == "tcg":
        return QemuHypervisor(program, "tcg", jail)
    found = memo.get("kvm")
    kvm = KvmProbe(**found) if found else probe_kvm()
    memo.put("kvm", asdict(kvm))
    if kvm.usable:
        return QemuHypervisor(program, "kvm", jail)
    if accelerator == "kvm":
        raise HypervisorUnavailable(
            f"KVM was asked for and is not usable: {kvm.reason}.",
            hint="Set accelerator to 'auto' or 'tcg', or run on a machine with hardware virtualisation "
            "and add yourself to the group 'kvm'.",
        )
    return QemuHypervisor(program, "tcg", jail)


def _remembered(found: dict[str, Any]) -> Qemu:
    version, folders = tuple(found["version"]), tuple(found["folders"])
    return Qemu(found["path"], version, found["build"], folders, found["firmware"])


class _Memo:
    """Findings that hold while this boot, this QEMU file and this user's groups stay the same."""

    def __init__(self, path: Path, qemu: str) -> None:
        self._path = path
        self._key = _identity(qemu)
        self._found: dict[str, Any] = {}
        try:
            with path.open(encoding="ascii") as file:
                raw = json.loads(file.read(_MAX_MEMO))
            if raw["key"] == self._key:
                self._found = dict(raw["found"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing is lost: it is found out again

    def get(self, name: str) -> Any:
        return self._found.get(name)

    def put(self, name: str, value: Any) -> None:
        if self._found.get(name) == value:
            return
        self._found[name] = value
        temporary = self._path.with_name(f".{self._path.name}-{os.getpid()}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            json.dump({"key": self._key, "found": self._found}, file)
        temporary.replace(self._path)


def _identity(qemu: str) -> list[Any]:
    path = shutil.which(qemu)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    if path is None:
        return [boot_id, qemu]
    info = os.stat(path)
    return [2, boot_id, path, info.st_size, info.st_mtime_ns, os.geteuid(), sorted(os.getgroups())]
