"""What an action did: entries, changes, changesets with one digest, and the card that shows them.

Pure: no I/O, no clock, no random numbers.
"""

from luminaguard.effects.changes import (
    Change,
    Changeset,
    DirEntry,
    Entry,
    FileEntry,
    LinkEntry,
    Manifest,
    check_path,
)

__all__ = [
    "Change",
    "Changeset",
    "DirEntry",
    "Entry",
    "FileEntry",
    "LinkEntry",
    "Manifest",
    "check_path",
]
