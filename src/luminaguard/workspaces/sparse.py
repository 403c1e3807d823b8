"""Write files without the zeros: what was sparse in the machine takes no more room on the host."""

from __future__ import annotations

import os

__all__ = ["write_at"]

_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write ``data`` at ``offset`` of a new file, leaving out blocks of zeros; raises OSError.

    The caller sets the size at the end: a file that ends in a hole is not that long by itself.
    """
    view = memoryview(data)
    for start in range(0, len(view), _BLOCK):
        block = view[start : start + _BLOCK]
        if block == _ZEROS[: len(block)]:
            continue
        at = offset + start
        while block:
            written = os.pwrite(fd, block, at)
            block, at = block[written:], at + written
