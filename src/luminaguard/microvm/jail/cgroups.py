"""One cgroup for each hypervisor process: memory and process limits, and nothing escapes a kill.

Version 2 where its controllers are there (Documentation/admin-guide/cgroup-v2.rst), version 1 where
only that exists. An ordinary user gets them in what was delegated to him (as systemd does for what runs
in a user's manager, or with ``systemd-run --user --scope``); without that the machine's record says so,
and rlimits and seccomp hold the same limits for the one process that QEMU is.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

__all__ = ["CgroupStore"]

_PARENT = "luminaguard"
_V1 = {"memory": "memory.limit_in_bytes", "pids": "pids.max"}
_V2 = {"memory": "memory.max", "pids": "pids.max"}
_SWAP = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}
_REMOVE_TIMEOUT_S = 2.0
_NOT_DELEGATED = "the cgroup hierarchy is not delegated to this user"


class CgroupStore:
    """Makes and removes groups.

    With version 1 under the group that this process is in; with version 2 under the root, or the topmost
    group above this process that belongs to this user. The arguments are for tests.
    """

    def __init__(
        self, mountinfo: str = "/proc/self/mountinfo", own: str = "/proc/self/cgroup", *, uid: int | None = None
    ) -> None:
        self._uid = os.geteuid() if uid is None else uid
        self._parents: dict[str, Path] = {}
        self.version = 0
        self.missing = ""
        try:
            self._find(Path(mountinfo).read_text(encoding="utf-8"), Path(own).read_text(encoding="utf-8"))
        except OSError as error:
            self.missing = f"the cgroup hierarchy cannot be used: {error.strerror} ({error.filename})"

    def create(self, name: str, *, memory_bytes: int, processes: int) -> list[Path]:
        """Make a limited group; return its folders (one for each hierarchy).

        Raises:
            OSError: the kernel refused.
        """
        values = {"memory": str(memory_bytes), "pids": str(processes)}
        files = _V2 if self.version == 2 else _V1
        made: list[Path] = []
        try:
            for folder in dict.fromkeys(self._parents.values()):
                group = folder / name
                group.mkdir()
                made.append(group)
            for controller, parent in self._parents.items():
                (parent / name / files[controller]).write_text(values[controller], encoding="ascii")
            swap = self._parents["memory"] / name / _SWAP[self.version]
            if swap.exists():  # a kernel without swap accounting has no such file, and a host without swap no need
                swap.write_text("0" if self.version == 2 else values["memory"], encoding="ascii")
        except OSError:
            self.remove(made)
            raise
        return made

    @staticmethod
    def add(groups: list[Path], pid: int) -> None:
        """Move a process into a group; raises OSError."""
        for group in groups:
            (group / "cgroup.procs").write_text(str(pid), encoding="ascii")

    @staticmethod
    def remove(groups: list[Path], *, wait: bool = True) -> None:
        """Remove a group whose processes are dead; the kernel may need a moment."""
        deadline = time.monotonic() + (_REMOVE_TIMEOUT_S if wait else 0)
        for group in groups:
            while True:
                try:
                    group.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY or time.monotonic() > deadline:
                        break  # the sweep removes it later
                    time.sleep(0.001)

    def groups(self) -> dict[str, list[Path]]:
        """All groups that exist, by name."""
        found: dict[str, list[Path]] = {}
        for parent in dict.fromkeys(self._parents.values()):
            for entry in parent.iterdir() if parent.is_dir() else ():
                if entry.is_dir():
                    found.setdefault(entry.name, []).append(entry)
        return found

    def _find(self, mountinfo: str, own: str) -> None:
        mounts = [_mount(line) for line in mountinfo.splitlines()]
        mine = {controllers: path for _, controllers, path in (line.split(":", 2) for line in own.splitlines())}
        unified = next((Path(point) for kind, point, _ in mounts if kind == "cgroup2"), None)
        if unified and _controls(unified):
            top = unified if self._uid == 0 else self._delegated(unified, mine.get("", "/"))
            if top is None:
                self.missing = _NOT_DELEGATED
                return
            parent = top / _PARENT
            parent.mkdir(exist_ok=True)
            for folder in (top, parent):
                (folder / "cgroup.subtree_control").write_text("+memory +pids", encoding="ascii")
            self._parents, self.version = {"memory": parent, "pids": parent}, 2
            return
        for controller in _V1:
            point = next((p for kind, p, options in mounts if kind == "cgroup" and controller in options), None)
            path = next((path for names, path in mine.items() if controller in names.split(",")), None)
            if point is None or path is None:
                self._parents, self.missing = {}, f"there is no cgroup hierarchy with the {controller} controller"
                return
            parent = Path(point, path.lstrip("/"), _PARENT)
            parent.mkdir(exist_ok=True)
            self._parents[controller] = parent
        if not all(os.access(parent, os.W_OK) for parent in self._parents.values()):
            self._parents, self.missing = {}, _NOT_DELEGATED
            return
        self.version = 1

    def _delegated(self, unified: Path, own: str) -> Path | None:
        """The topmost group above this process that is this user's; processes cannot be moved out of it."""
        group, found = Path(unified, own.lstrip("/")), None
        while group != unified and group.is_relative_to(unified) and self._owns(group):
            found, group = group, group.parent
        return found if found is not None and _controls(found) else None

    def _owns(self, group: Path) -> bool:
        files = (group, group / "cgroup.procs", group / "cgroup.subtree_control")
        try:
            return all(path.stat().st_uid == self._uid for path in files)
        except OSError:
            return False


def _controls(group: Path) -> bool:
    """Whether memory and processes can be limited below a group."""
    return {"memory", "pids"} <= set(_read(f"{group}/cgroup.controllers").split())


def _mount(line: str) -> tuple[str, str, set[str]]:
    """File system type, mount point and super options of a line of mountinfo(5)."""
    fields, _, rest = line.partition(" - ")
    kind, _, options = rest.split(" ", 2)
    return kind, fields.split(" ")[4], set(options.split(","))


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read(4096)
