"""Read Debian packages: the ``ar`` container and the data tarball inside, with bounds.

A .deb has been checked against its locked SHA-256 before it comes here; the bounds are there so
that a wrong lock ends in an error and not in a full disk. Format: deb(5).
"""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path

import zstandard

from luminaguard.errors import ImageBuildFailed

__all__ = ["MAX_UNPACKED", "data_members"]

MAX_UNPACKED = 1 << 30
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def data_members(deb: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield each member of the package's data tarball with its content.

    Raises:
        ImageBuildFailed: the file is no package, or is larger than :data:`MAX_UNPACKED` bytes.
    """
    name, payload = _data_member(deb)
    try:
        raw = _decompress(name, payload)
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for member in tar:
                source = tar.extractfile(member) if member.isreg() else None
                yield member, source.read() if source else b""
    except (tarfile.TarError, lzma.LZMAError, OSError, EOFError, zstandard.ZstdError) as error:
        raise _broken(deb, str(error)) from error


def _data_member(deb: Path) -> tuple[str, bytes]:
    blob = deb.read_bytes()
    if not blob.startswith(_AR_MAGIC):
        raise _broken(deb, "it does not start with an ar header")
    offset = len(_AR_MAGIC)
    while offset + _AR_HEADER <= len(blob):
        header = blob[offset : offset + _AR_HEADER]
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        try:
            size = int(header[48:58])
        except ValueError:
            raise _broken(deb, "a member has no size") from None
        offset += _AR_HEADER
        if name.startswith("data.tar"):
            return name, blob[offset : offset + size]
        offset += size + (size & 1)
    raise _broken(deb, "it has no data.tar")


def _decompress(name: str, payload: bytes) -> bytes:
    stream: io.BufferedIOBase | zstandard.ZstdDecompressionReader
    match name.removeprefix("data.tar"):
        case ".xz":
            stream = lzma.LZMAFile(io.BytesIO(payload))  # noqa: SIM115  # over memory: nothing to close
        case ".gz":
            stream = gzip.GzipFile(fileobj=io.BytesIO(payload))
        case ".zst":
            stream = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(payload))
        case "":
            return payload
        case other:
            raise ImageBuildFailed(
                f"A package's data is compressed as '{other}', which is not supported.",
                hint="Build on Debian 12 or 13, or Ubuntu 24.04.",
            )
    raw = stream.read(MAX_UNPACKED + 1)
    if len(raw) > MAX_UNPACKED:
        raise ImageBuildFailed(
            f"A package unpacks to more than {MAX_UNPACKED} bytes.",
            hint="Check the lock file: the package is not one that the guest needs.",
        )
    return raw


def _broken(deb: Path, why: str) -> ImageBuildFailed:
    return ImageBuildFailed(
        f"{deb.name} is not a readable Debian package: {why}.",
        hint=f"Delete {deb} and run 'luminaguard image build' again.",
    )
