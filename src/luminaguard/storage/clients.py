"""Who may use the gateway over HTTP: a name and the digest of a token each, in a file of the state folder."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luminaguard.errors import SettingsError, StorageError
from luminaguard.files import replace_text
from luminaguard.workspaces.locks import Busy, locked

__all__ = ["Clients"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_MOST_FILE = 1 << 20
_LOCK_WAIT_S = 10.0


class Clients:
    """The clients of one state folder."""

    def __init__(self, state: Path) -> None:
        self._path = state / "gateway-clients.json"
        self._known: tuple[tuple[int, ...], dict[str, str]] = ((), {})

    def renew(self, name: str) -> str:
        """A new token for a client, which is kept nowhere; an older one of it ends.

        Raises:
            SettingsError: the name is none.
            StorageError: the file cannot be read or written.
        """
        if not _NAME.fullmatch(name):
            raise SettingsError(f"{name[:40]!a} is no name for a client.", hint="Small letters, digits, '.', '_', '-'.")
        token = f"lg-{secrets.token_urlsafe(32)}"
        with self._alone():
            replace_text(self._path, json.dumps(self._read() | {name: _digest(token)}))
        return token

    def revoke(self, name: str) -> bool:
        """End a client's token; whether there was one."""
        with self._alone():
            known = self._read()
            if known.pop(name, None) is None:
                return False
            replace_text(self._path, json.dumps(known))
        return True

    def names(self) -> list[str]:
        """Who has a token."""
        return sorted(self._read())

    def who(self, token: str) -> str:
        """Whose token it is; empty for nobody's."""
        digest, found = _digest(token), ""
        for name, known in self._read().items():  # all of them, whichever it is
            if hmac.compare_digest(digest, known):
                found = name
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else changes the file meanwhile."""
        try:
            with locked(self._path.with_suffix(".lock"), "clients", wait_s=_LOCK_WAIT_S):
                yield
        except Busy:
            raise StorageError(f"{self._path} is being changed.", hint="Run the command again.") from None

    def _read(self) -> dict[str, str]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, encoding="ascii") as file:
                info = os.fstat(fd)
                version = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
                known, found = self._known
                if version != known:  # it is looked at for each request, and understood once
                    found = {str(name): str(one) for name, one in json.loads(file.read(_MOST_FILE)).items()}
                    self._known = (version, found)
            return dict(found)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            raise StorageError(
                f"{self._path} cannot be read: {error}.", hint="Remove it; clients need new tokens then."
            ) from error


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
