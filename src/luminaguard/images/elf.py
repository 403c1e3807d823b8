"""The few fields of an ELF file that a build has to know: which libraries a program needs.

Layout: elf(5), 64-bit little-endian only (the guest's architecture).
"""

from __future__ import annotations

import struct

__all__ = ["MAGIC", "needed"]

MAGIC = b"\x7fELF\x02\x01"
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB = 1, 5


def needed(blob: bytes) -> list[str]:
    """The ``DT_NEEDED`` names of a program or library; empty for a static one."""
    phoff, _, _, _, phentsize, phnum = struct.unpack_from("<QQIHHH", blob, 32)
    loads, dynamic = [], None
    for index in range(phnum):
        kind, _, offset, address, _, filesize = struct.unpack_from("<IIQQQQ", blob, phoff + index * phentsize)
        if kind == _PT_LOAD:
            loads.append((address, offset, filesize))
        elif kind == _PT_DYNAMIC:
            dynamic = (offset, filesize)
    if dynamic is None:
        return []
    entries = list(struct.iter_unpack("<qQ", blob[dynamic[0] : dynamic[0] + dynamic[1] // 16 * 16]))
    strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
    if strings is None:
        return []
    base = next(o + strings - a for a, o, size in loads if a <= strings < a + size)
    names = []
    for tag, value in entries:
        if tag == _DT_NEEDED:
            end = blob.index(b"\0", base + value)
            names.append(blob[base + value : end].decode())
    return names
