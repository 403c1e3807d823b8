"""The jail around a hypervisor: what a guest that has taken it over still cannot reach."""

from luminaguard.microvm.jail.cgroups import CgroupStore
from luminaguard.microvm.jail.folders import JailFolders
from luminaguard.microvm.jail.orphans import end_orphans
from luminaguard.microvm.jail.process import (
    Follow,
    Jail,
    JailedProcess,
    Limits,
    ProcessInfo,
    Program,
    not_followed,
    unused_uid,
)

__all__ = ["CgroupStore", "Follow", "Jail", "JailFolders", "JailedProcess", "Limits", "ProcessInfo", "Program",
           "end_orphans", "not_followed", "unused_uid"]  # fmt: skip
