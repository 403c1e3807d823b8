"""The jail around a hypervisor: what a guest that has taken it over still cannot reach."""

from luminaguard.microvm.jail.cgroups import CgroupStore
from luminaguard.microvm.jail.orphans import end_orphans
from luminaguard.microvm.jail.process import Jail, JailedProcess, Limits, ProcessInfo, Program

__all__ = ["CgroupStore", "Jail", "JailedProcess", "Limits", "ProcessInfo", "Program", "end_orphans"]
