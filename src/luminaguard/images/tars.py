"""Read a tar that may be hostile: nothing in a header makes the reader allocate, wait or skip without a bound."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

__all__ = ["BoundedTarInfo", "members"]

_MAX_HEADER = 64 << 10  # of a tar's extended header, which tarfile reads into memory
_MAX_GLOBAL = 4 << 10
_MAX_RECORDS = 64
_MAX_MEMBER = 1 << 40
_RECORD = re.compile(rb"([1-9]\d{0,6}) ([^=\n]{1,255})=")


class BoundedTarInfo(tarfile.TarInfo):
    """A header that would fill memory, keep the reader busy, or be read otherwise by others, is refused.

    The names of the methods are tarfile's own (Lib/tarfile.py, 3.11 to 3.13).
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """As tarfile's; raises ReadError for a damaged header, which would end the archive without a word."""
        with _no_damage():
            return super().frombuf(buf, encoding, errors)

    @classmethod
    def _frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str, **options: Any) -> Self:
        # What newer releases of Python call instead.
        with _no_damage():
            return cast("Self", super()._frombuf(buf, encoding, errors, **options))  # type: ignore[misc]

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        most = {tarfile.XHDTYPE: _MAX_HEADER, tarfile.XGLTYPE: _MAX_GLOBAL, tarfile.SOLARIS_XHDTYPE: 0,
                tarfile.GNUTYPE_LONGNAME: _MAX_HEADER, tarfile.GNUTYPE_LONGLINK: _MAX_HEADER,
                tarfile.GNUTYPE_SPARSE: -1}.get(self.type, _MAX_MEMBER)  # fmt: skip
        if not 0 <= self.size <= most:
            raise tarfile.ReadError(f"a header of type {self.type!r} with {self.size} bytes")
        return cast("tarfile.TarInfo", super()._proc_member(tar))  # type: ignore[misc]

    def _proc_pax(self, tar: Any) -> tarfile.TarInfo:
        data = tar.fileobj.read(self._block(self.size))  # type: ignore[attr-defined]
        _check_records(data[: self.size])
        source = tar.fileobj
        tar.fileobj = _Ahead(data, source)
        try:
            return cast("tarfile.TarInfo", super()._proc_pax(tar))  # type: ignore[misc]
        finally:
            tar.fileobj = source


@contextmanager
def _no_damage() -> Iterator[None]:
    try:
        yield
    except tarfile.HeaderError as error:
        if type(error).__name__ == "InvalidHeaderError":
            raise tarfile.ReadError("a header is damaged") from error
        raise


class _Ahead:
    """Gives what was read already once more, and then what comes."""

    def __init__(self, data: bytes, source: Any) -> None:
        self._data: bytes | None = data
        self._source = source

    def read(self, size: int) -> Any:
        data, self._data = self._data, None
        return self._source.read(size) if data is None else data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def _check_records(data: bytes) -> None:
    """In one pass; tarfile itself is quadratic in some (CVE-2024-6232)."""
    at = count = 0
    while at < len(data):
        found = _RECORD.match(data, at)
        length = int(found[1]) if found else 0
        if found is None or not found.end() < at + length <= len(data) or data[at + length - 1] != 0x0A:
            raise tarfile.ReadError("an extended header is damaged")
        count += 1
        if count > _MAX_RECORDS or found[2].startswith(b"GNU.sparse"):
            raise tarfile.ReadError("an extended header has holes, or too many records")
        at += length


def members(tar: tarfile.TarFile, most: int) -> Iterator[tarfile.TarInfo]:
    """One after the other; none is kept, and none of them claims more than there can be."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if not 0 <= member.size <= most:
            raise ValueError(f"{member.name[:200]!a} claims {member.size} bytes")
        yield member
