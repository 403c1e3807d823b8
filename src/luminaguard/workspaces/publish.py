"""Publish a changeset to the user's folder: all of it, or nothing, across any crash.

Rules:

1. The base is checked first: each path must be on the host exactly what the card said it was.
2. New contents are staged in a private folder on the same file system, hashed as they are written,
   and the digest of what was staged must be the digest that was decided.
3. Entries move by one rename each: created ones never replace anything (RENAME_NOREPLACE), changed
   ones are exchanged (RENAME_EXCHANGE) and what came out is compared with the base once more.
   So a file that someone else wrote in between is put back, not lost.
4. Every path is walked by descriptor without following links; nothing outside is ever opened.
5. The journal says how far it came; :func:`recover` undoes or finishes what a crash interrupted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from luminaguard.effects.changes import (
    Change,
    Changeset,
    DirEntry,
    Entry,
    FileEntry,
    LinkEntry,
    encode,
)
from luminaguard.errors import (
    Conflict,
    LuminaGuardError,
    OutcomeUnknown,
    PublishError,
    WorkspaceError,
)
from luminaguard.workspaces.blobs import BlobStore
from luminaguard.workspaces.journal import Journal
from luminaguard.workspaces.opening import entry_at, entry_in, open_folder, open_root, parent_of

__all__ = ["Publisher", "Step"]

Step = Callable[[str], None]
"""Told before each step that changes something; tests interrupt there."""

_NOREPLACE, _EXCHANGE = 1, 2
_CHUNK = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class Publisher:
    """Publishes into workspaces; keeps journals and locks in the state folder."""

    def __init__(self, state: Path, blobs: BlobStore) -> None:
        self._journals = state / "journal"
        self._locks = state / "locks"
        self._blobs = blobs

    @contextmanager
    def lock(self, workspace: str, *, wait: bool = False) -> Iterator[None]:
        """Only one process publishes into a workspace at a time.

        Raises:
            PublishError: another one does, and ``wait`` is false.
        """
        self._locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = hashlib.sha256(workspace.encode()).hexdigest()[:32]
        fd = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise PublishError(
                    f"Another process is publishing into {workspace}.",
                    hint="Run the command again in a moment.",
                ) from None
            yield
        finally:
            os.close(fd)

    def check(self, workspace: str, device: int, inode: int, changeset: Changeset) -> None:
        """Raise Conflict unless the workspace is still the base of the changeset."""
        root = self._root(workspace, device, inode)
        try:
            self._check_base(root, changeset)
        finally:
            os.close(root)

    def publish(
        self,
        request_id: str,
        workspace: str,
        device: int,
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
        root = self._root(workspace, device, inode)
        try:
            journal = Journal(self._journals / f"{request_id}.json", request_id, workspace, device, inode,
                              changeset, "staging", {})  # fmt: skip
            self._check_base(root, changeset)
            work = _Work(root, journal, step)
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
                work.undo()
                raise _failure(error) from error
            work.clean_up()
        finally:
            os.close(root)

    def close(self, request_id: str) -> None:
        """Forget the journal of a publish whose end has been recorded."""
        (self._journals / f"{request_id}.json").unlink(missing_ok=True)

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
            root = self._root(journal.workspace, journal.device, journal.inode)
        except (Conflict, WorkspaceError) as error:
            raise _unknown(journal, "the workspace is gone or was replaced") from error
        try:
            work = _Work(root, journal, lambda _: None)
            if journal.phase == "committed":
                work.clean_up()
                return journal.request_id, True
            work.undo()
            return journal.request_id, False
        finally:
            os.close(root)

    @staticmethod
    def _root(workspace: str, device: int, inode: int) -> int:
        root = open_root(Path(workspace))
        info = os.fstat(root)
        if (info.st_dev, info.st_ino) != (device, inode):
            os.close(root)
            raise _conflict(f"{workspace} is another folder than the one that the command ran on")
        return root

    @staticmethod
    def _check_base(root: int, changeset: Changeset) -> None:
        try:
            Publisher._compare_base(root, changeset)
        except OSError as error:
            raise _conflict(f"the folder cannot be compared with what the command saw ({error})") from error

    @staticmethod
    def _compare_base(root: int, changeset: Changeset) -> None:
        for change in changeset.changes:
            if entry_at(root, change.path) != change.before or (
                change.before is None and _something_at(root, change.path)
            ):
                raise _conflict(f"{change.path!a} was changed on the host since the command ran")
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
                    raise _conflict(f"the folder {change.path!a} has contents that the command did not see")


class _Work:
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
                    entry = _copy_file(source, folder, name, mode)
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
            _rename(parent, name, folder, b"old-%d" % number, _NOREPLACE)
        if entry_in(folder, b"old-%d" % number) != change.before:
            raise _conflict(f"{change.path!a} was changed while it was being published")
        if isinstance(change.before, DirEntry) and _listing(folder, b"old-%d" % number):
            raise _conflict(f"the folder {change.path!a} was filled while it was being removed")

    def _put_in(self, folder: int, number: int, change: Change) -> None:
        with parent_of(self._root, change.path) as (parent, name):
            try:
                _rename(folder, b"new-%d" % number, parent, name, _NOREPLACE)
            except FileExistsError:
                raise _conflict(f"{change.path!a} appeared while it was being published") from None

    def _exchange(self, folder: int, number: int, change: Change) -> None:
        with parent_of(self._root, change.path) as (parent, name):
            _rename(folder, b"new-%d" % number, parent, name, _EXCHANGE)
        if entry_in(folder, b"new-%d" % number) != change.before:
            raise _conflict(f"{change.path!a} was changed while it was being published")

    def _set_mode(self, change: Change, entry: Entry | None) -> None:
        assert isinstance(entry, FileEntry | DirEntry)
        kind = os.O_DIRECTORY if isinstance(entry, DirEntry) else 0
        with parent_of(self._root, change.path) as (parent, name):
            # O_PATH opens what may not be read, and /proc gives chmod a path that cannot be swapped.
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | kind, dir_fd=parent)
            try:
                now = os.fstat(fd).st_mode
                if stat.S_ISDIR(now) != isinstance(entry, DirEntry) or stat.S_ISLNK(now):
                    raise _conflict(f"{change.path!a} was replaced while it was being published")
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
                raise _unknown(self._journal, str(error)) from error
            if left:
                raise _unknown(self._journal, f"these could not be restored: {', '.join(map(ascii, left[:5]))}")
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
            if _inode(parent, name) == self._journal.inodes.get(number):
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
        if _inode(folder, staged) == inode:
            return True  # it never left
        with parent_of(self._root, change.path) as (parent, name):
            if _inode(parent, name) != inode:
                return False  # what was published has been replaced by someone
            if isinstance(change.after, DirEntry):
                if _listing(parent, name):
                    return False  # someone has put something into the new folder
            elif not _same_but_mode(entry_in(parent, name), change.after):
                return False  # someone has written into the new file
            _rename(parent, name, folder, staged, _EXCHANGE if _is_exchanged(change) else _NOREPLACE)
        return True

    def _undo_removal(self, folder: int, number: int, change: Change) -> bool:
        old = b"old-%d" % number
        if _inode(folder, old) is None:
            return True  # it was never taken out
        with parent_of(self._root, change.path) as (parent, name):
            _rename(folder, old, parent, name, _NOREPLACE)
        return True

    def clean_up(self) -> None:
        """Remove the staging folder."""
        self._step("clean up")
        _remove_tree(self._root, self._journal.staging.encode())

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


def _copy_file(source: int, folder: int, name: str, mode: int) -> FileEntry:
    """Copy and hash; the result says what was written, not what was asked for."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    digest, size = hashlib.sha256(), 0
    try:
        while data := os.pread(source, _CHUNK, size):
            digest.update(data)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            size += len(data)
        os.fchmod(fd, mode)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileEntry(mode, size, digest.hexdigest())


