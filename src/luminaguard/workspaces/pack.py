"""Pack a workspace state into a read-only squashfs image that a machine gets as a disk.

The bytes that go into the image are hashed again on their way and must be those of the state. The
image has no extended attributes, one owner and only permission bits, so nothing in a tree can act
as an overlay's whiteout or bring a set-id bit along. Images are cached by what they contain.

A large workspace is packed once; a later state of it is a small second image that lies on the first
(see :mod:`layers`), until so much has changed that packing anew is cheaper.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from luminaguard.effects.changes import DirEntry, FileEntry, LinkEntry, encode
from luminaguard.errors import StorageError, Unavailable, WorkspaceChanged
from luminaguard.workspaces.layers import Base, Layer, difference
from luminaguard.workspaces.opening import Parents, open_root
from luminaguard.workspaces.state import WorkspaceState

__all__ = ["WorkspaceImages"]

_UID = 1000
_CHUNK = 1 << 20
_KEPT = 8
_LEFTOVER_AGE_S = 7 * 86400
_LAYERED_FROM = 1000  # entries; fewer are packed anew in no time
_LAYER_FILES, _LAYER_BYTES = 2000, 64 << 20
_COMMAND = ("mksquashfs", "-", "{out}", "-tar", "-noI", "-noD", "-noF", "-no-xattrs", "-no-duplicates",
            # Tables that a mount would have to read: nothing exports the image, and uncompressed ends save nothing.
            "-no-exports", "-no-fragments",
            "-mkfs-time", "0", "-noappend", "-quiet", "-no-progress", "-mem", "128M", "-processors", "1",
            "-force-uid", str(_UID), "-force-gid", str(_UID), "-root-mode", "{mode}",
            "-root-uid", str(_UID), "-root-gid", str(_UID))  # fmt: skip

_TELL_EVERY = 500
Step = Callable[[int], None]


def _silent(_count: int) -> None:
    """Tell nobody."""


_PLAIN = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)
_PLAIN_SUM = sum(_PLAIN[156:]) + 8 * ord(" ")  # the checksum counts as blanks in itself


class WorkspaceImages:
    """The packed states of one cache folder."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "workspaces"

    def open_layered(self, state: WorkspaceState, step: Step = _silent) -> tuple[int, int]:
        """The images that show a state: one, and another that lies on it, or -1; the caller owns both.

        Args:
            state: what they show.
            step: told from time to time how many entries are packed.

        Raises:
            WorkspaceChanged: a file is not any more what the state says.
            StorageError: the disk is full.
            Unavailable: mksquashfs is missing.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        complete = self._cached(self._path(state.image_key()))
        if complete >= 0 or len(state.entries) < _LAYERED_FROM:
            if complete >= 0:
                os.close(complete)
            return self.open(state, step), -1
        pointer = self.folder / f"{hashlib.sha256(os.fsencode(state.path)).hexdigest()[:32]}.base"
        layered = self._on_base(state, pointer)
        if layered is not None:
            return layered
        fd = self.open(state, step)
        Base.of(state).save(pointer)
        return fd, -1

    def _on_base(self, state: WorkspaceState, pointer: Path) -> tuple[int, int] | None:
        base = Base.load(pointer)
        if base is None or not _is_digest(base.key):
            return None
        lower = self._cached(self._path(base.key))
        if lower < 0:
            return None
        try:
            path = self._path(hashlib.sha256(f"layer {base.key} {state.image_key()}".encode()).hexdigest())
            fd = self._cached(path)
            if fd < 0:
                layer = difference(base, state)
                if len(layer.paths) + len(layer.gone) > _LAYER_FILES or layer.size > _LAYER_BYTES:
                    os.close(lower)
                    return None
                fd = self._pack(state, path, _silent, layer)
        except BaseException:  # whatever ends this, the descriptor must not leak
            os.close(lower)
            raise
        self._keep(path, fd)
        self._keep(self._path(base.key), lower)
        self._forget()
        return lower, fd

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.squashfs"

    def _keep(self, path: Path, fd: int) -> None:
        """Say that an image is as it was packed, and is used: the newest are kept."""
        self._stamp(path).write_text(_changed_at(fd), encoding="ascii")
        os.utime(self._stamp(path))

    def open(self, state: WorkspaceState, step: Step = _silent) -> int:
        """The whole image of a state, packed first if need be, opened read-only; the caller owns it.

        Raises:
            WorkspaceChanged: a file is not any more what the state says.
            StorageError: the disk is full.
            Unavailable: mksquashfs is missing.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(state.image_key())
        fd = self._cached(path)
        if fd < 0:
            fd = self._pack(state, path, step)
        self._keep(path, fd)
        self._forget()
        return fd

    @staticmethod
    def _stamp(path: Path) -> Path:
        return path.with_suffix(".stamp")

    def _cached(self, path: Path) -> int:
        """The packed image, or -1 when there is none that is as it was packed.

        A hypervisor that was taken over can write to an image of its own user, behind the read-only
        descriptor that it was given; the kernel's change time tells.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return -1
        try:
            if self._stamp(path).read_text(encoding="ascii") == _changed_at(fd):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)
        path.unlink(missing_ok=True)
        return -1

    def _pack(self, state: WorkspaceState, path: Path, step: Step, layer: Layer | None = None) -> int:
        # Packed into a name of its own and then renamed: an image is whole or not there.
        partial = path.with_name(f".{path.stem[:16]}-{os.getpid()}.partial")
        try:
            self._run(state, partial, step, layer)
            fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            partial.replace(path)
            return fd
        finally:
            partial.unlink(missing_ok=True)

    def _run(self, state: WorkspaceState, out: Path, step: Step, layer: Layer | None) -> None:
        mode = f"{state.mode | 0o700:o}"
        command = [word.replace("{out}", str(out)).replace("{mode}", mode) for word in _COMMAND]
        # Readable by all: the folder is private, and a jail gets a link to it under another uid.
        os.close(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644))
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except FileNotFoundError as error:
            raise Unavailable("mksquashfs is not installed.", hint="apt-get install squashfs-tools") from error
        with process:
            assert process.stdin is not None and process.stderr is not None
            broken = False
            try:
                with process.stdin:
                    _widen(process.stdin.fileno())
                    _Tar(state, process.stdin, step, layer).write()
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

    def _forget(self) -> None:
        found = []
        for entry in self.folder.glob("*.stamp"):
            try:
                found.append((entry.stat().st_mtime, entry))
            except FileNotFoundError:
                continue  # another process tidies up as well
        for _, old in sorted(found, reverse=True)[_KEPT:]:
            old.with_suffix(".squashfs").unlink(missing_ok=True)  # a machine that runs from it has it open
            old.unlink(missing_ok=True)
        for leftover in (*self.folder.glob("*.base"), *self.folder.glob(".*.partial")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE_S:
                    leftover.unlink()


def _is_digest(key: str) -> bool:
    """Whether a key from a file can be part of a path."""
    return len(key) == 64 and set(key) <= set("0123456789abcdef")


def _changed_at(fd: int) -> str:
    info = os.fstat(fd)
    # Root's machines have other uids, which cannot write to root's files; and links into their jails, which
    # change this time.
    changed = info.st_mtime_ns if os.geteuid() == 0 else info.st_ctime_ns
    return f"{info.st_dev} {info.st_ino} {info.st_size} {changed}"


class _Tar:
    """Writes the state as a tar stream; reads every file by descriptor and checks its hash."""

    def __init__(self, state: WorkspaceState, out: IO[bytes], step: Step, layer: Layer | None) -> None:
        self._state = state
        self._step = step
        self._out = out
        self._paths = list(state.entries) if layer is None else layer.paths
        self._gone = [] if layer is None else layer.gone
        self._present = set(self._paths)

    def write(self) -> None:
        root = open_root(self._state.path)
        parents = Parents(root)
        try:
            info = os.fstat(root)
            if (info.st_dev, info.st_ino) != (self._state.device, self._state.inode):
                raise self._changed(str(self._state.path))
            for number, path in enumerate(self._paths):
                self._member(parents, path, self._state.entries[path])
                if number % _TELL_EVERY == 0:
                    self._step(number)
            for path in self._gone:
                self._whiteout(path)
            self._out.write(bytes(2 * tarfile.BLOCKSIZE))
        finally:
            parents.close()
            os.close(root)

    def _member(self, parents: Parents, path: str, entry: FileEntry | DirEntry | LinkEntry) -> None:
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
                self._content(parents, path, entry)
            return
        self._out.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _whiteout(self, path: str) -> None:
        info = tarfile.TarInfo(path)
        info.type = tarfile.CHRTYPE  # of device 0:0
        self._out.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))

    def _content(self, parents: Parents, path: str, entry: FileEntry) -> None:
        digest = hashlib.sha256()
        left = entry.size
        try:
            parent, name = parents.of(path)
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except OSError as error:
            raise self._changed(path) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise self._changed(path)
            while left:
                data = os.read(fd, min(_CHUNK, left))
                if not data:
                    raise self._changed(path)
                digest.update(data)
                self._out.write(data)
                left -= len(data)
            if os.read(fd, 1):
                raise self._changed(path)
        finally:
            os.close(fd)
        if digest.hexdigest() != entry.sha256:
            raise self._changed(path)
        self._out.write(bytes(-entry.size % tarfile.BLOCKSIZE))

    @staticmethod
    def _changed(path: str) -> WorkspaceChanged:
        return WorkspaceChanged(
            f"{path!a} changed while the workspace was packed.",
            hint="Run the command again when nothing else writes to the folder.",
        )


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
