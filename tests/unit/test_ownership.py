"""Whose the files of a packed disk are: what the guest puts in front of it and behind it, on real images."""

import os
import re
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.guest import confine, machine, ownership
from luminaguard.guest.ownership import MEMORY, Joined
from luminaguard.workspaces.pack import WorkspaceImages
from luminaguard.workspaces.state import Limits, read_state

BLOCK = MEMORY // 2
SIZE = 1 << 20
"""Of the disk as the guest sees it: more than there is of the image."""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A packed workspace with a file of each kind of mode, and one that is longer than a block."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "sub").mkdir(mode=0o700)
    (folder / "sub" / "private").write_text("secret\n")
    (folder / "sub" / "private").chmod(0o600)
    (folder / "large").write_bytes(os.urandom(300_000))
    (folder / "link").symlink_to("large")
    packed = tmp_path_factory.mktemp("cache")
    os.close(WorkspaceImages(packed).open(read_state(folder, Limits(1000, 1 << 30))))
    (found,) = (packed / "workspaces").glob("*.squashfs")
    return found, folder


def joined(disk, memory, size=SIZE):
    memory.write_bytes(bytes(2 * MEMORY))
    return Joined("none", str(disk), str(memory), MEMORY, size)


def seen(disk, memory, size=SIZE):
    """What the guest's kernel finds behind the joined device."""
    blocks = memory.read_bytes()[MEMORY:]
    between = disk.read_bytes()[BLOCK:].ljust(size - 2 * BLOCK, b"\0")
    return blocks[:BLOCK] + between + blocks[BLOCK:]


def test_all_belongs_to_the_user_and_nothing_else_is_different(image, tmp_path):
    disk, folder = image
    for owner in (100_000, 999_999, 1, 2**31 - 1, 1000):
        joined(disk, tmp_path / "memory").give_to(owner)
        (tmp_path / "seen").write_bytes(seen(disk, tmp_path / "memory"))
        listing = subprocess.run(("unsquashfs", "-lln", tmp_path / "seen"), capture_output=True, text=True, check=True)
        owners = re.findall(r"^[a-z-]{10} (\d+/\d+) ", listing.stdout, re.MULTILINE)
        assert owners == [f"{owner}/{owner}"] * 5, listing.stdout
        assert re.search(r"^-rw------- .* squashfs-root/sub/private$", listing.stdout, re.MULTILINE)
        content = subprocess.run(("unsquashfs", "-cat", tmp_path / "seen", "large"), capture_output=True, check=True)
        assert content.stdout == (folder / "large").read_bytes()
    assert disk.read_bytes()[:4] == b"hsqs", "the image itself is only read"


def test_a_disk_that_was_changed_since_is_read_again(image, tmp_path):
    disk, _ = image
    both = joined(tmp_path / "disk", tmp_path / "memory")
    for mark in (b"A", b"B"):
        (tmp_path / "disk").write_bytes(disk.read_bytes()[:200] + mark * 4000 + disk.read_bytes()[4200:])
        both.give_to(100_000)
        assert seen(tmp_path / "disk", tmp_path / "memory")[200:BLOCK] == mark * (BLOCK - 200)


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, b"hsqt"), (0, bytes(BLOCK)), (26, b"\x02\0"), (26, b"\0\0"), (26, b"\x01\x01"), (56, bytes(8))],
)  # fmt: skip
def test_what_is_no_image_of_ours_is_refused_and_nothing_is_written(image, tmp_path, offset, data):
    disk, _ = image
    spoilt = bytearray(disk.read_bytes())
    spoilt[offset : offset + len(data)] = data
    (tmp_path / "disk").write_bytes(spoilt)
    both = joined(tmp_path / "disk", tmp_path / "memory")
    with pytest.raises(ValueError, match="no squashfs of one owner"):
        both.give_to(100_000)
    assert not any((tmp_path / "memory").read_bytes())


def test_an_image_that_reaches_into_the_table_is_refused(image, tmp_path):
    disk, _ = image
    exact = int.from_bytes(disk.read_bytes()[40:48], "little")
    size = -(-exact // BLOCK) * BLOCK + BLOCK
    joined(disk, tmp_path / "memory", size).give_to(100_000)
    with pytest.raises(ValueError, match="larger than"):
        joined(disk, tmp_path / "memory", size - BLOCK).give_to(100_000)


def test_a_disk_without_a_first_block_is_refused(tmp_path):
    (tmp_path / "disk").write_bytes(b"hsqs")
    with pytest.raises(ValueError, match="no first block"):
        joined(tmp_path / "disk", tmp_path / "memory").give_to(100_000)


FIELD = st.text(st.characters(exclude_characters=":\n\r", codec="ascii", exclude_categories=("Cc",)), max_size=8)
LINE = st.lists(FIELD | st.just("1000"), min_size=1, max_size=7).map(":".join)


@given(st.lists(LINE, max_size=6), st.integers(100_000, 999_999))
def test_only_numbers_of_users_and_groups_change_in_the_files_of_accounts(lines, user):
    text = "".join(f"{line}\n" for line in lines)
    again = str(user).join(machine.around_user(text)).splitlines()
    assert len(again) == len(lines)
    for line, before in zip(again, lines, strict=True):
        for column, (field, was) in enumerate(zip(line.split(":"), before.split(":"), strict=True)):
            assert field == (str(user) if was == "1000" and column in (2, 3) else was)


@pytest.mark.parametrize("user", [0, -1])
def test_a_command_is_never_root(user):
    with pytest.raises(PermissionError, match="never root"):
        confine.Confinement.become(user)


def test_a_request_to_device_mapper_has_the_shape_of_the_kernels_headers(monkeypatch):
    asked = []
    monkeypatch.setattr("fcntl.ioctl", lambda fd, request, buffer, _: asked.append((fd, request, bytes(buffer))))
    ownership._ask(7, ownership._LOAD, "name", ((0, 8, "1:0 16"), (8, 100, "254:16 8")))
    ((fd, request, buffer),) = asked
    assert (fd, request) == (7, 0xC138FD09)  # _IOWR(0xfd, 9, struct dm_ioctl), of 312 bytes
    assert buffer[12:24] == len(buffer).to_bytes(4, "little") + (312).to_bytes(4, "little") + (2).to_bytes(4, "little")
    assert buffer[48:53] == b"name\0"
    second = 312 + int.from_bytes(buffer[312 + 20 : 312 + 24], "little")
    assert second % 8 == 0
    assert buffer[second : second + 16] == (8).to_bytes(8, "little") + (100).to_bytes(8, "little")
    assert buffer[second + 24 : second + 30] == b"linear"
    assert buffer[second + 40 : second + 49] == b"254:16 8\0"
