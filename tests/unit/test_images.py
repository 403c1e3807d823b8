"""Building guest images: reproducible, complete, bounded, and clear when something is wrong."""

import fcntl
import gzip
import io
import json
import mmap
import os
import subprocess
import tarfile
import threading

import lz4.block
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.errors import ImageBuildFailed, ImageMissing, ImageTampered
from luminaguard.images import build, deb, elf, kernel, lock, rootfs
from luminaguard.images.build import ImageStore
from luminaguard.images.manifest import Image, check_owner, seal
from luminaguard.testing import Home


def make_deb(path, members):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = gzip.compress(raw.getvalue())
    header = f"{'data.tar.gz':16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(data):<10}`\n".encode()
    path.write_bytes(b"!<arch>\n" + header + data)
    return path


def info(name, mode=0o644, kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.mode, member.type, member.linkname = mode, kind, target
    return member


def test_packages_merge_without_set_id_bits_devices_or_documentation(tmp_path):
    package = make_deb(
        tmp_path / "x_1_amd64.deb",
        [
            (info("./bin/su", 0o4755), b"su"),
            (info("./usr/share/doc/x/readme"), b"doc"),
            (info("./dev/null", kind=tarfile.CHRTYPE), b""),
            (info("./usr/bin/alias", kind=tarfile.LNKTYPE, target="./bin/su"), b""),
            (info("./usr/lib/python3.11/m.py"), b"x = 1\n"),
        ],
    )
    tree = rootfs.build_tree([package], lambda _: None)
    assert tree["usr/bin/su"].mode == 0o755
    assert tree["usr/bin/alias"].data == b"su"
    assert "usr/share/doc/x/readme" not in tree
    assert "dev/null" not in tree
    assert tree["bin"].target == "usr/bin"
    assert all(not node.mode & 0o6000 for node in tree.values())
    one, two = io.BytesIO(), io.BytesIO()
    rootfs.write_tar(tree, one)
    rootfs.write_tar(rootfs.build_tree([package], lambda _: None), two)
    assert one.getvalue() == two.getvalue()


def test_a_package_that_escapes_is_refused(tmp_path):
    package = make_deb(tmp_path / "x_1_amd64.deb", [(info("../../etc/passwd"), b"x")])
    with pytest.raises(ImageBuildFailed):
        rootfs.build_tree([package], lambda _: None)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_no_package(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("deb") / "x.deb"
    path.write_bytes(b"!<arch>\n" + data)
    with pytest.raises(ImageBuildFailed):
        list(deb.data_members(path))


def bzimage(payload: bytes) -> bytes:
    head = bytearray(0x400)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    head[0x248:0x250] = (0).to_bytes(4, "little") + len(payload).to_bytes(4, "little")
    return bytes(head) + payload


def test_a_kernel_is_unpacked_from_the_kernels_own_lz4_framing():
    image = b"\x7fELF" + bytes(range(256)) * 100
    block = lz4.block.compress(image, store_size=False)
    payload = b"\x02\x21\x4c\x18" + len(block).to_bytes(4, "little") + block + len(image).to_bytes(4, "little")
    assert kernel.vmlinux(bzimage(payload)) == image


@pytest.mark.parametrize("payload", [b"unknown!", b"\x1f\x8b" + bytes(20), b"\x02\x21\x4c\x18" + bytes(20), b""])
def test_a_kernel_that_cannot_be_unpacked_is_refused(payload):
    with pytest.raises(ImageBuildFailed):
        kernel.vmlinux(bzimage(payload))


def test_a_kernel_that_lacks_what_machines_need_is_refused(tmp_path):
    elf_file = b"\x7fELF" + bytes(100)
    block = lz4.block.compress(elf_file, store_size=False)
    payload = b"\x02\x21\x4c\x18" + len(block).to_bytes(4, "little") + block + len(elf_file).to_bytes(4, "little")
    folder = "lib/modules/6.1/kernel/drivers"
    package = make_deb(tmp_path / "linux_1_amd64.deb", [
        (info("boot/vmlinuz-6.1"), bzimage(payload)), (info(f"{folder}/brd.ko"), b"\0depends=\0"),
        (info("lib/modules/6.1/modules.builtin"), b"kernel/drivers/md/dm-mod.ko\nkernel/fs/squashfs/squashfs.ko\n"),
    ])  # fmt: skip
    with pytest.raises(ImageBuildFailed, match=r"The kernel 6.1 has no overlay, virtio_blk: machines"):
        kernel.extract([package], (("brd", "dm_mod", "overlay", "squashfs", "virtio_blk"), ("vsock",)))
    found = kernel.extract([package], (("brd", "dm_mod", "squashfs"), ("vsock",)))
    assert [[name for name, _ in group] for group in found.modules] == [["brd"], []]


def test_the_shipped_locks_are_whole_and_name_no_address():
    from importlib import resources

    for entry in (resources.files("luminaguard.images") / "locks").iterdir():
        text = entry.read_text()
        assert "http" not in text
        found = lock.PackageLock.loads(text, entry.name)
        assert found.dumps() == text
        assert len(found.role("kernel")) >= 1
        assert all(len(p.sha256) == 64 for p in found.packages)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "distribution": "x", "packages": [{}]}']
)
def test_a_bad_lock_is_refused(text):
    with pytest.raises(ImageBuildFailed):
        lock.PackageLock.loads(text, "x")


