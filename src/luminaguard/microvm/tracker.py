"""Which micro-VMs run now, and the end of those whose owner is gone.

Each machine has a small file that its owner keeps locked. The kernel drops the lock when the owner
dies, however it dies, so a file that can be locked by someone else belongs to nobody. The machine
itself dies with its owner by PR_SET_PDEATHSIG; the sweep is the second line.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from luminaguard import log

__all__ = ["RunningVM", "VMTracker"]

_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class RunningVM:
    """A machine as ``vm list`` shows it. ``started`` is the hypervisor's start time in clock ticks."""

    id: str
    backend: str
    accelerator: str
    pid: int
    started: int
    owner: int
    workspace: str
    command: list[str]
    created_ns: int


class VMTracker:
    """The files of one run-time folder."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "vms"

    @contextmanager
    def track(
        self,
        vm_id: str,
        backend: str,
        accelerator: str,
        pid: int,
        workspace: str,
        command: list[str],
    ) -> Iterator[None]:
        """Record a machine for as long as the context lasts."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        entry = RunningVM(
            vm_id,
            backend,
            accelerator,
            pid,
            _started(pid),
            os.getpid(),
            workspace,
            command,
            time.time_ns(),
        )
        path = self.folder / f"{vm_id}.json"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.write(fd, json.dumps(asdict(entry)).encode())
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)

    def running(self) -> list[RunningVM]:
        """The machines that live now; those of dead owners are ended and forgotten."""
        found = []
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else ():
            try:
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # it has just ended
            try:
                entry = _parse(os.read(fd, _MAX))
                if _is_locked(fd):
                    if entry is not None:
                        found.append(entry)
                    continue
                if entry is not None and entry.started and _started(entry.pid) == entry.started:
                    os.kill(entry.pid, signal.SIGKILL)
                    log.event("machine.reaped", vm=entry.id, pid=entry.pid)
                path.unlink(missing_ok=True)
            finally:
                os.close(fd)
        return found


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _parse(data: bytes) -> RunningVM | None:
    try:
        return RunningVM(**json.loads(data))
    except (ValueError, TypeError):
        return None


def _started(pid: int) -> int:
    """Start time of a process in clock ticks since boot (proc(5), field 22); 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
