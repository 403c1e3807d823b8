"""What differs between two states of a workspace, as the entries of a layer that lies on the older one.

A layer is what overlayfs expects of an upper layer (Documentation/filesystems/overlayfs.rst): changed
entries as they are, and a character device 0:0 (a whiteout) for each that is gone. An entry of another
kind hides what is below it. Nothing here needs an extended attribute: what is gone from a folder is
named one by one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luminaguard.effects.changes import DirEntry, Entry, FileEntry, LinkEntry, encode
from luminaguard.workspaces.state import WorkspaceState

__all__ = ["Base", "Layer", "difference"]

_MAX = 1 << 30
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Layer:
    """Paths to take from the newer state, parents first, and paths that are gone."""

    paths: list[str]
    gone: list[str]
    size: int


@dataclass(frozen=True, slots=True)
class Base:
    """What an image contains: a row of plain values for each path."""

    key: str
    rows: dict[str, list[Any]]

    @classmethod
    def of(cls, state: WorkspaceState) -> Base:
        """What the image of a state contains."""
        return cls(state.image_key(), _rows(state))

    def save(self, path: Path) -> None:
        """Write it beside the image; raises OSError."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(json.dumps({"format": _FORMAT, "key": self.key, "rows": self.rows}))

    @classmethod
    def load(cls, path: Path) -> Base | None:
        """Read it; None when there is none that can be read: the image is then no base for anything."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                raw = json.loads(file.read(_MAX))
            return cls(str(raw["key"]), dict(raw["rows"])) if raw["format"] == _FORMAT else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def difference(base: Base, state: WorkspaceState) -> Layer:
    """What has to lie on the base's image to show the state."""
    rows = _rows(state)
    paths: set[str] = set()
    size = 0
    for path, row in rows.items():
        if base.rows.get(path) != row:
            paths.add(path)
            entry = state.entries[path]
            size += entry.size if isinstance(entry, FileEntry) else 0
    gone = [path for path in base.rows if path not in rows and isinstance(_parent(path, state), DirEntry)]
    # A layer's folder gives the merged one its mode and time: all folders on the way are part of it.
    for path in [*paths, *gone]:
        while path := path.rpartition("/")[0]:
            paths.add(path)
    return Layer(sorted(paths, key=encode), sorted(gone, key=encode), size)


def _parent(path: str, state: WorkspaceState) -> Entry | None:
    """The entry above a path; where it is no folder any more, it hides what was in it."""
    parent = path.rpartition("/")[0]
    return state.entries.get(parent) if parent else DirEntry(state.mode)


def _rows(state: WorkspaceState) -> dict[str, list[Any]]:
    return {
        path: [*_fields(entry), state.times[path], state.links.get(path, "")] for path, entry in state.entries.items()
    }


def _fields(entry: Entry) -> list[Any]:
    match entry:
        case FileEntry(mode, size, sha256):
            return ["file", mode, size, sha256]
        case DirEntry(mode):
            return ["dir", mode]
        case LinkEntry(target):
            return ["link", target]
