"""What a process uses, from /proc (proc(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["Usage", "start_time", "usage"]

_MAX = 1 << 14


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU time in seconds; memory in bytes: resident, proportional share, and its own alone."""

    cpu_s: float
    rss: int
    pss: int
    private: int


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 when there is none, or only its zombie."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in {"Z", "X"} else 0


def usage(pid: int) -> Usage | None:
    """What a process uses now; None when it is gone or may not be looked at."""
    fields = _stat(pid)
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file.read(_MAX).splitlines()[1:])
    except OSError:
        return None
    if not fields:
        return None

    def kib(name: str) -> int:
        return int(rows.get(name, "0 kB").split()[0]) << 10

    ticks = int(fields[11]) + int(fields[12])
    private = kib("Private_Clean") + kib("Private_Dirty")
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), kib("Rss"), kib("Pss"), private)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: the name before them may contain anything."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read(_MAX).rpartition(")")[2].split()
    except OSError:
        return []
