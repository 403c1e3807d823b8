"""File contents by SHA-256: what machines left behind and waits for a decision or for publishing."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from luminaguard.errors import StorageError
from luminaguard.workspaces.shared import Shared
from luminaguard.workspaces.sparse import write_at

__all__ = ["BlobStore", "BlobWriter", "share"]


class BlobStore:
    """One folder of blobs for each request, so that forgetting a request forgets its contents.

    Args:
        state: the state folder.
        shared: where other hosts of the fleet have them from, and this one what others left.
    """

    def __init__(self, state: Path, shared: Shared | None = None) -> None:
        self.folder = state / "blobs"
        self._shared = shared

    def writer(self, owner: str) -> BlobWriter:
        """A writer for the contents of one request."""
        return BlobWriter(self.folder / owner)

    def open(self, owner: str, sha256: str) -> int:
        """Open a blob; the reader must check the hash of what it reads.

        Raises:
            StorageError: it is missing.
        """
        self._fetch(owner, sha256)
        try:
            return os.open(self.folder / owner / sha256, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(
                f"A stored file content is missing ({error.strerror}).",
                hint="The state folder was damaged or edited. Run the command again.",
            ) from error

    def read(self, owner: str, sha256: str, limit: int) -> bytes | None:
        """The content if it is there, not larger than ``limit`` bytes, and has that hash."""
        self._fetch(owner, sha256)
        try:
            fd = os.open(self.folder / owner / sha256, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        with os.fdopen(fd, "rb") as file:
            data = file.read(limit + 1)
        return data if len(data) <= limit and hashlib.sha256(data).hexdigest() == sha256 else None

    def _fetch(self, owner: str, sha256: str) -> None:
        """Have from elsewhere what is not here."""
        path = self.folder / owner / sha256
        if self._shared is None or path.exists():
            return
        for folder in (self.folder, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._shared.fetch(owner, sha256, path, sha256)

    def hand_over(self, owner: str, parts: Mapping[str, frozenset[str]]) -> None:
        """Keep contents under other names: for each new owner those that are its own; see :meth:`persist`."""
        source = self.folder / owner
        if len(parts) == 1 and source.is_dir():
            source.rename(self.folder / next(iter(parts)))
            return
        for blob in source.iterdir() if source.is_dir() else ():
            for to in (name for name, contents in parts.items() if blob.name in contents):
                (self.folder / to).mkdir(mode=0o700, exist_ok=True)
                os.link(blob, self.folder / to / blob.name, follow_symlinks=False)
        self.forget(owner)

    def persist(self, owner: str) -> None:
        """Make the contents of one request survive a power cut, and be had elsewhere: it waits for a decision."""
        self.sync(owner)
        for path in (self.folder / owner).glob("[!.]*") if self._shared is not None else ():
            share(self._shared, owner, path)

    def sync(self, owner: str) -> None:
        """Make contents survive a power cut."""
        folder = self.folder / owner
        if not folder.is_dir():
            return
        for path in (*folder.iterdir(), folder, self.folder):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def forget(self, owner: str) -> None:
        """Delete the contents of one request."""
        shutil.rmtree(self.folder / owner, ignore_errors=True)
        if self._shared is not None and owner.startswith("req-"):  # what machines left was not shared
            self._shared.forget(owner)

    def age_s(self, owner: str) -> float:
        """Seconds since the contents of one request last changed."""
        try:
            return time.time() - (self.folder / owner).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def owners(self) -> list[str]:
        """Whose contents are kept."""
        return sorted(entry.name for entry in self.folder.iterdir()) if self.folder.is_dir() else []


def share(shared: Shared | None, owner: str, path: Path, *, step: int = 0) -> None:
    """Let other hosts have a content that lies under its name."""
    if shared is None:
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        shared.put(owner, path.name, fd, step=step)
    finally:
        os.close(fd)


class BlobWriter:
    """Takes contents one after another, in pieces."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1
        self._digest = hashlib.sha256()
        self._size = 0

    def begin(self) -> None:
        """Start a content."""
        for folder in (self._folder.parent, self._folder):  # mkdir gives its mode to the last one only
            folder.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._folder / ".partial", flags, 0o600)
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        """Add a piece; raises OSError when the disk is full."""
        write_at(self._fd, data, self._size)
        self._digest.update(data)
        self._size += len(data)

    def end(self) -> tuple[int, str]:
        """Finish the content; return its size and SHA-256. See :meth:`BlobStore.persist`."""
        os.ftruncate(self._fd, self._size)
        os.close(self._fd)
        self._fd = -1
        name = self._digest.hexdigest()
        os.replace(self._folder / ".partial", self._folder / name)
        return self._size, name

    def discard(self) -> None:
        """Forget everything that was written."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        shutil.rmtree(self._folder, ignore_errors=True)
