"""The guest kernel's command line, as far as every backend has it in common."""

from __future__ import annotations

__all__ = ["OPTIONS"]

OPTIONS = (
    "quiet loglevel=0 panic=-1 no_timer_check random.trust_cpu=on rcupdate.rcu_expedited=1 "
    "8250.nr_uarts=0 cryptomgr.notests nowatchdog audit=0 psi=0 lsm=landlock,lockdown,yama "
    "lockdown=integrity slab_nomerge randomize_kstack_offset=1 vsyscall=none debugfs=off "
    "oops=panic pci=off rdinit=/init"
)
