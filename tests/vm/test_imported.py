"""A container image as the root of real machines."""

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from luminaguard.images import lock as locks
from luminaguard.images.build import _busybox
from luminaguard.testing import Home

pytestmark = pytest.mark.vm
HELPER = b"#!/bin/sh\n/bin/touch /tmp/pwned /workspace/pwned\n"
APPLETS = ("sh", "ls", "cat", "true", "touch", "id", "env", "mkdir", "chmod", "sleep", "printf", "test")


@pytest.fixture(scope="module")
def containers(tmp_path_factory, cache) -> Home:
    """A home whose image is made of a container that has nothing but busybox: no libc, no Python, no /usr/lib."""
    folder = tmp_path_factory.mktemp("containers")
    home = Home(folder / "home")
    (home.folder / "cache").mkdir()
    (home.folder / "cache" / "packages").symlink_to(cache / "packages")
    source = folder / "container.tar"
    lock = locks.shipped() or locks.resolve()
    save(source, _busybox(cache / "packages" / lock.role("initramfs")[0].filename))
    built = home.run("image", "build", "--from-oci", str(source), "--json", timeout_s=300)
    assert built.code == 0, built.err
    return home


def save(target: Path, busybox: bytes) -> None:
    """As ``docker save`` writes it."""
    files = [("bin", tarfile.DIRTYPE, b"", "", 0o755), ("bin/busybox", tarfile.REGTYPE, busybox, "", 0o4755),
             *((f"bin/{name}", tarfile.SYMTYPE, b"", "busybox", 0o777) for name in APPLETS),
             ("app", tarfile.DIRTYPE, b"", "", 0o755),
             ("app/hello", tarfile.REGTYPE, b"#!/bin/sh\necho hi\n", "", 0o700),
             *((path, tarfile.REGTYPE, HELPER, "", 0o755) for path in ("bin/false", "sbin/modprobe")),
             ("etc", tarfile.DIRTYPE, b"", "", 0o755), ("etc/shadow", tarfile.REGTYPE, b"root:hash:1\n", "", 0o600),
             ("tmp", tarfile.SYMTYPE, b"", "/etc", 0o777), ("dev", tarfile.DIRTYPE, b"", "", 0o755),
             ("dev/sda", tarfile.BLKTYPE, b"", "", 0o666)]  # fmt: skip
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, data, link, mode in files:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname, info.mode, info.uid = kind, len(data), link, mode, 4711
            tar.addfile(info, io.BytesIO(data))
    layer = out.getvalue()
    config = json.dumps({
        "os": "linux", "architecture": "amd64", "config": {"Env": ["PATH=/app:/bin", "GREETING=hello"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }).encode()  # fmt: skip
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    described = json.dumps([{"Config": name, "RepoTags": None, "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(target, "w") as tar:
        for path, data in (("manifest.json", described), (name, config), ("layer.tar", layer)):
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_command_of_the_container_runs_and_its_effects_come_out(containers, workspace):
    script = """hello; echo $GREETING $PATH $HOME; [ $(id -u) -ge 100000 ] && echo user
cat /etc/shadow; ls /dev/sda /usr/bin; echo new > n; echo t > /tmp/x"""
    told = containers.exec(workspace, "sh", "-c", script, flags=("--publish", "always"), timeout_s=300).json
    assert told["exit_code"] == 0, told
    assert told["stdout"] == "hi\nhello /app:/bin /home/user\nuser\n", told
    assert told["stderr"].count("No such file") == 3, told
    assert (workspace / "n").read_text() == "new\n"
    assert containers.exec(workspace, "python3").code == 127
    assert containers.exec(workspace, "bash").code == 127


def test_the_kernel_starts_no_program_of_the_container(containers, workspace):
    """It would: /bin/false for a crash, /sbin/modprobe for a file of unknown format, as root, confined by nothing."""
    script = r"""printf '\377\376\375\374' > x; chmod +x x; ./x
sh -c 'kill -SEGV $$'; sh -c 'kill -ABRT $$'; sleep 1; ls /tmp; test -e /workspace/pwned && echo pwned"""
    told = containers.exec(workspace, "sh", "-c", script).json
    assert "pwned" not in told["stdout"], told
    assert "x" in {change["path"] for change in told["changeset"]["changes"]}


@pytest.mark.slow
def test_it_passes_the_audit_inside_and_out(containers):
    told = containers.run("image", "audit", "--live", "--json", timeout_s=300)
    faults = {check["name"]: check["faults"] for check in told.json["checks"] if check["verdict"] == "fail"}
    assert (told.code, faults) == (0, {})
    waived = {check["name"] for check in told.json["checks"] if check["verdict"] == "waived"}
    assert "programs" in waived  # busybox, which our own image may not have
    assert all(attempt["verdict"] == "held" for attempt in told.json["attempts"])


def test_a_pool_keeps_its_machines_too(containers, workspace):
    with containers.serving():
        told = containers.exec(workspace, "cat", "a.txt").json
        assert told["stdout"] == "one\ntwo\n"
        assert containers.run("pool", "status", "--json").json["status"]["hits"] == 1


@pytest.mark.slow
def test_the_image_is_listed_with_its_origin_and_another_can_be_used_again(containers, workspace):
    (of_container,) = containers.run("image", "list", "--json").json["images"]
    assert of_container["container"].startswith("sha256:")
    assert containers.run("image", "build", timeout_s=300).code == 0
    assert containers.exec(workspace, "python3", "-c", "print(1)", timeout_s=300).json["stdout"] == "1\n"
    assert containers.run("image", "use", of_container["id"][:8]).code == 0
    assert containers.exec(workspace, "python3").code == 127
    assert containers.run("image", "use", "").code == 123
    assert containers.run("image", "use", "00000000").code == 123


def test_a_damaged_container_builds_nothing(containers, tmp_path):
    spoiled = tmp_path / "spoiled.tar"
    shutil.copyfile(containers.folder.parent / "container.tar", spoiled)
    with spoiled.open("r+b") as file:
        file.seek(-200_000, 2)
        file.write(b"spoiled")
    before = containers.run("image", "list", "--json").json
    result = containers.run("image", "build", "--from-oci", str(spoiled))
    assert (result.code, "container image" in result.err, "Traceback" in result.err) == (123, True, False)
    assert containers.run("image", "list", "--json").json == before
