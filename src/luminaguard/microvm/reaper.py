"""What sweeps up after an owner that was killed: its machines die with it, their records and cgroups do not.

While a process has machines, a flock(1) of its own session waits for a lock that this process holds.
The kernel gives the lock away when the process is gone, however it went, and flock turns into the
sweep. A process that ends as it should has swept up itself, and ends the waiting first.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from luminaguard.errors import HypervisorUnavailable

__all__ = ["Reaper", "forget", "keep_from_children"]


_ENVIRONMENT = ("PATH", "PYTHONPATH", "LANG")
_locks: set[int] = set()


def keep_from_children(fd: int) -> None:
    """A child that this process forks must not hold its locks: they would outlive it."""
    _locks.add(fd)


def forget(fd: int) -> None:
    """It is about to be closed."""
    _locks.discard(fd)


def _in_a_child() -> None:
    for fd in _locks:
        os.close(fd)
    _locks.clear()


os.register_at_fork(after_in_child=_in_a_child)


class Reaper:
    """The waiting process, for the machines recorded in ``run``."""

    def __init__(self, run: Path) -> None:
        self._run = run
        # One process may have several, and a pid is one's own in each pid namespace only.
        self._lock = run / f"owner-{os.getpid()}-{secrets.token_hex(4)}.lock"
        self._fd = -1
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to wait.

        Raises:
            HypervisorUnavailable: flock(1) is missing.
            OSError: the lock cannot be made.
        """
        self._fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        keep_from_children(self._fd)
        sweep = [sys.executable, "-m", "luminaguard.microvm.sweep", str(self._run), str(self._lock)]
        try:
            self._process = subprocess.Popen(
                [shutil.which("flock") or "/usr/bin/flock", str(self._lock), *sweep], start_new_session=True, cwd="/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )  # fmt: skip
        except (FileNotFoundError, PermissionError) as error:
            self.stop()
            raise HypervisorUnavailable(
                f"flock(1) cannot be run ({error.strerror}): nobody could sweep up if this process were killed.",
                hint="Install it: apt-get install util-linux",
                kept="No machine was started.",
            ) from error

    def stop(self) -> None:
        """There is nothing to sweep up any more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._lock.unlink(missing_ok=True)
        if self._fd >= 0:
            forget(self._fd)
            os.close(self._fd)
            self._fd = -1
