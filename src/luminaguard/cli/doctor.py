"""``luminaguard doctor``: try everything that is needed; each failure says what to do about it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import anyio

from luminaguard.cli.output import colours, print_json
from luminaguard.errors import EXIT_UNAVAILABLE, LuminaGuardError
from luminaguard.runtime import Runtime
from luminaguard.settings import Folders, Settings, load_settings

__all__ = ["Finding", "run"]

Level = Literal["ok", "note", "fail"]
_WORDS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}
_COLOURS = {"ok": "\x1b[32m", "note": "\x1b[33m", "fail": "\x1b[1;31m"}
_CACHE_BYTES, _STATE_BYTES = 1 << 30, 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was tried, how it went, and the remedy where there is something to mend."""

    check: str
    level: Level
    detail: str
    remedy: str = ""


def run(*, as_json: bool) -> int:
    """Run all checks; return 0, or the status of something missing."""
    findings: list[Finding] = []
    folders = Folders.from_environment()
    try:
        settings = load_settings(folders)
        folders.ensure()
        findings.append(Finding("settings", "ok", f"state in {folders.state}"))
    except LuminaGuardError as error:
        findings.append(Finding("settings", "fail", error.message, error.hint))
        settings = Settings.model_construct()
    else:
        runtime = Runtime(settings, folders)
        checks = (_hypervisor, _firecracker, _kvm, _host, _tools, _backend, _jail, _disk, _image, _machine, _database,
                  _publishes, _mcp)  # fmt: skip
        findings.extend(_tried(check, runtime) for check in checks)
        runtime.close()
    failed = any(finding.level == "fail" for finding in findings)
    if as_json:
        print_json({"status": "fail" if failed else "ok", "checks": [asdict(f) for f in findings]})
    else:
        for finding in findings:
            _show(finding)
    return EXIT_UNAVAILABLE if failed else 0


def _tried(check: Callable[[Runtime], Finding], runtime: Runtime) -> Finding:
    try:
        return check(runtime)
    except LuminaGuardError as error:
        return Finding(check.__name__.strip("_"), "fail", error.message, error.hint)
    except OSError as error:
        return Finding(check.__name__.strip("_"), "fail", str(error), "Check the permissions of that path.")


def _show(finding: Finding) -> None:
    coloured = colours(sys.stdout)
    start, end = (_COLOURS[finding.level], "\x1b[0m") if coloured else ("", "")
    print(f"{start}{_WORDS[finding.level]}{end}  {finding.check:11} {finding.detail}")
    if finding.remedy:
        print(f"                  remedy: {finding.remedy}")


def _hypervisor(runtime: Runtime) -> Finding:
    from luminaguard.microvm.qemu.probe import RECOMMENDED, find_qemu

    found = find_qemu(runtime.settings.qemu)
    version = ".".join(map(str, found.version))
    if found.version[:2] < RECOMMENDED:
        wanted = ".".join(map(str, RECOMMENDED))
        return Finding("hypervisor", "note", f"QEMU {version} at {found.path} works",
                       f"QEMU {wanted} or newer starts programs faster under emulation (in backports)")  # fmt: skip
    return Finding("hypervisor", "ok", f"QEMU {version} at {found.path}")


def _firecracker(runtime: Runtime) -> Finding:
    from luminaguard.errors import HypervisorUnavailable
    from luminaguard.microvm.firecracker.probe import find_firecracker

    wanted = runtime.settings.backend == "firecracker"
    try:
        found = find_firecracker(runtime.settings.firecracker, runtime.settings.jailer)
    except HypervisorUnavailable as error:
        return Finding("firecracker", "fail" if wanted else "note", error.message, error.hint if wanted else "")
    return Finding("firecracker", "ok", f"{'.'.join(map(str, found.version))} at {found.path}, with its jailer")


def _backend(runtime: Runtime) -> Finding:
    """Which of them machines really get."""
    chosen = runtime.hypervisor
    return Finding("backend", "ok", f"{chosen.name} with {chosen.accelerator}")


def _host(_runtime: Runtime) -> Finding:
    from luminaguard.cli.host_checks import host_notes

    found = list(host_notes())
    if not found:
        return Finding("host", "ok", "nothing weakens the isolation of machines")
    return Finding("host", "note", "; ".join(what for what, _ in found), "; ".join(remedy for _, remedy in found))


def _mcp(runtime: Runtime) -> Finding:
    """Servers of tools that run with the user's rights are a person's choice, and never forgotten."""
    servers = runtime.settings.mcp_servers
    free = [name for name, one in servers.items() if getattr(one, "isolation", "machine") == "none"]
    if free:
        return Finding("mcp", "note", f"without a machine of their own, with your rights: {', '.join(free)}",
                       'Take isolation = "none" out of their tables')  # fmt: skip
    return Finding("mcp", "ok", f"{len(servers)} servers of tools, none of them without isolation")