def test_elf_dependencies_of_a_real_program():
    with open("/bin/ls", "rb") as file:
        assert "libc.so.6" in elf.needed(file.read())


def test_without_an_image_and_with_a_strange_current(tmp_path):
    store = ImageStore(tmp_path)
    with pytest.raises(ImageMissing):
        store.current()


@pytest.mark.vm
def test_the_same_packages_give_the_same_image(tmp_path, cache):
    """A forced second build, from the same downloads, has the same digest."""
    own = tmp_path / "home"
    (own / "cache").mkdir(parents=True)
    (own / "cache" / "packages").symlink_to(cache / "packages")
    built = Home(own).run("image", "build", "--force", "--json", timeout_s=300)
    assert built.code == 0, built.err
    assert json.loads(built.out)["id"] == (cache / "images" / "current").read_text().strip()
    (own / "cache" / "images" / ".building-1").mkdir()
    assert Home(own).run("image", "build", timeout_s=300).code == 0
    assert not (own / "cache" / "images" / ".building-1").exists()


@pytest.mark.parametrize("spoil", ["folder", "parent", "link"])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, spoil):
    parent, folder = tmp_path / "images", tmp_path / "images" / "id"
    folder.mkdir(parents=True)
    check_owner(folder)
    match spoil:
        case "folder":
            folder.chmod(0o775)
        case "parent":
            parent.chmod(0o777)
        case "link":
            folder.rename(tmp_path / "elsewhere")
            folder.symlink_to("../elsewhere")
            (tmp_path / "elsewhere").chmod(0o707)
    with pytest.raises(ImageTampered, match=r"others can write") as caught:
        check_owner(folder)
    assert caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")
@pytest.mark.parametrize("part", ["id", ""])
def test_a_folder_of_another_user_is_refused(tmp_path, part):
    folder = tmp_path / "images" / "id"
    folder.mkdir(parents=True)
    os.chown(tmp_path / "images" / part, 4711, 4711)
    with pytest.raises(ImageTampered, match="another user"):
        check_owner(folder)


def test_a_talkative_mksquashfs_is_not_waited_for(tmp_path, monkeypatch):
    """It may say more than a pipe holds while it is still being written to."""
    fake = tmp_path / "mksquashfs"
    fake.write_text("#!/bin/sh\nhead -c 500000 /dev/zero | tr '\\0' x >&2; cat > /dev/null; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tree = {"f": rootfs.Node("file", 0o644, bytes(1 << 20))}
    with pytest.raises(ImageBuildFailed, match="mksquashfs failed: x"):
        build.squash(tree, tmp_path / "out")


@pytest.mark.parametrize("target", ["/" + "a" * 100, "/ä", "./x", "../" + "b" * 120, "/" + "c" * 300])
def test_links_lead_where_they_should_however_long_they_are(tmp_path, target):
    build.squash(
        {"usr": rootfs.Node("dir", 0o755), "usr/link": rootfs.Node("link", 0o777, target=target)}, tmp_path / "d"
    )
    subprocess.run(["unsquashfs", "-q", "-n", "-d", tmp_path / "out", tmp_path / "d"], check=True, capture_output=True)
    assert os.readlink(tmp_path / "out" / "usr" / "link") == target


def test_a_manifest_without_an_end_is_refused_in_words(tmp_path):
    folder = tmp_path / "images" / ("0" * 64)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ImageTampered, match="cannot be read"):
        Image.load(folder)


def test_a_memory_file_that_is_still_held_is_sealed_once_it_is_let_go():
    memory = os.memfd_create("held", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, mmap.PAGESIZE)
    held = mmap.mmap(memory, mmap.PAGESIZE)
    with pytest.raises(OSError, match="busy"):
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    letting_go = threading.Timer(0.1, held.close)
    letting_go.start()
    seal(memory)
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"x", 0)
    os.close(memory)
    letting_go.join()


def test_a_memory_file_that_is_never_let_go_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr("luminaguard.images.manifest._SEAL_S", 0.05)
    memory = os.memfd_create("held", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, mmap.PAGESIZE)
    with mmap.mmap(memory, mmap.PAGESIZE), pytest.raises(OSError, match="busy"):
        seal(memory)
    os.close(memory)
