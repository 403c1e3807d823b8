"""The guest kernel's command line, as far as every backend has it in common.

What hardens it is read back from a running machine by ``luminaguard image audit --live``. Parameters that a
kernel does not have (those of IOMMUs and EFI in a machine without either, kCFI before 6.2) it ignores: they
cost nothing, and hold for the kernel that has them.
"""

from __future__ import annotations

__all__ = ["MITIGATIONS", "OPTIONS"]

MITIGATIONS = "mitigations=auto,nosmt pti=on"
"""Against processors that speculate; an emulated one does not."""
OPTIONS = (
    "quiet loglevel=0 panic=-1 no_timer_check random.trust_cpu=on rcupdate.rcu_expedited=1 "
    "8250.nr_uarts=0 cryptomgr.notests nowatchdog audit=0 psi=0 lsm=landlock,lockdown,yama "
    "lockdown=confidentiality module.sig_enforce=1 slab_nomerge page_alloc.shuffle=1 init_on_alloc=1 init_on_free=1 "
    "hardened_usercopy=1 randomize_kstack_offset=1 kfence.sample_interval=100 hash_pointers=always cfi=kcfi "
    "vsyscall=none vdso32=0 ia32_emulation=0 debugfs=off proc_mem.force_override=never nosmt "
    "efi=disable_early_pci_dma iommu=force iommu.strict=1 intel_iommu=on "
    "oops=panic pci=off rdinit=/init"
)
