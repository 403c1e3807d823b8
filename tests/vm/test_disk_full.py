"""A full disk at each place where much is written: a clear refusal, and nothing half made is left."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from luminaguard.testing import Home

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounts a small file system"),
]


SCRIPT = """
mount -t tmpfs -o size={mib}m,mode=700 tmpfs "$1" && {prepare} && shift 2 && "$@"
code=$?
find "$LUMINAGUARD_HOME" -name "*.partial" -o -type d -name ".building*"
exit $code
"""


def run_on_small_disk(home: Home, mib: int, prepare: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``luminaguard`` in a mount namespace where the home is a tmpfs of ``mib`` MiB."""
    script = SCRIPT.replace("{mib}", str(mib)).replace("{prepare}", prepare)
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(home.folder), str(home.image_cache), *home.argv(*arguments)],
        env=home.environment, capture_output=True, text=True, timeout=150, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def small(tmp_path, cache) -> Home:
    home = Home(tmp_path / "home")
    home.image_cache = cache
    return home


# What is finished alone: other tests audit images and build templates in hidden folders beside them.
COPY_IMAGE = 'mkdir -p "$1/cache/images" && cp -r "$2/images"/[!.]* "$1/cache/images/"'
COPY_ALL = (
    f'{COPY_IMAGE} && mkdir "$1/cache/templates" "$1/state" && cp -r "$2/templates"/[!.]* "$1/cache/templates/"'
    ' && cp -r "$2/../state/keys" "$1/state/"'
)


def size_mib(folder: Path) -> int:
    """What the finished entries of a folder take."""
    files = (file for entry in folder.glob("[!.]*") for file in (entry, *entry.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file()) >> 20


@pytest.mark.parametrize("mib", [40, 150])
def test_while_the_image_is_built(small, mib):
    result = run_on_small_disk(small, mib, "true", "image", "build")
    assert "Traceback" not in result.stderr
    assert result.returncode in {123, 125}, result
    assert "disk is full" in result.stderr
    assert result.stdout == ""  # nothing half built is left


def test_while_a_template_is_saved(small, cache, workspace):
    room = size_mib(cache / "images") + 40
    result = run_on_small_disk(small, room, COPY_IMAGE, "exec", "-w", str(workspace), "--", "true")
    assert "Traceback" not in result.stderr
    assert result.returncode in {123, 125}, result
    assert "disk is full" in result.stderr
    assert ".building" not in result.stdout


def test_while_the_workspace_is_packed(small, cache, workspace):
    (workspace / "big").write_bytes(os.urandom(60 << 20))
    room = size_mib(cache / "images") + size_mib(cache / "templates") + 30
    result = run_on_small_disk(small, room, COPY_ALL, "exec", "-w", str(workspace), "--", "true")
    assert "Traceback" not in result.stderr
    assert result.returncode in {123, 125}, result
    assert "free space" in result.stderr
    assert "partial" not in result.stdout


def test_while_contents_come_out(small, cache, workspace):
    room = size_mib(cache / "images") + size_mib(cache / "templates") + 20
    command = ("exec", "-w", str(workspace), "--", "sh", "-c", "head -c 60M /dev/urandom > big")
    result = run_on_small_disk(small, room, COPY_ALL, *command)
    assert "Traceback" not in result.stderr
    assert result.returncode in {123, 125}, result
    assert "disk is full" in result.stderr
    assert not (workspace / "big").exists()


PUBLISH = """
mount -t tmpfs -o size=3m,mode=755 tmpfs "$1" && cp -a "$2/." "$1" && cd "$1" && before=$(ls -AlR --time-style=full-iso)
shift 2
"$@" > "$LUMINAGUARD_HOME/out"
code=$?
[ "$before" = "$(ls -AlR --time-style=full-iso)" ] && cmp a.txt "$LUMINAGUARD_HOME/a.txt" && echo as it was
mount -o remount,size=30m . && "$@" > "$LUMINAGUARD_HOME/again" && ls -A
exit $code
"""


def test_while_publishing(home, workspace, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    shutil.copyfile(workspace / "a.txt", home.folder / "a.txt")
    change = "rm a.txt; echo new > run.sh; mkdir d; for i in 1 2 3 4 5; do head -c 1M /dev/urandom > d/$i; done"
    argv = home.argv("exec", "-w", str(small), "--publish", "always", "--json", "--", "sh", "-c", change)
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", PUBLISH, "sh", str(small), str(workspace), *argv],
        env=home.environment, capture_output=True, text=True, timeout=150, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = json.loads((home.folder / "out").read_text())
    assert (said["status"], said["error"]["type"]) == ("refused", "PublishError"), said
    assert "disk" in said["error"]["message"] or "space" in said["error"]["message"], said
    # Nothing of it was written, nothing is left behind, and with room the same command is published.
    assert result.stdout == "as it was\nd\nlink\nrun.sh\nsub\n", result
    assert json.loads((home.folder / "again").read_text())["status"] == "published"
    assert home.run("ledger", "verify").code == 0
    requests = home.run("approvals", "list", "--all", "--json").json["requests"]
    assert [request["state"] for request in requests] == ["refused", "published"]
