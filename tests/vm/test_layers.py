"""A state of a workspace shown as a layer on an older one: the machine must see exactly the state."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import anyio
import pytest

from luminaguard.effects import DirEntry, FileEntry, LinkEntry
from luminaguard.microvm.machine import Command
from luminaguard.microvm.pool import PoolLimits
from luminaguard.runtime import Runtime
from luminaguard.settings import Folders, load_settings
from luminaguard.workspaces import pack
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.state import Limits, read_state

pytestmark = pytest.mark.vm
LIMITS = Limits(10_000, 1 << 28)

LISTING = r"""
import hashlib, json, os, stat
found = {}
for folder, folders, files in os.walk(b'.'):
    for name in folders + files:
        path = os.path.join(folder, name)[2:]
        info = os.lstat(path)
        row = [int(info.st_mtime)]
        if stat.S_ISLNK(info.st_mode):
            row = ['link', os.fsdecode(os.readlink(path))]
        elif stat.S_ISDIR(info.st_mode):
            row += ['dir', info.st_mode & 0o777]
        else:
            row += ['file', info.st_mode & 0o777, hashlib.sha256(open(path, 'rb').read()).hexdigest()]
        found[os.fsdecode(path)] = row
print(json.dumps(found))
"""


def expected(state) -> dict:
    rows = {}
    for path, entry in state.entries.items():
        match entry:
            case LinkEntry(target):
                rows[path] = ["link", target]
            case DirEntry(mode):
                rows[path] = [state.times[path], "dir", mode]
            case FileEntry(mode, _, sha256):
                rows[path] = [state.times[path], "file", mode, sha256]
    return rows


def make(folder: Path) -> None:
    for number in range(6):
        (folder / f"d{number}" / "deep").mkdir(parents=True)
        for name in "abc":
            (folder / f"d{number}" / name).write_text(f"{number}{name}\n")
            (folder / f"d{number}" / "deep" / name).write_text(f"deep {number}{name}\n")
    (folder / "link").symlink_to("d0/a")
    os.link(folder / "d1" / "a", folder / "hard")
    (Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff"))).write_text("odd")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def change(folder: Path, seed: int) -> None:
    """Some of everything, on what is there."""
    chance = random.Random(seed)
    for _ in range(12):
        paths = sorted(folder.rglob("*"))
        path = chance.choice(paths)
        match chance.randrange(9):
            case 0:
                remove(path)
            case 1 if path.is_file() and not path.is_symlink():  # never through a link: it may lead anywhere
                path.write_text(f"changed {chance.random()}\n")
            case 2 if not path.is_symlink():
                path.chmod(0o700 if path.is_dir() else chance.choice([0o600, 0o755]))
            case 3:  # another kind at the same name
                was_folder = path.is_dir() and not path.is_symlink()
                remove(path)
                if was_folder:
                    path.write_text("a file now\n")
                else:
                    path.mkdir()
                    (path / "inside").write_text("new\n")
            case 4 if path.is_dir() and not path.is_symlink():  # gone and there again, with something else in it
                shutil.rmtree(path)
                path.mkdir()
                (path / "only").write_text("only this\n")
            case 5:
                target = folder / f"moved{chance.randrange(1000)}"
                path.rename(target)
            case 6 if not path.is_symlink():
                os.utime(path, (1_000_000_000, 1_000_000_000))
            case 7:
                (folder / f"l{chance.randrange(1000)}").symlink_to("/nonexistent/target")
            case _:
                (folder / f"n{chance.randrange(1000)}").write_text("new\n")


@pytest.mark.slow
def test_every_state_is_shown_exactly(home, tmp_path, monkeypatch):
    monkeypatch.setenv("LUMINAGUARD_HOME", str(home.folder))
    monkeypatch.setattr(pack, "_LAYERED_FROM", 0)
    folders = Folders.from_environment().ensure()
    runtime = Runtime(load_settings(folders), folders)
    images = WorkspaceImages(tmp_path / "images")
    layers = 0

    async def scenario() -> None:
        nonlocal layers
        async with runtime.open_pool(PoolLimits(2, 2)) as pool:
            for seed in range(10):
                folder = tmp_path / f"w{seed}"
                make(folder)
                for fd in images.open_layered(read_state(folder, LIMITS)):
                    if fd >= 0:
                        os.close(fd)
                for step in range(2):  # the second one is shown on the same base again
                    change(folder, seed * 10 + step)
                    state = read_state(folder, LIMITS)
                    disks = [fd for fd in images.open_layered(state) if fd >= 0]
                    layers += len(disks) - 1
                    said = bytearray()

                    async def output(_stream: int, data: bytes, said: bytearray = said) -> None:
                        said.extend(data)

                    if seed % 2:
                        await pool.wait_ready(1)
                    async with pool.machine(*disks) as vm:
                        outcome = await vm.run(Command(("python3", "-c", LISTING)), output=output, timeout_s=60)
                    assert outcome.exit_code == 0, said
                    assert json.loads(said) == expected(state), (seed, step)
                    for fd in disks:
                        os.close(fd)

    async def bounded() -> None:
        with anyio.fail_after(170):
            await scenario()

    anyio.run(bounded)
    runtime.close()
    assert layers == 20


def test_a_large_folder_is_packed_once_and_its_changes_go_both_ways(home, tmp_path):
    folder, images = tmp_path / "large", home.folder / "cache" / "workspaces"
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    for number in range(1100):
        path = folder / f"d{number % 20}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number}\n")
    script = "cat d0/f0; echo changed > d1/f1; rm -r d2; mv d3/f3 d3/renamed"
    first = home.exec(folder, "sh", "-c", script, flags=("--publish", "always"))
    assert (first.code, first.json["stdout"]) == (0, "0\n")
    (folder / "d0" / "f0").write_text("by the user\n")
    (pointer,) = [path for path in images.glob("*.base") if name in path.name]
    before = set(images.glob("*.squashfs"))
    script = "cat d0/f0 d1/f1 d3/renamed; ls d2 2>&1; rm d4/f4"
    second = home.exec(folder, "sh", "-c", script, flags=("--publish", "always"))
    assert second.json["stdout"] == "by the user\nchanged\n3\nls: cannot access 'd2': No such file or directory\n"
    assert not (folder / "d4" / "f4").exists()
    new = set(images.glob("*.squashfs")) - before
    assert new
    assert json.loads(pointer.read_text())["rows"]["d4/f4"]  # the first state still is the base


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1, "key": "../../x", "rows": {}}', '{"format": 2}'])
def test_a_damaged_base_is_no_base(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(pack, "_LAYERED_FROM", 0)
    folder = tmp_path / "w"
    make(folder)
    images = WorkspaceImages(tmp_path / "images")
    os.close(images.open_layered(read_state(folder, LIMITS))[0])
    (pointer,) = images.folder.glob("*.base")
    pointer.write_text(damage)
    (folder / "n").write_text("new")
    base, layer = images.open_layered(read_state(folder, LIMITS))
    assert layer == -1
    os.close(base)


def test_a_base_that_was_written_to_is_no_base(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_LAYERED_FROM", 0)
    folder = tmp_path / "w"
    make(folder)
    images = WorkspaceImages(tmp_path / "images")
    first = images.open_layered(read_state(folder, LIMITS))[0]
    writer = os.open(f"/proc/self/fd/{first}", os.O_RDWR)
    os.pwrite(writer, b"poison", 300)
    (folder / "n").write_text("new")
    base, layer = images.open_layered(read_state(folder, LIMITS))
    assert layer == -1
    for fd in (first, writer, base):
        os.close(fd)


def test_too_much_change_is_packed_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "_LAYERED_FROM", 0)
    monkeypatch.setattr(pack, "_LAYER_FILES", 5)
    folder = tmp_path / "w"
    make(folder)
    images = WorkspaceImages(tmp_path / "images")
    os.close(images.open_layered(read_state(folder, LIMITS))[0])
    shutil.rmtree(folder / "d1")
    shutil.rmtree(folder / "d2")
    (folder / "d3" / "a").write_text("x")
    (folder / "d4" / "a").write_text("x")
    (folder / "d5" / "a").write_text("x")
    base, layer = images.open_layered(read_state(folder, LIMITS))
    assert layer == -1
    os.close(base)
