"""The folders that jailed hypervisors have as their root, and what is laid into them.

    <run>/jails/<program>/<machine>/root/    one machine's root, as Firecracker's jailer wants it; locked
    <run>/jails/.parts-<random>/             copies of parts that exist in memory only, one process's own

A jailed program owns its root folder, so nothing in it is trusted: it is opened by descriptor, and no
link in it is followed. What it only reads is a hard link to a file of root's that it cannot write to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from pathlib import Path

__all__ = ["JailFolder", "JailFolders", "Parts", "copy_data", "is_socket", "open_inside", "remove_tree"]

_PARTS, _NEW = ".parts-", ".new-"
_NEW_AGE_S = 60.0
_MOST_PARTS = 8  # a template has six
_CHUNK = 1 << 20
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class JailFolders:
    """The jails of one run-time folder."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "jails"

    def create(self, program: str, name: str) -> JailFolder:
        """An empty root folder for a machine; it is its maker's until :meth:`JailFolder.remove`."""
        parent = self.folder / program
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return JailFolder(_locked_folder(self.folder, parent / name))

    def machines(self) -> dict[str, Path]:
        """The folders that exist, by the name of their machine."""
        return {path.name: path for path in self.folder.glob("*/*") if not path.parent.name.startswith(".")}

    def sweep(self) -> None:
        """Remove the jails and the parts of processes that are gone; never raises for what is in them."""
        for folder in (*self.machines().values(), *self.folder.glob(f"{_PARTS}*")):
            _remove_if_free(folder)
        for folder in self.folder.glob(f"{_NEW}*"):  # made and not yet locked, by a process that lives, or died
            with contextlib.suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > _NEW_AGE_S:
                    _remove_if_free(folder)


class JailFolder:
    """A machine's folder, locked for as long as its maker lives."""

    def __init__(self, lock: tuple[Path, int]) -> None:
        self._path, self._lock = lock
        self.root = self._path / "root"
        self.root.mkdir(mode=0o755)

    def seal(self) -> None:
        """From here on its program makes no file any more: the folders in it are root's."""
        for folder in ("", "run", "dev"):
            fd = open_inside(self.root, folder, os.O_RDONLY | os.O_DIRECTORY) if folder else os.open(self.root, _FOLDER)
            try:
                os.chown(f"/proc/self/fd/{fd}", 0, 0)
                os.chmod(f"/proc/self/fd/{fd}", 0o755)  # noqa: S103  # to be read by its program, under a private folder
            finally:
                os.close(fd)

    def remove(self) -> None:
        """Remove it, whatever the jailed program has left in it."""
        remove_tree(self._path)
        os.close(self._lock)


class Parts:
    """Lays files into jails: by hard link where the kernel can, else by a link to one copy.

    Call :meth:`close` at the end; if the process dies instead, the lock on its folder goes with it and
    :meth:`JailFolders.sweep` removes the copies.
    """

    def __init__(self, folders: JailFolders) -> None:
        self._parent = folders.folder
        self._folder: Path | None = None
        self._lock = -1
        self._copies: dict[tuple[int, int, int, int], Path] = {}
        self._one_at_a_time = threading.Lock()

    def lay(self, fd: int, root: Path, name: str) -> None:
        """Make what ``fd`` has open appear as ``root/name``, readable by all and writable by root alone.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        info = os.fstat(fd)
        if info.st_nlink and info.st_uid == 0 and not info.st_mode & 0o022 and info.st_mode & 0o004:
            try:
                folder = os.open(root, _FOLDER)
                try:
                    # With folders given, Python calls linkat, which follows /proc's link; link would not.
                    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
                finally:
                    os.close(folder)
                return
            except OSError as error:
                if error.errno not in {errno.EXDEV, errno.ENOENT, errno.EPERM, errno.EMLINK}:
                    raise
        with self._one_at_a_time:
            os.link(self._copy(fd, info), root / name)

    def close(self) -> None:
        """Remove the copies; jails that have links to them keep them alive."""
        if self._folder is not None:
            remove_tree(self._folder)
            os.close(self._lock)
            self._folder = None

    def _copy(self, fd: int, info: os.stat_result) -> Path:
        # A sealed memfd cannot change, and its number is not given to another while the kernel runs.
        key = (info.st_dev, info.st_ino, info.st_ctime_ns, info.st_size)
        if key not in self._copies:
            folder = self._own_folder()
            while len(self._copies) >= _MOST_PARTS:
                self._copies.pop(next(iter(self._copies))).unlink(missing_ok=True)
            path = folder / secrets.token_hex(8)
            out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
            try:
                copy_data(fd, out, info.st_size)
            except BaseException:  # whatever ends this, no half copy may stay
                path.unlink()
                raise
            finally:
                os.close(out)
            self._copies[key] = path
        self._copies[key] = self._copies.pop(key)  # the one that was not used for longest goes first
        return self._copies[key]

    def _own_folder(self) -> Path:
        if self._folder is None:
            self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder, self._lock = _locked_folder(self._parent, self._parent / f"{_PARTS}{secrets.token_hex(6)}")
        return self._folder


def _locked_folder(parent: Path, folder: Path) -> tuple[Path, int]:
    """Make a folder and lock it before it gets its name: a sweep never finds it unlocked."""
    temporary = parent / f"{_NEW}{secrets.token_hex(6)}"
    temporary.mkdir(mode=0o700)
    lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        temporary.rename(folder)
    except BaseException:  # whatever ends this, the descriptor must not leak
        os.close(lock)
        raise
    return folder, lock


def _remove_if_free(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_tree(folder)
    except BlockingIOError:
        pass  # its process lives
    finally:
        os.close(fd)


def remove_tree(folder: Path) -> None:
    """Remove a folder that a hostile program could write to; what cannot be removed stays, and nothing is raised.

    However deep the tree is, there is no recursion and no long path: the folders in a folder are moved
    up to the top before it goes.
    """
    with contextlib.suppress(OSError):
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            while names := os.listdir(top):
                for name in names:
                    _flatten(top, name)
        finally:
            os.close(top)
        folder.rmdir()


def _flatten(top: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=top)
    except IsADirectoryError:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
        try:
            for inner in os.listdir(fd):
                try:
                    os.unlink(inner, dir_fd=fd)
                except IsADirectoryError:
                    os.rename(inner, secrets.token_hex(8), src_dir_fd=fd, dst_dir_fd=top)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=top)


def copy_data(source: int, target: int, size: int) -> None:
    """Copy ``size`` bytes, leaving out what is a hole; raises OSError."""
    os.ftruncate(target, size)
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole is left
            raise
        end = min(os.lseek(source, offset, os.SEEK_HOLE), size)
        while offset < end:
            data = os.pread(source, min(_CHUNK, end - offset), offset)
            if not data:
                return
            offset += os.pwrite(target, data, offset)


def open_inside(root: Path, name: str, flags: int) -> int:
    """Open a file below a jail's root folder, following no link at any step; raises OSError."""
    fd = os.open(root, _FOLDER)
    *parents, last = name.split("/")
    try:
        for parent in parents:
            step = os.open(parent, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = step
        return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    finally:
        os.close(fd)


def is_socket(fd: int) -> bool:
    """Whether a descriptor is a socket's name, and nothing else that a hostile program put there."""
    return stat.S_ISSOCK(os.fstat(fd).st_mode)
