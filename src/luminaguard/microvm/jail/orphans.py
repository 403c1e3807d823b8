"""Find hypervisors whose owner was killed in the moment between starting them and recording them.

An owner that is killed then leaves at most a process that waits at its gate, or one that has just
passed it: its parent, bubblewrap, is gone, so its parent is init. Its command line says which
machine it was to be.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Collection

from luminaguard import log

__all__ = ["end_orphans"]

_NAMED = re.compile(rb"\0(?:--hostname|-name)\0(vm-[0-9a-f]{10})\0")
_MAX = 1 << 17


def end_orphans(living: Collection[str]) -> list[int]:
    """Kill this user's orphans (as root: everyone's) that are not among ``living``; return their pids."""
    ended: list[int] = []
    with open("/proc/1/comm", "rb") as file:
        if file.read(64).startswith((b"python", b"luminaguard")):
            return ended  # in a container, init may be an owner itself
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        pid = int(name)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            # Looked at while the descriptor holds the process: its number cannot be reused meanwhile.
            vm = _machine_of(pid)
            if vm and vm not in living and _parent(pid) == 1:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                log.event("machine.orphan_ended", vm=vm, pid=pid)
                ended.append(pid)
        except OSError:
            continue  # it has just ended, or is someone else's
        finally:
            os.close(pidfd)
    return ended


def _machine_of(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        found = _NAMED.search(file.read(_MAX))
    return found[1].decode() if found else ""


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return int(file.read(4096).rpartition(")")[2].split()[1])
