"""Which cgroup hierarchy is used, on trees of plain files in the shape that kernels show."""

import os
from pathlib import Path

import pytest

from luminaguard.microvm.jail import CgroupStore

V2_FILES = ("cgroup.procs", "cgroup.subtree_control")
USER = "user.slice/user-7.slice/user@7.service"


def unified(tmp_path: Path, *groups: str, controllers: str = "cpu memory pids") -> Path:
    """A fake version 2 hierarchy with these groups."""
    root = tmp_path / "unified"
    for group in ("", *groups):
        folder = root / group
        folder.mkdir(parents=True, exist_ok=True)
        for name in V2_FILES:
            (folder / name).write_text("")
        (folder / "cgroup.controllers").write_text(controllers + "\n")
    return root


def store(tmp_path: Path, mounts: list[tuple[str, Path, str]], own: list[str], uid: int = 0) -> CgroupStore:
    lines = [f"1 0 0:1 / {point} rw - {kind} {kind} {options}" for kind, point, options in mounts]
    (tmp_path / "mountinfo").write_text("\n".join(lines) + "\n")
    (tmp_path / "own").write_text("\n".join(own) + "\n")
    return CgroupStore(str(tmp_path / "mountinfo"), str(tmp_path / "own"), uid=uid)


def test_version_2_is_used_where_its_controllers_are(tmp_path):
    root = unified(tmp_path)
    found = store(tmp_path, [("cgroup2", root, "rw")], ["0::/"])
    assert (found.version, found.missing) == (2, "")
    (group,) = found.create("vm-1", memory_bytes=1 << 20, processes=7)
    assert group == root / "luminaguard" / "vm-1"
    assert (group / "memory.max").read_text() == str(1 << 20)
    assert (group / "pids.max").read_text() == "7"
    assert (root / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_version_1_is_used_where_version_2_has_no_controllers(tmp_path):
    root = unified(tmp_path, controllers="")
    folders = {name: tmp_path / name for name in ("memory", "pids")}
    for folder in folders.values():
        (folder / "own").mkdir(parents=True)
    mounts = [("cgroup2", root, "rw"), *(("cgroup", folder, f"rw,{name}") for name, folder in folders.items())]
    found = store(tmp_path, mounts, ["0::/", "2:memory:/own", "3:pids:/own"])
    assert (found.version, found.missing) == (1, "")
    groups = found.create("vm-1", memory_bytes=1 << 20, processes=7)
    assert groups == [folder / "own" / "luminaguard" / "vm-1" for folder in folders.values()]
    assert (groups[0] / "memory.limit_in_bytes").read_text() == str(1 << 20)
    assert (groups[1] / "pids.max").read_text() == "7"


def test_without_any_hierarchy_that_is_said(tmp_path):
    found = store(tmp_path, [("cgroup2", unified(tmp_path, controllers="cpu"), "rw")], ["0::/"])
    assert found.version == 0
    assert "no cgroup hierarchy with the memory controller" in found.missing


def test_a_user_makes_groups_in_what_was_delegated_to_him(tmp_path, monkeypatch):
    root = unified(tmp_path, "user.slice", "user.slice/user-7.slice", USER, f"{USER}/app.slice",
                   f"{USER}/app.slice/run.scope")  # fmt: skip
    own = os.geteuid()
    real = Path.stat

    def stat(path: Path, **options: object) -> os.stat_result:
        info = real(path, **options)
        if path.is_relative_to(root) and not path.is_relative_to(root / USER):  # the system's
            return os.stat_result((*info[:4], own + 1, *info[5:]))
        return info

    monkeypatch.setattr(Path, "stat", stat)
    found = store(tmp_path, [("cgroup2", root, "rw")], [f"0::/{USER}/app.slice/run.scope"], uid=own or 7)
    if own == 0:  # root's files are not uid 7's
        assert found.missing == "the cgroup hierarchy is not delegated to this user"
        found = _as(own, tmp_path, root)
    assert (found.version, found.missing) == (2, "")
    (group,) = found.create("vm-1", memory_bytes=1, processes=1)
    assert group == root / USER / "luminaguard" / "vm-1"


def _as(uid: int, tmp_path: Path, root: Path) -> CgroupStore:
    """Root in the user's place: every file of the tree is root's, so only the choice of the top differs."""

    class User(CgroupStore):
        def _owns(self, group: Path) -> bool:
            return group.stat().st_uid == uid

    lines = (str(tmp_path / "mountinfo"), str(tmp_path / "own"))
    return User(*lines, uid=7)


@pytest.mark.parametrize("own", ["0::/", "0::/user.slice/user-7.slice/session-1.scope", "0::/../../elsewhere"])
def test_a_user_to_whom_nothing_was_delegated_gets_none(tmp_path, own):
    root = unified(tmp_path, "user.slice/user-7.slice/session-1.scope")
    found = store(tmp_path, [("cgroup2", root, "rw")], [own], uid=os.geteuid() + 7)
    assert found.missing == "the cgroup hierarchy is not delegated to this user"
    assert not (root / "luminaguard").exists()
