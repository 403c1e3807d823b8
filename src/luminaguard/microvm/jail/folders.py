"""The folders that jailed hypervisors have as their root, and what is laid into them.

    <run>/jails/<program>/<machine>/root/    one machine's root, as Firecracker's jailer wants it
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
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["JailFolders", "Parts", "copy_data", "is_socket", "open_inside"]

_PARTS = ".parts-"
_MOST_PARTS = 16
_CHUNK = 1 << 20
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class JailFolders:
    """The jails of one run-time folder."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "jails"

    @contextlib.contextmanager
    def create(self, program: str, name: str) -> Iterator[Path]:
        """An empty root folder for a machine, removed with the context."""
        machine = self.folder / program / name
        machine.mkdir(mode=0o700, parents=True)
        try:
            root = machine / "root"
            root.mkdir(mode=0o755)
            yield root
        finally:
            shutil.rmtree(machine, ignore_errors=True)

    def machines(self) -> dict[str, Path]:
        """The folders that exist, by the name of their machine."""
        return {path.name: path for path in self.folder.glob("*/*") if not path.parent.name.startswith(".")}

    def remove(self, name: str) -> None:
        """Remove what a machine whose owner was killed has left."""
        for found, path in self.machines().items():
            if found == name:
                shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> None:
        """Remove the parts of processes that are gone."""
        for folder in self.folder.glob(f"{_PARTS}*"):
            try:
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                pass  # its process lives
            finally:
                os.close(fd)


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

    def lay(self, fd: int, root: Path, name: str) -> None:
        """Make what ``fd`` has open appear as ``root/name``, readable by all and writable by root alone.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        info = os.fstat(fd)
        if info.st_nlink and info.st_uid == 0 and not info.st_mode & 0o022 and info.st_mode & 0o004:
            try:
                os.link(f"/proc/self/fd/{fd}", root / name, follow_symlinks=True)
                return
            except OSError as error:
                if error.errno not in {errno.EXDEV, errno.ENOENT, errno.EPERM, errno.EMLINK}:
                    raise
        os.link(self._copy(fd, info), root / name)

    def close(self) -> None:
        """Remove the copies; jails that have links to them keep them alive."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
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
        return self._copies[key]

    def _own_folder(self) -> Path:
        if self._folder is None:
            self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = secrets.token_hex(6)
            # Locked before it gets its name: a sweep never finds it unlocked.
            temporary, folder = self._parent / f".new-{name}", self._parent / f"{_PARTS}{name}"
            temporary.mkdir(mode=0o700)
            self._lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            temporary.rename(folder)
            self._folder = folder
        return self._folder


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
