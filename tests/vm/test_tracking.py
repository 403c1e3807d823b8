"""Every machine is in the records from the start of its process to its end, with how it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from luminaguard.errors import MachineError
from luminaguard.microvm import machine as machines
from luminaguard.microvm.pool import PoolLimits
from luminaguard.microvm.tracker import VMTracker
from luminaguard.testing import Home

pytestmark = pytest.mark.vm


def listed(home) -> list[dict]:
    return home.run("vm", "list", "--json").json["vms"]


def until(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_machine_that_clones_are_copied_from_is_one_too(cache, tmp_path, workspace):
    own = tmp_path / "own-cache"  # without a template
    own.mkdir()
    (own / "images").symlink_to(cache / "images")
    home = Home(tmp_path / "own", own)
    argv = home.argv("exec", "-w", str(workspace), "--", "true")
    with subprocess.Popen(argv, env=home.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until(lambda: listed(home) or process.poll() is not None)
        (vm,) = listed(home)
        assert (vm["task"], vm["backend"]) == (["template"], "qemu")
        assert Path(f"/proc/{vm['pid']}/comm").read_text().startswith(("qemu-system", "bwrap"))
        assert process.wait(120) == 0, process.stderr.read()
    ended = home.run("vm", "list", "--all", "--json").json["vms"]
    assert [(e["task"], e["reason"], e["exit_status"]) for e in ended] == [
        (["true"], "done", None), (["template"], "done", None)
    ]  # fmt: skip


def test_a_clone_is_recorded_before_it_can_do_anything(runtime, monkeypatch):
    """A hypervisor that hangs while it is being restored is in the list, and can be killed there."""
    seen = []

    async def stuck(self, state: int) -> None:
        seen.extend(runtime.tracker.running())
        runtime.tracker.kill(seen[0].id)
        await self.process.wait()
        raise MachineError("It ended.", hint="")

    monkeypatch.setattr("luminaguard.microvm.qemu.backend.QemuMachine.restore", stuck)

    async def scenario() -> None:
        async with runtime._pool_template() as template:
            disks = (template.root, template.rehearsal)
            with pytest.raises(MachineError):
                async with machines.clone(runtime.hypervisor, template.saved, disks, runtime.tracker, task=["x"]):
                    raise AssertionError("it cannot have been restored")

    anyio.run(scenario)
    assert [(record.state, record.task) for record in seen] == [("starting", ["x"])]
    (ended,) = (record for record in runtime.tracker.ended() if record.id == seen[0].id)
    assert (ended.reason, ended.exit_status) == ("luminaguard vm kill", 128 + signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "the hypervisor ended"), (signal.SIGSTOP, "it did not answer")]
)
def test_how_a_waiting_clone_ended_is_known(runtime, monkeypatch, number, reason):
    monkeypatch.setattr(machines, "WATCH_S", 0.3)
    monkeypatch.setattr("luminaguard.microvm.qemu.qmp.ANSWER_TIMEOUT_S", 1.0)

    async def scenario() -> None:
        async with runtime.open_pool(PoolLimits(1, 1)) as pool:
            await pool.wait_ready(1)
            (victim,) = runtime.tracker.running()
            os.kill(victim.pid, number)
            with anyio.fail_after(60):
                while not [record for record in runtime.tracker.ended() if record.id == victim.id]:
                    await anyio.sleep(0.02)
            (ended,) = (record for record in runtime.tracker.ended() if record.id == victim.id)
            assert (ended.reason, ended.exit_status) == (reason, 128 + signal.SIGKILL)

    anyio.run(scenario)


def test_a_killed_owner_is_swept_up_after_without_another_command(home, workspace):
    argv = home.argv("exec", "-w", str(workspace), "--", "sh", "-c", "echo ready; sleep 600")
    run = home.folder / "run"
    with subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"ready\n"
        assert len(list(run.glob("owner-*.lock"))) == 1
        process.kill()
    until(lambda: not list((run / "vms").iterdir()) and not list(run.glob("owner-*")), 10)
    (ended,) = home.run("vm", "list", "--all", "--json").json["vms"]
    assert ended["reason"] == "its owner died"


def test_two_runtimes_of_one_home_in_one_process_do_not_wait_for_each_other(home):
    trackers = [VMTracker(home.folder / "run"), VMTracker(home.folder / "run")]
    (home.folder / "run").mkdir(mode=0o700, exist_ok=True)
    with trackers[0].survived(), trackers[1].survived():
        assert len(list((home.folder / "run").glob("owner-*.lock"))) == 2
    assert list((home.folder / "run").glob("owner-*.lock")) == []


def test_a_forked_child_does_not_keep_the_locks_of_a_killed_owner(home):
    run = home.folder / "run"
    run.mkdir(mode=0o700)
    script = (
        "import os, sys, time; from pathlib import Path; from luminaguard.microvm.tracker import VMTracker\n"
        "with VMTracker(Path(sys.argv[1])).survived():\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE) as owner:
        child = int(owner.stdout.readline())
        owner.kill()
        owner.wait()
    try:
        until(lambda: not list(run.glob("owner-*")), 20)
    finally:
        os.kill(child, signal.SIGKILL)


def test_without_flock_that_is_said(home, workspace, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "flock").write_text("#!/no/such/interpreter\n")
    (programs / "flock").chmod(0o755)
    result = home.exec(workspace, "true", PATH=f"{programs}:{os.environ['PATH']}")
    assert result.code == 123
    assert "flock(1)" in result.json["error"]["message"]


def test_the_groups_of_a_killed_owner_are_found_wherever_they_are(tmp_path, home):
    """The record names them; and nothing else than what is called like the machine is removed."""
    for name in ("vm-0123456789", "other"):
        (tmp_path / "luminaguard" / name).mkdir(parents=True)
    folder = home.folder / "run" / "vms"
    folder.mkdir(parents=True, mode=0o700)
    record = {"id": "vm-0123456789", "backend": "qemu", "accelerator": "tcg", "state": "running", "pid": 1,
              "started": 1, "owner": 1, "workspace": "/w", "task": ["x"], "created_ns": 1,
              "groups": [str(tmp_path / "luminaguard" / name) for name in ("vm-0123456789", "other")]}  # fmt: skip
    (folder / "vm-0123456789.json").write_text(json.dumps(record))
    assert home.run("vm", "reap").code == 0
    assert [path.name for path in (tmp_path / "luminaguard").iterdir()] == ["other"]


def test_an_owner_that_ends_leaves_nobody_waiting(home, workspace):
    assert home.exec(workspace, "true").code == 0
    assert list((home.folder / "run").glob("owner-*")) == []
    waiting = [
        path for path in Path("/proc").glob("[0-9]*/cmdline") if os.fsencode(home.folder) in _read(path)
    ]  # fmt: skip
    assert waiting == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
