"""The workspace states of a task: what it began with, and what its finished steps made of it.

A task works on states that nobody can change under it. Its first one is packed and kept, whatever
becomes of the user's folder meanwhile; each later one is that, and the changes since, whose contents lie
beside it by SHA-256. A state is a value: the same step on the same state is the same call again.

    tasks/ID/base.squashfs   the first state
    tasks/ID/base.json       what is in it
    tasks/ID/rules           the rules in the folder itself, in a fleet
    tasks/ID/contents/SHA    what steps wrote
    tasks/ID/layer-KEY       a later state as an image that lies on the first; made again when missing
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luminaguard.effects.changes import Changeset, DirEntry, Entry, FileEntry, LinkEntry
from luminaguard.errors import StorageError
from luminaguard.workspaces.blobs import BlobStore, share
from luminaguard.workspaces.layers import Base, difference
from luminaguard.workspaces.opening import sync_folder
from luminaguard.workspaces.shared import Shared
from luminaguard.workspaces.squash import changed, squash
from luminaguard.workspaces.state import WorkspaceState

__all__ = ["Snapshot", "Snapshots"]

_FORMAT = 1
_MAX = 1 << 30
_CHUNK = 64 << 20
_BASE, _META, _CONTENTS, _RULES = "base.squashfs", "base.json", "contents", "rules"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One state of a task.

    Attributes:
        changes: since the task's first state.
        times: modification times of what changed, in seconds.
    """

    changes: Changeset = field(default_factory=lambda: Changeset(()))
    times: Mapping[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What tells it from the other states of its task."""
        text = json.dumps([self.changes.digest, sorted(self.times.items())])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()

    def after(self, changes: Changeset, seconds: int) -> Snapshot:
        """The state after a step's changes, made at a time in seconds since the epoch."""
        joined = self.changes.then(changes)
        kept = {change.path for change in joined.changes}
        times = {path: at for path, at in self.times.items() if path in kept}
        times |= {change.path: seconds for change in changes.changes if change.path in kept}
        return Snapshot(joined, times)

    def to_json(self) -> dict[str, Any]:
        """For storage."""
        return {"changes": self.changes.to_json(), "times": dict(self.times)}

    @classmethod
    def from_json(cls, raw: Any) -> Snapshot:
        """The inverse of :meth:`to_json`; raises ChangesetRefused, KeyError or ValueError if it is not one."""
        return cls(Changeset.from_json(raw["changes"]), {str(path): int(at) for path, at in raw["times"].items()})


class Snapshots:
    """The states of all tasks of a state folder.

    Args:
        state: the state folder.
        blobs: where machines leave what they wrote.
        shared: where other hosts of the fleet have states from, and this one those of others.
    """

    def __init__(self, state: Path, blobs: BlobStore, shared: Shared | None = None) -> None:
        self.folder = state / "tasks"
        self._blobs = blobs
        self._shared = shared
        self._known: tuple[str, WorkspaceState, Base] | None = None
        self._lock = threading.Lock()

    def begin(self, task: str, state: WorkspaceState, image: int) -> None:
        """Keep a task's first state. Safe to repeat: the one that was kept first stays.

        Args:
            task: its id.
            state: what was read.
            image: an open image that shows it, whole.

        Raises:
            StorageError: it cannot be kept, such as on a full disk.
        """
        folder = self.folder / task
        if (folder / _META).exists():
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            self._keep_image(image, folder / _BASE)
            (folder / _CONTENTS).mkdir(mode=0o700, exist_ok=True)
            base = Base.of(state)
            whole = {"format": _FORMAT, "path": str(state.path), "device": state.device, "inode": state.inode,
                     "mode": state.mode, "key": base.key, "rows": base.rows}  # fmt: skip
            if self._shared is not None:  # with what tells the copy of another host from another image
                whole["image"] = _sha256(folder / _BASE)
            share(self._shared, task, folder / _BASE)
            _write_whole(folder / _META, json.dumps(whole).encode("ascii"))
            share(self._shared, task, folder / _META)
        except OSError as error:
            raise StorageError(
                f"The first state of {task} cannot be kept: {error}.",
                hint="Free some space in the state folder and run it again.",
            ) from error

    def keep_rules(self, task: str, rules: bytes) -> None:
        """Keep the rules that the task's folder has of its own, for hosts that have not the folder; empty for none."""
        path = self.folder / task / _RULES
        _write_whole(path, rules)
        share(self._shared, task, path)

    def rules(self, task: str) -> bytes:
        """What :meth:`keep_rules` kept.

        Raises:
            StorageError: nothing; without its rules a folder is not worked on.
        """
        path = self.folder / task / _RULES
        try:
            if task:
                self._fetch(task, path)
            return path.read_bytes()
        except OSError as error:
            raise StorageError(
                "The rules of a folder on another host are not known here.",
                hint="Answer on the host that has the folder, or give the task a new start there.",
            ) from error

    def digest(self, task: str) -> str:
        """What tells a task's first state, and its folder's rules, from any others; raises StorageError."""
        digest = hashlib.sha256()
        try:
            for name in (_META, _RULES):
                data = (self.folder / task / name).read_bytes()
                digest.update(len(data).to_bytes(8) + data)
        except OSError as error:
            raise StorageError(
                f"The first state of {task} cannot be read ({error}).",
                hint="The state folder was damaged or edited: the task cannot go on; begin it again.",
            ) from error
        return digest.hexdigest()

    def expect(self, task: str, digest: str) -> None:
        """Have the first state of a task, as it was when the task began; a damaged copy is fetched anew.

        Raises:
            StorageError: what can be had is another one.
        """
        if self._is_whole(task, digest):
            return
        self._known = None
        for name in (_META, _RULES, _BASE):
            path = self.folder / task / name
            if self._shared is not None:
                path.unlink(missing_ok=True)
                self._fetch(task, path)
        if not self._is_whole(task, digest):
            raise StorageError(
                f"The first state of {task} is not what it began with.",
                hint="The database or the state folder was damaged or edited: begin the task again.",
                kept="Nothing ran.",
            )

    def _is_whole(self, task: str, digest: str) -> bool:
        try:
            image = json.loads((self.folder / task / _META).read_bytes())["image"]
            return self.digest(task) == digest and _sha256(self.folder / task / _BASE) == image
        except (OSError, ValueError, KeyError, TypeError, StorageError):
            return False

    def copy_first(self, task: str, other: str) -> None:
        """Let another task begin where this one began.

        Raises:
            StorageError: its first state is not kept any more.
        """
        state, _ = self._load(task)
        image = self._open(self.folder / task / _BASE)
        try:
            self.begin(other, state, image)
            if self._shared is not None:
                self.keep_rules(other, self.rules(task))
        finally:
            os.close(image)

    def first(self, task: str) -> WorkspaceState:
        """A task's first state; raises StorageError."""
        return self._load(task)[0]

    def open(self, task: str, snapshot: Snapshot) -> tuple[tuple[int, ...], dict[str, Entry]]:
        """The images that show a state, which the caller closes, and its entries.

        Raises:
            StorageError: a part of it is missing or damaged.
        """
        with self._lock:  # two who open one state at once pack it once
            return self._open_state(task, snapshot)

    def _open_state(self, task: str, snapshot: Snapshot) -> tuple[tuple[int, ...], dict[str, Entry]]:
        first, base = self._load(task)
        folder = self.folder / task
        if not len(snapshot.changes):
            return (self._open(folder / _BASE),), first.entries
        merged = _merged(first, snapshot)
        path = folder / f"layer-{snapshot.key}"
        lower = self._open(folder / _BASE)
        try:
            try:
                upper = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                layer = difference(base, merged)
                upper = squash(merged, _Contents(self, task), path, lambda _: None, layer)
        except BaseException:  # whatever ends this, the descriptor must not leak
            os.close(lower)
            raise
        return (lower, upper), merged.entries

    def take(self, task: str, owner: str, *, step: int = 0) -> None:
        """Make contents that a step left part of the task, so that they survive a power cut."""
        source, target = self._blobs.folder / owner, self.folder / task / _CONTENTS
        if not source.is_dir():
            return
        self._blobs.sync(owner)
        for blob in source.iterdir():
            blob.replace(target / blob.name)  # the same content under the same name, if it is there already
            share(self._shared, task, target / blob.name, step=step)
        sync_folder(target)
        self._blobs.forget(owner)

    def lend(self, task: str, owner: str, changes: Changeset) -> None:
        """Let a request have the contents that its changes write; both names are the same file."""
        writer = self._blobs.folder / owner
        try:
            for folder in (writer.parent, writer):
                folder.mkdir(mode=0o700, exist_ok=True)
            for sha256 in changes.blobs():
                self._fetch(task, self.folder / task / _CONTENTS / sha256, sha256)
                with contextlib.suppress(FileExistsError):
                    os.link(self.folder / task / _CONTENTS / sha256, writer / sha256)
            self._blobs.persist(owner)
        except OSError as error:
            raise StorageError(
                f"What {task} changed cannot be put before a person: {error}.",
                hint="Check that the state folder has free space and was not edited; then resume the task.",
            ) from error

    def collect(self, task: str, step: int, snapshot: Snapshot, *more: Changeset) -> None:
        """Delete what a task needs no more.

        Args:
            task: its id.
            step: how many of its steps are saved.
            snapshot: its present state.
            more: other changes whose outcomes may be gone back to, or asked for.
        """
        # Contents that only a mode was changed of, too: a layer has the whole file.
        contents = frozenset[str]().union(*(changes.contents for changes in (snapshot.changes, *more)))
        layers = {f"layer-{snapshot.key}"}
        folder = self.folder / task
        for blob in (folder / _CONTENTS).iterdir() if (folder / _CONTENTS).is_dir() else ():
            if blob.name not in contents:
                blob.unlink(missing_ok=True)
        for layer in folder.glob("layer-*"):
            if layer.name not in layers:
                layer.unlink(missing_ok=True)
        if self._shared is not None:
            self._shared.collect(task, contents | {_BASE, _META, _RULES}, step)

    def forget(self, task: str) -> None:
        """Delete all states of a task."""
        self._known = None
        shutil.rmtree(self.folder / task, ignore_errors=True)
        if self._shared is not None:
            self._shared.forget(task)

    def _fetch(self, task: str, path: Path, sha256: str = "") -> None:
        """Have from elsewhere what is not here."""
        if self._shared is None or path.exists():
            return
        for folder in (self.folder, self.folder / task, self.folder / task / _CONTENTS):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._shared.fetch(task, path.name, path, sha256)

    def open_content(self, task: str, sha256: str) -> int:
        """A descriptor of a content that a step wrote; raises OSError."""
        path = self.folder / task / _CONTENTS / sha256
        self._fetch(task, path, sha256)
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def tasks(self) -> list[str]:
        """The tasks that have states here."""
        return sorted(entry.name for entry in self.folder.iterdir() if entry.is_dir()) if self.folder.is_dir() else []

    def _load(self, task: str) -> tuple[WorkspaceState, Base]:
        known = self._known  # another thread may replace it
        if known is not None and known[0] == task:
            return known[1], known[2]
        path = self.folder / task / _META
        self._fetch(task, path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                raw = json.loads(file.read(_MAX))
            if raw["format"] != _FORMAT:
                raise ValueError(f"format {raw['format']!r}")
            state = WorkspaceState(Path(raw["path"]), int(raw["device"]), int(raw["inode"]), int(raw["mode"]))
            for name, row in raw["rows"].items():
                *fields, at, link = row
                state.entries[name], state.times[name] = _entry(fields), int(at)
                if link:
                    state.links[name] = str(link)
            base = Base(str(raw["key"]), raw["rows"])
            if "image" in raw:
                self._fetch(task, path.with_name(_BASE), str(raw["image"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"The first state of {task} cannot be read ({error}).",
                hint="The state folder was damaged or edited: the task cannot go on; begin it again.",
                kept="Nothing was deleted.",
            ) from error
        self._known = (task, state, base)
        return state, base

    @staticmethod
    def _open(path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(
                f"A stored state of the workspace is missing ({error.strerror}).",
                hint="The state folder was damaged or edited: the task cannot go on; begin it again.",
            ) from error

    @staticmethod
    def _keep_image(image: int, path: Path) -> None:
        """A copy: the cache's own file may be forgotten, and a jail has other names of it."""
        partial = path.with_name(f".{path.name}-{os.getpid()}")
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            at = 0
            while sent := os.sendfile(fd, image, at, _CHUNK):
                at += sent
            os.fsync(fd)
        finally:
            os.close(fd)
        partial.replace(path)


class _Contents:
    """The contents of a task, by SHA-256."""

    def __init__(self, snapshots: Snapshots, task: str) -> None:
        self._snapshots, self._task = snapshots, task

    def open(self, path: str, entry: FileEntry) -> int:
        """A descriptor of a content; what is read from it is hashed by the reader."""
        try:
            return self._snapshots.open_content(self._task, entry.sha256)
        except OSError as error:
            raise changed(path) from error


def _merged(first: WorkspaceState, snapshot: Snapshot) -> WorkspaceState:
    entries = snapshot.changes.applied_to(first.entries)
    touched = {change.path for change in snapshot.changes.changes}
    return WorkspaceState(
        first.path, first.device, first.inode, first.mode, entries,
        {path: snapshot.times.get(path, first.times.get(path, 0)) for path in entries},
        # A second name of a file that was written to is a file of its own from then on.
        {path: name for path, name in first.links.items() if path in entries and path not in touched},
    )  # fmt: skip


def _entry(fields: list[Any]) -> Entry:
    match fields:
        case ["file", int(mode), int(size), str(sha256)]:
            return FileEntry(mode, size, sha256)
        case ["dir", int(mode)]:
            return DirEntry(mode)
        case ["link", str(target)]:
            return LinkEntry(target)
    raise ValueError(f"no entry: {fields!r:.60}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)
