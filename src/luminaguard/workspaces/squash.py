"""Make a read-only squashfs image of a workspace state, or of a layer that lies on another image.

The bytes that go in are hashed on their way and must be those of the state, wherever they are read from.
The image has no extended attributes, one owner and only permission bits, so nothing in a tree can act
as an overlay's whiteout or bring a set-id bit along.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from luminaguard.effects.changes import DirEntry, FileEntry, LinkEntry, encode
from luminaguard.errors import StorageError, Unavailable, WorkspaceChanged
from luminaguard.workspaces.layers import Layer
from luminaguard.workspaces.opening import Parents, open_root
from luminaguard.workspaces.state import WorkspaceState

__all__ = ["HostFolder", "Source", "Step", "changed", "squash"]

_UID = 1000  # any one: the guest shows the user of its machine in its place (guest/ownership.py)
_CHUNK = 1 << 20
_COMMAND = ("mksquashfs", "-", "{out}", "-tar", "-noI", "-noD", "-noF", "-no-xattrs", "-no-duplicates",
            # Tables that a mount would have to read: nothing exports the image, and uncompressed ends save nothing.
            "-no-exports", "-no-fragments",
            "-mkfs-time", "0", "-noappend", "-quiet", "-no-progress", "-mem", "128M", "-processors", "1",
            "-force-uid", str(_UID), "-force-gid", str(_UID), "-root-mode", "{mode}",
            "-root-uid", str(_UID), "-root-gid", str(_UID))  # fmt: skip
_TELL_EVERY = 500
_PLAIN = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)
_PLAIN_SUM = sum(_PLAIN[156:]) + 8 * ord(" ")  # the checksum counts as blanks in itself
Step = Callable[[int], None]


class Source(Protocol):
    """Where the contents of a state are."""

    def open(self, path: str, entry: FileEntry) -> int:
        """A descriptor of a file's content, which the caller closes; raises WorkspaceChanged if it is gone."""


class HostFolder:
    """The folder that a state was read from, as long as it still is that folder."""

    def __init__(self, state: WorkspaceState) -> None:
        self._root = open_root(state.path)
        info = os.fstat(self._root)
        if (info.st_dev, info.st_ino) != (state.device, state.inode):
            os.close(self._root)
            raise changed(str(state.path))
        self._parents = Parents(self._root)

    def open(self, path: str, _: FileEntry) -> int:
        """A descriptor of a file's content."""
        try:
            parent, name = self._parents.of(path)
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except OSError as error:
            raise changed(path) from error

    def close(self) -> None:
        """Let go of the folder."""
        self._parents.close()
        os.close(self._root)


def squash(state: WorkspaceState, source: Source, path: Path, step: Step, layer: Layer | None = None) -> int:
    """Make an image and open it read-only; the caller owns the descriptor.

    Args:
        state: what it shows.
        source: the contents.
        path: where it is put, whole or not at all.
        step: told from time to time how many entries are packed.
        layer: only this part of the state, to lie on the image of another one.

    Raises:
        WorkspaceChanged: a content is not what the state says.
        StorageError: the disk is full.
        Unavailable: mksquashfs is missing.
    """
    # Packed into a name of its own and then renamed: an image is whole or not there.
    partial = path.with_name(f".{path.stem[:16]}-{os.getpid()}.partial")
    try:
        _run(state, source, partial, step, layer)
        fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
        partial.replace(path)
        return fd
    finally:
        partial.unlink(missing_ok=True)


def changed(path: str) -> WorkspaceChanged:
    """A file is not what the state says of it."""
    return WorkspaceChanged(
        f"{path!a} changed while the workspace was packed.",
        hint="Run the command again when nothing else writes to the folder.",
    )


