"""Signals at any moment of an exec: it ends, says how, and leaves nothing; a publish that has begun is told."""

import json
import os
import pty
import random
import signal
import subprocess
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
LATEST_S = 1.3  # by then a short exec is over on the machine that this was written on
MOMENTS = 28


@contextmanager
def started(home, *arguments: str):
    process = subprocess.Popen(home.argv(*arguments), env=home.environment, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def listens(pid: int) -> bool:
    """Whether it has taken over SIGTERM: what comes earlier ends the interpreter itself."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = int(next(line for line in lines if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught & 1 << (signal.SIGTERM - 1))


def until(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def processes_of(home) -> list[str]:
    """Command lines of what runs with this home's environment or with a path of it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            told = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(home.folder) in told and path.name != str(os.getpid()):
            found.append(told.decode(errors="replace")[-300:])
    return found


@pytest.mark.parametrize("number", ENDING, ids=lambda n: n.name)
def test_a_signal_at_any_moment_ends_it_with_one_object_and_leaves_nothing(home, workspace, number):
    chance = random.Random(int(number))
    codes = set()
    for moment in sorted(chance.uniform(0, LATEST_S) for _ in range(MOMENTS // len(ENDING))):
        with started(home, "exec", "-w", str(workspace), "--json", "--", "sh", "-c", "echo x > new") as process:
            until(lambda process=process: process.poll() is not None or listens(process.pid))
            time.sleep(moment)
            os.killpg(process.pid, number)
            out, err = process.communicate(timeout=60)
        told = json.loads(out)  # one object and nothing else
        codes.add(process.returncode)
        assert err == b"", (moment, err)
        if told["status"] == "refused":
            assert told["error"]["type"] == "Interrupted", (moment, told)
            assert process.returncode == told["exit_code"] == 128 + number
        elif told["status"] == "unchanged":  # the command in the machine took it
            assert process.returncode == told["exit_code"] == 128 + number
        else:  # it came too late to change anything, but in time to be told
            assert told["status"] == "pending"
            assert process.returncode in {120, 128 + number}
    assert 128 + number in codes
    assert processes_of(home) == []
    assert list((home.folder / "run" / "vms").glob("*.json")) == []
    waiting = {request["id"] for request in home.run("approvals", "list", "--json").json["requests"]}
    blobs = home.folder / "state" / "blobs"
    assert {path.name for path in blobs.glob("*")} == waiting
    assert not (workspace / "new").exists()
    assert home.exec(workspace, "true").code == 0
    assert home.run("ledger", "verify").code == 0


@pytest.mark.parametrize("as_json", [True, False])
def test_a_publish_that_has_begun_ends_and_is_told(home, workspace, tmp_path, as_json):
    flags = ["--json"] if as_json else []
    script = "for i in $(seq 1500); do echo $i > f$i; done"
    argv = home.argv("exec", "-w", str(workspace), "--publish", "always", *flags, "--", "bash", "-c", script)
    with (tmp_path / "said").open("w+b") as said, subprocess.Popen(
        argv, env=home.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said
    ) as process:  # fmt: skip
        journal = home.folder / "state" / "journal"
        until(lambda: any(journal.glob("*.json")) or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
        said.seek(0)
        err = said.read()
    assert len(list(workspace.glob("f*"))) == 1500
    assert process.returncode == 130, err
    if as_json:
        told = json.loads(out)
        assert (told["status"], len(told["changeset"]["changes"])) == ("published", 1500)
    else:
        assert b"published 1500 changes" in err


def test_an_approval_that_has_begun_to_publish_is_told(home, workspace):
    script = "for i in $(seq 1500); do echo $i > f$i; done"
    request = home.exec(workspace, "bash", "-c", script).json["request_id"]
    with started(home, "approvals", "approve", request, "--json") as process:
        journal = home.folder / "state" / "journal"
        until(lambda: any(journal.glob("*.json")) or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert json.loads(out)["state"] == "published"
    assert len(list(workspace.glob("f*"))) == 1500


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGHUP])
def test_what_a_program_may_use_for_itself_reaches_the_command(home, workspace, number):
    script = f"trap 'echo caught; exit 9' {number.name[3:]}; echo ready; while :; do sleep 0.1; done"
    with started(home, "exec", "-w", str(workspace), "--", "bash", "-c", script) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == b"caught\n"
        assert process.wait(60) == 9


def test_ctrl_z_stops_the_command_too_and_it_goes_on_after_it(home, workspace):
    script = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo $i; sleep 0.05; done"
    with started(home, "exec", "-w", str(workspace), "--", "bash", "-c", script) as process:
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGTSTP)
        until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        machine = home.run("vm", "list", "--json").json["vms"][0]
        time.sleep(1)
        before = home.run("vm", "list", "--json").json["vms"][0]["cpu_s"]
        time.sleep(2)
        assert home.run("vm", "list", "--json").json["vms"][0]["cpu_s"] - before < 0.5, machine
        process.send_signal(signal.SIGCONT)
        rest = process.stdout.read().split()
        assert process.wait(60) == 0
    assert rest == [str(i).encode() for i in range(2, 61)]


def on_a_terminal_until(wanted: bytes, home, *arguments: str) -> tuple[int, int, bytes]:
    """Start it; its pid, our end of its terminal, and what it said up to there."""
    pid, fd = pty.fork()
    if pid == 0:
        argv = home.argv(*arguments)
        os.execvpe(argv[0], argv, home.environment)
    said = b""
    while wanted not in said:
        said += os.read(fd, 4096)
    return pid, fd, said


def test_a_terminal_that_is_closed_at_the_question_leaves_the_request_waiting(home, workspace):
    pid, fd, _ = on_a_terminal_until(b"another person): ", home, "exec", "-w", str(workspace), "--", "touch", "new")
    os.close(fd)
    # Its end of file and the hang-up come together.
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in {120, 129}
    assert len(home.run("approvals", "list", "--json").json["requests"]) == 1


def test_a_shell_whose_terminal_is_closed_ends_as_hung_up(home, workspace):
    pid, fd, _ = on_a_terminal_until(b"$ ", home, "shell", "-w", str(workspace))
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert home.run("vm", "list", "--json").json["vms"] == []


def test_a_shell_that_was_stopped_has_its_terminal_back_when_it_goes_on(home, workspace):
    pid, fd, said = on_a_terminal_until(b"$ ", home, "shell", "-w", str(workspace))

    def cooked() -> bool:
        return bool(termios.tcgetattr(fd)[3] & termios.ICANON)

    assert not cooked()
    os.kill(pid, signal.SIGTSTP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    assert cooked()
    os.kill(pid, signal.SIGCONT)
    until(lambda: not cooked())
    os.write(fd, b"echo a''live; exit 3\n")
    while True:
        try:
            said += os.read(fd, 4096)
        except OSError:
            break
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert b"alive" in said


@pytest.mark.parametrize("answer", [b"\x03", b"\x04", signal.SIGTERM])
def test_a_question_that_is_not_answered_leaves_the_request_waiting(home, workspace, answer):
    """Ctrl-C, Ctrl-D or a signal at the question is no answer."""
    pid, fd = pty.fork()
    if pid == 0:
        argv = home.argv("exec", "-w", str(workspace), "--", "touch", "new")
        os.execvpe(argv[0], argv, home.environment)
    said = b""
    asked = False
    while True:
        try:
            piece = os.read(fd, 4096)
        except OSError:  # its end
            break
        if not piece:
            break
        said += piece
        if b"another person): " in said and not asked:
            asked = True
            os.write(fd, answer) if isinstance(answer, bytes) else os.kill(pid, answer)
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 120, said
    (request,) = home.run("approvals", "list", "--json").json["requests"]
    assert request["id"].encode() in said
    assert not (workspace / "new").exists()
    assert home.run("approvals", "approve", request["id"]).code == 0
    assert (workspace / "new").exists()


def test_a_signal_for_the_command_ends_nothing_when_there_is_none(home, workspace):
    """SIGUSR1 from start to end, also while it is published."""
    script = "for i in $(seq 300); do echo $i > f$i; done"
    for _ in range(8):
        with started(home, "exec", "-w", str(workspace), "--publish", "always", "--json", "--",
                     "bash", "-c", f"trap '' USR1; {script}") as process:  # fmt: skip
            until(lambda process=process: process.poll() is not None or listens(process.pid))
            while process.poll() is None:
                if not home.run("vm", "list", "--json").json["vms"]:
                    process.send_signal(signal.SIGUSR1)
            out, err = process.communicate()
        if process.returncode != 128 + signal.SIGUSR1:  # the command had begun since the look, without its trap yet
            break
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["status"] == "published"


def test_what_the_caller_ignores_stays_ignored(home, workspace):
    argv = home.argv("exec", "-w", str(workspace), "--", "sh", "-c", "echo ready; sleep 1; echo done")
    with subprocess.Popen(["nohup", *argv], env=home.environment, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == b"done\n"
        assert process.wait(60) == 0


def test_a_pool_ends_on_a_signal(home, workspace):
    with started(home, "pool", "serve") as process:
        until(lambda: home.run("pool", "status", "--json").json["running"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert processes_of(home) == []
