"""Pack a workspace state into a read-only squashfs image that a machine gets as a disk.

Images are cached by what they contain; :mod:`squash` makes one.

A large workspace is packed once; a later state of it is a small second image that lies on the first
(see :mod:`layers`), until so much has changed that packing anew is cheaper.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from luminaguard.workspaces.joined import HostFolders
from luminaguard.workspaces.layers import Base, Layer, difference
from luminaguard.workspaces.squash import Step, squash
from luminaguard.workspaces.state import WorkspaceState

__all__ = ["WorkspaceImages"]

_KEPT = 8
_LEFTOVER_AGE_S = 7 * 86400
_LAYERED_FROM = 1000  # entries; fewer are packed anew in no time
_LAYER_FILES, _LAYER_BYTES = 2000, 64 << 20


def _silent(_count: int) -> None:
    """Tell nobody."""


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

    @staticmethod
    def _pack(state: WorkspaceState, path: Path, step: Step, layer: Layer | None = None) -> int:
        source = HostFolders(state)
        try:
            return squash(state, source, path, step, layer)
        finally:
            source.close()

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
