"""Write cpio archives of the kind that the kernel unpacks at boot: newc, uncompressed.

Format: Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

__all__ = ["Newc"]


class Newc:
    """An archive in the making; everything in it belongs to uid 0 and has no time."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 1

    def add(self, name: str, mode: int, data: bytes) -> None:
        """Add an entry; ``mode`` includes its type (inode(7))."""
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        self._out += b"070701" + b"".join(b"%08x" % field for field in fields)
        self._out += name.encode() + b"\0"
        self._pad()
        self._out += data
        self._pad()
        self._inode += 1

    def finish(self) -> bytes:
        """The archive."""
        self.add("TRAILER!!!", 0, b"")
        return bytes(self._out)

    def _pad(self) -> None:
        self._out += b"\0" * (-len(self._out) % 4)
