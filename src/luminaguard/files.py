"""Small files that are written whole or not at all, with the right mode from the first byte."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from luminaguard.errors import StorageError

__all__ = ["replace_text"]


def replace_text(path: Path, text: str) -> None:
    """Write a file anew beside the old one, and put it in its place; a link stays one, and a mode stays, too.

    Raises:
        StorageError: it cannot be written; the old one is as it was.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        data = text.encode()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except (OSError, UnicodeEncodeError) as error:
        temporary.unlink(missing_ok=True)
        why = error.strerror if isinstance(error, OSError) else "it is no Unicode"
        raise StorageError(
            f"{path} cannot be written: {why}.", hint="Check its folder, and that the disk has free space.",
            kept="It is as it was.",
        ) from error  # fmt: skip
