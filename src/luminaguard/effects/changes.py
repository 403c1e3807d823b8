"""Entries of a workspace, changes between two states of it, and their canonical digest.

A path is a string relative to the workspace, with ``/`` between components and bytes that are not
UTF-8 as surrogate escapes (PEP 383), so every name that Linux allows has exactly one spelling.

The digest is SHA-256 over a length-prefixed encoding of every field: two changesets have the same
digest only if they do the same to the same base. It is the one value that goes from the card
through the decision to the receipt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from luminaguard.errors import ChangesetRefused

__all__ = [
    "RESERVED_PREFIX",
    "Change",
    "Changeset",
    "DirEntry",
    "Entry",
    "FileEntry",
    "Kind",
    "LinkEntry",
    "Manifest",
    "check_path",
]

Kind = Literal["create", "modify", "delete", "mode", "symlink"]
RESERVED_PREFIX = ".luminaguard-req-"
"""Names at the top of a workspace that publishing uses itself."""

_MAX_PATH, _MAX_NAME, _MAX_DEPTH = 4095, 255, 200
_DOMAIN = b"luminaguard changeset 1\0"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A regular file: permission bits, size in bytes, SHA-256 of the content in hex."""

    mode: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class DirEntry:
    """A folder: permission bits."""

    mode: int


@dataclass(frozen=True, slots=True)
class LinkEntry:
    """A symbolic link: where it points, uninterpreted."""

    target: str


Entry = FileEntry | DirEntry | LinkEntry
Manifest = Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Change:
    """One path before and after; None where there is nothing."""

    path: str
    before: Entry | None
    after: Entry | None

    @property
    def kind(self) -> Kind:
        """The word that people see for it."""
        if self.after is None:
            return "delete"
        if isinstance(self.after, LinkEntry):
            return "symlink"
        if self.before is None:
            return "create"
        if type(self.before) is type(self.after) and _content(self.before) == _content(self.after):
            return "mode"
        return "modify"


