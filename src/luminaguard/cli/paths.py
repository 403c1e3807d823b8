"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from luminaguard.errors import WorkspaceError

__all__ = ["absolute"]


def absolute(path: Path) -> Path:
    """The absolute path of a workspace; raises WorkspaceError."""
    # Links above the folder are the user's own; whether the folder itself is one is checked later.
    try:
        return _resolved(path)
    except (OSError, RuntimeError) as error:
        raise WorkspaceError(
            f"The workspace {str(path)!a} cannot be found: {error}.", hint="Check the path after --workspace."
        ) from error


def _resolved(path: Path) -> Path:
    whole = path.absolute()
    # Strict: Python 3.13 takes a loop of links for a path like any other.
    if whole.name in {"", ".."}:
        return whole.resolve(strict=True)
    return whole.parent.resolve(strict=True) / whole.name
