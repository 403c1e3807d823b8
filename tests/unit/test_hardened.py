"""The kernel that is built here, and the tree that its root is checked against; the build itself: make kernel."""

import gzip
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from luminaguard.errors import ImageBuildFailed, Unavailable
from luminaguard.images import hardened, imported, initramfs, verity
from luminaguard.images.kernel import vmlinux

needs_veritysetup = pytest.mark.skipif(not shutil.which("veritysetup"), reason="veritysetup is not installed")


def test_every_option_is_named_once_and_has_a_value():
    lines = [line for line in hardened.configuration().decode().splitlines() if line and not line.startswith("#")]
    names = [line.partition("=")[0] for line in lines]
    assert all(name.startswith("CONFIG_") and value for name, _, value in (line.partition("=") for line in lines))
    assert len(names) == len(set(names))
    assert not {"CONFIG_MODULES", "CONFIG_BPF_SYSCALL", "CONFIG_USER_NS", "CONFIG_IO_URING"} & set(names)


def test_a_missing_tool_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(hardened.shutil, "which", lambda tool: None if tool == "veritysetup" else f"/usr/bin/{tool}")
    with pytest.raises(Unavailable, match="cryptsetup-bin") as error:
        hardened.compiler()
    assert "make kernel" in error.value.hint


def package(path, name, data):
    """A .deb with one file in it."""
    inside = io.BytesIO()
    with tarfile.open(fileobj=inside, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    payload = inside.getvalue()
    header = b"data.tar".ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"644".ljust(8)
    path.write_bytes(b"!<arch>\n" + header + str(len(payload)).encode().ljust(10) + b"`\n" + payload)
    return path


def test_a_package_without_sources_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(hardened, "compiler", lambda: "gcc 1")
    wrong = package(tmp_path / "linux-source_1_all.deb", "./usr/share/doc/x", b"text")
    with pytest.raises(ImageBuildFailed, match="no kernel sources"):
        hardened.build_kernel(wrong, tmp_path / "kernels", lambda _: None)
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_kernel_that_was_built_is_used_again_unless_it_was_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(hardened, "compiler", lambda: "gcc 1")
    source = package(tmp_path / "linux-source_1_all.deb", "./x", b"")
    code = Path(hardened.__file__).read_bytes()
    parts = (source.name.encode(), hardened.configuration(), hardened.first_program(), b"gcc 1", code)
    kept = tmp_path / "kernels" / hashlib.sha256(b"\0".join(parts)).hexdigest()
    kept.parent.mkdir()
    built = {"vmlinux": b"\x7fELF kernel", "init": b"\x7fELF init"}
    for name, data in built.items():
        hardened._keep(kept, tmp_path / "kernels" / ".building-x", "6.9", built)
        found = hardened.build_kernel(source, kept.parent, lambda _: None)
        assert {"vmlinux": found.elf, "init": found.init} == built
        (kept / name).write_bytes(data.upper())
        with pytest.raises(ImageBuildFailed, match="no kernel sources"):  # it is built again
            hardened.build_kernel(source, kept.parent, lambda _: None)


def entries(archive):
    """The files of an archive as cpio(5) describes it, of the new ASCII format."""
    found, at = {}, 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        start = -(-(at + 110 + fields[11]) // 4) * 4
        name = archive[at + 110 : at + 109 + fields[11]].decode()
        if name == "TRAILER!!!":
            break
        found[name] = archive[start : start + fields[6]]
        at = -(-(start + fields[6]) // 4) * 4
    return found


def test_an_initramfs_without_a_shell_has_the_supervisor_and_how_it_is_started():
    found = entries(initramfs.build(b"busybox", [[("x", b"module")], []], b"\x7fELF init"))
    assert found["init"] == b"\x7fELF init"
    assert {"supervisor", "supervisor.container", "luminaguard/guest/supervisor.py", "root", "dev", "proc"} <= set(
        found
    )
    assert not [path for path in found if path.startswith(("bin", "modules"))]
    script = entries(initramfs.build(b"busybox", [[("x", b"module")], []]))
    assert (script["bin/busybox"], script["modules/x.ko"]) == (b"busybox", b"module")
    for name, python in (("supervisor", ("/usr/bin/python3",)), ("supervisor.container", imported.interpreter())):
        words = found[name].decode().split("\0")
        assert words[: len(python)] == list(python)
        assert words[len(python) : -2] == ["-I", "-S", "-E", "-B", "-c"]
        assert words[-1] == ""
        assert words[-2].encode() in script["init"]


def test_the_first_program_does_what_the_shell_does_for_other_kernels():
    """Of both, the same folder, with the same limits."""
    program, script = hardened.first_program().decode(), initramfs._INIT
    assert f'#define FOLDER "{initramfs.SUPERVISOR_FOLDER}"' in program
    (limits,) = re.findall(r"mode=\d+,size=\w+,nr_inodes=\d+", program)
    assert f",{limits} tmpfs" in script
    assert f'given("{imported.RUNTIME_OPTION}")' in program


@pytest.mark.parametrize("tail", [b"", struct.pack("<I", 12)])
def test_a_kernel_that_was_packed_with_gzip_is_unpacked(tail):
    elf = b"\x7fELF" + bytes(100_000)
    payload = gzip.compress(elf) + tail
    image = bytearray(0x1000)
    image[0x202:0x206], image[0x1F1] = b"HdrS", 1
    struct.pack_into("<II", image, 0x248, 0x1000 - 0x400, len(payload))
    assert vmlinux(bytes(image) + payload) == elf


@needs_veritysetup
def test_the_tree_is_part_of_the_file_and_the_same_for_the_same_root(tmp_path):
    content = b"".join(bytes([i]) * 1000 for i in range(200))
    options = []
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(content)
        options.append(verity.add_tree(tmp_path / name))
    assert options[0] == options[1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    blocks = -(-len(content) // verity.BLOCK)
    assert (
        f'"root,,,ro,0 {blocks * 8} verity 1 /dev/vda /dev/vda 4096 4096 {blocks} {blocks} blake2b-512 ' in options[0]
    )
    assert options[0].endswith(' - 1 panic_on_corruption"')


@needs_veritysetup
def test_a_block_that_was_changed_does_not_verify(tmp_path):
    root = tmp_path / "root"
    root.write_bytes(bytes(200_000))
    options = verity.add_tree(root)
    digest = options.split(" blake2b-512 ")[1].split()[0]
    blocks = -(-200_000 // verity.BLOCK)
    command = ["veritysetup", "verify", "--no-superblock", "--salt", "-", "--hash", "blake2b-512",
               "--data-blocks", str(blocks),
               "--hash-offset", str(blocks * verity.BLOCK), str(root), str(root), digest]  # fmt: skip
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    with root.open("r+b") as file:
        file.seek(100_000)
        file.write(b"x")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert json.dumps(options)  # it goes into the manifest
