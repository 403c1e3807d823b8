"""Locks by name, all in one file: each name is a byte of it, and the kernel lets go for whoever is killed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Busy", "locked"]

_PAUSE_S = 0.05
_FLOCK = struct.Struct("@hhqqi4x")
"""struct flock of Linux on 64 bits: type, whence, start, length, pid (fcntl(2))."""


class Busy(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(file: Path, name: str, *, wait_s: float = 0) -> Iterator[None]:
    """Hold the lock of a name, for as long as this context lasts.

    Raises:
        Busy: another one does, and goes on for ``wait_s`` seconds.
    """
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    at = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Busy from None
                time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(fd)
