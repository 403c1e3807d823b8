"""Which deleted file a created one was, although it was edited on the way: a help for reading a card.

Nothing is decided by it: a changeset holds both changes, and publishing does both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from luminaguard.effects.changes import Change, Changeset, FileEntry

__all__ = ["edited_renames"]

_ALIKE = 0.5
"""The share of bytes, in whole lines, that both have: git's measure, and its threshold (git-diff(1), -M)."""
_MAX_FILES = 100
_MAX_SIZE = 256 << 10
Contents = Callable[[str], bytes | None]


def edited_renames(changeset: Changeset, before: Contents, after: Contents) -> Mapping[str, str]:
    """New path to old path of files that are alike; those that are equal are in ``changeset.renames``."""
    taken = set(changeset.renames.values())
    gone = {change.path: change.before for change in _files(changeset, created=False) if change.path not in taken}
    new = {change.path: change.after for change in _files(changeset, created=True)
           if change.path not in changeset.renames}  # fmt: skip
    if not gone or not new or len(gone) > _MAX_FILES or len(new) > _MAX_FILES:
        return {}
    old_lines = {path: _lines(entry, before) for path, entry in gone.items()}
    pairs = sorted(
        ((alike, path, old) for path, entry in new.items() if (lines := _lines(entry, after))
         for old, others in old_lines.items() if (alike := _alike(lines, others)) >= _ALIKE),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )  # fmt: skip
    found: dict[str, str] = {}
    for _, path, old in pairs:
        if path not in found and old not in found.values():
            found[path] = old
    return found


def _files(changeset: Changeset, *, created: bool) -> Iterator[Change]:
    for change in changeset.changes:
        there, missing = (change.after, change.before) if created else (change.before, change.after)
        if missing is None and isinstance(there, FileEntry) and 0 < there.size <= _MAX_SIZE:
            yield change


def _lines(entry: object, contents: Contents) -> Counter[bytes]:
    data = contents(entry.sha256) if isinstance(entry, FileEntry) else None
    return Counter() if data is None or b"\0" in data else Counter(data.splitlines(keepends=True))


def _alike(a: Counter[bytes], b: Counter[bytes]) -> float:
    size = max(_size(a), _size(b))
    return _size(a & b) / size if size else 0.0


def _size(lines: Counter[bytes]) -> int:
    return sum(len(line) * count for line, count in lines.items())
