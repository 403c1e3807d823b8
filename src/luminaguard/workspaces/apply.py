"""One publish on an open workspace: stage the new entries, move them into place, or put all back.

Every step that changes something is told before it is taken, and each can be found half done by
:meth:`Work.undo`, which looks at what is there and trusts no memory of what was meant.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from luminaguard.effects.changes import Change, Changeset, DirEntry, Entry, FileEntry, LinkEntry, encode
from luminaguard.errors import Conflict, OutcomeUnknown, PublishError
from luminaguard.workspaces.journal import Journal
from luminaguard.workspaces.opening import entry_at, entry_in, open_folder, parent_of
from luminaguard.workspaces.renames import (
    EXCHANGE,
    NOREPLACE,
    copy_file,
    inode_of,
    listing,
    remove_tree,
    rename,
)

__all__ = ["Step", "Work", "conflict", "unknown"]

Step = Callable[[str], None]
"""Told before each step that changes something; tests interrupt there."""


class Work:
    """One publish on an open workspace. Numbers name the changes; staged entries are ``new-N``."""

    def __init__(self, root: int, journal: Journal, step: Step) -> None:
        self._root = root
        self._journal = journal
        self._step = step
        self._changes = list(enumerate(journal.changeset.changes))

    # -- staging --------------------------------------------------------------------------------

    def stage(self, blob: Callable[[str], int]) -> None:
        """Create everything new in the staging folder and check that it is what was decided."""
        self._step("staging folder")
        os.mkdir(self._journal.staging, 0o700, dir_fd=self._root)
        staged: list[Change] = []
        with self._staging() as folder:
            for number, change in self._changes:
                after = change.after
                if after is not None and _is_moved(change):
                    self._step(f"stage {change.path}")
                    after = self._stage_one(folder, number, change, after, blob)
                staged.append(Change(change.path, change.before, after))
            if Changeset.of(staged).digest != self._journal.changeset.digest:
                raise PublishError(
                    "What was staged for publishing is not what was approved.",
                    hint="A stored content was damaged or edited. Run the command again.",
                )
            os.fsync(folder)

    def _stage_one(self, folder: int, number: int, change: Change, after: Entry, blob: Callable[[str], int]) -> Entry:
        name = f"new-{number}"
        entry: Entry = after
        match after:
            case FileEntry(mode, _, sha256):
                source = blob(sha256) if not _same_content(change) else self._open_before(change)
                try:
                    entry = copy_file(source, folder, name, mode)
                finally:
                    os.close(source)
            case DirEntry(mode):
                os.mkdir(name, 0o700, dir_fd=folder)
                entry = after
            case LinkEntry(target=target):
                os.symlink(encode(target), name.encode(), dir_fd=folder)
                entry = LinkEntry(os.fsdecode(os.readlink(name.encode(), dir_fd=folder)))
        self._give_owner(folder, name, change)
        self._journal.inodes[number] = os.stat(name, dir_fd=folder, follow_symlinks=False).st_ino
        return entry

    def _open_before(self, change: Change) -> int:
        with parent_of(self._root, change.path) as (parent, name):
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)

    def _give_owner(self, folder: int, name: str, change: Change) -> None:
        """Root publishing into someone's folder must not leave root's files there."""
        if os.geteuid() != 0:
            return
        info = os.fstat(self._root)
        with contextlib.suppress(OSError), parent_of(self._root, change.path) as (parent, last):
            info = os.fstat(parent)
            with contextlib.suppress(FileNotFoundError):
                info = os.stat(last, dir_fd=parent, follow_symlinks=False)
        os.chown(name, info.st_uid, info.st_gid, dir_fd=folder, follow_symlinks=False)

    # -- applying -------------------------------------------------------------------------------

    def apply(self) -> None:
        """Move everything into place: deletions from the leaves up, creations from the root down."""
        with self._staging() as folder:
            for number, change in reversed(self._changes):
                if change.before is not None and not _is_exchanged(change) and not _is_mode_only(change):
                    self._step(f"remove {change.path}")
                    self._take_out(folder, number, change)
            for number, change in self._changes:
                if change.after is None or _is_mode_only(change):
                    continue
                self._step(f"place {change.path}")
                if _is_exchanged(change):
                    self._exchange(folder, number, change)
                else:
                    self._put_in(folder, number, change)
            # While every folder can still be opened.
            self._sync()
            # Last, from the leaves up: a mode may take away the right to write into a folder.
            for _, change in reversed(self._changes):
                if isinstance(change.after, DirEntry) or _is_mode_only(change):
                    self._step(f"mode {change.path}")
                    self._set_mode(change, change.after)

    def _take_out(self, folder: int, number: int, change: Change) -> None:
        with parent_of(self._root, change.path) as (parent, name):
            rename(parent, name, folder, b"old-%d" % number, NOREPLACE)
        if entry_in(folder, b"old-%d" % number) != change.before:
            raise conflict(f"{change.path!a} was changed while it was being published")
        if isinstance(change.before, DirEntry) and listing(folder, b"old-%d" % number):
            raise conflict(f"the folder {change.path!a} was filled while it was being removed")

    def _put_in(self, folder: int, number: int, change: Change) -> None:
        with parent_of(self._root, change.path) as (parent, name):
            try:
                rename(folder, b"new-%d" % number, parent, name, NOREPLACE)
            except FileExistsError:
                raise conflict(f"{change.path!a} appeared while it was being published") from None

    def _exchange(self, folder: int, number: int, change: Change) -> None:
        with parent_of(self._root, change.path) as (parent, name):
            rename(folder, b"new-%d" % number, parent, name, EXCHANGE)
        if entry_in(folder, b"new-%d" % number) != change.before:
            raise conflict(f"{change.path!a} was changed while it was being published")

    def _set_mode(self, change: Change, entry: Entry | None) -> None:
        assert isinstance(entry, FileEntry | DirEntry)
        kind = os.O_DIRECTORY if isinstance(entry, DirEntry) else 0
        with parent_of(self._root, change.path) as (parent, name):
            # O_PATH opens what may not be read, and /proc gives chmod a path that cannot be swapped.
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=parent)
            try:
                now = os.fstat(fd).st_mode
                if stat.S_ISDIR(now) != isinstance(entry, DirEntry) or stat.S_ISLNK(now):
                    raise conflict(f"{change.path!a} was replaced while it was being published")
                special = stat.S_IMODE(now) & 0o7000 if stat.S_ISDIR(now) else 0
                os.chmod(f"/proc/self/fd/{fd}", entry.mode | special)
            finally:
                os.close(fd)

    def _sync(self) -> None:
        for parent in {change.path.rpartition("/")[0] for _, change in self._changes}:
            # A folder that went, or became a file, has nothing to be made durable; one that may not be
            # opened is made durable by the file system in its own time.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                fd = open_folder(self._root, parent)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    # -- undoing and cleaning up ------------------------------------------------------------------

    def undo(self) -> None:
        """Bring the workspace back to the base; what each step did is read off the file system.

        Raises:
            OutcomeUnknown: someone else changed what had been published already.
        """
        if self._journal.phase == "applying":
            try:
                left = self._undo_all()
            except OSError as error:
                raise unknown(self._journal, str(error)) from error
            if left:
                raise unknown(self._journal, f"these could not be restored: {', '.join(map(ascii, left[:5]))}")
        if self._journal.phase != "undone":
            self._step("journal undone")
            self._journal.write("undone")
        self.clean_up()

    def _undo_all(self) -> list[str]:
        """Undo in the opposite order; return the paths that could not be restored."""
        left: list[str] = []
        with self._staging() as folder:
            for number, change in self._changes:
                if isinstance(change.after, DirEntry):
                    self._attempt(left, change, self._open_up, number, change)
            for number, change in reversed(self._changes):
                if change.after is not None and not _is_mode_only(change):
                    self._attempt(left, change, self._undo_place, folder, number, change)
            for number, change in self._changes:
                if change.before is not None and not _is_exchanged(change):
                    self._attempt(left, change, self._undo_removal, folder, number, change)
            for _, change in reversed(self._changes):
                if _is_mode_only(change):
                    self._attempt(left, change, self._undo_mode, change)
        self._sync()
        return left

    def _open_up(self, number: int, change: Change) -> bool:
        """A folder that may have got its final mode must be writable to take things out of it."""
        if _is_mode_only(change):
            if isinstance(entry_at(self._root, change.path), DirEntry):
                self._set_mode(change, DirEntry(0o700))
            return True
        with (
            contextlib.suppress(FileNotFoundError),
            parent_of(self._root, change.path) as (parent, name),
        ):
            if inode_of(parent, name) == self._journal.inodes.get(number):
                self._set_mode(change, DirEntry(0o700))
        return True

    @staticmethod
    def _attempt(left: list[str], change: Change, action: Callable[..., bool], *arguments: object) -> None:
        try:
            restored = action(*arguments)
        except (OSError, Conflict):
            restored = False
        if not restored and change.path not in left:
            left.append(change.path)

    def _undo_mode(self, change: Change) -> bool:
        if isinstance(entry_at(self._root, change.path), type(change.before)):
            self._set_mode(change, change.before)
        return True

    def _undo_place(self, folder: int, number: int, change: Change) -> bool:
        staged, inode = b"new-%d" % number, self._journal.inodes.get(number)
        if inode_of(folder, staged) == inode:
            return True  # it never left
        with parent_of(self._root, change.path) as (parent, name):
            if inode_of(parent, name) != inode:
                return False  # what was published has been replaced by someone
            if isinstance(change.after, DirEntry):
                if listing(parent, name):
                    return False  # someone has put something into the new folder
            elif not _same_but_mode(entry_in(parent, name), change.after):
                return False  # someone has written into the new file
            rename(parent, name, folder, staged, EXCHANGE if _is_exchanged(change) else NOREPLACE)
        return True

    def _undo_removal(self, folder: int, number: int, change: Change) -> bool:
        old = b"old-%d" % number
        if inode_of(folder, old) is None:
            return True  # it was never taken out
        with parent_of(self._root, change.path) as (parent, name):
            rename(folder, old, parent, name, NOREPLACE)
        return True

    def clean_up(self) -> None:
        """Remove the staging folder."""
        self._step("clean up")
        remove_tree(self._root, self._journal.staging.encode())

    @contextmanager
    def _staging(self) -> Iterator[int]:
        fd = os.open(self._journal.staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                     dir_fd=self._root)  # fmt: skip
        try:
            yield fd
        finally:
            os.close(fd)


def _is_mode_only(change: Change) -> bool:
    return change.kind == "mode"


def _is_exchanged(change: Change) -> bool:
    """One rename replaces it: file by file, file by link, and so on; a folder has to move out first."""
    return (
        change.before is not None
        and change.after is not None
        and not _is_mode_only(change)
        and not isinstance(change.before, DirEntry)
        and not isinstance(change.after, DirEntry)
    )


def _is_moved(change: Change) -> bool:
    return change.after is not None and not _is_mode_only(change)


def _same_content(change: Change) -> bool:
    before, after = change.before, change.after
    return isinstance(before, FileEntry) and isinstance(after, FileEntry) and before.sha256 == after.sha256


def _same_but_mode(now: Entry | None, after: Entry | None) -> bool:
    if isinstance(now, FileEntry) and isinstance(after, FileEntry):
        return (now.size, now.sha256) == (after.size, after.sha256)
    return now == after


def conflict(why: str) -> Conflict:
    """The folder is not the base that the card was made from."""
    return Conflict(
        f"{why[0].upper()}{why[1:]}.",
        hint="Run the command again on the folder as it is now.",
        kept="Nothing was published; your files are as they were.",
    )


def unknown(journal: Journal, why: str) -> OutcomeUnknown:
    """An interrupted publish that needs a person."""
    return OutcomeUnknown(
        f"Publishing {journal.request_id} into {journal.workspace} was interrupted and not undone completely: {why}.",
        hint=f"Look into {journal.staging} in that folder: it holds the old and new files. "
        f"Then delete it, and run 'luminaguard approvals close {journal.request_id}'.",
        kept="Old and new contents were all kept.",
    )
