"""The command line on bad input: a clear sentence, a hint, a documented code, no traceback."""

import json
import os
import subprocess
import sys
import time

import pytest

from luminaguard import errors
from luminaguard.testing import Home


def says(result, code, *words):
    assert result.code == code, (result.code, result.err)
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err
    assert "hint:" in result.err


def test_the_version_needs_no_heavy_import(bare_home):
    script = (
        "import sys; sys.argv = ['l', '--version']; from luminaguard.__main__ import main; main(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("luminaguard ")
    for heavy in ("typer", "pydantic", "sqlalchemy", "rich", "anyio", "cryptography"):
        assert heavy not in done.stdout.split()


def test_help_loads_none_of_the_parts():
    script = (
        "import sys; sys.argv = ['l', '--help']\nfrom luminaguard.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for heavy in ("pydantic", "sqlalchemy", "cryptography", "anyio"):
        assert heavy not in done.stdout.split()


def test_without_an_image_the_hint_says_how_to_build_one(bare_home, workspace):
    says(bare_home.run("exec", "--workspace", str(workspace), "--", "true"), 123, "guest image", "image build")


@pytest.mark.parametrize("name", ["missing", "file"])
def test_bad_qemu(bare_home, name, tmp_path):
    fake = tmp_path / "qemu"
    fake.write_text("#!/bin/sh\necho QEMU emulator version 5.2.0\n")
    fake.chmod(0o755)
    qemu = str(fake) if name == "file" else "/nonexistent/qemu"
    result = bare_home.run("doctor", LUMINAGUARD_QEMU=qemu)
    assert result.code == 123
    assert ("too old" if name == "file" else "not found") in result.out
    assert "remedy: Install it" in result.out


@pytest.mark.parametrize(
    ("text", "words"),
    [("memory_mib = 'many'", "memory_mib"), ("memory_mib = ", "cannot be read"), ("unknown = 1", "unknown"),
     ("timeout_s = -1", "timeout_s"), ("\x00", "cannot be read")],
)  # fmt: skip
def test_bad_settings(bare_home, text, words):
    (bare_home.folder / "config").mkdir(mode=0o700)
    (bare_home.folder / "config" / "luminaguard.toml").write_text(text)
    says(bare_home.run("approvals", "list"), 123, words)


def test_bad_environment(bare_home):
    says(bare_home.run("approvals", "list", LUMINAGUARD_MEMORY_MIB="x"), 123, "memory_mib")


def test_flags_beat_the_environment_which_beats_the_file(bare_home, monkeypatch):
    from luminaguard.settings import Folders, load_settings

    monkeypatch.setenv("LUMINAGUARD_HOME", str(bare_home.folder))
    folders = Folders.from_environment().ensure()
    (folders.config / "luminaguard.toml").write_text("memory_mib = 512\nprocesses = 99\ntimeout_s = 5\n")
    monkeypatch.setenv("LUMINAGUARD_PROCESSES", "77")
    monkeypatch.setenv("LUMINAGUARD_TIMEOUT_S", "6")
    settings = load_settings(folders, {"timeout_s": 7.0, "publish": None})
    assert (settings.memory_mib, settings.processes, settings.timeout_s) == (512, 77, 7.0)


def test_unknown_requests(bare_home):
    for verb in ("show", "approve", "deny"):
        says(bare_home.run("approvals", verb, "req-nope"), 122, "no request")


def test_errors_are_json_when_asked_for(bare_home, workspace):
    result = bare_home.exec(workspace, "true")
    assert result.code == 123
    assert result.json["error"]["type"] == "ImageMissing"
    assert result.json["error"]["hint"]


def test_state_is_private(bare_home):
    assert bare_home.run("ledger", "verify").code == 0
    for path in [bare_home.folder / "state", *(bare_home.folder / "state").rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert path.stat().st_mode & 0o777 == wanted, path


def test_debug_shows_the_traceback(bare_home):
    assert "Traceback" in bare_home.run("--debug", "approvals", "show", "x").err


def test_every_error_is_in_the_tree_and_has_an_exit_code():
    for name in errors.__all__:
        value = getattr(errors, name)
        if isinstance(value, type):
            assert issubclass(value, errors.LuminaGuardError)
            assert 120 <= value.exit_code <= 130
            assert name in errors.__doc__


def test_a_home_of_someone_else_is_refused(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to make a folder of someone else")
    home = Home(tmp_path / "home")
    (home.folder / "state").mkdir()
    os.chown(home.folder / "state", 12345, 12345)
    says(home.run("approvals", "list"), 123, "another user")


def test_doctor_as_json(bare_home):
    report = json.loads(bare_home.run("doctor", "--json").out)
    checks = {check["check"]: check for check in report["checks"]}
    assert checks["image"]["level"] == "fail"
    assert checks["image"]["remedy"]
    assert checks["hypervisor"]["level"] in {"ok", "note"}


def test_folders_that_cannot_be_resolved_are_refused(bare_home, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    says(bare_home.run("exec", "-w", str(tmp_path / "loop" / "x"), "--", "true"), 122, "workspace")


def test_a_journal_that_cannot_be_recovered_blocks_no_other_folder(bare_home, tmp_path):
    assert bare_home.run("ledger", "verify").code == 0
    journals = bare_home.folder / "state" / "journal"
    journals.mkdir(mode=0o700)
    (journals / "req-damaged.json").write_text("{")
    assert bare_home.run("approvals", "list").code == 0
    told = bare_home.run("recover")
    assert told.code == 0
    assert "req-damaged" in told.out
    assert (journals / "req-damaged.json").exists()


def test_contents_that_nobody_waits_for_are_deleted(bare_home):
    assert bare_home.run("ledger", "verify").code == 0
    blobs = bare_home.folder / "state" / "blobs"
    for name, age in (("vm-dead000000", 7200), ("vm-new0000000", 10)):
        (blobs / name).mkdir(parents=True)
        (blobs / name / ("0" * 64)).write_bytes(b"x")
        then = time.time() - age
        os.utime(blobs / name, (then, then))
    assert bare_home.run("recover").code == 0
    assert [entry.name for entry in blobs.iterdir()] == ["vm-new0000000"]


def test_what_a_hostile_path_says_is_escaped(bare_home, tmp_path):
    loop = tmp_path / "x\x1b[2J\u202eloop"
    loop.symlink_to(loop.name)
    result = bare_home.run("exec", "-w", str(loop / "x"), "--", "true")
    assert result.code == 122
    assert "\x1b" not in result.err
    assert "\u202e" not in result.err


def test_no_secret_and_no_key_is_in_the_log_or_the_ledger(bare_home):
    assert bare_home.run("ledger", "verify").code == 0
    keys = [path.read_bytes() for path in (bare_home.folder / "state" / "keys").iterdir()]
    assert keys
    exported = bare_home.run("ledger", "export").out.encode()
    logs = b"".join(path.read_bytes() for path in (bare_home.folder / "state").glob("log/*"))
    for key in keys:
        for shape in (key, key.hex().encode()):
            assert shape not in exported
            assert shape not in logs


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_a_process_without_standard_streams_works(bare_home, closed):
    redirections = " ".join(f"{number}>&-" if number != "0" else "0<&-" for number in closed)
    argv = " ".join(bare_home.argv("approvals", "list", "--json"))
    done = subprocess.run(
        ["bash", "-c", f"exec {redirections}; {argv}"],
        env=bare_home.environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr.decode()


def test_what_nobody_foresaw_is_an_internal_error_without_a_traceback(bare_home, tmp_path):
    (bare_home.folder / "state").mkdir(parents=True)
    (bare_home.folder / "state" / "ledger-head.json").mkdir()
    result = bare_home.run("exec", "--workspace", str(tmp_path), "--", "true")
    assert "Traceback" not in result.err
    script = (
        "import sys; sys.argv = ['l', 'approvals', 'list', '--json']\n"
        "from luminaguard.cli import app, approvals\n"
        "approvals.show_list = lambda *_, **__: 1 / 0\n"
        "app.run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=bare_home.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 125
    assert "Traceback" not in done.stderr
    assert "ZeroDivisionError" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize("how", ["link", "folder is a file"])
def test_keys_that_are_no_files_are_refused(bare_home, how, tmp_path):
    keys = bare_home.folder / "state" / "keys"
    keys.parent.mkdir(parents=True)
    if how == "link":
        keys.mkdir(mode=0o700)
        (keys / "ledger.key").symlink_to(tmp_path / "elsewhere")
    else:
        keys.write_text("")
    says(bare_home.run("approvals", "list"), 125, "key", "cannot be used")


def test_a_loop_of_links_is_no_workspace(home, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    says(home.run("exec", "--workspace", str(tmp_path / "loop"), "--", "true"), 122, "symbolic link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_workspace_has_a_hint(home, workspace):
    workspace.chmod(0)
    says(home.run("exec", "--workspace", str(workspace), "--", "true"), 122, "cannot be read")
    workspace.chmod(0o700)


def test_settings_that_are_a_link_to_nothing_are_an_error(bare_home):
    (bare_home.folder / "config").mkdir()
    (bare_home.folder / "config" / "luminaguard.toml").symlink_to("elsewhere.toml")
    says(bare_home.run("approvals", "list"), 123, "link to nothing")


def test_an_image_whose_manifest_was_changed_is_listed_as_damaged(bare_home):
    folder = bare_home.folder / "cache" / "images" / ("a" * 64)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert "DAMAGED" in bare_home.run("image", "list").out
    assert bare_home.run("image", "list", "--json").json == {"images": [], "damaged": ["a" * 64]}
