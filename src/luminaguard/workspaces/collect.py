"""Take the upper layer out of a machine: contents into blobs, entries into a changeset.

Counts and bytes are limited here, on what really arrives; sizes that the guest claims only ever
lead to an earlier refusal.
"""

from __future__ import annotations

import errno

from luminaguard.effects.changes import Changeset, Manifest
from luminaguard.effects.layer import Observed, changeset_from_layer
from luminaguard.errors import ChangesetRefused, StorageError
from luminaguard.workspaces.blobs import BlobWriter
from luminaguard.workspaces.state import Limits

__all__ = ["Collector"]

_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


class Collector:
    """Receives the guest's records in order; see :meth:`luminaguard.microvm.machine.MicroVM.changes`."""

    def __init__(self, writer: BlobWriter, limits: Limits) -> None:
        self._writer = writer
        self._limits = limits
        self._layer: list[Observed] = []
        self._size = 0
        self._missing = 0

    @property
    def size(self) -> int:
        """Bytes that have come."""
        return self._size - self._missing

    def entry(self, path: str, kind: str, mode: int, size: int, target: str, opaque: bool) -> None:
        """Take one entry.

        Raises:
            ChangesetRefused: there are too many entries, or too many bytes are announced.
        """
        if len(self._layer) >= self._limits.files:
            raise ChangesetRefused(
                f"The command changed more than {self._limits.files:,} files and folders.",
                hint="Raise changeset_max_files, or have the command clean up after itself.",
                kept="The workspace was not touched.",
            )
        if kind == "file" and self._size + size > self._limits.size:
            raise ChangesetRefused(
                f"The changed files have more than {self._limits.size >> 20:,} MiB (at {path[:200]!a}).",
                hint="Raise changeset_max_mib; note that sparse files count with their full size.",
                kept="The workspace was not touched.",
            )
        is_content = kind == "file" and size > 0
        self._layer.append(Observed(path, kind, mode, size, target, opaque, _EMPTY if kind == "file" else ""))
        if kind == "file" and not is_content:
            self._begin()
            self._end()
        elif is_content:
            self._size += size
            self._missing = size
            self._begin()

    def content(self, data: bytes) -> None:
        """Take a piece of the content of the file whose entry came last."""
        try:
            self._writer.write(data)
        except OSError as error:
            raise _disk(error) from error
        self._missing -= len(data)
        if self._missing == 0:
            self._end()

    def changeset(self, base: Manifest) -> Changeset:
        """What differs from the base. Raises ChangesetRefused."""
        return changeset_from_layer(base, self._layer)

    def _begin(self) -> None:
        try:
            self._writer.begin()
        except OSError as error:
            raise _disk(error) from error

    def _end(self) -> None:
        try:
            size, sha256 = self._writer.end()
        except OSError as error:
            raise _disk(error) from error
        last = self._layer[-1]
        self._layer[-1] = Observed(last.path, last.kind, last.mode, size, sha256=sha256)


def _disk(error: OSError) -> StorageError:
    what = "the disk is full" if error.errno == errno.ENOSPC else str(error)
    return StorageError(
        f"The changes could not be stored: {what}.",
        hint="Free some space in the state folder and run the command again.",
        kept="The workspace was not touched.",
    )
