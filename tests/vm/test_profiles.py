"""The profiles of a command, in a real machine."""

import json

import pytest

pytestmark = pytest.mark.vm

PROBE = """
import asyncio, ctypes, json, os, socket, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def tried(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__ + str(error.errno)
    return "done"
def checked(value):
    if value < 0:
        raise OSError(ctypes.get_errno(), "")
print(json.dumps({
    "unix socket": tried(lambda: socket.socket(socket.AF_UNIX).close()),
    "internet socket": tried(lambda: socket.socket().close()),
    "vsock": tried(lambda: socket.socket(40).close()),
    "netlink": tried(lambda: socket.socket(16).close()),
    "event loop": tried(lambda: asyncio.run(asyncio.sleep(0))),
    "child": tried(lambda: subprocess.run(["/bin/true"], check=True)),
    "thread": tried(lambda: threading.Thread(target=int).start()),
    "own the file": tried(lambda: os.chown("/tmp", -1, -1)),
    "shared memory": tried(lambda: checked(libc.shmget(0, 4096, 0o1600))),
    "anonymous file": tried(lambda: os.close(os.memfd_create("x"))),
    "personality": tried(lambda: checked(libc.personality(0xFFFFFFFF))),
    "namespace": tried(lambda: checked(libc.unshare(0x10000000))),
    "no such call": tried(lambda: checked(libc.syscall(600))),
}))
"""
EXPECTED = {
    "strict": {"unix socket": "OSError97", "internet socket": "OSError97", "vsock": "OSError97",
               "netlink": "OSError97", "shared memory": "PermissionError1",
               "anonymous file": "PermissionError1", "personality": "PermissionError1",
               "namespace": "PermissionError1", "no such call": "OSError38"},
    "default": {"vsock": "OSError97", "netlink": "OSError97", "personality": "PermissionError1",
                "namespace": "PermissionError1", "no such call": "OSError38"},
    "build": {"vsock": "OSError97", "netlink": "OSError97", "namespace": "PermissionError1",
              "no such call": "OSError38"},
}  # fmt: skip


@pytest.mark.parametrize("profile", sorted(EXPECTED))
def test_a_command_may_do_what_its_profile_says(home, workspace, profile):
    told = home.exec(workspace, "python3", "-c", PROBE, flags=("--profile", profile)).json
    found = json.loads(told["stdout"])
    assert {name: how for name, how in found.items() if how != "done"} == EXPECTED[profile]
    entries = [json.loads(line) for line in home.run("ledger", "export").out.splitlines()[1:]]
    (started,) = (entry["body"] for entry in entries if entry["kind"] == "exec.started")
    assert started["profile"] == profile


@pytest.mark.parametrize("profile", sorted(EXPECTED))
def test_the_tools_work_in_every_profile(home, workspace, profile):
    script = """set -e
git init -q . && git add -A && git commit -qm x && git log --oneline | wc -l
tar czf /tmp/t.tgz . && tar tzf /tmp/t.tgz > /dev/null
find . -name '*.txt' | xargs grep -l one; sed -i s/one/1/ a.txt; sort a.txt | head -1; jq -n '1+1'
cp -a a.txt /tmp/a; install -m 640 a.txt /tmp/b; chown $(id -u):$(id -g) /tmp/a; chgrp $(id -g) /tmp/b
python3 -c 'import sqlite3, ssl, json, tempfile; tempfile.TemporaryFile().write(b"x"); print("python")'
"""
    told = home.exec(workspace, "bash", "-c", script, flags=("--profile", profile)).json
    assert (told["exit_code"], told["stdout"]) == (0, "1\n./a.txt\n1\n2\npython\n"), told


def test_a_profile_that_there_is_not_is_refused(home, workspace):
    result = home.exec(workspace, "true", flags=("--profile", "loose"))
    assert result.code == 123
    assert "profile" in result.json["error"]["message"]


def test_the_root_is_read_only_for_everyone_and_names_are_the_machines_own(home, workspace):
    script = """cat /etc/hostname /etc/machine-id
touch /etc/x /usr/x /run/identity/hostname 2>&1 | grep -c 'Read-only\\|denied'"""
    told = home.exec(workspace, "sh", "-c", script).json
    host, machine, count = told["stdout"].split()
    assert host == told["vm"]["id"]
    assert len(machine) == 32
    assert count == "3"
