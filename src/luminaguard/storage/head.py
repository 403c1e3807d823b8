"""The newest checkpoint of a ledger, in a file outside of its database, so that a cut-off end is noticed."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
from pathlib import Path

from luminaguard.errors import StorageError
from luminaguard.ledger.chain import Checkpoint

__all__ = ["Head"]

_MOST = 4096


class Head:
    """One such file; it is replaced as a whole, so there is always one that is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether there is one."""
        return self.path.exists()

    def read(self) -> Checkpoint:
        """The checkpoint; what it says is not verified.

        Raises:
            OSError: the file cannot be read, or is not there.
            ValueError: it is no checkpoint.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("it is no file")
            raw = json.loads(os.read(fd, _MOST))
        finally:
            os.close(fd)
        try:
            seq = int(raw["seq"])
            if not 0 < seq < 1 << 63:
                raise ValueError("it is no checkpoint: there is no such entry")
            return Checkpoint(seq, str(raw["hash"]), base64.b64decode(raw["signature"], validate=True))
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"it is no checkpoint: {error!r}") from error

    def write(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint instead of the one before; raises StorageError."""
        text = json.dumps({"seq": checkpoint.seq, "hash": checkpoint.hash,
                           "signature": base64.b64encode(checkpoint.signature).decode()})  # fmt: skip
        temporary = self.path.with_name(f".{self.path.name}-{os.getpid()}-{threading.get_ident()}")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(text)
            temporary.replace(self.path)
        except OSError as error:
            raise StorageError(
                f"The ledger's head {self.path} cannot be written: {error.strerror}.",
                hint="Check that the state folder has free space and is yours.",
                kept="The entry itself is in the ledger.",
            ) from error
