"""Read base contents for a card: from the host's files, as long as they still are the base."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from luminaguard.effects.changes import Changeset, FileEntry
from luminaguard.errors import WorkspaceError
from luminaguard.workspaces.opening import open_root, parent_of

__all__ = ["base_contents"]


@contextmanager
def base_contents(workspace: Path, changeset: Changeset, limit: int) -> Iterator[Callable[[str], bytes | None]]:
    """A reader of base contents by SHA-256; None for what is gone, changed, or over ``limit`` bytes."""
    paths = {c.before.sha256: c.path for c in changeset.changes if isinstance(c.before, FileEntry)}
    try:
        root = open_root(workspace)
    except WorkspaceError:
        yield lambda _: None
        return

    def read(sha256: str) -> bytes | None:
        try:
            with parent_of(root, paths[sha256]) as (parent, name):
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except (OSError, KeyError):
            return None
        with os.fdopen(fd, "rb") as file:
            data = file.read(limit + 1)
        return data if len(data) <= limit and hashlib.sha256(data).hexdigest() == sha256 else None

    try:
        yield read
    finally:
        os.close(root)
