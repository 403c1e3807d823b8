"""What the guest's kernel is set to, read back from a running machine and compared with a published list.

The lists are those of kernel-hardening-checker, revision 0b9aebf (June 2026), its parts about sysctls and the
command line: names and values are facts of KSPP, CIS, grsecurity and that project; the reading is ours. Where
that list takes a kernel's build for an answer, so do we (``None`` among the values: it need not be said).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from luminaguard.images.audit import Check

if TYPE_CHECKING:
    from luminaguard.runtime.core import Runtime

__all__ = ["CMDLINE", "COMPARED_WITH", "SYSCTLS", "judge_cmdline", "judge_kernel", "judge_mounts", "judge_settings",
           "read_back"]  # fmt: skip

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


_MITIGATIONS = "auto,nosmt"
_BY_MITIGATIONS = (
    "spectre_v2", "spectre_v2_user", "spectre_bhi", "spec_store_bypass_disable", "l1tf", "mds", "tsx_async_abort",
    "srbds", "mmio_stale_data", "retbleed", "spec_rstack_overflow", "gather_data_sampling", "reg_file_data_sampling",
    "tsa", "indirect_target_selection", "vmscape",
)  # fmt: skip
"""Each may be on by itself; ``mitigations=auto,nosmt`` turns all of them on."""
_MUST_BE_ABSENT = (
    "nokaslr", "no_hash_pointers", "nosmep", "nosmap", "dis_ucode_ldr", "setcpuid", "clearcpuid", "nopti",
    "nospec_store_bypass_disable", "nospectre_v1", "nospectre_v2", "nospectre_bhb", "arm64.nobti", "arm64.nopauth",
    "arm64.nomte", "arm64.nogcs", "slab_merge", "slub_merge", "slab_common.usercopy_fallback", "sysrq_always_enabled",
    "norandmaps",
)  # fmt: skip
CMDLINE: dict[str, frozenset[str | None]] = {
    **{name: frozenset({None}) for name in _MUST_BE_ABSENT},
    **{name: frozenset({None, value}) for name, value in {
        "iommu.passthrough": "0", "rodata": "on", "amd_iommu": "on", "tsx": "off", "bdev_allow_write_mounted": "0",
        "vdso32": "0", "init_on_alloc": "1"}.items()},
    **{name: frozenset({value}) for name, value in {
        "page_alloc.shuffle": "1", "hash_pointers": "always", "slab_nomerge": "", "init_on_free": "1",
        "hardened_usercopy": "1", "kfence.sample_interval": "100", "lockdown": "confidentiality",
        "module.sig_enforce": "1", "efi": "disable_early_pci_dma", "randomize_kstack_offset": "1",
        "mitigations": _MITIGATIONS, "intel_iommu": "on", "iommu.strict": "1", "pti": "on", "cfi": "kcfi",
        "iommu": "force", "nosmt": "", "vsyscall": "none", "ia32_emulation": "0", "debugfs": "off",
        "proc_mem.force_override": "never"}.items()},
    **{name: frozenset({"on", "auto"}) for name in _BY_MITIGATIONS},
}  # fmt: skip
"""Parameters and the values that are right; None stands for one that is not given."""
_EMULATED = (
    "without KVM the processor is emulated and does not speculate, so mitigations=off: with mitigations=auto,nosmt "
    "pti=on a Python program that runs five others took 705 ms instead of 503, 30 programs from bash 509 instead "
    "of 300, a cold boot 2.84 s instead of 2.63 (medians, TCG, QEMU 7.2, 2 cores)"
)
_NO_CORES = "kernel/core_pattern=core"
_KNOWN_MODULES = frozenset({
    "squashfs", "overlay", "virtio_blk", "virtio_mmio", "virtio_console", "virtio_rng", "virtio", "virtio_ring",
    "virtio_pci", "rng_core", "vsock", "vmw_vsock_virtio_transport", "vmw_vsock_virtio_transport_common",
    "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "dm_mod", "brd",
})  # fmt: skip
_FORBIDDEN_KINDS = frozenset({"debugfs", "tracefs", "bpf", "configfs", "securityfs", "nfs", "fuse", "hugetlbfs"})
_OWN_FOLDER = "/run/luminaguard"
_LEAST_LANDLOCK = 2


def judge_cmdline(text: str) -> Check:
    """The running kernel's command line against the list; what emulation makes pointless is waived by name."""
    given: dict[str, str] = {}
    for word in text.split():
        parameter, _, its = word.partition("=")
        given[parameter] = its
    wrong: list[str] = []
    waived: list[str] = []
    for name, right in CMDLINE.items():
        value = given.get(name)
        if value in right or (name in _BY_MITIGATIONS and given.get("mitigations") == _MITIGATIONS):
            continue
        emulated = given.get("mitigations") == "off" and name in {*_BY_MITIGATIONS, "mitigations", "pti"}
        (waived if emulated else wrong).append(f"{name}={value}" if value is not None else f"{name} is not given")
    right_ones = len(CMDLINE) - len(wrong) - len(waived)
    detail = f"{right_ones} of {len(CMDLINE)} parameters read back from the running kernel as {COMPARED_WITH} asks"
    return Check("cmdline", "fail" if wrong else "waived" if waived else "pass", detail, tuple(wrong), tuple(waived),
                 (_EMULATED,) if waived else ())  # fmt: skip


