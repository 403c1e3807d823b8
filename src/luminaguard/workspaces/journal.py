"""The journal of one publish: what is about to be done, written before it is done.

A journal is a file in the state folder. Its phases:

    staging    new contents are being written beside the workspace's files; nothing is visible
    applying   everything is staged; entries are being moved into place
    committed  everything is in place; only cleaning up is left
    undone     everything was put back; only cleaning up is left

A crash in the first two is undone, in the others cleaned up. The journal itself is removed only
after the database knows how the publish ended, so the two never disagree about it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luminaguard.effects.changes import Changeset
from luminaguard.errors import PublishError, StorageError
from luminaguard.workspaces.opening import sync_folder

__all__ = ["Journal", "Phase"]

Phase = Literal["staging", "applying", "committed", "undone"]
_PHASES = ("staging", "applying", "committed", "undone")
_MAX = 256 << 20


@dataclass(slots=True)
class Journal:
    """One journal file.

    Attributes:
        request_id: which request is published; names the staging folder too.
        inodes: inode of each staged entry by its number, known from ``applying`` on. It tells
            after a crash whether an entry has been moved into place.
    """

    path: Path
    request_id: str
    workspace: str
    inode: int
    changeset: Changeset
    phase: Phase
    inodes: dict[int, int]

    @property
    def staging(self) -> str:
        """Name of the staging folder at the top of the workspace."""
        return f".luminaguard-{self.request_id}"

    def write(self, phase: Phase) -> None:
        """Move to a phase, durably: when this returns, a crash finds this phase.

        Raises:
            PublishError: it would be longer than :meth:`load` reads.
        """
        self.phase = phase
        fields = {
            "format": 1, "request": self.request_id, "workspace": self.workspace, "inode": self.inode,
            "phase": phase, "inodes": self.inodes, "changes": self.changeset.to_json(),
        }  # fmt: skip
        text = json.dumps(fields)
        if len(text) > _MAX:
            raise PublishError(
                f"The changes are too many to be published at once: their journal would have {len(text):,} bytes.",
                hint="Let the command change fewer files at a time.",
            )
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        sync_folder(self.path.parent)

    def remove(self) -> None:
        """The publish has ended, one way or the other, and the database knows it."""
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Read a journal.

        Raises:
            StorageError: it is damaged; it is kept for a person to look at.
        """
        try:
            with path.open(encoding="ascii") as file:
                raw: dict[str, Any] = json.loads(file.read(_MAX))
            if raw["format"] != 1 or raw["phase"] not in _PHASES:
                raise ValueError("unknown format or phase")
            return cls(
                path, str(raw["request"]), str(raw["workspace"]), int(raw["inode"]),
                Changeset.from_json(raw["changes"]), raw["phase"],
                {int(number): int(inode) for number, inode in raw["inodes"].items()},
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"The publish journal {path} cannot be read: {error}.",
                hint="A publish was interrupted. Compare the workspace with your backup, then move the journal away.",
                kept="The journal and the staged files beside the workspace were kept.",
            ) from error
