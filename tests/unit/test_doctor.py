"""Doctor tries what is needed, and names the remedy of exactly what it found."""

from dataclasses import replace

import pytest

from luminaguard.cli import doctor
from luminaguard.cli.doctor import Finding, _remedy
from luminaguard.cli.host_checks import host_notes
from luminaguard.microvm.qemu import probe
from luminaguard.runtime import Runtime
from luminaguard.settings import Folders, load_settings

CHECKS = ["settings", "hypervisor", "firecracker", "kvm", "host", "tools", "backend", "jail", "disk", "image",
          "machine", "database", "publishes", "mcp"]  # fmt: skip


@pytest.fixture
def runtime(bare_home, monkeypatch):
    monkeypatch.setenv("LUMINAGUARD_HOME", str(bare_home.folder))
    folders = Folders.from_environment().ensure()
    made = Runtime(load_settings(folders), folders)  # without an image, unlike the suite's own
    yield made
    made.close()


@pytest.mark.vm
def test_where_everything_is_there_it_says_so_and_how_it_was_tried(home):
    told = home.run("doctor", "--json")
    found = {check["check"]: check for check in told.json["checks"]}
    assert list(found) == CHECKS
    assert (told.code, told.json["status"]) == (0, "ok"), told.out
    assert "a clone ran /bin/true" in found["machine"]["detail"]
    assert "namespaces" in found["jail"]["detail"]
    assert "verified" in found["image"]["detail"]
    assert found["publishes"]["level"] == "ok"
    for check in told.json["checks"]:
        assert check["level"] in {"ok", "note"}
        assert check["level"] == "ok" or check["remedy"] or check["check"] == "firecracker"
    people = home.run("doctor").out.splitlines()
    assert [line.split()[1] for line in people if line[:4] in {"ok  ", "note", "FAIL"}] == CHECKS


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, "kernel.apparmor_restrict_unprivileged_userns=0"),
        ({"kernel/unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone=1"),
        ({"user/max_user_namespaces": "0"}, "user.max_user_namespaces=10000"),
        ({"kernel/unprivileged_userns_clone": "1", "user/max_user_namespaces": "0"}, "max_user_namespaces=10000"),
        ({"kernel/apparmor_restrict_unprivileged_userns": "0", "user/max_user_namespaces": "99"}, "otherwise"),
        ({}, "otherwise"),
    ],
)
def test_the_setting_that_forbids_user_namespaces_is_named(tmp_path, files, remedy):
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(value + "\n")
    assert remedy in _remedy("otherwise", tmp_path)


@pytest.mark.parametrize(("version", "level"), [((9, 2, 0), "note"), ((10, 0, 2), "ok"), ((11, 0, 0), "ok")])
def test_qemu_10_is_recommended(runtime, monkeypatch, version, level):
    real = probe.find_qemu(runtime.settings.qemu)
    monkeypatch.setattr(probe, "find_qemu", lambda _name: replace(real, version=version))
    found = doctor._hypervisor(runtime)
    assert found.level == level
    assert ("10.0 or newer" in found.remedy) == (level == "note")


def test_a_full_disk_is_found(runtime, monkeypatch):
    usage = doctor.shutil.disk_usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _path: usage)
    found = doctor._disk(runtime)
    assert (found.level, found.remedy) == ("fail", "free 1024 MiB there")


def test_a_missing_tool_is_named_with_its_package(runtime, monkeypatch):
    real = doctor.shutil.which
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name in {"bwrap", "mksquashfs"} else real(name))
    found = doctor._tools(runtime)
    assert found == Finding("tools", "fail", "missing: bubblewrap, squashfs-tools",
                            "apt-get install bubblewrap squashfs-tools")  # fmt: skip


def test_an_interrupted_publish_is_told(runtime, monkeypatch):
    monkeypatch.setattr(type(runtime.decisions), "recover", lambda _self: ["req-1: undone after an interruption"])
    found = doctor._publishes(runtime)
    assert (found.level, found.detail) == ("note", "req-1: undone after an interruption")


def test_a_jail_that_this_host_does_not_allow_fails_with_the_remedy(runtime, monkeypatch):
    from luminaguard.errors import JailUnavailable

    def refused() -> dict[str, str]:
        raise JailUnavailable("bwrap: No permissions to create new namespace", hint="see doctor")

    monkeypatch.setattr(runtime, "try_jail", refused)
    found = doctor._jail(runtime)
    assert found.level == "fail"
    assert found.remedy
    monkeypatch.setattr(runtime, "try_jail", lambda: {"namespaces": "on", "cgroup": "not delegated"})
    assert doctor._jail(runtime).detail == "namespaces; without cgroup (not delegated)"


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("proc/swaps", "Filename Type\n/dev/sda2 partition\n", "swap is on"),
        ("sys/kernel/mm/ksm/run", "1\n", "KSM"),
        ("sys/devices/system/cpu/smt/control", "on\n", "SMT"),
        ("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable: no microcode\n", "vulnerable to mds"),
    ],
)
def test_what_weakens_machines_on_this_host_is_a_note(tmp_path, path, content, words):
    assert list(host_notes(tmp_path)) == []
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(content)
    ((what, remedy),) = host_notes(tmp_path)
    assert words in what
    assert remedy


def test_a_kvm_device_that_is_open_to_everyone_is_a_note(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "kvm").touch(0o600)
    assert list(host_notes(tmp_path)) == []
    (tmp_path / "dev" / "kvm").chmod(0o666)
    assert "open to everyone" in next(host_notes(tmp_path))[0]
