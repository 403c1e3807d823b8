"""The few fields of an ELF file that are looked at: the libraries that it needs, and how it was hardened.

Layout: elf(5), 64-bit little-endian only (the guest's architecture).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

__all__ = ["MAGIC", "X86_64", "Hardening", "hardening", "needed"]

MAGIC = b"\x7fELF\x02\x01"
X86_64 = b"\x3e\x00"
"""The machine (e_machine, bytes 18 and 19)."""
_PT_LOAD, _PT_DYNAMIC = 1, 2
_PT_INTERP, _PT_GNU_STACK, _PT_GNU_RELRO = 3, 0x6474E551, 0x6474E552
_ET_EXEC, _ET_DYN = 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_BIND_NOW, _DT_RUNPATH = 1, 5, 15, 24, 29
_DT_FLAGS, _DT_FLAGS_1, _DF_1_PIE = 30, 0x6FFFFFFB, 0x08000000


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


@dataclass(frozen=True, slots=True)
class Hardening:
    """What the linker and the compiler did for a program or library.

    ``pie`` is None for a library, which can always be moved. ``relro`` is ``full`` when all symbols
    are bound at the start, ``partial`` when the table of functions stays writable.
    """

    pie: bool | None
    relro: Literal["full", "partial", "none"]
    nx: bool
    canary: bool
    search_path: bool


def hardening(blob: bytes) -> Hardening:
    """Read the properties off a 64-bit ELF file.

    Raises:
        ValueError: its headers point outside of it.
    """
    try:
        return _hardening(blob)
    except (struct.error, StopIteration) as error:
        raise ValueError(f"not a whole ELF file: {error}") from error


def _hardening(blob: bytes) -> Hardening:
    (kind,) = struct.unpack_from("<H", blob, 16)
    phoff, _, _, _, phentsize, phnum = struct.unpack_from("<QQIHHH", blob, 32)
    segments: dict[int, tuple[int, int, int]] = {}
    for index in range(phnum):
        segment, flags, offset, _, _, size = struct.unpack_from("<IIQQQQ", blob, phoff + index * phentsize)
        segments.setdefault(segment, (flags, offset, size))
    tags: dict[int, int] = {}
    if _PT_DYNAMIC in segments:
        _, offset, size = segments[_PT_DYNAMIC]
        tags = dict(struct.iter_unpack("<qQ", blob[offset : offset + size // 16 * 16]))
    bound = _DT_BIND_NOW in tags or tags.get(_DT_FLAGS, 0) & 8 or tags.get(_DT_FLAGS_1, 0) & 1
    relro: Literal["full", "partial", "none"] = "none"
    if _PT_GNU_RELRO in segments:
        relro = "full" if bound or _PT_DYNAMIC not in segments else "partial"
    is_program = _PT_INTERP in segments or kind == _ET_EXEC or bool(tags.get(_DT_FLAGS_1, 0) & _DF_1_PIE)
    return Hardening(
        pie=kind == _ET_DYN if is_program else None,
        relro=relro,
        nx=_PT_GNU_STACK in segments and not segments[_PT_GNU_STACK][0] & 1,
        canary=b"__stack_chk_fail" in blob,
        search_path=_DT_RPATH in tags or _DT_RUNPATH in tags,
    )
