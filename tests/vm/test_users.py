"""Who a command is in its machine: a user that no other call is, to whom all of the workspace belongs."""

import json
import os

import anyio
import pytest

from luminaguard.errors import MachineError
from luminaguard.microvm.machine import FIRST_UID, UIDS, Command
from luminaguard.microvm.pool import PoolLimits
from luminaguard.testing.machines import output_of
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.state import Limits, read_state

pytestmark = pytest.mark.vm
LIMITS = Limits(10_000, 1 << 30)
WHO = """
import grp, json, os, pwd, sys
from pathlib import Path
def owner(path): return list({os.lstat(path).st_uid, os.lstat(path).st_gid})
uid = os.getuid()
Path('/workspace/new').write_text('new')
Path('/home/user/new').write_text('new')
files = ['/workspace', *(str(path) for path in Path('/workspace').rglob('*')), '/home/user', '/home/user/new']
print(json.dumps({
    'uid': uid, 'ids': [*os.getresuid(), *os.getresgid()], 'groups': os.getgroups(),
    'account': list(pwd.getpwuid(uid)), 'by name': pwd.getpwnam('user').pw_uid, 'group': grp.getgrgid(uid).gr_name,
    'others': sorted(entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid != uid),
    'owners': [path for path in files if owner(path) != [uid]], 'files': len(files),
    'mode': oct(os.stat('/workspace').st_mode & 0o7777), 'of the system': owner('/usr/bin/env') + owner('/etc/passwd'),
}))
"""


def who(said):
    """What a command said of itself, of which all that must hold was checked but for its number."""
    found = json.loads(said)
    uid, _ = found.pop("uid"), found.pop("mode")
    assert FIRST_UID <= uid < FIRST_UID + UIDS
    assert found.pop("ids") == [uid] * 6
    assert found.pop("groups") == []
    assert found.pop("account") == ["user", "x", uid, uid, "user", "/home/user", "/bin/bash"]
    assert (found.pop("by name"), found.pop("group")) == (uid, "user")
    assert found.pop("others") == [0, 65534]
    assert found.pop("owners") == []
    assert found.pop("of the system") == [0, 0]
    return uid, found.pop("files")


def test_each_call_is_a_user_that_no_other_is(home, workspace):
    (workspace / "inner").mkdir(mode=0o700)
    (workspace / "inner" / "private").write_text("mine\n")
    (workspace / "inner" / "private").chmod(0o600)
    (workspace / "way").symlink_to("inner/private")
    seen = [who(home.exec(workspace, "python3", "-c", WHO).json["stdout"]) for _ in range(3)]
    assert len({uid for uid, _ in seen}) == 3
    assert {count for _, count in seen} == {len(list(workspace.rglob("*"))) + 4}


def test_what_an_owner_may_it_may(home, workspace):
    (workspace / "private").write_text("mine\n")
    (workspace / "private").chmod(0o400)
    script = """set -e
cat private
chmod 600 private; echo more >> private; touch -d 2020-01-01 private
chown "$(id -u):$(id -g)" private
! chown 1000 private; ! chown 0 private; ! chgrp 1000 private
cp -a private copy; tar --format=ustar -cf /tmp/all.tar .; tar -tvf /tmp/all.tar | grep -c user/user
git init -q . ; git add private; git -c gc.auto=0 commit -qm one; git status --short | wc -l
rm -rf .git
"""
    result = home.exec(workspace, "bash", "-c", script)
    assert result.json["exit_code"] == 0, result.json
    said = result.json["stdout"].split()
    assert said[0] == "mine"
    assert [change["path"] for change in result.json["changeset"]["changes"]] == ["copy", "private"]


def test_a_call_finds_nothing_of_another_user(home, workspace):
    """Whoever ran in the machine that all are copied from has left nothing that this user could not change."""
    script = """
import os, sys
mine = {0, os.getuid()}
for top in ("/tmp", "/var/tmp", "/dev", "/home", "/run", "/etc", "/workspace"):
    for folder, _, files in os.walk(top):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            if not {os.lstat(path).st_uid, os.lstat(path).st_gid} <= mine: print(path)
print(os.listdir("/tmp"), os.listdir("/home/user"))
"""
    assert home.exec(workspace, "python3", "-c", script).json["stdout"] == "[] []\n"


def test_looking_at_a_repository_changes_nothing_of_it(home, workspace):
    """Its index knows who owned a file when it was last looked at."""
    make = "git init -q .; for n in 1 2 3; do echo $n > f$n; done; git add .; git commit -qm one; git status --short"
    assert home.exec(workspace, "sh", "-c", make, flags=("--publish", "always")).json["status"] == "published"
    look = ("sh", "-c", "git status --short; git diff; git log --oneline | wc -l")
    home.exec(workspace, *look, flags=("--publish", "always"))  # other times than in the machine that made it
    for _ in range(2):
        again = home.exec(workspace, *look, flags=("--publish", "always")).json
        assert (again["status"], again["stdout"]) == ("unchanged", "1\n"), again


