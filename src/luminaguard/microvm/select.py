"""Choose the hypervisor and its accelerator by trying them, and remember the result until reboot.

``auto`` takes Firecracker where all that it needs is there (root, KVM that runs guest code, both of its
programs in a version that is used), otherwise QEMU. A backend that was asked for by name is that one
or a refusal. Every machine's record, and ``luminaguard doctor``, say which it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luminaguard.errors import HypervisorUnavailable
from luminaguard.microvm.jail import Jail, JailFolders
from luminaguard.microvm.port import Hypervisor
from luminaguard.microvm.qemu.backend import QemuHypervisor
from luminaguard.microvm.qemu.probe import KvmProbe, Qemu, find_qemu, probe_kvm
from luminaguard.settings import Settings

__all__ = ["choose_hypervisor"]

_MAX_MEMO = 1 << 16
_LEFT_S = 3600


def choose_hypervisor(settings: Settings, run: Path, jail: Jail) -> Hypervisor:
    """The hypervisor that the settings ask for.

    Args:
        settings: ``backend``, ``accelerator`` and the names of the programs.
        run: folder for what was found out, valid until reboot or until a program changes.
        jail: what it is started in.

    Raises:
        HypervisorUnavailable: what was asked for is not there or does not work here.
    """
    memo = _Memo(run / "hypervisor.json", settings)
    wanted = settings.backend == "firecracker" or (settings.backend == "auto" and shutil.which(settings.firecracker))
    if wanted and settings.accelerator != "tcg":
        try:
            return _firecracker(settings, memo, run, jail)
        except HypervisorUnavailable:
            if settings.backend == "firecracker":
                raise
    if settings.backend == "firecracker":
        raise HypervisorUnavailable(
            "Firecracker runs on KVM only, and the accelerator is set to 'tcg'.",
            hint="Set accelerator to 'auto', or backend to 'qemu'.",
        )
    return _qemu(settings, memo, jail)


def _firecracker(settings: Settings, memo: _Memo, run: Path, jail: Jail) -> Hypervisor:
    # Only where it may be used: every command would pay for the import.
    from luminaguard.microvm.firecracker.backend import FirecrackerHypervisor
    from luminaguard.microvm.firecracker.probe import Firecracker, check_owner, find_firecracker

    if os.geteuid() != 0:
        raise HypervisorUnavailable(
            "Firecracker's jailer needs root.", hint="Run LuminaGuard as root, or set backend to 'qemu'."
        )
    found = memo.get("firecracker")
    if found:
        version = found["version"]
        program = Firecracker(found["path"], found["jailer"], (version[0], version[1], version[2]),
                              found["snapshot_version"])  # fmt: skip
        for path in (program.path, program.jailer):
            check_owner(path)
    else:
        program = find_firecracker(settings.firecracker, settings.jailer)
    memo.put("firecracker", asdict(program))
    kvm = _kvm(memo)
    if not kvm.usable:
        raise HypervisorUnavailable(
            f"Firecracker needs KVM, which is not usable: {kvm.reason}.",
            hint="Run on a machine with hardware virtualisation, or set backend to 'qemu'.",
        )
    return FirecrackerHypervisor(program, jail, JailFolders(run))


def _qemu(settings: Settings, memo: _Memo, jail: Jail) -> QemuHypervisor:
    found = memo.get("qemu")
    program = _remembered(found) if found else find_qemu(settings.qemu)
    memo.put("qemu", asdict(program))
    if settings.accelerator == "tcg":
        return QemuHypervisor(program, "tcg", jail)
    kvm = _kvm(memo)
    if kvm.usable:
        return QemuHypervisor(program, "kvm", jail)
    if settings.accelerator == "kvm":
        raise HypervisorUnavailable(
            f"KVM was asked for and is not usable: {kvm.reason}.",
            hint="Set accelerator to 'auto' or 'tcg', or run on a machine with hardware virtualisation "
            "and add yourself to the group 'kvm'.",
        )
    return QemuHypervisor(program, "tcg", jail)


def _kvm(memo: _Memo) -> KvmProbe:
    found = memo.get("kvm")
    kvm = KvmProbe(**found) if found else probe_kvm()
    memo.put("kvm", asdict(kvm))
    return kvm


def _remembered(found: dict[str, Any]) -> Qemu:
    version, folders = tuple(found["version"]), tuple(found["folders"])
    return Qemu(found["path"], version, found["build"], folders, found["firmware"])


class _Memo:
    """Findings that hold while this boot, these programs and this user's groups stay the same."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self._key = _identity(settings)
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
        for left in self._path.parent.glob(f".{self._path.name}-*"):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _LEFT_S:
                    left.unlink()


def _identity(settings: Settings) -> list[Any]:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    programs: list[Any] = []
    for name in (settings.qemu, settings.firecracker, settings.jailer):
        path = shutil.which(name)
        info = os.stat(path) if path else None
        programs.append([name, path, info.st_size, info.st_mtime_ns] if info else [name])
    return [3, boot_id, programs, os.geteuid(), sorted(os.getgroups())]
