"""The overlay's upper layer as records, made as fast as the host grants credit for them.

The workload is dead when this runs, so nothing moves; but it wrote the tree, so every name, depth
and size in it is hostile. The format of a record is in ``docs/guest-protocol.md``.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator

from luminaguard.guest import frames

TYPE_CHECKING = False  # typing takes 70 ms of an emulated boot
if TYPE_CHECKING:
    from typing import Any

__all__ = ["BadLayer", "Changes"]

_BATCH = 1 << 15
_REDIRECTS = ("trusted.overlay.redirect", "trusted.overlay.metacopy")


class BadLayer(Exception):
    """The layer has something that this overlay never makes."""


class Changes:
    """The records of one ``changes`` call."""

    def __init__(self, upper: str) -> None:
        self._upper = upper.encode()
        self._records = self._walk("")
        self._pending = b""
        self.credit = frames.WINDOW
        self.count = 0

    def next(self) -> bytes | None:
        """The next piece within the credit, at most a frame's payload; None at the end.

        Raises:
            BadLayer: the layer cannot be described.
            OSError: it cannot be read.
        """
        if not self._pending:
            try:
                self._pending = next(self._records, b"")
            except RecursionError:
                raise BadLayer("folders are nested too deeply") from None
            if not self._pending:
                return None
        count = min(self.credit, frames.MAX_PAYLOAD)
        part, self._pending = self._pending[:count], self._pending[count:]
        self.credit -= len(part)
        return part

    def _walk(self, folder: str) -> Iterator[bytes]:
        """Yield the records of one folder of the upper layer, parents first, in byte order."""
        batch = bytearray()
        with os.scandir(self._upper + b"/" + os.fsencode(folder)) as entries:
            names = sorted(entry.name for entry in entries)
        for raw in names:
            name = os.fsdecode(raw)
            path = f"{folder}/{name}" if folder else name
            real = self._upper + b"/" + os.fsencode(path)
            info = os.lstat(real)
            batch += self._record(path, real, info)
            if len(batch) >= _BATCH or (stat.S_ISREG(info.st_mode) and info.st_size):
                yield bytes(batch)
                batch.clear()
            if stat.S_ISREG(info.st_mode):
                yield from _content(real, info.st_size)
            elif stat.S_ISDIR(info.st_mode):
                if batch:
                    yield bytes(batch)
                    batch.clear()
                yield from self._walk(path)
        if batch:
            yield bytes(batch)

    def _record(self, path: str, real: bytes, info: os.stat_result) -> bytes:
        self.count += 1
        meta: dict[str, Any] = {"p": path, "m": stat.S_IMODE(info.st_mode)}
        mode = info.st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            for attribute in _REDIRECTS:
                if _attribute(real, attribute):
                    raise BadLayer(f"{path!r} has {attribute}")
        if stat.S_ISREG(mode):
            meta["t"], meta["s"] = "file", info.st_size
        elif stat.S_ISDIR(mode):
            meta["t"] = "dir"
            meta["o"] = _attribute(real, "trusted.overlay.opaque") == b"y"
        elif stat.S_ISLNK(mode):
            meta["t"] = "symlink"
            meta["l"] = os.fsdecode(os.readlink(real))
        elif stat.S_ISCHR(mode) and info.st_rdev == 0:
            meta["t"] = "whiteout"
        else:
            meta["t"] = "other"
        header = json.dumps(meta).encode()
        return struct.pack(">I", len(header)) + header


def _content(real: bytes, size: int) -> Iterator[bytes]:
    fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while size > 0:
            data = os.read(fd, min(frames.MAX_PAYLOAD, size))
            if not data:
                raise OSError("a file became shorter while it was read")
            size -= len(data)
            yield data
    finally:
        os.close(fd)


def _attribute(path: bytes, name: str) -> bytes:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return b""