def _kvm(_runtime: Runtime) -> Finding:
    from luminaguard.microvm.qemu.probe import probe_kvm

    probe = probe_kvm()
    if probe.usable:
        return Finding("kvm", "ok", probe.reason)
    return Finding("kvm", "note", f"not used: {probe.reason}",
                   "emulation (TCG) is used; it is slower, and QEMU does not call it a security boundary")  # fmt: skip


def _tools(_runtime: Runtime) -> Finding:
    needed = {
        "mksquashfs": "squashfs-tools",
        "bwrap": "bubblewrap",
        "setpriv": "util-linux",
        "prlimit": "util-linux",
        "flock": "util-linux",
        "apt-get": "apt",
    }
    missing = sorted({package for program, package in needed.items() if shutil.which(program) is None})
    if missing:
        return Finding(
            "tools",
            "fail",
            f"missing: {', '.join(missing)}",
            f"apt-get install {' '.join(missing)}",
        )
    return Finding("tools", "ok", ", ".join(needed))


def _jail(runtime: Runtime) -> Finding:
    """Run the hypervisor in its jail, as every machine is, and say which layers it had."""
    from luminaguard.errors import JailUnavailable

    try:
        layers = runtime.try_jail()
    except JailUnavailable as error:
        return Finding("jail", "fail", error.message, _remedy(error.hint))
    missing = [f"{name} ({why})" for name, why in layers.items() if why != "on"]
    present = ", ".join(name for name, why in layers.items() if why == "on")
    if missing:
        return Finding("jail", "note", f"{present}; without {'; '.join(missing)}",
                       "run as root, or have a cgroup hierarchy delegated to you")  # fmt: skip
    return Finding("jail", "ok", present)


def _remedy(otherwise: str, system: Path = Path("/proc/sys")) -> str:
    """The setting that forbids user namespaces here, if there is one."""
    for path, wanted, setting in (
        ("kernel/apparmor_restrict_unprivileged_userns", "0", "kernel.apparmor_restrict_unprivileged_userns=0"),
        ("kernel/unprivileged_userns_clone", "1", "kernel.unprivileged_userns_clone=1"),
    ):
        file = system / path
        if file.exists() and file.read_text(encoding="ascii").strip() != wanted:
            return f"sysctl -w {setting}"
    file = system / "user/max_user_namespaces"
    if file.exists() and file.read_text(encoding="ascii").strip() == "0":
        return "sysctl -w user.max_user_namespaces=10000"
    return f"{otherwise} In a container, /proc must not be masked (docker: --security-opt systempaths=unconfined)."


def _disk(runtime: Runtime) -> Finding:
    needed = ((runtime.folders.cache, _CACHE_BYTES), (runtime.folders.state, _STATE_BYTES))
    for folder, wanted in needed:
        free = shutil.disk_usage(folder).free
        if free < wanted:
            return Finding("disk", "fail", f"{free >> 20} MiB free at {folder}", f"free {wanted >> 20} MiB there")
    free = shutil.disk_usage(runtime.folders.cache).free
    return Finding("disk", "ok", f"{free >> 30} GiB free at {runtime.folders.cache}")


def _image(runtime: Runtime) -> Finding:
    image = runtime.images.current()
    image.verify()
    return Finding(
        "image",
        "ok",
        f"{image.id}, {image.manifest.distribution}, kernel {image.manifest.kernel_release}; verified",
    )


def _machine(runtime: Runtime) -> Finding:
    """Clone a machine and run a command in it; the first time a template is booted for it."""
    import tempfile

    from luminaguard.microvm.machine import Command

    async def ignore(_stream: int, _data: bytes) -> None:
        return

    with tempfile.TemporaryDirectory(prefix="luminaguard-doctor-") as folder:
        done = anyio.run(lambda: runtime.exec(Path(folder).resolve(), Command(("/bin/true",)), output=ignore))
    if done.outcome.exit_code:
        return Finding(
            "machine", "fail", f"/bin/true ended with {done.outcome.exit_code}", "luminaguard image build --force"
        )
    return Finding("machine", "ok", f"a clone ran /bin/true (woken after {done.spawn_ms:.0f} ms)")


def _publishes(runtime: Runtime) -> Finding:
    told = runtime.decisions.recover()
    if told:
        return Finding("publishes", "note", "; ".join(told), "see 'luminaguard approvals list'")
    return Finding("publishes", "ok", "none was interrupted")


def _database(runtime: Runtime) -> Finding:
    count = runtime.ledger.verify()
    waiting = len(runtime.approvals.list())
    return Finding("database", "ok", f"the ledger verifies ({count} entries); {waiting} requests wait")
