"""Read a workspace into an immutable state: every entry, with the hash of every file.

Each file is opened by descriptor and looked at before and after it is read; one that changes
meanwhile ends in :class:`WorkspaceChanged`. Ignored paths (``.luminaguardignore``, the syntax of
gitignore) do not go in; a change that meets one on the host is a conflict. Git metadata is part of the state.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from luminaguard.effects.changes import (
    RESERVED_PREFIX,
    DirEntry,
    Entry,
    FileEntry,
    LinkEntry,
    encode,
)
from luminaguard.errors import WorkspaceChanged, WorkspaceError
from luminaguard.workspaces.index import HashIndex
from luminaguard.workspaces.opening import hash_fd, open_root

__all__ = ["IGNORE_FILE", "Limits", "WorkspaceState", "read_state"]

IGNORE_FILE = ".luminaguardignore"
_MAX_IGNORE = 1 << 20
_MAX_DEPTH = 200
_LOOK_S, _LOOK_DEPTH = 5.0, 2


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a workspace may be: entries, and bytes of all files together."""

    files: int
    size: int


@dataclass(slots=True)
class WorkspaceState:
    """One version of a workspace.

    Attributes:
        path: absolute path of the folder.
        device, inode: the folder's identity.
        entries: everything in it, by path.
        times: modification times in seconds, which tools such as make compare.
        links: paths of one file with several names, in the order they were found.
        mode: permission bits of the folder itself.
        size: bytes of all files.
        ignored: how many paths were left out.
        parts: of one that was joined of several folders, those beside the first, by name.
    """

    path: Path
    device: int
    inode: int
    mode: int
    entries: dict[str, Entry] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    size: int = 0
    ignored: int = 0
    parts: dict[str, WorkspaceState] = field(default_factory=dict)
    _key: str = ""

    def image_key(self) -> str:
        """SHA-256 over all that a workspace image contains."""
        if not self._key:  # a state does not change once it is read
            self._key = self._make_key()
        return self._key

    def _make_key(self) -> str:
        digest = hashlib.sha256(f"luminaguard workspace 1 {self.mode:o}\0".encode())
        for path in sorted(self.entries, key=encode):
            row = (path, repr(self.entries[path]), str(self.times[path]), self.links.get(path, ""))
            for part in row:
                raw = encode(part)
                digest.update(len(raw).to_bytes(4, "big") + raw)
        return digest.hexdigest()


def read_state(
    path: Path,
    limits: Limits,
    step: Callable[[int], None] | None = None,
    *,
    own: frozenset[str] = frozenset(),
    indexes: Path | None = None,
) -> WorkspaceState:
    """Read the folder.

    Args:
        path: absolute path.
        limits: beyond them the folder is refused.
        step: told the number of entries from time to time.
        own: paths that are left out, see :mod:`luminaguard.workspaces.own`.
        indexes: a folder for what was hashed before, see :mod:`luminaguard.workspaces.index`.

    Raises:
        WorkspaceError: it cannot be a workspace, and why.
        WorkspaceChanged: a file changed while it was read.
    """
    root = open_root(path)
    try:
        info = os.fstat(root)
        state = WorkspaceState(path, info.st_dev, info.st_ino, info.st_mode & 0o777)
        index = HashIndex(indexes, path) if indexes else None
        _Reader(state, limits, _ignore_rules(root), step, own, index).folder(root, "", 0)
        if index is not None:
            index.save()
        return state
    finally:
        os.close(root)


