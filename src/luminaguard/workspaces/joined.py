"""Several folders in one machine: one is the working folder, the others lie in it; what changed is told apart again."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from luminaguard.effects.changes import Change, Changeset, DirEntry, FileEntry
from luminaguard.errors import ChangesetRefused, WorkspaceError
from luminaguard.workspaces.squash import HostFolder
from luminaguard.workspaces.state import WorkspaceState

__all__ = ["HostFolders", "join", "split"]


def join(top: WorkspaceState, beside: Mapping[str, WorkspaceState]) -> WorkspaceState:
    """One state of all: that of the working folder, with the other folders in it.

    Args:
        top: of the working folder.
        beside: of the others, by the name that each has in it.

    Raises:
        WorkspaceError: the working folder has something of such a name, or a folder lies in another one.
    """
    if not beside:
        return top
    real = sorted((Path(os.path.realpath(state.path)) for state in (top, *beside.values())), key=lambda one: one.parts)
    for one, later in itertools.pairwise(real):
        if later.is_relative_to(one):
            raise WorkspaceError(
                f"{ascii(str(later))[1:-1]} is given twice, or lies in another one of the folders.",
                hint="What changes there would be asked for twice: give it once.",
            )
    whole = replace(top, entries=dict(top.entries), times=dict(top.times), links=dict(top.links), parts=dict(beside))
    for name, state in beside.items():
        if name in top.entries:
            raise WorkspaceError(
                f"{ascii(str(top.path))[1:-1]} has {name!a}, where {ascii(str(state.path))[1:-1]} would lie.",
                hint="Give that folder another name.",
            )
        whole.entries[name], whole.times[name] = DirEntry(state.mode | 0o700), 0
        for path, entry in state.entries.items():
            whole.entries[f"{name}/{path}"] = entry
            whole.times[f"{name}/{path}"] = state.times[path]
        whole.links |= {f"{name}/{path}": f"{name}/{first}" for path, first in state.links.items()}
        whole.size += state.size
        whole.ignored += state.ignored
    return whole


def split(changeset: Changeset, names: Mapping[str, object]) -> dict[str, Changeset]:
    """What changed in each folder, with paths of its own; "" is the working folder.

    Raises:
        ChangesetRefused: one of the folders was removed or replaced.
    """
    found: dict[str, list[Change]] = {"": [], **{name: [] for name in names}}
    for change in changeset.changes:
        first, _, rest = change.path.partition("/")
        if first not in names:
            found[""].append(change)
        elif rest:
            found[first].append(replace(change, path=rest))
        elif not isinstance(change.after, DirEntry):
            raise ChangesetRefused(
                f"The folder {first!a} itself was removed or replaced.",
                hint="A machine may change what is in a folder that it was given, not the folder.",
                kept="Nothing was published.",
            )
    return {name: Changeset.of(changes) for name, changes in found.items()}


class HostFolders:
    """The folders that a state was joined of, as long as they still are those."""

    def __init__(self, state: WorkspaceState) -> None:
        self._opened: dict[str, HostFolder] = {}
        try:
            self._opened[""] = HostFolder(state)
            for name, part in state.parts.items():
                self._opened[name] = HostFolder(part)
        except BaseException:
            self.close()
            raise

    def open(self, path: str, entry: FileEntry) -> int:
        """A descriptor of a file's content."""
        first, _, rest = path.partition("/")
        if rest and first in self._opened:
            return self._opened[first].open(rest, entry)
        return self._opened[""].open(path, entry)

    def close(self) -> None:
        """Let go of the folders."""
        for folder in self._opened.values():
            folder.close()
