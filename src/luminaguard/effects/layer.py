"""From what the guest observed in its overlay's upper layer to a changeset against the base.

The guest only reports; what is a change is decided here, from a base that the host made itself. A
file that was opened for writing and not changed is copied up by the overlay and is no change.
Semantics: Documentation/filesystems/overlayfs.rst (whiteouts, opaque folders).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from luminaguard.effects.changes import (
    Change,
    Changeset,
    DirEntry,
    Entry,
    FileEntry,
    LinkEntry,
    Manifest,
    check_path,
    encode,
)
from luminaguard.errors import ChangesetRefused

__all__ = ["Observed", "changeset_from_layer"]

_MAX_TARGET = 4095


@dataclass(frozen=True, slots=True)
class Observed:
    """One entry of the upper layer, with the SHA-256 of what really arrived for a file."""

    path: str
    kind: str
    mode: int = 0
    size: int = 0
    target: str = ""
    opaque: bool = False
    sha256: str = ""


def changeset_from_layer(base: Manifest, layer: Iterable[Observed]) -> Changeset:
    """Apply a layer to its base and return what differs.

    Args:
        base: all entries of the base state by path (the root itself is not one of them).
        layer: entries with parents before their children.

    Raises:
        ChangesetRefused: a path escapes, an entry is no file, folder or link, a parent is no folder,
            or a file has a set-id bit.
    """
    children = _children(base)
    after: dict[str, Entry | None] = {}

    def now(path: str) -> Entry | None:
        return after[path] if path in after else base.get(path)

    def remove(path: str) -> None:
        stack = [path]
        while stack:
            gone = stack.pop()
            after[gone] = None
            stack.extend(children.get(gone, ()))

    seen: set[str] = set()
    for entry in layer:
        check_path(entry.path)
        if entry.path in seen:
            raise _refused(entry, "it was reported twice")
        seen.add(entry.path)
        parent, slash, _ = entry.path.rpartition("/")
        if slash and not isinstance(now(parent), DirEntry):
            raise _refused(entry, "it is inside something that is no folder")
        existing = now(entry.path)
        if entry.kind == "whiteout" or entry.opaque or (isinstance(existing, DirEntry) and entry.kind != "dir"):
            remove(entry.path)
        if entry.kind != "whiteout":
            after[entry.path] = _entry(entry)
    return Changeset.of(Change(path, base.get(path), entry) for path, entry in after.items() if base.get(path) != entry)


def _entry(seen: Observed) -> Entry:
    match seen.kind:
        case "file":
            if seen.mode & 0o6000:
                raise _refused(seen, "it has a set-user-id or set-group-id bit")
            return FileEntry(seen.mode & 0o777, seen.size, seen.sha256)
        case "dir":
            return DirEntry(seen.mode & 0o777)
        case "symlink":
            try:
                target = encode(seen.target)
            except UnicodeEncodeError:
                target = b""
            if not target or b"\0" in target or len(target) > _MAX_TARGET:
                raise _refused(seen, "its target cannot be one")
            return LinkEntry(seen.target)
        case _:
            raise _refused(seen, "it is a device, a socket or a pipe")


def _children(base: Manifest) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in base:
        parent, slash, _ = path.rpartition("/")
        if slash:
            found.setdefault(parent, []).append(path)
    return found


def _refused(entry: Observed, why: str) -> ChangesetRefused:
    return ChangesetRefused(
        f"{entry.path[:200]!a} cannot be published: {why}.",
        hint="Remove it inside the machine, as the last step of the command.",
        kept="The workspace was not touched.",
    )