class _Reader:
    def __init__(
        self,
        state: WorkspaceState,
        limits: Limits,
        ignore: GitIgnoreSpec | None,
        step: Callable[[int], None] | None,
        own: frozenset[str],
        index: HashIndex | None,
    ) -> None:
        self._index = index
        self._state = state
        self._own = own
        self._limits = limits
        self._ignore = ignore
        self._step = step
        self._inodes: dict[int, str] = {}

    def folder(self, fd: int, prefix: str, depth: int) -> None:
        """Read one open folder and all below it."""
        if depth > _MAX_DEPTH:
            raise self._refused(prefix, f"is nested deeper than {_MAX_DEPTH} folders")
        with os.scandir(fd) as listing:
            entries = sorted(listing, key=lambda entry: os.fsencode(entry.name))
        for entry in entries:
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            try:
                self._entry(fd, entry, path, depth)
            except FileNotFoundError as error:
                raise self._changed(path) from error
            except PermissionError as error:
                raise self._refused(path, "cannot be read", "Make it readable, or name it in " + IGNORE_FILE) from error

    def _entry(self, fd: int, entry: os.DirEntry[str], path: str, depth: int) -> None:
        info = entry.stat(follow_symlinks=False)
        is_folder = stat.S_ISDIR(info.st_mode)
        if self._left_out(path, folder=is_folder):
            self._state.ignored += 1
            return
        if stat.S_ISLNK(info.st_mode):
            self._add(path, LinkEntry(os.readlink(entry.name, dir_fd=fd)), info)
        elif is_folder:
            if info.st_dev != self._state.device:
                raise self._refused(path, "is another file system mounted there", f"Name it in {IGNORE_FILE}.")
            self._add(path, DirEntry(info.st_mode & 0o777), info)
            below = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                self.folder(below, path, depth + 1)
            finally:
                os.close(below)
        elif stat.S_ISREG(info.st_mode):
            self._file(fd, entry.name, path, info)
        else:
            raise self._refused(path, "is a device, a socket or a pipe", f"Remove it, or name it in {IGNORE_FILE}.")

    def _file(self, parent: int, name: str, path: str, info: os.stat_result) -> None:
        sha256 = self._index.lookup(path, info) if self._index else None
        if sha256 is None:
            info, sha256 = self._hash(parent, name, path)
            if self._index:
                self._index.learn(path, info, sha256)
        elif self._state.size + info.st_size > self._limits.size:
            raise self._too_large(path, info.st_size)
        self._state.size += info.st_size
        if info.st_nlink > 1:
            first = self._inodes.setdefault(info.st_ino, path)
            if first != path:
                self._state.links[path] = first
        self._add(path, FileEntry(info.st_mode & 0o777, info.st_size, sha256), info)

    def _hash(self, parent: int, name: str, path: str) -> tuple[os.stat_result, str]:
        """Read a file that must not change meanwhile."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        try:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                raise self._changed(path)
            if self._state.size + before.st_size > self._limits.size:
                raise self._too_large(path, before.st_size)
            size, sha256 = hash_fd(fd)
            after = os.fstat(fd)
        finally:
            os.close(fd)
        if (size, after.st_mtime_ns, after.st_ctime_ns) != (
            before.st_size,
            before.st_mtime_ns,
            before.st_ctime_ns,
        ):
            raise self._changed(path)
        return before, sha256

    def _add(self, path: str, entry: Entry, info: os.stat_result) -> None:
        entries = self._state.entries
        entries[path] = entry
        self._state.times[path] = max(0, min(int(info.st_mtime), 0xFFFFFFFF))
        if len(entries) > self._limits.files:
            raise WorkspaceError(
                f"The workspace has more than {self._limits.files:,} entries; "
                f"most are in {self._largest(by_size=False)}.",
                hint=f"Name what is not needed in {IGNORE_FILE}, or raise workspace_max_files.",
            )
        if self._step is not None and len(entries) % 500 == 0:
            self._step(len(entries))

    def _too_large(self, path: str, size: int) -> WorkspaceError:
        return WorkspaceError(
            f"The workspace has more than {self._limits.size >> 20:,} MiB of files (at {path!a}, {size >> 20:,} MiB); "
            f"most are in {self._largest(by_size=True)}.",
            hint=f"Name what is not needed in {IGNORE_FILE}, or raise workspace_max_mib.",
        )

    def _largest(self, *, by_size: bool) -> str:
        """The folders that take most of what would go in, in words; looks at everything, but not for ever."""
        totals: dict[str, list[int]] = {}
        deadline = time.monotonic() + _LOOK_S
        for folder, folders, names, fd in os.fwalk(self._state.path, follow_symlinks=False):
            prefix = os.path.relpath(folder, self._state.path).removeprefix(".")
            folders[:] = [name for name in folders if not self._left_out(os.path.join(prefix, name), folder=True)]
            total = totals.setdefault("/".join(prefix.split("/")[:_LOOK_DEPTH]) or ".", [0, 0])
            total[1] += len(folders)
            for name in names:
                if not self._left_out(os.path.join(prefix, name), folder=False):
                    total[1] += 1
                    with contextlib.suppress(OSError):
                        total[0] += os.stat(name, dir_fd=fd, follow_symlinks=False).st_size
            if time.monotonic() > deadline:
                break
        first = sorted(totals.items(), key=lambda item: -item[1][0 if by_size else 1])[:3]
        return ", ".join(f"{name!a} ({size >> 20:,} MiB, {count:,} entries)" for name, (size, count) in first)

    def _left_out(self, path: str, *, folder: bool) -> bool:
        if path in self._own or path.startswith(RESERVED_PREFIX):
            return True
        return self._ignore is not None and self._ignore.match_file(f"{path}/" if folder else path)

    @staticmethod
    def _refused(path: str, why: str, hint: str = "") -> WorkspaceError:
        return WorkspaceError(f"{path!a} in the workspace {why}.", hint=hint or f"Name it in {IGNORE_FILE}.")

    @staticmethod
    def _changed(path: str) -> WorkspaceChanged:
        return WorkspaceChanged(
            f"{path!a} changed while the workspace was read.",
            hint="Run the command again when nothing else writes to the folder.",
        )


def _ignore_rules(root: int) -> GitIgnoreSpec | None:
    try:
        fd = os.open(IGNORE_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WorkspaceError(
            f"{IGNORE_FILE} cannot be read: {error.strerror}.",
            hint="It must be a readable file, not a link.",
        ) from error
    with os.fdopen(fd, "rb") as file:
        text = file.read(_MAX_IGNORE + 1)
    try:
        if len(text) > _MAX_IGNORE:
            raise ValueError("it is larger than 1 MiB")
        return GitIgnoreSpec.from_lines(text.decode().splitlines())
    except (ValueError, UnicodeDecodeError) as error:
        raise WorkspaceError(f"{IGNORE_FILE} cannot be used: {error}.", hint="Correct its patterns.") from error
