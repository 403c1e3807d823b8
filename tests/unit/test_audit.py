"""The audit of the built image: it passes on the real one, and finds each fault that is put into a small one."""

import io
import json
import shutil
import struct
import subprocess
import tarfile

import pytest

from luminaguard.errors import ImageTampered
from luminaguard.images import audit as auditor
from luminaguard.images import elf
from luminaguard.images.build import ImageStore, part_of
from luminaguard.images.manifest import INITRAMFS, KERNEL, PARTS, ROOT, SBOM, Image, Manifest

PASSWD = b"root:x:0:0:root:/root:/usr/sbin/nologin\nuser:x:1000:1000::/home/user:/bin/bash\n"
GOOD = {"etc/passwd": PASSWD, "etc/machine-id": b"uninitialized\n", "usr/bin/tool": b"#!/bin/sh\n"}
BILL = {"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [
    {"name": "a", "version": "1", "hashes": [{"alg": "SHA-256", "content": "0" * 64}]}]}  # fmt: skip
KEY = b"-----BEGIN OPENSSH " + b"PRIVATE KEY-----\n"


def program(*, executable_stack: bool = False) -> bytes:
    """A real program of this host, with or without the right to execute its stack."""
    path = shutil.which("true")
    assert path
    with open(path, "rb") as file:
        blob = bytearray(file.read())
    phoff, _, _, _, size, count = struct.unpack_from("<QQIHHH", blob, 32)
    for index in range(count):
        at = phoff + index * size
        if struct.unpack_from("<I", blob, at)[0] == 0x6474E551:
            struct.pack_into("<I", blob, at + 4, 7 if executable_stack else 6)
    return bytes(blob)


def make_image(folder, extra=(), files=GOOD, bill=BILL, xattrs=False) -> Image:
    """An image whose root has these files, and ``extra`` entries given as (name, fields of TarInfo, data)."""
    folder.mkdir()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, fields, data in (*((n, {}, d) for n, d in files.items()), *extra):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    command = ["mksquashfs", "-", str(folder / ROOT), "-tar", "-comp", "lz4", "-quiet", "-no-progress",
               "-root-mode", "755", *([] if xattrs else ["-no-xattrs"]),
               *([] if any({"uid", "gid"} & set(fields) for _, fields, _ in extra) else ["-all-root"])]  # fmt: skip
    subprocess.run(command, input=out.getvalue(), check=True, capture_output=True, timeout=60)
    for name, data in ((KERNEL, b"k"), (INITRAMFS, b"modules/virtio.ko\0"), (SBOM, json.dumps(bill).encode())):
        (folder / name).write_bytes(data)
    parts = {name: part_of(folder / name) for name in PARTS}
    return Image(folder, Manifest("debian-12", "6.1", "0" * 64, False, "0" * 64, "0" * 64, parts))


def failed(image: Image) -> set[str]:
    return {check.name for check in auditor.audit(image) if check.verdict == "fail"}


def test_the_image_that_is_built_passes_and_says_what_it_waives(cache):
    checks = {check.name: check for check in auditor.audit(ImageStore(cache).current())}
    assert [name for name, check in checks.items() if check.verdict == "fail"] == []
    waived = {name for name, check in checks.items() if check.verdict == "waived"}
    assert waived <= {"elf-pie", "elf-canary", "elf-search-path", "elf-bind-now"}
    for name in waived:
        assert checks[name].reasons
        assert checks[name].waived


def test_a_small_clean_image_passes(tmp_path):
    assert failed(make_image(tmp_path / "i")) == set()
    assert [entry.name for entry in tmp_path.iterdir()] == ["i"], "nothing is left of the unpacked root"


