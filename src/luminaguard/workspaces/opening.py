"""Open files of a workspace by descriptor, component by component, never through a link."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luminaguard.effects.changes import DirEntry, Entry, FileEntry, LinkEntry, encode
from luminaguard.errors import WorkspaceError

__all__ = ["entry_at", "hash_fd", "open_folder", "open_root", "parent_of", "sync_folder"]

_CHUNK = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_root(path: Path) -> int:
    """Open a workspace folder; the caller owns the descriptor.

    Raises:
        WorkspaceError: it is missing, no folder, a symbolic link, unreadable, or the root of the system.
    """
    why = hint = ""
    try:
        # A plain decode: the path goes into the database and onto cards.
        str(path).encode()
        if path.parent == path:
            raise _unusable(path, "is the root of the file system", "Name the folder that the command works on.")
        return os.open(path, _FOLDER)
    except UnicodeEncodeError:
        why, hint = "has a name that is not UTF-8", "Rename the folder."
    except FileNotFoundError:
        why, hint = "does not exist", "Check the path after --workspace."
    except PermissionError:
        why, hint = "cannot be read", "Run the command as a user who may read the folder."
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            link = path.is_symlink()
            why = "is a symbolic link" if link else "is not a folder"
            hint = f"Name the folder itself: {os.path.realpath(path)}" if link else "Name a folder."
        else:
            why, hint = f"cannot be opened ({error.strerror})", "Check the path after --workspace."
    raise _unusable(path, why, hint)


def open_folder(root: int, path: str) -> int:
    """Open a folder below ``root`` (empty path: root itself) without following any link.

    Raises:
        OSError: a component is missing, a link, or no folder.
    """
    fd = os.dup(root)
    try:
        for component in encode(path).split(b"/") if path else ():
            step = os.open(component, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = step
    except BaseException:  # whatever ends this, the descriptor must not leak
        os.close(fd)
        raise
    return fd


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed and removed in a folder of ours survive a power cut; raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def parent_of(root: int, path: str) -> Iterator[tuple[int, bytes]]:
    """The opened parent folder of a path, and the path's last component."""
    parent, _, name = path.rpartition("/")
    fd = open_folder(root, parent)
    try:
        yield fd, encode(name)
    finally:
        os.close(fd)


class Parents:
    """Like :func:`parent_of` for many paths one after another: the folder of the last one stays open."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._path = ""
        self._fd = os.dup(root)

    def of(self, path: str) -> tuple[int, bytes]:
        """The opened parent folder of a path, good until the next call, and its last component; raises OSError."""
        parent, _, name = path.rpartition("/")
        if parent != self._path:
            fd = open_folder(self._root, parent)
            os.close(self._fd)
            self._fd, self._path = fd, parent
        return self._fd, encode(name)

    def close(self) -> None:
        """Close what is open."""
        os.close(self._fd)


def entry_at(root: int, path: str) -> Entry | None:
    """What is at a path now: None for nothing, or for something that is no file, folder or link."""
    try:
        with parent_of(root, path) as (parent, name):
            return entry_in(parent, name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def entry_in(parent: int, name: bytes) -> Entry | None:
    """The entry called ``name`` in an open folder; files are read and hashed. Raises OSError."""
    info = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if stat.S_ISLNK(info.st_mode):
        return LinkEntry(os.fsdecode(os.readlink(name, dir_fd=parent)))
    if stat.S_ISDIR(info.st_mode):
        return DirEntry(info.st_mode & 0o777)
    if not stat.S_ISREG(info.st_mode):
        return None
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return None
        size, sha256 = hash_fd(fd)
        return FileEntry(info.st_mode & 0o777, size, sha256)
    finally:
        os.close(fd)


def hash_fd(fd: int) -> tuple[int, str]:
    """Size and SHA-256 of what can be read from an open file, from its beginning."""
    digest = hashlib.sha256()
    size = 0
    while data := os.pread(fd, _CHUNK, size):
        digest.update(data)
        size += len(data)
    return size, digest.hexdigest()


def _unusable(path: Path, why: str, hint: str) -> WorkspaceError:
    return WorkspaceError(f"The workspace {ascii(str(path))[1:-1]} {why}.", hint=hint)
