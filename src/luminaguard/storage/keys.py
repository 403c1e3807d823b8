"""The keys of an installation: Ed25519 for the approver and the ledger, a secret for saved machines.

Each is 32 random bytes, made on first use, mode 0600 from the first byte. A key file that others can
read is refused: what it has signed proves nothing.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from luminaguard.errors import StorageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["load_key", "load_secret"]

_SIZE = 32


def load_key(folder: Path, name: str) -> Ed25519PrivateKey:
    """The Ed25519 key in ``<folder>/<name>.key``; see :func:`load_secret`."""
    # Only here: whoever needs no signature is spared the import.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    return Ed25519PrivateKey.from_private_bytes(load_secret(folder, name))


def load_secret(folder: Path, name: str) -> bytes:
    """Read the 32 bytes of ``<folder>/<name>.key``, creating it if there is none.

    Raises:
        StorageError: the file is damaged, a link, someone else's, or readable by others.
    """
    path = folder / f"{name}.key"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _load(folder, path, name)
    except OSError as error:
        raise StorageError(
            f"The key {path} cannot be used: {error.strerror}.",
            hint="It must be a file of yours in a folder of yours, not a link; restore it from a backup.",
        ) from error


def _load(folder: Path, path: Path, name: str) -> bytes:
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    temporary = folder / f".{name}-{secrets.token_hex(8)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(_SIZE))
            file.flush()
            os.fsync(file.fileno())
        # A link and not a rename: of two first commands at once, one key must win for both.
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
    return _read(path)


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(file.fileno())
        data = file.read(_SIZE + 1)
    if info.st_uid != os.geteuid() or info.st_mode & 0o077 or len(data) != _SIZE:
        raise StorageError(
            f"The key {path} is not usable: it must be yours, have mode 0600 and {_SIZE} bytes.",
            hint="Restore it, or move it away to make a new one; older signatures then no longer verify.",
        )
    return data
