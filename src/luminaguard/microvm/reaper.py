"""What sweeps up after an owner that was killed: its machines die with it, their records and cgroups do not.

While a process has machines, a flock(1) of its own session waits for a lock that this process holds.
The kernel gives the lock away when the process is gone, however it went, and flock turns into the
sweep. A process that ends as it should has swept up itself, and ends the waiting first.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["Reaper"]


class Reaper:
    """The waiting process, for the machines recorded in ``run``."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = run / f"owner-{os.getpid()}.lock"
        self._fd = -1
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to wait; raises OSError."""
        self._fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        sweep = [sys.executable, "-m", "luminaguard.microvm.sweep", str(self._run), str(self._lock)]
        self._process = subprocess.Popen(
            [shutil.which("flock") or "/usr/bin/flock", str(self._lock), *sweep], start_new_session=True, cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def stop(self) -> None:
        """There is nothing to sweep up any more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._lock.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