def test_python_uses_the_images_byte_code_and_writes_none(home, workspace):
    (workspace / "part.py").write_text("X = 1\n")
    result = home.exec(workspace, "python3", "-v", "-c", "import argparse, part").json
    assert result["status"] == "unchanged"
    # Of a module that it compiled Python says "code object from" and where its text is; of byte code that it "matches".
    traced = result["stderr"].splitlines()
    compiled = [line.split()[-1] for line in traced if line.startswith("# code object from /")]
    assert compiled == ["/workspace/part.py"]
    assert any("/argparse.cpython-" in line and "matches" in line for line in traced)


def test_what_a_command_reads_and_writes_can_be_opened_by_name(home, workspace):
    script = "cat /dev/stdin; echo out > /dev/stdout; echo err > /dev/stderr; echo more | tee /proc/self/fd/1"
    result = home.exec(workspace, "bash", "-c", script).json
    assert (result["exit_code"], result["stdout"], result["stderr"]) == (0, "out\nmore\nmore\n", "err\n"), result


def test_files_of_accounts_are_read_only(home, workspace):
    mounts = home.exec(workspace, "cat", "/proc/mounts").json["stdout"].splitlines()
    for path in ("/etc/passwd", "/etc/group"):
        (found,) = (line.split() for line in mounts if line.split()[1] == path)
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(found[3].split(",")), found


def test_a_large_workspace_of_two_images_is_the_users(runtime, workspace):
    """What changed since it was packed lies on a disk of its own."""
    workspace.chmod(0o750)
    for number in range(1100):
        (workspace / f"f{number}").write_text("x")

    modes = []

    async def scenario() -> list[tuple[int, int]]:
        seen = []
        for _ in range(2):
            said = bytearray()

            async def output(_stream, data, said=said):
                said.extend(data)

            with anyio.fail_after(120):
                await runtime.exec(workspace, Command(("python3", "-c", WHO)), output=output)
            modes.append(json.loads(said)["mode"])
            seen.append(who(said))
            if len(seen) == 2:
                lower, layer = WorkspaceImages(runtime.folders.cache).open_layered(read_state(workspace, LIMITS))
                assert layer >= 0, "it had one image only"
                os.close(lower)
                os.close(layer)
            (workspace / "f7").write_text("other")
            workspace.chmod(0o711)
            (workspace / "f8").unlink(missing_ok=True)
        return seen

    seen = anyio.run(scenario)
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] == seen[1][1] + 1
    assert modes == ["0o750", "0o711"], "the folder's own mode is that of the newer image"


def test_machines_that_wait_become_users_of_their_own_on_one_disk(runtime, workspace):
    """The disk is one, and read by both at once; and each of them was another user in its rehearsal."""
    disk = WorkspaceImages(runtime.folders.cache).open(read_state(workspace, LIMITS))

    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(2, 2)) as pool:
            await pool.wait_ready(2)
            async with pool.machine(disk) as one, pool.machine(disk) as two:
                first = who(await output_of(one, "python3", "-c", WHO))
                second = who(await output_of(two, "python3", "-c", WHO))
                assert (first[0], second[0]) == (one.uid, two.uid)
                assert one.uid != two.uid
            assert pool.status.hits == 2

    async def bounded() -> None:
        with anyio.fail_after(150):
            await scenario()

    anyio.run(bounded)
    os.close(disk)


def test_a_machine_that_is_awake_is_not_woken_again(runtime, workspace):
    disk = WorkspaceImages(runtime.folders.cache).open(read_state(workspace, LIMITS))

    async def scenario() -> None:
        with anyio.fail_after(120):
            async with runtime.open_pool(PoolLimits(0, 0)) as pool, pool.machine(disk) as vm:
                before = vm.uid
                for again in ({}, {"upper_mib": 8}):
                    with pytest.raises(MachineError, match=r"busy.*is awake"):
                        await vm.wake(**again)
                assert await output_of(vm, "id", "-u") == f"{before}\n"

    anyio.run(scenario)
    os.close(disk)


def test_the_terminal_of_a_command_is_its_users(workspace, on_a_terminal):
    script = "import os; print('mine', {os.fstat(n).st_uid for n in range(3)} == {os.getuid()})"
    with on_a_terminal("shell", "-w", str(workspace)) as terminal:
        terminal.until(b"$ ")
        terminal.type(f'python3 -c "{script}"\n')
        terminal.until(b"mine True")
        terminal.type("exit\n")
        assert terminal.wait() == 0


@pytest.mark.parametrize("number", [0, -1, 1 << 31])
def test_a_machine_takes_no_number_that_is_no_users(runtime, workspace, monkeypatch, number):
    monkeypatch.setattr("luminaguard.microvm.machine.FIRST_UID", number)
    monkeypatch.setattr("luminaguard.microvm.machine.UIDS", 1)

    async def output(_stream, data):
        raise AssertionError(data)

    async def scenario() -> None:
        with anyio.fail_after(120):
            await runtime.exec(workspace, Command(("true",)), output=output)

    with pytest.raises(MachineError, match="no number of a user"):
        anyio.run(scenario)
