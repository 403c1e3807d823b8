"""The newest checkpoints of a ledger, in a file outside of its database, so that a cut-off end is noticed.

The file has two places of one sector each, which checkpoints take in turn: one that was half written when the power
went leaves the one before it. Nothing is created or renamed for it, so a disk has next to nothing to do.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from luminaguard.errors import StorageError
from luminaguard.ledger.chain import Checkpoint

__all__ = ["Head"]

_SECTOR = 512
_MOST = 4096


class Head:
    """One such file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether there is one."""
        return self.path.exists()

    def read(self) -> Checkpoint:
        """The newest checkpoint; what it says is not verified.

        Raises:
            OSError: the file cannot be read, or is not there.
            ValueError: it has none.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            data = file.read(_MOST)
        places = [data[:_SECTOR], data[_SECTOR:]] if len(data) % _SECTOR == 0 else [data]
        found = [one for one in map(_parsed, places) if one is not None]
        if not found:
            raise ValueError("it has no checkpoint")
        return max(found, key=lambda one: one.seq)

    def write(self, checkpoint: Checkpoint, *, anew: bool = False) -> None:
        """Keep a checkpoint.

        Args:
            checkpoint: it.
            anew: forget all others: a chain that was cut off goes on at an earlier place.

        Raises:
            StorageError: the file cannot be written.
        """
        said = {"seq": checkpoint.seq, "hash": checkpoint.hash,
                "signature": base64.b64encode(checkpoint.signature).decode()}  # fmt: skip
        place = json.dumps(said).encode().ljust(_SECTOR - 1) + b"\n"
        assert len(place) == _SECTOR
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            try:
                if anew or os.fstat(fd).st_size % _SECTOR:  # by an older version, which had one checkpoint
                    os.ftruncate(fd, 0)
                os.pwrite(fd, place, checkpoint.seq % 2 * _SECTOR)
            finally:
                os.close(fd)
        except OSError as error:
            raise StorageError(
                f"The ledger's head {self.path} cannot be written: {error.strerror}.",
                hint="Check that the state folder has free space and is yours.",
                kept="The entry itself is in the ledger.",
            ) from error


def _parsed(place: bytes) -> Checkpoint | None:
    """A checkpoint; None for what is none, such as one that was half written."""
    try:
        raw = json.loads(place.strip(b"\0 \n"))
        return Checkpoint(int(raw["seq"]), str(raw["hash"]), base64.b64decode(raw["signature"], validate=True))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
