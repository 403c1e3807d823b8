"""Publish a changeset to the user's folder: all of it, or nothing, across any crash.

Rules:

1. The base is checked first: each path must be on the host exactly what the card said it was.
2. New contents are staged in a private folder on the same file system, hashed as they are written,
   and the digest of what was staged must be the digest that was decided.
3. Entries move by one rename each: created ones never replace anything (RENAMENOREPLACE), changed
   ones are exchanged (RENAMEEXCHANGE) and what came out is compared with the base once more.
   So a file that someone else wrote in between is put back, not lost.
4. Every path is walked by descriptor without following links; nothing outside is ever opened.
5. The journal says how far it came; :func:`recover` undoes or finishes what a crash interrupted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luminaguard.effects.changes import (
    Changeset,
    DirEntry,
    FileEntry,
)
from luminaguard.errors import (
    Conflict,
    LuminaGuardError,
    PublishError,
    WorkspaceError,
)
from luminaguard.workspaces.apply import Step, Work, conflict, unknown
from luminaguard.workspaces.blobs import BlobStore
from luminaguard.workspaces.journal import Journal
from luminaguard.workspaces.locks import Busy, locked
from luminaguard.workspaces.opening import entry_at, open_root, parent_of
from luminaguard.workspaces.renames import something_at

__all__ = ["Publisher", "Step"]


class Publisher:
    """Publishes into workspaces; keeps journals and locks in the state folder.

    Args:
        data: the folder of the journals.
        blobs: what is published.
        state: the folder of the lock, if it is another one.
    """

    def __init__(self, data: Path, blobs: BlobStore, state: Path | None = None) -> None:
        self._journals = data / "journal"
        self._lock = (state or data) / "publish.lock"
        self._blobs = blobs

    @contextmanager
    def lock(self, workspace: str, *, wait_s: float = 0) -> Iterator[None]:
        """Only one process publishes into a workspace at a time.

        Raises:
            PublishError: another one does, and goes on for ``wait_s`` seconds.
        """
        try:
            with locked(self._lock, workspace, wait_s=wait_s):
                yield
        except Busy:
            raise PublishError(
                f"Another process is publishing into {workspace}.", hint="Run the command again in a moment."
            ) from None

    def check(self, workspace: str, inode: int, changeset: Changeset) -> None:
        """Raise Conflict unless the workspace is still the base of the changeset."""
        root = self._root(workspace, inode)
        try:
            self._check_base(root, changeset)
        finally:
            os.close(root)

    def publish(
        self,
        request_id: str,
        workspace: str,
        inode: int,
        changeset: Changeset,
        step: Step = lambda _: None,
    ) -> None:
        """Publish; the caller holds :meth:`lock`, has claimed the request, and calls :meth:`close` after it.

        Raises:
            Conflict: the folder is not the base any more; nothing was changed.
            PublishError: it cannot be done (disk full, file system without the renames); undone.
            OutcomeUnknown: it failed and could not be undone completely; it says what is left.
        """
        root = self._root(workspace, inode)
        try:
            journal = Journal(self._journals / f"{request_id}.json", request_id, workspace, inode, changeset,
                              "staging", {})  # fmt: skip
            self._check_base(root, changeset)
            work = Work(root, journal, step)
            try:
                step("journal staging")
                journal.write("staging")
                work.stage(lambda sha256: self._blobs.open(request_id, sha256))
                step("journal applying")
                journal.write("applying")
                work.apply()
                step("journal committed")
                journal.write("committed")
            except (OSError, LuminaGuardError) as error:
                try:
                    work.undo()
                except OSError as second:
                    raise unknown(journal, str(second)) from error
                raise _failure(error) from error
            work.clean_up()
        finally:
            os.close(root)

    def close(self, request_id: str) -> None:
        """Forget the journal of a publish whose end has been recorded."""
        (self._journals / f"{request_id}.json").unlink(missing_ok=True)

    def set_aside(self, request_id: str) -> Path | None:
        """Keep the journal for a person, where it is not in the way any more; its path, None if there is none."""
        journal = self._journals / f"{request_id}.json"
        aside = journal.with_suffix(".closed")
        try:
            journal.replace(aside)
        except FileNotFoundError:
            return None
        return aside

    def interrupted(self) -> list[Path]:
        """Journals of publishes that have not ended."""
        return sorted(self._journals.glob("*.json")) if self._journals.is_dir() else []

    def recover(self, path: Path) -> tuple[str, bool]:
        """Undo or finish one interrupted publish; the caller holds the lock and calls :meth:`close` after it.

        Returns:
            The request's id, and whether its changes are in the workspace.

        Raises:
            OutcomeUnknown: it could not be undone completely; the journal is kept.
            StorageError: the journal is damaged; it is kept.
        """
        journal = Journal.load(path)
        try:
            root = self._root(journal.workspace, journal.inode)
        except (Conflict, WorkspaceError) as error:
            raise unknown(journal, "the workspace is gone or was replaced") from error
        try:
            work = Work(root, journal, lambda _: None)
            if journal.phase == "committed":
                work.clean_up()
                return journal.request_id, True
            work.undo()
            return journal.request_id, False
        finally:
            os.close(root)

    @staticmethod
    def _root(workspace: str, inode: int) -> int:
        # Not the device: its number may be another one after each boot, and the base is compared anyway.
        root = open_root(Path(workspace))
        if os.fstat(root).st_ino != inode:
            os.close(root)
            raise conflict(f"{workspace} is another folder than the one that the command ran on")
        return root

    @staticmethod
    def _check_base(root: int, changeset: Changeset) -> None:
        try:
            Publisher._compare_base(root, changeset)
        except OSError as error:
            raise conflict(f"the folder cannot be compared with what the command saw ({error})") from error

    @staticmethod
    def _compare_base(root: int, changeset: Changeset) -> None:
        for change in changeset.changes:
            if entry_at(root, change.path) != change.before or (
                change.before is None and something_at(root, change.path)
            ):
                raise conflict(f"{change.path!a} was changed on the host since the command ran")
            if change.kind == "mode" and isinstance(change.before, FileEntry):
                _refuse_other_names(root, change.path)
        gone = {c.path for c in changeset.changes if c.after is None or not isinstance(c.after, DirEntry)}
        for change in changeset.changes:
            if isinstance(change.before, DirEntry) and change.path in gone:
                with parent_of(root, change.path) as (parent, name):
                    fd = os.open(
                        name,
                        os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                        dir_fd=parent,
                    )
                    try:
                        left = [n for n in os.listdir(fd) if f"{change.path}/{n}" not in gone]
                    finally:
                        os.close(fd)
                if left:
                    raise conflict(f"the folder {change.path!a} has contents that the command did not see")


def _refuse_other_names(root: int, path: str) -> None:
    """A mode belongs to a file, not to its name: other names of it, wherever they are, would get it, too."""
    with parent_of(root, path) as (parent, name):
        count = os.stat(name, dir_fd=parent, follow_symlinks=False).st_nlink
    if count > 1:
        raise PublishError(
            f"The mode of {path!a} cannot be published: the file has {count} names (hard links), and all would get it.",
            hint="Give it a copy of its own first (cp FILE COPY; mv COPY FILE), then run the command again.",
        )


def _failure(error: OSError | LuminaGuardError) -> LuminaGuardError:
    if isinstance(error, LuminaGuardError):
        return error
    if error.errno == errno.ENOSPC:
        why, hint = "the disk is full", "Free some space and run the command again."
    elif error.errno == errno.EINVAL:
        why = "the file system cannot exchange or protect names atomically"
        hint = "Move the folder to ext4, xfs, btrfs or tmpfs."
    elif error.errno == errno.EXDEV:
        why, hint = (
            "another file system is mounted inside",
            "Publish into a folder without mounts in it.",
        )
    else:
        why, hint = str(error), "Check the owner and modes of the folder and run the command again."
    return PublishError(f"Publishing failed: {why}.", hint=hint, kept="Everything was put back as it was.")