def _rename(old_folder: int, old: bytes, new_folder: int, new: bytes, flags: int) -> None:
    """renameat2(2). Raises OSError."""
    if _libc.renameat2(old_folder, old, new_folder, new, flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fsdecode(new))


def _inode(folder: int, name: bytes) -> int | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return None


def _listing(folder: int, name: bytes) -> list[str]:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)


def _something_at(root: int, path: str) -> bool:
    try:
        with parent_of(root, path) as (parent, name):
            return _inode(parent, name) is not None
    except OSError:
        return False


def _remove_tree(parent: int, name: bytes) -> None:
    """Remove a folder of ours by descriptor; nothing if it is not there."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return
    try:
        os.fchmod(fd, 0o700)
        for child in os.listdir(fd):
            raw = os.fsencode(child)
            if stat.S_ISDIR(os.stat(raw, dir_fd=fd, follow_symlinks=False).st_mode):
                _remove_tree(fd, raw)
            else:
                os.unlink(raw, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def _conflict(why: str) -> Conflict:
    return Conflict(
        f"{why[0].upper()}{why[1:]}.",
        hint="Run the command again on the folder as it is now.",
        kept="Nothing was published; your files are as they were.",
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


def _unknown(journal: Journal, why: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"Publishing {journal.request_id} into {journal.workspace} was interrupted and not undone completely: {why}.",
        hint=f"Look into {journal.staging} in that folder: it holds the old and new files. "
        f"Then delete it and {journal.path}.",
        kept="Old and new contents were all kept.",
    )
