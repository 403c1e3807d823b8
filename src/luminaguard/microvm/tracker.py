"""Which micro-VMs there are, in every process of this user; and the end of those whose owner is gone.

Each machine has a small file that its owner keeps locked and rewrites as the machine's state
changes. The kernel drops the lock when the owner dies, however it dies, so a file that someone else
can lock belongs to nobody. The machine itself dies with its owner (PR_SET_PDEATHSIG); the sweep is
the second line, and removes the cgroup that no exit handler removed. A process is never judged by
its number alone: the start time in the file has to be its start time.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio

from luminaguard import log
from luminaguard.errors import LuminaGuardError, MachineError
from luminaguard.microvm.jail import CgroupStore, JailedProcess, JailFolders, end_orphans
from luminaguard.microvm.reaper import Reaper, forget, keep_from_children
from luminaguard.microvm.usage import Usage, start_time, usage

if TYPE_CHECKING:
    from luminaguard.microvm.port import Hypervisor

__all__ = ["MachineRecord", "State", "Tracked", "VMTracker"]

State = Literal["starting", "ready", "running", "stopping", "gone"]
_MAX = 1 << 16
_MAX_ENDED = 1 << 20
_GROUP_AGE_S = 60.0
_LOCK_AGE_S = 5.0  # younger, it may be about to be locked
_END_S = 0.5
_KILLED = "luminaguard vm kill"
_STATES = ("starting", "ready", "running", "stopping", "gone")


@dataclass(slots=True)
class MachineRecord:
    """A machine as ``vm list`` shows it.

    Attributes:
        pid: the hypervisor's process.
        started: that process's start time, in clock ticks since boot.
        owner: process id of the LuminaGuard process that owns it.
        task: what it is for: the command, or ``pool``.
        ended_ns: when it ended, 0 while it lives; ``reason`` says why.
        groups: its cgroups, which only its owner would find otherwise.
        exit_status: of a hypervisor that ended before it was told to; 128 and the signal's number if it was one.
    """

    id: str
    backend: str
    accelerator: str
    state: State
    pid: int
    started: int
    owner: int
    workspace: str
    task: list[str]
    created_ns: int
    jail: dict[str, str] = field(default_factory=dict)
    ended_ns: int = 0
    reason: str = ""
    exit_status: int | None = None
    groups: list[str] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether the process is still the one that was recorded."""
        return bool(self.started) and start_time(self.pid) == self.started

    def usage(self) -> Usage | None:
        """What it uses now; None when it is gone."""
        return usage(self.pid) if self.alive else None


class Tracked:
    """The owner's handle on its machine's record; made by :meth:`VMTracker.track`."""

    def __init__(self, record: MachineRecord, tracker: VMTracker) -> None:
        self.record = record
        self._tracker = tracker
        self._fd = -1

    @contextmanager
    def follow(self, process: JailedProcess) -> Iterator[None]:
        """Record the machine for as long as the context lasts, and its end after it.

        To be entered as soon as there is a process.
        """
        record, folder = self.record, self._tracker.folder
        record.jail, record.groups = process.layers, [str(group) for group in process.groups]
        self._take(process)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Made under another name and locked before it gets its own: a sweep never finds it unlocked.
        temporary, path = folder / f".{record.id}", folder / f"{record.id}.json"
        reason = "done"
        with self._tracker.survived():
            self._fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                keep_from_children(self._fd)
                self.update()
                temporary.rename(path)
                yield
            except BaseException as error:
                reason = "cancelled" if isinstance(error, anyio.get_cancelled_exc_class()) else type(error).__name__
                if isinstance(error, MachineError):  # its channel may end a moment before it does
                    process.ended_within(_END_S)
                if self._tracker.was_killed(record.id) and isinstance(error, LuminaGuardError):
                    error.hint = "It was ended by 'luminaguard vm kill'."
                raise
            finally:
                if not process.running:
                    killed = self._tracker.was_killed(record.id)
                    reason = process.killed_for or (_KILLED if killed else "the hypervisor ended")
                    record.exit_status = process.exit_status()
                self._tracker.remember(record, reason)
                for left in (path, self._tracker.kill_mark(record.id)):
                    left.unlink(missing_ok=True)
                forget(self._fd)
                os.close(self._fd)
                self._fd = -1

    def started(self, process: JailedProcess) -> None:
        """The hypervisor is up: what was started first may have been what starts it."""
        self._take(process)
        self.update()

    def _take(self, process: JailedProcess) -> None:
        self.record.pid, self.record.started = process.pid, start_time(process.pid)

    def update(self, **changes: Any) -> None:
        """Change fields of the record; readers see all of them or none."""
        for name, value in changes.items():
            setattr(self.record, name, value)
        data = _dumps(self.record)
        # One write of a padded record: a reader sees the old one or the new one.
        os.pwrite(self._fd, data.ljust(max(len(data), os.fstat(self._fd).st_size)), 0)