@pytest.mark.parametrize(
    ("check", "entry"),
    [
        ("set-id", ("usr/bin/x", {"mode": 0o4755}, b"x")),
        ("set-id", ("usr/bin/x", {"mode": 0o2755}, b"x")),
        ("set-id", ("usr/bin/x", {"mode": 0o4644}, b"x")),
        ("devices", ("dev/mem", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 1}, b"")),
        ("devices", ("run/pipe", {"type": tarfile.FIFOTYPE}, b"")),
        ("writable-by-all", ("etc/x", {"mode": 0o666}, b"x")),
        ("writable-by-all", ("tmp", {"mode": 0o777, "type": tarfile.DIRTYPE}, b"")),
        ("owner", ("etc/x", {"uid": 1000}, b"x")),
        ("owner", ("etc/x", {"gid": 1000}, b"x")),
        ("programs", ("usr/bin/strace", {}, b"x")),
        ("names", ("usr/bin/a\nb", {}, b"x")),
        ("programs", ("usr/bin/nc", {"type": tarfile.SYMTYPE, "linkname": "tool"}, b"")),
        ("modules", ("lib/modules/6.1/kvm.ko.xz", {}, b"x")),
        ("identity", ("var/lib/systemd/random-seed", {}, b"x")),
        ("keys", ("home/user/.ssh/authorized_keys", {}, b"x")),
        ("keys", ("etc/tls.pem", {}, b"text\n" + KEY)),
        ("accounts", ("etc/shadow", {}, b"root:$6$abc$def:1::::::\n")),
        ("elf-nx", ("usr/bin/x", {}, program(executable_stack=True))),
        ("elf", ("usr/bin/x", {}, program()[:70])),
    ],
)  # fmt: skip
def test_each_fault_is_found(tmp_path, check, entry):
    assert failed(make_image(tmp_path / "i", [entry])) == {check}


@pytest.mark.parametrize(
    ("check", "name", "data"),
    [
        ("accounts", "etc/passwd", PASSWD.replace(b"root:x", b"root:$6$abc")),
        ("accounts", "etc/passwd", PASSWD.replace(b"/usr/sbin/nologin", b"/bin/bash")),
        ("accounts", "etc/passwd", PASSWD + b"toor:x:0:0::/:/usr/sbin/nologin\n"),
        ("identity", "etc/machine-id", b"0123456789abcdef0123456789abcdef\n"),
    ],
)
def test_faults_of_files_that_every_image_has(tmp_path, check, name, data):
    assert failed(make_image(tmp_path / "i", files=GOOD | {name: data})) == {check}


def test_an_image_that_could_carry_file_capabilities_fails(tmp_path):
    capability = {"pax_headers": {"SCHILY.xattr.user.x": "1"}}
    assert failed(make_image(tmp_path / "i", [("usr/bin/x", capability, b"x")], xattrs=True)) == {"read-only"}


def test_packages_without_a_digest_and_images_over_budget_fail(tmp_path, monkeypatch):
    bill = json.loads(json.dumps(BILL))
    bill["components"][0]["hashes"][0]["content"] = "missing"
    assert failed(make_image(tmp_path / "a", bill=bill)) == {"sbom"}
    image = make_image(tmp_path / "b")
    monkeypatch.setattr(auditor, "MAX_FILES", 3)
    assert failed(image) == {"budget"}
    monkeypatch.setattr(auditor, "MAX_ROOT_BYTES", 10)
    assert failed(image) == {"budget"}


def test_nothing_is_said_about_an_image_that_was_tampered_with(tmp_path):
    image = make_image(tmp_path / "i")
    (image.folder / ROOT).write_bytes((image.folder / ROOT).read_bytes() + b"x")
    with pytest.raises(ImageTampered):
        auditor.audit(image)


def test_a_waiver_covers_what_it_names_and_nothing_else(tmp_path):
    names = {"usr/bin/python3.11", "usr/bin/python3.11x", "usr/bin/other"}
    check = auditor._judged("elf-pie", "", sorted(names))
    assert check.verdict == "fail"
    assert set(check.waived) == {"usr/bin/python3.11"}
    assert set(check.faults) == names - {"usr/bin/python3.11"}


def test_what_an_elf_file_says_of_itself():
    found = elf.hardening(program())
    assert (found.pie, found.nx) == (True, True)
    assert not elf.hardening(program(executable_stack=True)).nx
    with pytest.raises(ValueError, match="whole ELF"):
        elf.hardening(program()[:70])


def test_the_command_line_says_it_and_its_status_is_the_verdict(home):
    told = home.run("image", "audit")
    assert told.code == 0, told
    assert "waived  elf-pie" in told.out
    found = home.run("image", "audit", "--json").json
    assert found["status"] == "pass"
    assert found["fail"] == 0
    assert found["pass"] + found["waived"] == len(found["checks"])
