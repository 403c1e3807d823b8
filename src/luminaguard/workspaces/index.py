"""Remember the hashes of files that have not changed since they were read, as git's index does.

A file is taken for unchanged when its inode, size, modification time and change time are what they
were. The kernel sets the change time itself and nobody else can, so a file that was written to has
another one, unless that happened within the granularity of the clock or goes on through a mapping: a
file that was changed shortly before it was read is never remembered, and one that turns out to be
another one makes the whole index be forgotten.

A wrong hash could at worst show a machine an older file; what is published is compared with what
really is there, hashed anew. So the index is a cache and may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

__all__ = ["HashIndex"]

_FORMAT = 1
_MAX = 512 << 20
_SETTLED_NS = 2_000_000_000
_WORTH_IT = 32  # files; fewer are hashed faster than an index is read
_KEPT = 16
_LEFT_S = 3600


class HashIndex:
    """The index of one workspace.

    Args:
        folder: where indexes are kept.
        workspace: absolute path of the workspace.
    """

    def __init__(self, folder: Path, workspace: Path) -> None:
        self._folder = folder
        self._path = folder / f"{hashlib.sha256(os.fsencode(workspace)).hexdigest()[:32]}.json"
        self._known: dict[str, list[Any]] = self._load()
        self._seen: dict[str, list[Any]] = {}
        self._learned = 0
        self._now = time.time_ns()

    def lookup(self, path: str, info: os.stat_result) -> str | None:
        """SHA-256 of a file if it is the one that was hashed before."""
        row = self._known.get(path)
        if row is not None and row[:4] == [info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]:
            self._seen[path] = row
            return str(row[4])
        return None

    def learn(self, path: str, info: os.stat_result, sha256: str) -> None:
        """Remember what was just hashed, unless it is too fresh to be told apart from a later change."""
        if max(info.st_mtime_ns, info.st_ctime_ns) < self._now - _SETTLED_NS:
            self._seen[path] = [info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, sha256]
            self._learned += 1

    def save(self) -> None:
        """Write the index if it has learned enough; a full disk only costs the time to hash again."""
        if self._learned < _WORTH_IT:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.partial")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(json.dumps({"format": _FORMAT, "files": self._seen}))
            temporary.replace(self._path)
            self._forget()
        except OSError:
            temporary.unlink(missing_ok=True)

    def forget(self) -> None:
        """Hash everything next time: something was not what the index said.

        A program that writes through a mapping (mmap(2)) may change a file without changing its times again.
        """
        self._path.unlink(missing_ok=True)

    def _load(self) -> dict[str, list[Any]]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                raw = json.loads(file.read(_MAX))
            return dict(raw["files"]) if raw["format"] == _FORMAT else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # nothing is lost: all is hashed

    def _forget(self) -> None:
        found = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in found[_KEPT:]:
            old.unlink(missing_ok=True)
        for left in self._folder.glob("*.partial"):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _LEFT_S:
                    left.unlink()