@dataclass(frozen=True)
class Changeset:
    """Changes in the byte order of their paths, each path once."""

    changes: tuple[Change, ...]

    @classmethod
    def of(cls, changes: Iterable[Change]) -> Changeset:
        """Sort and check.

        Raises:
            ChangesetRefused: a path is malformed or occurs twice, or a change changes nothing.
        """
        ordered = tuple(sorted(changes, key=lambda change: encode(change.path)))
        for index, change in enumerate(ordered):
            check_path(change.path)
            if index and ordered[index - 1].path == change.path:
                raise _refused(change.path, "occurs twice")
            if change.before == change.after:
                raise _refused(change.path, "is not changed at all")
        return cls(ordered)

    def __len__(self) -> int:
        return len(self.changes)

    @property
    def contents(self) -> frozenset[str]:
        """SHA-256 of each content that there is afterwards."""
        return frozenset(change.after.sha256 for change in self.changes if isinstance(change.after, FileEntry))

    @cached_property
    def digest(self) -> str:
        """``sha256:`` and 64 hex digits."""
        digest = hashlib.sha256(_DOMAIN)
        for change in self.changes:
            for field in (encode(change.path), _canonical(change.before), _canonical(change.after)):
                digest.update(len(field).to_bytes(8, "big") + field)
        return f"sha256:{digest.hexdigest()}"

    @cached_property
    def renames(self) -> Mapping[str, str]:
        """New path to old path, where a file was deleted and one with the same content created."""
        gone: dict[tuple[str, int], list[str]] = {}
        for change in self.changes:
            if isinstance(change.before, FileEntry) and change.after is None and change.before.size:
                gone.setdefault((change.before.sha256, change.before.mode), []).append(change.path)
        found = {}
        for change in self.changes:
            if isinstance(change.after, FileEntry) and change.before is None:
                candidates = gone.get((change.after.sha256, change.after.mode))
                if candidates:
                    found[change.path] = candidates.pop(0)
        return found

    def needed_with(self, path: str) -> frozenset[str]:
        """The other changes without which the one of a path cannot be made: folders made for it, what a folder held.

        Raises:
            ChangesetRefused: nothing changes at this path.
        """
        by_path = self._by_path
        if path not in by_path:
            raise _refused(path, "is not one of the changes")
        change, needed = by_path[path], set()
        if change.after is not None:
            parent = path
            while "/" in parent:
                parent = parent.rpartition("/")[0]
                above = by_path.get(parent)
                if above and isinstance(above.after, DirEntry) and not isinstance(above.before, DirEntry):
                    needed.add(parent)
        if isinstance(change.before, DirEntry) and not isinstance(change.after, DirEntry):
            needed |= {other for other in by_path if other.startswith(f"{path}/")}
        return frozenset(needed)

    def part(self, paths: Iterable[str]) -> Changeset:
        """The changes of these paths alone.

        Raises:
            ChangesetRefused: a path is not changed, or cannot be changed without another one, which is named.
        """
        chosen = set(paths)
        if not chosen:
            raise ChangesetRefused("A part of nothing was chosen.", hint="Name a path, or deny all of it.")
        for path in sorted(chosen):
            if missing := self.needed_with(path) - chosen:
                raise ChangesetRefused(
                    f"{path!a} cannot be changed without {min(missing)!a}.",
                    hint=f"Choose it, too ({len(missing)} such), or leave this one out.",
                )
        return Changeset(tuple(change for change in self.changes if change.path in chosen))

    def then(self, later: Changeset) -> Changeset:
        """Both as one: what this one did to its base, and ``later`` to the outcome of this one.

        Raises:
            ChangesetRefused: ``later`` was made on another state than this one leads to.
        """
        mine, joined = self._by_path, dict(self._by_path)
        for change in later.changes:
            before = mine.get(change.path)
            if before is not None and before.after != change.before:
                raise _refused(change.path, "was changed on another state than this")
            first = change.before if before is None else before.before
            joined[change.path] = Change(change.path, first, change.after)
        return Changeset.of(change for change in joined.values() if change.before != change.after)

    def since(self, earlier: Changeset) -> Changeset:
        """What leads from the outcome of ``earlier`` to the outcome of this one; both are of the same base.

        Raises:
            ChangesetRefused: they are not of the same base.
        """
        found = []
        for path in self._by_path.keys() | earlier._by_path.keys():
            mine, other = self._by_path.get(path), earlier._by_path.get(path)
            if mine is not None and other is not None and mine.before != other.before:
                raise _refused(path, "was changed on another base than this")
            first = (mine or other).before  # type: ignore[union-attr]  # it is in one of the two
            found.append(Change(path, other.after if other else first, mine.after if mine else first))
        return Changeset.of(change for change in found if change.before != change.after)

    def applied_to(self, base: Manifest) -> dict[str, Entry]:
        """The entries of a state after these changes.

        Raises:
            ChangesetRefused: they were not made on this state.
        """
        entries = dict(base)
        for change in self.changes:
            if entries.get(change.path) != change.before:
                raise _refused(change.path, "was changed on another state than this")
            if change.after is None:
                del entries[change.path]
            else:
                entries[change.path] = change.after
        return entries

    def touches(self, path: str) -> bool:
        """Whether a path, something below it, or a folder above it changes."""
        return any(path == other or other.startswith(f"{path}/") or path.startswith(f"{other}/")
                   for other in self._by_path) or (not path and bool(self))  # fmt: skip

    @cached_property
    def _by_path(self) -> Mapping[str, Change]:
        return {change.path: change for change in self.changes}

    def to_json(self) -> list[dict[str, Any]]:
        """One object a change, for storage and for people's programs."""
        rows = []
        for change in self.changes:
            row: dict[str, Any] = {"path": change.path, "kind": change.kind,
                                   "before": _to_json(change.before), "after": _to_json(change.after)}  # fmt: skip
            if change.path in self.renames:
                row["renamed_from"] = self.renames[change.path]
            rows.append(row)
        return rows

    @classmethod
    def from_json(cls, rows: Any) -> Changeset:
        """The inverse of :meth:`to_json`; raises ChangesetRefused when it is not one."""
        try:
            return cls.of(Change(str(r["path"]), _from_json(r["before"]), _from_json(r["after"])) for r in rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ChangesetRefused(
                f"A stored changeset cannot be read: {error!r}.",
                hint="The database was damaged or edited; run the command again.",
            ) from error

    def blobs(self) -> dict[str, int]:
        """SHA-256 and size of every content that publishing writes."""
        return {
            change.after.sha256: change.after.size
            for change in self.changes
            if isinstance(change.after, FileEntry)
            and not (isinstance(change.before, FileEntry) and change.before.sha256 == change.after.sha256)
        }


def encode(path: str) -> bytes:
    """The bytes of a path as the file system has them."""
    return path.encode("utf-8", "surrogateescape")


def check_path(path: str) -> None:
    """Refuse a path that could mean anything outside of the workspace.

    Raises:
        ChangesetRefused: it is empty, absolute, too long, contains ``.``, ``..``, an empty
            component or a NUL, is not encodable, or is reserved for publishing.
    """
    try:
        raw = encode(path)
    except UnicodeEncodeError:
        raise _refused(path, "cannot be a file name") from None
    components = raw.split(b"/")
    if len(components) > _MAX_DEPTH:
        raise _refused(path, f"is nested deeper than {_MAX_DEPTH} folders")
    if len(raw) > _MAX_PATH or any(len(component) > _MAX_NAME for component in components):
        raise _refused(path, "is too long")
    if b"\0" in raw or any(component in {b"", b".", b".."} for component in components):
        raise _refused(path, "does not stay in the workspace")
    if path.startswith(RESERVED_PREFIX):
        raise _refused(path, f"starts with {RESERVED_PREFIX}, which publishing uses itself")


def _content(entry: Entry) -> object:
    return (entry.sha256, entry.size) if isinstance(entry, FileEntry) else None


def _canonical(entry: Entry | None) -> bytes:
    match entry:
        case None:
            return b"-"
        case FileEntry(mode, size, sha256):
            return f"f {mode:o} {size} {sha256}".encode("ascii")
        case DirEntry(mode):
            return f"d {mode:o}".encode("ascii")
        case LinkEntry(target):
            return b"l " + encode(target)


def _to_json(entry: Entry | None) -> dict[str, Any] | None:
    match entry:
        case None:
            return None
        case FileEntry(mode, size, sha256):
            return {"type": "file", "mode": f"{mode:04o}", "size": size, "sha256": sha256}
        case DirEntry(mode):
            return {"type": "dir", "mode": f"{mode:04o}"}
        case LinkEntry(target):
            return {"type": "symlink", "target": target}


def _from_json(raw: Any) -> Entry | None:
    if raw is None:
        return None
    match raw["type"]:
        case "file":
            sha256 = str(raw["sha256"])
            if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
                raise ValueError("not a SHA-256")
            return FileEntry(_mode(raw["mode"]), int(raw["size"]), sha256)
        case "dir":
            return DirEntry(_mode(raw["mode"]))
        case "symlink":
            return LinkEntry(str(raw["target"]))
        case other:
            raise ValueError(f"unknown type {other!r}")


def _mode(text: Any) -> int:
    mode = int(str(text), 8)
    if mode & ~0o777:
        raise ValueError("mode has more than permission bits")
    return mode


def _refused(path: str, why: str) -> ChangesetRefused:
    shown = ascii(path[:200])
    return ChangesetRefused(
        f"The change of {shown} is refused: the path {why}.",
        hint="Treat what ran in the machine as hostile, or rename the file there.",
        kept="The workspace was not touched.",
    )
