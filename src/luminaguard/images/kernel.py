"""Take the uncompressed kernel and its modules out of the distribution's signed kernel package.

QEMU's qboot starts an ELF kernel through PVH, which is faster than unpacking a bzImage under
emulation. The header fields are those of the Linux/x86 boot protocol, version 2.08 and later
(Documentation/arch/x86/boot.rst).
"""

from __future__ import annotations

import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import lz4.block
import zstandard

from luminaguard.errors import ImageBuildFailed
from luminaguard.images import deb, spec

__all__ = ["Kernel", "extract", "vmlinux"]

_UNPACKING_FAILED = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, lz4.block.LZ4BlockError,
                     zstandard.ZstdError)  # fmt: skip
_LZ4_LEGACY_BLOCK = 8 << 20
_MAX_VMLINUX = 256 << 20


class Kernel:
    """A kernel as the images room needs it: the ELF file, and sets of modules, each in load order.

    ``init`` is the program that starts a machine without a shell's help; only of a kernel that has all drivers in it.
    """

    def __init__(self, release: str, elf: bytes, modules: list[list[tuple[str, bytes]]], init: bytes = b"") -> None:
        self.release = release
        self.elf = elf
        self.modules = modules
        self.init = init


def extract(
    packages: Iterable[Path], sets: Sequence[Sequence[str]] = (spec.KERNEL_MODULES, spec.VSOCK_MODULES)
) -> Kernel:
    """Find vmlinuz in the kernel packages, and sets of modules; a module is in the first set that needs it.

    Raises:
        ImageBuildFailed: there is no kernel in them, it is compressed in an unknown way, or it lacks a module of the
            first set.
    """
    compressed, release = b"", ""
    modules: dict[str, tuple[str, bytes]] = {}
    built_in: set[str] = set()
    for package in packages:
        for member, data in deb.data_members(package):
            name = member.name.removeprefix("./")
            if name.startswith("boot/vmlinuz-"):
                compressed, release = data, name.removeprefix("boot/vmlinuz-")
            if name.endswith("/modules.builtin"):
                built_in.update(_stem(line)[0] for line in data.decode("utf-8", "replace").splitlines())
            stem, found, kind = _stem(name)
            if found and "/modules/" in name:
                modules[stem] = (kind, data)
    if not compressed:
        raise ImageBuildFailed(
            "The kernel packages contain no boot/vmlinuz.",
            hint="Write a new lock with 'luminaguard image lock'.",
        )
    missing = [name for name in (sets[0] if sets else ()) if name not in modules and name not in built_in]
    if built_in and missing:
        raise ImageBuildFailed(
            f"The kernel {release} has no {', '.join(missing)}: machines cannot do without.",
            hint="Install another kernel package of the distribution, or build one: 'make kernel'.",
        )
    return Kernel(release, vmlinux(compressed), _load_order(modules, sets))


def _stem(path: str) -> tuple[str, bool, str]:
    """The name of a module, whether this is one, and how it is compressed."""
    stem, found, kind = Path(path).name.partition(".ko")
    return stem.replace("-", "_"), bool(found), kind


def vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage.

    Raises:
        ImageBuildFailed: this is no bzImage, or the compression is unknown.
    """
    if bzimage[0x202:0x206] != b"HdrS":
        raise ImageBuildFailed("vmlinuz has no boot header.", hint="Rebuild with another kernel package.")
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    for magic, unpack in _UNPACKERS.items():
        if payload.startswith(magic):
            try:
                elf = unpack(payload)
            except _UNPACKING_FAILED:
                break
            if not elf.startswith(b"\x7fELF"):
                break
            return elf
    raise ImageBuildFailed(
        f"The kernel payload (it starts with {payload[:4].hex()}) cannot be unpacked.",
        hint="Rebuild with another kernel package.",
    )


def _lz4_legacy(payload: bytes) -> bytes:
    """The kernel's own lz4 framing: a magic, then blocks with a 32-bit size each."""
    out, offset = bytearray(), 4
    while offset + 4 < len(payload) and len(out) < _MAX_VMLINUX:
        (size,) = struct.unpack_from("<I", payload, offset)
        offset += 4
        if not 0 < size <= len(payload) - offset:
            break  # the last four bytes are the unpacked size, appended by the kernel's build
        block = payload[offset : offset + size]
        out += lz4.block.decompress(block, uncompressed_size=_LZ4_LEGACY_BLOCK)
        offset += size
    return bytes(out)


def _zstd(payload: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(payload)


def _xz(payload: bytes) -> bytes:
    return lzma.LZMADecompressor().decompress(payload, _MAX_VMLINUX)


def _gzip(payload: bytes) -> bytes:
    # Unlike the others it may, but need not, be followed by its unpacked size: gzip has that in its own end.
    return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(payload, _MAX_VMLINUX)


_UNPACKERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x02\x21\x4c\x18": _lz4_legacy,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"\xfd7zXZ\x00": _xz,
    b"\x1f\x8b": _gzip,
}


def _load_order(modules: dict[str, tuple[str, bytes]], sets: Sequence[Sequence[str]]) -> list[list[tuple[str, bytes]]]:
    """The wanted modules after the ones that they depend on (``depends=`` of their modinfo)."""
    found: set[str] = set()
    order: list[list[tuple[str, bytes]]] = []

    def add(name: str) -> None:
        if name in found or name not in modules:
            return  # a name without a file is built into the kernel
        found.add(name)
        blob = _module(*modules[name])
        match = re.search(rb"\0depends=([^\0]*)\0", blob)
        for dependency in match[1].decode().split(",") if match and match[1] else ():
            add(dependency.replace("-", "_"))
        order[-1].append((name, blob))

    for wanted in sets:
        order.append([])
        for name in wanted:
            add(name)
    return order


def _module(kind: str, data: bytes) -> bytes:
    if kind == ".xz":
        return _xz(data)
    if kind == ".zst":
        return _zstd(data)
    return data
