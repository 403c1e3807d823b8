"""Keep LuminaGuard's own folders out of every machine, and every change out of them.

A workspace may be a folder in which they lie, such as a home folder. Then they do not go in (keys stay
on the host), and a change that names them is refused: who can write the settings, the keys or the
database has all approvals.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from luminaguard.effects.changes import Changeset
from luminaguard.errors import ChangesetRefused, WorkspaceError

__all__ = ["own_paths", "refuse_changes"]


def own_paths(workspace: Path, folders: Iterable[Path]) -> frozenset[str]:
    """Those of our folders that lie in the workspace, relative to it.

    Raises:
        WorkspaceError: the workspace itself is one of them, or lies in one.
    """
    root = os.path.realpath(workspace)
    found = set()
    for folder in folders:
        real = os.path.realpath(folder)
        if os.path.commonpath([root, real]) == real:
            raise WorkspaceError(
                f"The workspace {ascii(root)[1:-1]} belongs to LuminaGuard itself.",
                hint="Name a folder of yours; keys and decisions must not go into a machine.",
            )
        if os.path.commonpath([root, real]) == root:
            found.add(os.path.relpath(real, root))
    return frozenset(found)


def refuse_changes(changeset: Changeset, own: frozenset[str]) -> None:
    """Raise ChangesetRefused if a change is in one of our folders, or would replace what leads to one."""
    for change in changeset.changes:
        for folder in own:
            inside = change.path == folder or change.path.startswith(f"{folder}/")
            above = folder.startswith(f"{change.path}/")  # it is there, so this is no creation
            if inside or above:
                raise ChangesetRefused(
                    f"The command changed {change.path!a}, which belongs to LuminaGuard itself.",
                    hint="Treat what ran as hostile; or choose a workspace that does not contain these folders.",
                    kept="Nothing was published.",
                )