class VMTracker:
    """The records of one run-time folder."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "vms"
        self._jails = JailFolders(run)
        self._ended = run / "ended.jsonl"
        self._reaper = Reaper(run)
        self._followed = 0

    def track(self, vm_id: str, hypervisor: Hypervisor, *, workspace: str = "", task: Sequence[str] = ()) -> Tracked:
        """A record for a machine that is about to be started; it begins with :meth:`Tracked.follow`."""
        return Tracked(MachineRecord(vm_id, hypervisor.name, hypervisor.accelerator, "starting", 0, 0, os.getpid(),
                                     workspace, list(task), time.time_ns()), self)  # fmt: skip

    @contextmanager
    def survived(self) -> Iterator[None]:
        """While there is a machine, somebody waits to sweep up should this process be killed."""
        self._followed += 1
        try:
            if self._followed == 1:
                self._reaper.start()
            yield
        finally:
            self._followed -= 1
            if self._followed == 0:
                self._reaper.stop()

    def running(self) -> list[MachineRecord]:
        """The machines that live now; those of dead owners are ended and forgotten."""
        return self._sweep()[0]

    def reap(self) -> list[MachineRecord]:
        """End the machines of dead owners, remove the cgroups that they left; return what was ended."""
        living, dead = self._sweep()
        end_orphans({record.id for record in living})
        groups = CgroupStore()
        names = {record.id for record in living}
        for name, folders in groups.groups().items():
            # Another home's machines are not in our records: a group that is in use cannot be removed,
            # and one that is about to be used is young.
            if name not in names and all(_age_s(folder) > _GROUP_AGE_S for folder in folders):
                groups.remove(folders, wait=False)
        self._jails.sweep()
        # Of owners that were killed before the record had its name, or together with their reaper.
        for path in (*self.folder.glob(".vm-*"), *self.folder.glob(".killed-*"), *self.folder.parent.glob("owner-*")):
            if _age_s(path) > (_LOCK_AGE_S if path.suffix == ".lock" else _GROUP_AGE_S) and not _held(path):
                path.unlink(missing_ok=True)
        return dead

    def kill(self, vm_id: str) -> MachineRecord | None:
        """End one machine; its owner sees it end. None when there is no such machine."""
        for record in self.running():
            if record.id == vm_id:
                os.close(os.open(self.kill_mark(vm_id), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
                _end(record)
                log.event("machine.killed", vm=record.id, pid=record.pid)
                return record
        return None

    def kill_mark(self, vm_id: str) -> Path:
        """A file that says that a machine was ended by :meth:`kill`."""
        return self.folder / f".killed-{vm_id}"

    def was_killed(self, vm_id: str) -> bool:
        """Whether a machine was ended by :meth:`kill`."""
        return self.kill_mark(vm_id).exists()

    def ended(self, limit: int = 50) -> list[MachineRecord]:
        """The last machines that ended, newest first."""
        try:
            with self._ended.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX))
                lines = file.read(_MAX).splitlines()
        except FileNotFoundError:
            return []
        records = (_parse(line) for line in reversed(lines[-limit:]))
        return [record for record in records if record is not None]

    def _sweep(self) -> tuple[list[MachineRecord], list[MachineRecord]]:
        living, dead = [], []
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else ():
            try:
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # it has just ended
            try:
                record = _parse(os.pread(fd, _MAX, 0))
                if _is_locked(fd):
                    if record is not None:
                        living.append(record)
                    continue
                if not path.exists():
                    continue  # its owner has just finished with it
                if record is not None:
                    _end(record)
                    self.remember(record, "its owner died")
                    self._remove_groups(record)
                    log.event("machine.reaped", vm=record.id, pid=record.pid)
                    dead.append(record)
                path.unlink(missing_ok=True)
            finally:
                os.close(fd)
        return living, dead

    def remember(self, record: MachineRecord, reason: str) -> None:
        """Note the end of a machine."""
        record.state, record.ended_ns, record.reason = "gone", time.time_ns(), reason
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self._ended, flags, 0o600)
        except OSError:
            return  # a full disk, no descriptors: the end happened all the same
        try:
            if os.fstat(fd).st_size > _MAX_ENDED:
                self._ended.replace(self._ended.with_suffix(".old"))
            os.write(fd, _dumps(record) + b"\n")
        except OSError:
            pass
        finally:
            os.close(fd)

    @staticmethod
    def _remove_groups(record: MachineRecord) -> None:
        groups = CgroupStore()
        found = {*groups.groups().get(record.id, []), *map(Path, record.groups)}
        # Only what is called like the machine, and rmdir(2) removes only what is empty.
        groups.remove([group for group in found if group.name == record.id and group.parent.name == "luminaguard"])


def _dumps(record: MachineRecord) -> bytes:
    """The record in at most :data:`_MAX` bytes: what a command is called must not hide its machine."""
    raw = asdict(record)
    while len(data := json.dumps(raw).encode()) > _MAX:
        raw["task"] = [word[:100] for word in raw["task"][: len(raw["task"]) // 2]]
        raw["workspace"] = raw["workspace"][:1000]
    return data


def _end(record: MachineRecord) -> None:
    """Kill exactly the process that was recorded."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if record.alive:  # checked while the descriptor holds the process: its number cannot be reused
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def _age_s(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _held(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _is_locked(fd)
    finally:
        os.close(fd)


def _parse(data: bytes) -> MachineRecord | None:
    try:
        raw: dict[str, Any] = json.loads(data)
        record = MachineRecord(**raw)
        if record.state not in _STATES:
            return None
        record.pid, record.started = int(record.pid), int(record.started)
        return record
    except (ValueError, TypeError, AttributeError):
        return None
