"""What the guest's kernel is set to, read back from a running machine and compared with a published list.

The list is that of kernel-hardening-checker, revision 0b9aebf (June 2026), its part about sysctls: names and
values are facts of KSPP, CIS, grsecurity and that project; the reading is ours.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from luminaguard.images.audit import Check

if TYPE_CHECKING:
    from luminaguard.runtime.core import Runtime

__all__ = ["COMPARED_WITH", "SYSCTLS", "judge_settings", "read_back"]

COMPARED_WITH = "kernel-hardening-checker 0b9aebf"
SYSCTLS: dict[str, str] = {
    "net/core/bpf_jit_harden": "2", "vm/mmap_min_addr": "65536", "kernel/oops_limit": "100",
    "kernel/warn_limit": "100", "kernel/dmesg_restrict": "1", "kernel/perf_event_paranoid": "3",
    "dev/tty/ldisc_autoload": "0", "kernel/kptr_restrict": "2", "dev/tty/legacy_tiocsti": "0",
    "user/max_user_namespaces": "0", "kernel/kexec_load_disabled": "1", "kernel/unprivileged_bpf_disabled": "1",
    "vm/unprivileged_userfaultfd": "0", "kernel/modules_disabled": "1", "kernel/io_uring_disabled": "2",
    "kernel/sysrq": "0", "net/ipv4/icmp_ignore_bogus_error_responses": "1",
    "net/ipv4/icmp_echo_ignore_broadcasts": "1", "net/ipv4/conf/all/accept_redirects": "0",
    "net/ipv4/conf/default/accept_redirects": "0", "net/ipv6/conf/all/accept_redirects": "0",
    "net/ipv6/conf/default/accept_redirects": "0", "net/ipv4/conf/all/accept_source_route": "0",
    "net/ipv4/conf/default/accept_source_route": "0", "net/ipv6/conf/all/accept_source_route": "0",
    "net/ipv6/conf/default/accept_source_route": "0", "net/ipv4/tcp_syncookies": "1",
    "net/ipv6/conf/all/accept_ra": "0", "net/ipv6/conf/default/accept_ra": "0", "fs/protected_symlinks": "1",
    "fs/protected_hardlinks": "1", "fs/protected_fifos": "2", "fs/protected_regular": "2", "fs/suid_dumpable": "0",
    "kernel/randomize_va_space": "2", "kernel/yama/ptrace_scope": "3", "vm/mmap_rnd_bits": "32",
    "vm/mmap_rnd_compat_bits": "16",
}  # fmt: skip
"""Names below /proc/sys and the values that the list asks for (the largest of x86-64, where it asks for that)."""
_NOT_THERE = "the guest's kernel has no such setting: the feature is not built in, or came later"


def judge_settings(found: dict[str, str]) -> Check:
    """Compare; a setting that the kernel does not have is waived and never passed."""
    missing = tuple(name for name in SYSCTLS if name not in found)
    wrong = tuple(f"{name}={found[name]}" for name, want in SYSCTLS.items() if name in found and found[name] != want)
    right = len(SYSCTLS) - len(missing) - len(wrong)
    detail = f"{right} of {len(SYSCTLS)} settings read back from the running kernel as {COMPARED_WITH} asks"
    return Check(
        "sysctls", "fail" if wrong else "waived" if missing else "pass", detail, wrong, missing,
        (_NOT_THERE,) if missing else (),
    )  # fmt: skip


async def read_back(runtime: Runtime) -> Check:
    """Clone a machine and read its kernel's settings as its PID 1 sees them.

    Raises:
        LuminaGuardError: there is no machine.
    """
    from luminaguard.microvm.pool import PoolLimits

    disk = runtime.open_rehearsal()
    try:
        async with runtime.open_pool(PoolLimits(0, 0)) as pool, pool.machine(disk) as vm:
            return judge_settings(await vm.inspect(tuple(SYSCTLS)))
    finally:
        os.close(disk)