def judge_mounts(text: str) -> Check:
    """Every mount of the machine: read-only or limited, without set-id bits and devices, and nothing that tells."""
    wrong = []
    count = 0
    for line in text.splitlines():
        _, target, kind, options = line.split(" ")[:4]
        given = options.split(",")
        count += 1
        if kind in _FORBIDDEN_KINDS:
            wrong.append(f"{target} is a {kind}")
        if "nosuid" not in given:
            wrong.append(f"{target} has no nosuid")
        # Devices are where the machine's own and the workload's six are, and nowhere else.
        devices = target in {"/dev", "/dev/pts", f"{_OWN_FOLDER}/dev"} or target.startswith("/proc/")
        if "nodev" not in given and not devices:
            wrong.append(f"{target} has no nodev")
        if kind == "squashfs" and "ro" not in given:
            wrong.append(f"{target} is not read-only")
        if kind == "tmpfs" and not any(o.startswith("size=") for o in given):
            wrong.append(f"{target} has no limit of its size")
        if kind == "tmpfs" and not any(o.startswith("nr_inodes=") for o in given):
            wrong.append(f"{target} has no limit of its files")
        if target == "/proc" and not {"hidepid=invisible", "hidepid=2"} & set(given):
            wrong.append("/proc shows the processes of others")
    root = [line for line in text.splitlines() if line.split(" ")[1] == "/"]
    if not root or " squashfs ro," not in root[-1]:
        wrong.append("the root file system is not a read-only squashfs")
    return Check("mounts", "fail" if wrong else "pass", f"{count} mounts read back", tuple(wrong))


def judge_kernel(facts: dict[str, str], settings: dict[str, str]) -> Check:
    """Lockdown, modules and landlock of the running kernel."""
    wrong = []
    if "[confidentiality]" not in facts.get("lockdown", ""):
        wrong.append(f"lockdown is {facts.get('lockdown', 'unknown')!r}")
    loaded = {line.split(" ")[0] for line in facts.get("modules", "").splitlines()}
    wrong += [f"module {name} is loaded" for name in sorted(loaded - _KNOWN_MODULES)]
    # A kernel that was built without them has no such setting, and no list.
    if (loaded or "kernel/modules_disabled" in settings) and settings.get("kernel/modules_disabled") != "1":
        wrong.append("modules can still be loaded")
    abi = facts.get("landlock", "none")
    if not abi.isdecimal() or int(abi) < _LEAST_LANDLOCK:
        wrong.append(f"landlock ABI is {abi}")
    detail = f"lockdown, {len(loaded)} modules and no more, landlock ABI {abi}"
    return Check("kernel", "fail" if wrong else "pass", detail, tuple(wrong))


def judge_settings(found: dict[str, str], *, container: bool = False) -> Check:
    """Compare; a setting that the kernel does not have is waived and never passed."""
    missing = tuple(name for name in SYSCTLS if name not in found)
    wrong = tuple(f"{name}={found[name]}" for name, want in SYSCTLS.items() if name in found and found[name] != want)
    right = len(SYSCTLS) - len(missing) - len(wrong)
    reasons = (_NOT_THERE,) if missing else ()
    if container and _NO_CORES in wrong:
        wrong, missing = tuple(set(wrong) - {_NO_CORES}), (*missing, _NO_CORES)
        reasons = (*reasons, "/bin/false is the container's: the kernel would run it as root; no core is written")
    detail = f"{right} of {len(SYSCTLS)} settings read back from the running kernel as {COMPARED_WITH} asks"
    return Check(
        "sysctls", "fail" if wrong else "waived" if missing else "pass", detail, wrong, missing,
        reasons,
    )  # fmt: skip


async def read_back(runtime: Runtime) -> list[Check]:
    """Clone a machine and read its kernel's command line, settings and mounts as its PID 1 sees them.

    Raises:
        LuminaGuardError: there is no machine.
    """
    from luminaguard.microvm.pool import PoolLimits

    disk = runtime.open_rehearsal()
    try:
        async with runtime.open_pool(PoolLimits(0, 0)) as pool, pool.machine(disk) as vm:
            settings, facts = await vm.inspect(tuple(SYSCTLS))
    finally:
        os.close(disk)
    container = bool(runtime.images.current().manifest.container)
    return [judge_cmdline(facts.get("cmdline", "")), judge_settings(settings, container=container),
            judge_mounts(facts.get("mounts", "")), judge_kernel(facts, settings)]  # fmt: skip
