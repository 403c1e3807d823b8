"""Bounded places for what Firecracker logs: pipes that nobody has to read.

Firecracker opens them without blocking and drops what does not fit, so a guest that provokes a
million warnings fills 64 KiB and no disk.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import ExitStack
from pathlib import Path

__all__ = ["Sink"]

_KEPT = 8192
_READ = 1 << 16
_MOST_READS = 32


class Sink:
    """The reading end of one pipe; made by :meth:`make`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._last = b""

    @classmethod
    def make(cls, path: Path, uid: int, stack: ExitStack) -> Sink:
        """Make the pipe at ``path`` for a program with this uid; closed with the stack. Raises OSError."""
        os.mkfifo(path, 0o600)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        os.fchown(fd, uid, uid)
        return cls(fd)

    def words(self) -> str:
        """The end of what was written so far, printable."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MOST_READS):  # one that never stops writing must not keep us here
                if not (data := os.read(self._fd, _READ)):
                    break
                self._last = (self._last + data)[-_KEPT:]
        return self._last.decode("utf-8", "replace").strip()
