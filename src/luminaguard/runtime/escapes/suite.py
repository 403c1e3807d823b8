"""The escape suite: what a hostile command tries in its machine, and what has to come of each attempt.

Every attempt is really made, by :mod:`probe` as the workload of a real machine. One that was not made
counts like one that succeeded. Identifiers: ATT&CK Enterprise (``T…``), ATLAS 5.6 (``AML.T…``), OWASP Agentic
Top 10 2026 (``ASI…``).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from luminaguard.approvals.model import Verdict
from luminaguard.images.imported import python_of
from luminaguard.runtime.decisions import Answer

if TYPE_CHECKING:
    from luminaguard.microvm.machine import Outcome
    from luminaguard.runtime.core import Runtime

__all__ = ["ATTEMPTS", "KILLING", "SYSTEM_CALLS", "Attempt", "Result", "judge", "probe_command", "read_outcomes",
           "run_suite"]  # fmt: skip

_MAX_SAID = 1 << 20

FORGED = b'{"exit":0,"out_of_memory":0}'
"""Part of the answer that the probe forges on its output before it ends."""
PROBE_STATUS = 71
"""What the probe ends with; a forgery that was believed would make it 0."""

PYTHON = "python3"
"""In a command: whatever starts it in the image that is audited."""
_DENIED = frozenset({"EPERM", "EACCES"})
_ABSENT = _DENIED | {"ENOENT"}
_READ_ONLY = _DENIED | {"EROFS"}
_NO_FAMILY = frozenset({"EAFNOSUPPORT"})
_NO_ROUTE = frozenset({"ENETUNREACH", "EACCES"})  # EACCES: a landlock that knows TCP
_FULL = frozenset({"ENOSPC", "EDQUOT"})

SYSTEM_CALLS: dict[str, tuple[int, tuple[int, ...]]] = {
    "ptrace": (101, (0, 0, 0, 0)), "process_vm_readv": (310, (1, 0, 0, 0, 0, 0)),
    "process_vm_writev": (311, (1, 0, 0, 0, 0, 0)), "kcmp": (312, (1, 1, 0, 0, 0)), "pidfd_getfd": (438, (0, 0, 0)),
    "mount": (165, (0, 0, 0, 0, 0)), "umount2": (166, (0, 0)), "pivot_root": (155, (0, 0)), "chroot": (161, (0,)),
    "open_tree": (428, (0, 0, 0)), "move_mount": (429, (0, 0, 0, 0, 0)), "fsopen": (430, (0, 0)),
    "fsmount": (432, (0, 0, 0)), "mount_setattr": (442, (0, 0, 0, 0, 0)),
    "unshare.user": (272, (0x10000000,)), "unshare.mount": (272, (0x20000,)), "unshare.net": (272, (0x40000000,)),
    "setns": (308, (0, 0)), "clone.user": (56, (0x10000000 | 17, 0, 0, 0, 0)), "clone3": (435, (0, 0)),
    "init_module": (175, (0, 0, 0)), "finit_module": (313, (0, 0, 0)), "delete_module": (176, (0, 0)),
    "kexec_load": (246, (0, 0, 0, 0)), "kexec_file_load": (320, (0, 0, 0, 0, 0)), "reboot": (169, (0, 0, 0, 0)),
    "bpf": (321, (0, 0, 0)), "perf_event_open": (298, (0, 0, 0, 0, 0)), "userfaultfd": (323, (0,)),
    "io_uring_setup": (425, (8, 0)), "io_uring_enter": (426, (0, 0, 0, 0, 0, 0)),
    "add_key": (248, (0, 0, 0, 0, 0)), "request_key": (249, (0, 0, 0, 0)), "keyctl": (250, (0, 0, 0, 0, 0)),
    "swapon": (167, (0, 0)), "acct": (163, (0,)), "quotactl": (179, (0, 0, 0, 0)), "syslog": (103, (3, 0, 0)),
    "iopl": (172, (3,)), "ioperm": (173, (0, 1, 1)), "modify_ldt": (154, (0, 0, 0)), "personality": (135, (0x40000,)),
    "settimeofday": (164, (0, 0)), "clock_settime": (227, (0, 0)), "clock_adjtime": (305, (0, 0)),
    "adjtimex": (159, (0,)), "sethostname": (170, (0, 0)), "setdomainname": (171, (0, 0)),
    "name_to_handle_at": (303, (0, 0, 0, 0, 0)), "open_by_handle_at": (304, (0, 0, 0)),
    "fanotify_init": (300, (0, 0)), "lookup_dcookie": (212, (0, 0, 0)), "move_pages": (279, (1, 0, 0, 0, 0, 0)),
}  # fmt: skip
"""Number (x86-64) and arguments of the calls that are made directly."""

_ESCAPE = ("T1611", "AML.T0105", "ASI05")
_PRIVILEGE = ("T1068", "T1548", "AML.T0105", "ASI03")
_KERNEL_CODE = ("T1547.006", "T1014", "AML.T0105", "ASI05")
_INJECTION = ("T1055.008", "AML.T0105", "ASI05")
_DISCOVERY = ("T1003.007", "T1057", "AML.T0083", "ASI03")
_NETWORK = ("T1048", "T1095", "AML.T0086", "ASI02")
_METADATA = ("T1552.005", "AML.T0083", "ASI03")
_TAMPER = ("T1565.001", "T1574.006", "AML.T0101", "ASI02")
_CLOCK = ("T1070.006", "AML.T0105", "ASI10")
_EXHAUST = ("T1499.001", "AML.T0034.002", "ASI08")
_FORGE = ("T1557", "AML.T0053", "ASI07")
_GROUPS = {
    "ptrace": _INJECTION, "process_vm_readv": _INJECTION, "process_vm_writev": _INJECTION, "kcmp": _INJECTION,
    "pidfd_getfd": _INJECTION, "init_module": _KERNEL_CODE, "finit_module": _KERNEL_CODE,
    "delete_module": _KERNEL_CODE, "kexec_load": _KERNEL_CODE, "kexec_file_load": _KERNEL_CODE, "bpf": _KERNEL_CODE,
    "settimeofday": _CLOCK, "clock_settime": _CLOCK, "clock_adjtime": _CLOCK, "adjtimex": _CLOCK,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt: its name, the outcomes that mean that it failed, and what it is an instance of."""

    name: str
    fails_with: frozenset[str]
    techniques: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of an attempt."""

    attempt: Attempt
    outcome: str
    verdict: Literal["held", "escaped", "not made"]


def _rows(prefix: str, names: Iterable[str], fails_with: Iterable[str], techniques: tuple[str, ...]) -> list[Attempt]:
    return [Attempt(f"{prefix}.{name}", frozenset(fails_with), techniques) for name in names]


ATTEMPTS: tuple[Attempt, ...] = (
    *(Attempt(f"call.{name}", frozenset({"ENOSYS" if name == "clone3" else "EPERM"}), _GROUPS.get(name, _ESCAPE))
      for name in SYSTEM_CALLS),
    Attempt("abi.x32", frozenset({"killed:SIGSYS"}), _ESCAPE),
    # A kernel that was told ia32_emulation=0 and knows it does not even take the interrupt.
    Attempt("abi.i386", frozenset({"killed:SIGSYS", "killed:SIGSEGV"}), _ESCAPE),
    *_rows("init.signal", ("SIGKILL", "SIGTERM", "SIGSTOP", "SIGCHLD"), {"EPERM", "ESRCH"}, ("T1489", *_ESCAPE)),
    *_rows("init", ("environ", "memory", "maps", "root", "files"), _ABSENT, _DISCOVERY),
    Attempt("init.pidfd", frozenset({"unseen"}), _DISCOVERY),
    Attempt("processes.others", frozenset({"none seen"}), _DISCOVERY),
    Attempt("supervisor.files", _ABSENT, _DISCOVERY),
    Attempt("supervisor.descriptors", frozenset({"none left"}), _FORGE),
    *_rows("rights", ("setuid", "setgid", "setgroups", "nice", "realtime"), _DENIED, _PRIVILEGE),
    Attempt("rights.rlimit", frozenset({"ValueError", "EPERM"}), _PRIVILEGE),
    Attempt("rights.cgroup", _ABSENT, _PRIVILEGE),
    Attempt("rights.capabilities", frozenset({"none"}), _PRIVILEGE),
    Attempt("rights.new-privileges", frozenset({"off"}), _PRIVILEGE),
    Attempt("rights.seccomp", frozenset({"filtered"}), _PRIVILEGE),
    *_rows("proc.write", ("sysrq-trigger", "sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/kernel/hostname",
                          "sys/vm/overcommit_memory", "sys/kernel/modules_disabled", "sys/user/max_user_namespaces",
                          "sys/kernel/yama/ptrace_scope", "1/oom_score_adj"), _READ_ONLY | {"ENOENT"}, _ESCAPE),
    *_rows("proc.read", ("kcore", "kmsg", "kpageflags", "iomem", "timer_list", "modules", "slabinfo"),
           _ABSENT | {"empty"}, _DISCOVERY),
    Attempt("proc.pagemap", _ABSENT | {"frames hidden"}, _DISCOVERY),
    Attempt("proc.kallsyms", _ABSENT | {"addresses hidden"}, _DISCOVERY),
    *_rows("sys", ("list", "debug"), _ABSENT, _DISCOVERY),
    *_rows("device.open", ("mem", "kmsg", "vda", "vdb", "kvm", "vport0p1", "vsock", "hwrng", "hvc0", "ttyS0", "fuse",
                           "net/tun", "loop-control", "mapper/control"), _ABSENT, _ESCAPE),
    *_rows("device.make", ("disk", "memory", "port", "whiteout"), _DENIED, _ESCAPE),
    Attempt("terminal.push-input", _DENIED | {"ENOTTY"}, ("T1056", *_ESCAPE)),
    *_rows("socket", ("vsock", "netlink", "packet", "alg", "key", "bluetooth", "can", "xdp"), _NO_FAMILY, _NETWORK),
    *_rows("socket", ("raw", "raw6"), _DENIED, _NETWORK),
    *_rows("network", ("gateway", "dns", "six"), _NO_ROUTE | {"EADDRNOTAVAIL"}, _NETWORK),
    Attempt("network.metadata", _NO_ROUTE, _METADATA),
    Attempt("network.name", frozenset({"EAI_AGAIN", "-3", "-2", "-5"}), _NETWORK),
    *_rows("root.write", ("usr/bin/python3", "etc/passwd", "etc/ld.so.cache", "etc/machine-id"),
           _READ_ONLY | {"ENOENT"}, _TAMPER),
    *_rows("root.create", ("usr/new", "etc/ld.so.preload", "run/new", "new", "var/new", "dev/new"), _READ_ONLY,
           _TAMPER),
    Attempt("root.remount", _DENIED, _TAMPER),
    *_rows("workspace", ("hard-link", "hard-link-out", "rename-out"), _READ_ONLY | {"EXDEV"}, _TAMPER),
    *_rows("workspace", ("through-link", "dot-dot"), _READ_ONLY, _TAMPER),
    *_rows("workspace", ("overlay-attribute", "redirect", "file-capability", "chown", "immutable"),
           _READ_ONLY | {"ENOTSUP", "EOPNOTSUPP", "ENOTTY"}, _TAMPER),
    Attempt("exhaust.processes", frozenset({"EAGAIN"}), _EXHAUST),
    Attempt("exhaust.descriptors", frozenset({"EMFILE"}), _EXHAUST),
    *_rows("exhaust.disk", ("tmp", "var/tmp", "home/user", "dev/shm", "workspace"), _FULL, _EXHAUST),
    Attempt("exhaust.inodes", _FULL, _EXHAUST),
    Attempt("exhaust.locked-memory", frozenset({"EPERM", "ENOMEM"}), _EXHAUST),
    *_rows("exhaust", ("memory", "shared-memory"), {"out of memory"}, _EXHAUST),
    Attempt("protocol.forged-answer", frozenset({"only output"}), _FORGE),
)  # fmt: skip


async def run_suite(runtime: Runtime, step: Callable[[str], None] = lambda _: None) -> list[Result]:
    """Make every attempt in machines of their own, on an empty workspace, and judge what came of them.

    Args:
        runtime: its settings and its image are those that are put to the test.
        step: told in a few words what is being done.

    Raises:
        LuminaGuardError: there is no machine to try it in.
    """
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="luminaguard-escapes-") as folder:
        step(f"making {len(ATTEMPTS) - len(KILLING)} attempts in a machine")
        said, outcome = await _run(runtime, folder, probe_command())
        outcomes |= read_outcomes(said, outcome.exit_code)
        for name, command in KILLING.items():
            step(f"making the attempt {name}")
            _, outcome = await _run(runtime, folder, command)
            outcomes[name] = "out of memory" if outcome.out_of_memory else f"exit {outcome.exit_code}"
    return judge(outcomes)


async def _run(runtime: Runtime, folder: str, argv: tuple[str, ...]) -> tuple[bytes, Outcome]:
    from luminaguard.microvm.machine import Command

    said = bytearray()
    program, *arguments = argv
    if program == PYTHON:
        argv = (*python_of(runtime.images.current()), *arguments)

    async def output(stream: int, data: bytes) -> None:
        if stream == 1 and len(said) < _MAX_SAID:
            said.extend(data)

    execution = await runtime.exec(Path(folder), Command(argv, processes=runtime.settings.processes), output=output)
    if execution.request is not None:
        runtime.decisions.deny(execution.request, Answer(Verdict.DENY, "escape suite"))
    return bytes(said), execution.outcome


def probe_command() -> tuple[str, ...]:
    """The command that makes all attempts but those of :data:`KILLING`."""
    source = (resources.files("luminaguard.runtime.escapes") / "probe.py").read_text(encoding="utf-8")
    return (PYTHON, "-I", "-c", source, json.dumps({f"call.{name}": row for name, row in SYSTEM_CALLS.items()}))


KILLING = {
    "exhaust.memory": (PYTHON, "-I", "-c", "b = [bytes([i % 255 + 1]) * (1 << 24) for i in range(4096)]"),
    "exhaust.shared-memory": (PYTHON, "-I", "-c", "import os; os.posix_fallocate(os.memfd_create('m'), 0, 1 << 40)"),
}
"""Attempts that end every process of their command: each is a command of its own."""


def read_outcomes(output: bytes, exit_code: int) -> dict[str, str]:
    """What the probe said, and whether its forgery was taken for anything but output."""
    line, _, rest = output.partition(b"\n")
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    outcomes = {str(name): str(outcome) for name, outcome in said.items()} if isinstance(said, dict) else {}
    if FORGED in rest:
        outcomes["protocol.forged-answer"] = "only output" if exit_code == PROBE_STATUS else f"exit {exit_code}"
    return outcomes


def judge(outcomes: Mapping[str, str]) -> list[Result]:
    """Every attempt with its verdict; one without an outcome was not made."""
    results = []
    for attempt in ATTEMPTS:
        outcome = outcomes.get(attempt.name)
        if outcome is None:
            results.append(Result(attempt, "", "not made"))
        else:
            results.append(Result(attempt, outcome, "held" if outcome in attempt.fails_with else "escaped"))
    return results
