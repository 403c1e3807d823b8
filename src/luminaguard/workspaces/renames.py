"""Small, exact steps on folders that are held open by descriptor: rename, copy, look, remove.

Names are bytes below a descriptor, and no step follows a symbolic link.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat

from luminaguard.effects.changes import FileEntry
from luminaguard.workspaces.opening import parent_of
from luminaguard.workspaces.sparse import write_at

__all__ = ["EXCHANGE", "NOREPLACE", "copy_file", "inode_of", "listing", "remove_tree", "rename", "something_at"]

NOREPLACE, EXCHANGE = 1, 2
_CHUNK = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def copy_file(source: int, folder: int, name: str, mode: int) -> FileEntry:
    """Copy and hash; the result says what was written, not what was asked for."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    digest, size = hashlib.sha256(), 0
    try:
        while data := os.pread(source, _CHUNK, size):
            digest.update(data)
            write_at(fd, data, size)
            size += len(data)
        os.ftruncate(fd, size)
        os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileEntry(mode, size, digest.hexdigest())


def rename(old_folder: int, old: bytes, new_folder: int, new: bytes, flags: int) -> None:
    """renameat2(2). Raises OSError."""
    if _libc.renameat2(old_folder, old, new_folder, new, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(new))


def inode_of(folder: int, name: bytes) -> int | None:
    """Inode of an entry, None if there is none; does not follow links."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return None


def listing(folder: int, name: bytes) -> list[str]:
    """Names in a folder of a folder; raises OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def something_at(root: int, path: str) -> bool:
    """Whether anything at all is at a path below ``root``, reached without following links."""
    try:
        with parent_of(root, path) as (parent, name):
            return inode_of(parent, name) is not None
    except OSError:
        return False


def remove_tree(parent: int, name: bytes) -> None:
    """Remove a folder of ours by descriptor; nothing if it is not there."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return
    try:
        os.fchmod(fd, 0o700)
        for child in os.listdir(fd):
            raw = os.fsencode(child)
            if stat.S_ISDIR(os.stat(raw, dir_fd=fd, follow_symlinks=False).st_mode):
                remove_tree(fd, raw)
            else:
                os.unlink(raw, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