def _run(state: WorkspaceState, source: Source, out: Path, step: Step, layer: Layer | None) -> None:
    mode = f"{state.mode | 0o700:o}"
    command = [word.replace("{out}", str(out)).replace("{mode}", mode) for word in _COMMAND]
    # Readable by all: the folder is private, and a jail gets a link to it under another uid.
    os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644))
    try:
        # In a group of its own: a Ctrl-C at the terminal is ours to act on.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   process_group=0)  # fmt: skip
    except FileNotFoundError as error:
        raise Unavailable("mksquashfs is not installed.", hint="apt-get install squashfs-tools") from error
    with process:
        assert process.stdin is not None and process.stderr is not None
        broken = False
        try:
            with process.stdin:
                _widen(process.stdin.fileno())
                _Tar(state, source, process.stdin, step, layer).write()
        except BrokenPipeError:
            broken = True
        except BaseException:  # a cancelled packing must not leave mksquashfs waiting for more
            process.kill()
            raise
        said = process.stderr.read().decode("utf-8", "replace").strip()
    if broken or process.returncode:
        raise StorageError(
            f"The workspace could not be packed: {said[-300:] or 'mksquashfs ended early'}.",
            hint="Check that the cache folder has as much free space as the workspace is large.",
        )


class _Tar:
    """Writes the state as a tar stream; reads every file by descriptor and checks its hash."""

    def __init__(self, state: WorkspaceState, source: Source, out: IO[bytes], step: Step, layer: Layer | None) -> None:
        self._state = state
        self._source = source
        self._step = step
        self._out = out
        self._paths = list(state.entries) if layer is None else layer.paths
        self._gone = [] if layer is None else layer.gone
        self._present = set(self._paths)

    def write(self) -> None:
        for number, path in enumerate(self._paths):
            self._member(path, self._state.entries[path])
            if number % _TELL_EVERY == 0:
                self._step(number)
        for path in self._gone:
            self._whiteout(path)
        self._out.write(bytes(2 * tarfile.BLOCKSIZE))

    def _member(self, path: str, entry: FileEntry | DirEntry | LinkEntry) -> None:
        info = tarfile.TarInfo(path)
        info.mtime = self._state.times[path]
        if self._state.links.get(path) in self._present:
            info.type, info.linkname = tarfile.LNKTYPE, self._state.links[path]
        elif isinstance(entry, DirEntry):
            info.type, info.mode = tarfile.DIRTYPE, entry.mode
        elif isinstance(entry, LinkEntry):
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.target, 0o777
        else:
            self._out.write(_file_header(encode(path), entry.mode, entry.size, self._state.times[path]))
            if entry.size:
                self._content(path, entry)
            return
        self._out.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _whiteout(self, path: str) -> None:
        info = tarfile.TarInfo(path)
        info.type = tarfile.CHRTYPE  # of device 0:0
        self._out.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _content(self, path: str, entry: FileEntry) -> None:
        digest = hashlib.sha256()
        left = entry.size
        fd = self._source.open(path, entry)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise changed(path)
            while left:
                data = os.read(fd, min(_CHUNK, left))
                if not data:
                    raise changed(path)
                digest.update(data)
                self._out.write(data)
                left -= len(data)
            if os.read(fd, 1):
                raise changed(path)
        finally:
            os.close(fd)
        if digest.hexdigest() != entry.sha256:
            raise changed(path)
        self._out.write(bytes(-entry.size % tarfile.BLOCKSIZE))


def _file_header(name: bytes, mode: int, size: int, seconds: int) -> bytes:
    """What :meth:`tarfile.TarInfo.tobuf` gives for a file, in a quarter of the time: nearly all entries are files."""
    if len(name) >= 100 or size >= 1 << 33:  # beyond them the format has extensions
        info = tarfile.TarInfo(os.fsdecode(name))
        info.mode, info.size, info.mtime = mode, size, seconds
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    head = b"%b%07o\0%b%011o\0%011o\0" % (name.ljust(100, b"\0"), mode, _PLAIN[108:124], size, seconds)
    return b"%b%06o\0 %b" % (head, sum(head) + _PLAIN_SUM, _PLAIN[156:])


def _widen(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EBUSY}:
            raise
