"""The main job with real machines: effects come out as they happened, and only what is approved goes in."""

import hashlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm


def listing(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = oct(path.stat().st_mode)
        else:
            found[name] = (oct(path.stat().st_mode), path.read_bytes())
    return found


def hypervisors_of(home) -> list[int]:
    """QEMU processes whose command line or owner belongs to this home: none may outlive a command."""
    found = home.run("vm", "list", "--json").json["vms"]
    return [vm["pid"] for vm in found]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except FileNotFoundError:
        return False


def test_output_and_status_are_the_commands_own(home, workspace):
    before = listing(workspace)
    result = home.run(
        "exec", "-w", str(workspace), "--", "sh", "-c", "cat; echo err >&2; cat a.txt; exit 7", stdin=b"from stdin\n"
    )
    assert (result.code, result.out, result.err) == (7, "from stdin\none\ntwo\n", "err\n")
    assert listing(workspace) == before


def test_json_names_everything(home, workspace):
    result = home.exec(workspace, "sh", "-c", "echo new > n; rm a.txt; echo out; exit 3")
    value = result.json
    assert result.code == 120
    assert (value["status"], value["exit_code"], value["stdout"], value["stderr"]) == ("pending", 3, "out\n", "")
    assert value["changeset"]["digest"].startswith("sha256:")
    assert [(c["path"], c["kind"]) for c in value["changeset"]["changes"]] == [("a.txt", "delete"), ("n", "create")]
    assert value["vm"]["backend"] == "qemu"
    assert value["vm"]["accelerator"] in {"tcg", "kvm"}
    assert value["vm"]["spawn_ms"] > 0
    assert value["request_id"].startswith("req-")


def test_a_pending_request_is_published_by_another_process(home, workspace):
    request = home.exec(workspace, "sh", "-c", "echo new > n; chmod 700 a.txt").json["request_id"]
    assert not (workspace / "n").exists()
    shown = home.run("approvals", "show", request)
    assert "+new" in shown.err
    assert "0644 to 0700" in shown.err
    assert home.run("approvals", "approve", request).code == 0
    assert (workspace / "n").read_text() == "new\n"
    assert (workspace / "a.txt").stat().st_mode & 0o777 == 0o700
    again = home.run("approvals", "approve", request)
    assert again.code == 122
    assert home.run("approvals", "list", "--json").json == {"requests": []}
    assert home.run("ledger", "verify").code == 0
    kinds = [json.loads(line)["kind"] for line in home.run("ledger", "export").out.splitlines()[1:]]
    assert kinds == ["exec.started", "exec.finished", "request.created", "request.decided", "request.claimed",
                     "request.finished", "request.refused"]  # fmt: skip


def test_denied_and_never_leave_the_folder_alone(home, workspace):
    before = listing(workspace)
    request = home.exec(workspace, "sh", "-c", "echo n > n").json["request_id"]
    assert home.run("approvals", "deny", request).code == 0
    assert "no longer kept: the request was decided" in home.run("approvals", "show", request).err
    assert home.run("approvals", "approve", request).code == 122
    never = home.exec(workspace, "touch", "n", flags=("--publish", "never"))
    assert (never.code, never.json["status"]) == (0, "denied")
    assert listing(workspace) == before
    assert list((home.folder / "state" / "blobs").iterdir()) == []


def test_a_folder_that_changed_since_is_a_conflict(home, workspace):
    request = home.exec(workspace, "sh", "-c", "echo mine > a.txt; echo n > n").json["request_id"]
    (workspace / "a.txt").write_text("the user's\n")
    result = home.run("approvals", "approve", request)
    assert result.code == 122
    assert "changed on the host" in result.err
    assert (workspace / "a.txt").read_text() == "the user's\n"
    assert not (workspace / "n").exists()
    assert home.run("approvals", "list", "--all", "--json").json["requests"][0]["state"] == "refused"


CHANGES = r"""
set -e
printf 'more\n' >> a.txt
touch sub/b.txt
chmod 600 run.sh
mkdir -p empty/inner
ln -s /etc/passwd outside
rm link
head -c 100000 /dev/urandom > binary
printf odd > $'caf\351 \n'
ln binary hard
truncate -s 3M sparse
rm -r tree && mkdir tree && echo again > tree/same
mv moved renamed
rm -r swap && echo file > swap
rm file2dir && mkdir file2dir && echo x > file2dir/x
chmod +x .git/hooks/x
"""


def test_every_kind_of_change_comes_out_and_goes_in(home, workspace):
    (workspace / "tree" / "below").mkdir(parents=True)
    (workspace / "tree" / "same").write_text("same\n")
    (workspace / "tree" / "below" / "f").write_text("f\n")
    (workspace / "moved").write_text("a file that moves\n")
    (workspace / "swap").mkdir()
    (workspace / "swap" / "in").write_text("in\n")
    (workspace / "file2dir").write_text("file\n")
    (workspace / ".git" / "hooks").mkdir(parents=True)
    (workspace / ".git" / "hooks" / "x").write_text("#!/bin/sh\n")
    result = home.exec(workspace, "bash", "-c", CHANGES, flags=("--publish", "always"))
    assert result.json["status"] == "published", result.json
    kinds = {c["path"]: c["kind"] for c in result.json["changeset"]["changes"]}
    assert kinds == {
        "a.txt": "modify", "run.sh": "mode", "empty": "create", "empty/inner": "create", "outside": "symlink",
        "link": "delete", "binary": "create", "caf\udce9 \n": "create", "hard": "create", "sparse": "create",
        "tree/below": "delete", "tree/below/f": "delete", "tree/same": "modify", "moved": "delete",
        "renamed": "create", "swap": "modify", "swap/in": "delete", "file2dir": "modify", "file2dir/x": "create",
        ".git/hooks/x": "mode",
    }  # fmt: skip
    renamed = next(c for c in result.json["changeset"]["changes"] if c["path"] == "renamed")
    assert renamed["renamed_from"] == "moved"
    assert (workspace / "hard").read_bytes() == (workspace / "binary").read_bytes()
    assert (workspace / "sparse").stat().st_size == 3 << 20
    assert (workspace / "sparse").stat().st_blocks == 0
    assert os.readlink(workspace / "outside") == "/etc/passwd"
    assert (workspace / "tree" / "same").read_text() == "again\n"
    assert os.path.exists(os.fsencode(workspace) + b"/caf\xe9 \n")
    second = home.exec(workspace, "true")
    assert second.json["status"] == "unchanged"


@pytest.mark.slow
def test_a_sparse_file_stays_sparse_on_the_host_and_says_the_same(home, workspace):
    script = """truncate -s 300M holes; printf start | dd of=holes conv=notrunc status=none
printf middle | dd of=holes conv=notrunc status=none bs=1 seek=200000001; sha256sum holes"""
    told = home.exec(workspace, "sh", "-c", script, flags=("--publish", "always")).json
    assert told["status"] == "published"
    path = workspace / "holes"
    assert path.stat().st_size == 300 << 20
    assert path.stat().st_blocks * 512 < 1 << 20
    assert hashlib.sha256(path.read_bytes()).hexdigest() == told["stdout"].split()[0]


@pytest.mark.slow
@pytest.mark.parametrize("memory", [512, 1024])
def test_a_guest_may_use_all_of_the_memory_that_it_was_given(home, workspace, memory):
    """Its pages count twice on the host: that must not end its machine."""
    with (workspace / "large").open("wb") as file:
        file.truncate(memory * 9 // 10 << 20)
    script = "cat large | wc -c; cat large > /dev/null; head -c 100M large > copy; echo still here"
    told = home.exec(workspace, "sh", "-c", script, flags=("--memory", str(memory), "--publish", "never"),
                     timeout_s=170).json  # fmt: skip
    assert told["stdout"].split() == [str(memory * 9 // 10 << 20), "still", "here"], told


def test_names_of_one_file_are_files_of_their_own_in_the_machine(home, workspace):
    """What is published is what was shown: one name changed, the other did not."""
    os.link(workspace / "a.txt", workspace / "again.txt")
    told = home.exec(workspace, "sh", "-c", "echo more >> again.txt; cat a.txt", flags=("--publish", "always")).json
    assert told["stdout"] == "one\ntwo\n"
    assert [(c["path"], c["kind"]) for c in told["changeset"]["changes"]] == [("again.txt", "modify")]
    assert (workspace / "a.txt").read_text() == "one\ntwo\n"
    assert (workspace / "again.txt").read_text() == "one\ntwo\nmore\n"


def test_git_works_inside_without_noise(home, workspace):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(workspace)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "base"], check=True)
    result = home.exec(workspace, "sh", "-c", "git status --short; git log --oneline | wc -l; python3 -c 'print(6*7)'")
    assert result.json["stdout"] == "1\n42\n"
    assert {c["path"] for c in result.json["changeset"]["changes"]} <= {".git/index"}


def test_commands_that_cannot_start_are_told_apart(home, workspace):
    missing = home.exec(workspace, "no-such-command")
    assert missing.code == 127
    assert "was not found" in missing.json["error"]["message"]
    assert home.exec(workspace, "./a.txt").code == 126
    nameless = home.exec(workspace, "")
    assert nameless.code == 127
    assert "''" in nameless.json["error"]["message"]
    long = home.exec(workspace, "echo", "x" * 70_000)
    assert long.code == 122
    assert (long.json["error"]["type"], "standard input" in long.json["error"]["hint"]) == ("CommandTooLong", True)
    assert home.exec(workspace, "sh", "-c", "kill -9 $$").json["exit_code"] == 137


def test_a_time_limit_ends_everything_and_publishes_nothing(home, workspace):
    before = listing(workspace)
    start = time.monotonic()
    result = home.exec(
        workspace, "sh", "-c", "touch n; sleep 600 & sleep 600", flags=("--timeout", "1", "--publish", "always")
    )
    assert (result.code, result.json["status"]) == (124, "refused")
    assert time.monotonic() - start < 60
    assert listing(workspace) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command_and_a_second_ends_the_machine(home, workspace, number):
    script = "trap 'echo caught' INT TERM; echo ready; while :; do sleep 0.1; done"
    argv = home.argv("exec", "-w", str(workspace), "--", "bash", "-c", script)
    with subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        machines = hypervisors_of(home)
        assert len(machines) == 1
        process.send_signal(number)
        assert process.stdout.readline() == b"caught\n"
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert not any(alive(pid) for pid in machines)
    assert list((home.folder / "run" / "vms").glob("*")) == []


def test_kill_9_leaves_no_machine(home, workspace):
    argv = home.argv("exec", "-w", str(workspace), "--", "sh", "-c", "echo ready; sleep 600")
    with subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        (machine,) = hypervisors_of(home)
        assert alive(machine)
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while alive(machine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(machine)
    assert hypervisors_of(home) == []


def read_until(fd: int, wanted: bytes, timeout_s: float = 60) -> bytes:
    data, deadline = b"", time.monotonic() + timeout_s
    while wanted not in data:
        ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
        assert ready, data
        try:
            piece = os.read(fd, 4096)
        except OSError:
            piece = b""
        assert piece, data
        data += piece
    return data


def test_a_shell_on_a_terminal_asks_and_publishes(home, workspace):
    pid, fd = pty.fork()
    if pid == 0:
        argv = home.argv("shell", "-w", str(workspace))
        os.execvpe(argv[0], argv, home.environment | {"TERM": "xterm"})
    try:
        read_until(fd, b"$ ")
        os.write(fd, b"stty size; tty; echo typed > t\n")
        read_until(fd, b"/dev/pts/")
        os.write(fd, b"exit\n")
        asked = read_until(fd, b"another person): ")
        assert b"+typed" in asked
        assert not (workspace / "t").exists()
        os.write(fd, b"y\n")
        read_until(fd, b"published 1 changes")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(fd)
    assert (workspace / "t").read_text() == "typed\n"


def on_a_terminal(home, *arguments: str) -> tuple[int, int]:
    pid, fd = pty.fork()
    if pid == 0:
        argv = home.argv(*arguments)
        os.execvpe(argv[0], argv, home.environment | {"TERM": "xterm"})
    return pid, fd


def test_a_command_leaves_no_terminal_state_under_the_card(home, workspace):
    """It had the terminal: alternate screen, scroll region, palette, invisible text."""
    spoil = r"printf '\033[?1049h\033[5;6r\033]4;1;rgb:00/00/00\007\033[8m\033[?25l'; echo x > n"
    pid, fd = on_a_terminal(home, "exec", "-w", str(workspace), "--", "sh", "-c", spoil)
    try:
        shown = read_until(fd, b"another person): ")
        card = shown[: shown.index(b"1 created")]
        spoiled = card.rindex(b"\x1b[8m")
        for reset in (b"\x1b[?1049l", b"\x1b[r", b"\x1b]104", b"\x1b[0m", b"\x1b[?25h"):
            assert card.find(reset, spoiled) > 0, reset
        os.write(fd, b"n\n")
        read_until(fd, b"denied")
        os.waitpid(pid, 0)
    finally:
        os.close(fd)
    assert not (workspace / "n").exists()


ASK = """
import os, time
from luminaguard.approvals import Request, State
from luminaguard.cli.prompt import ask
os.write(2, b"ready")
time.sleep(1)  # the keys arrive now
request = Request("req-1", "/w", 2, "sha256:x", ("true",), 0, 1, 2, State.PENDING)
print("answer", ask(request, print, None).verdict.value, flush=True)
"""


def test_keys_typed_before_the_question_answer_nothing():
    """The answer that was in the keyboard buffer belongs to something else."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", ASK])
    try:
        read_until(fd, b"ready")
        os.write(fd, b"y\n")
        read_until(fd, b"another person): ")
        os.write(fd, b"n\n")
        read_until(fd, b"answer deny")
    finally:
        os.close(fd)
        os.waitpid(pid, 0)


def test_a_reader_that_does_not_read_cannot_stop_the_time_limit(home, workspace):
    argv = home.argv("exec", "-w", str(workspace), "--timeout", "2", "--", "yes")
    with subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.wait(60) == 124


def test_folders_nested_without_end_are_refused_and_nothing_breaks(home, workspace):
    dig = "import os\nfor _ in range(3000):\n os.mkdir('d'); os.chdir('d')"
    result = home.exec(workspace, "python3", "-c", dig, flags=("--publish", "always"), timeout_s=170)
    assert result.code in {122, 125}
    assert result.json["status"] == "refused"
    assert result.json["error"]["hint"]
    assert not (workspace / "d").exists()


def test_a_command_that_a_rule_holds_back_runs_once_it_was_approved(home, workspace):
    rule = ('[[policy.rules]]\nname = "deploys"\nrisk = "RED"\nreason = "It deploys."\n'
            'when = { effect = "run", command = "*deploy*" }\n')  # fmt: skip
    (home.folder / "config").mkdir(mode=0o700, exist_ok=True)
    (home.folder / "config" / "luminaguard.toml").write_text(rule)
    command = ("sh", "-c", "echo deployed; exit 3")
    first = home.exec(workspace, *command)
    assert (first.code, first.json["stdout"], first.json["vm"]) == (120, "", None)
    (waiting,) = home.run("approvals", "list", "--json").json["requests"]
    assert (waiting["effect"], waiting["judged"]["reason"]) == ("run", "It deploys.")
    assert "echo deployed" in home.run("approvals", "show", waiting["id"]).err
    assert "<title>" in home.run("approvals", "show", waiting["id"], "--html").out
    assert home.run("approvals", "approve", waiting["id"]).code == 0
    assert home.exec(workspace, "sh", "-c", "echo another deploy").code == 120
    again = home.exec(workspace, *command)
    assert (again.code, again.json["stdout"]) == (3, "deployed\n")
    assert home.exec(workspace, *command).code == 120  # once


def test_a_held_back_command_is_asked_about_at_the_terminal(home, workspace):
    (home.folder / "config").mkdir(mode=0o700, exist_ok=True)
    (home.folder / "config" / "luminaguard.toml").write_text(
        '[[policy.rules]]\nname = "all"\nrisk = "RED"\nreason = "Ask."\nwhen = { effect = "run" }\n'
    )
    for answer, seen, code in ((b"y\n", b"ran here", 4), (b"n not now\n", b"not now", 122)):
        pid, fd = on_a_terminal(home, "exec", "-w", str(workspace), "--", "sh", "-c", "echo ran $0; exit 4", "here")
        assert b"ran here" not in read_until(fd, b"another person): ")
        os.write(fd, answer)
        read_until(fd, seen)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == code
        os.close(fd)


# -- what a terminal, a pipe and a second process do to it -----------------------------------------------


def test_ctrl_c_on_a_terminal_works_before_the_command_runs(home, workspace):
    """The terminal is raw while the command runs, and only then."""
    pid, fd = pty.fork()
    if pid == 0:
        # A memory size that has no template yet: seconds in which there is no command.
        argv = home.argv("exec", "-w", str(workspace), "--memory", "199", "--", "sleep", "600")
        os.execvpe(argv[0], argv, home.environment)
    read_until(fd, b"booting")
    start = time.monotonic()
    os.write(fd, b"\x03")
    assert b"interrupted" in read_until(fd, b"nothing was published")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert time.monotonic() - start < 5
    os.close(fd)
    assert hypervisors_of(home) == []


def test_a_window_that_changes_its_size_is_seen_by_the_command(home, workspace):
    import fcntl
    import struct
    import termios

    pid, fd = pty.fork()
    if pid == 0:
        argv = home.argv("exec", "-w", str(workspace), "--", "bash", "-c",
                         "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.1; done")  # fmt: skip
        os.execvpe(argv[0], argv, home.environment)
    read_until(fd, b"ready")
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    assert b"33 77" in read_until(fd, b"33 77")
    os.waitpid(pid, 0)
    os.close(fd)


def test_ctrl_c_on_a_terminal_reaches_the_command(home, workspace):
    pid, fd = pty.fork()
    if pid == 0:
        script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.1; done"
        argv = home.argv("exec", "-w", str(workspace), "--", "bash", "-c", script)
        os.execvpe(argv[0], argv, home.environment)
    read_until(fd, b"ready")
    os.write(fd, b"\x03")
    assert b"caught" in read_until(fd, b"caught")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 5
    os.close(fd)


def test_a_reader_that_goes_away_ends_the_command_and_its_effects_wait(home, workspace):
    argv = home.argv("exec", "-w", str(workspace), "--", "sh", "-c", "touch n; while :; do echo line; done")
    with subprocess.Popen(argv, env=home.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL) as process:  # fmt: skip
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == 120, said
    assert "pending: req-" in said


@pytest.mark.parametrize(
    ("flags", "code"),
    [(["--json", "--publish", "always"], 0), (["--json"], 120), ([], 120), (["--publish", "never"], 0)],
)
def test_that_nobody_reads_what_is_told_changes_nothing_of_it(home, workspace, flags, code):
    """As in ``exec --json ... | true`` and ``exec ... 2>&1 | true``."""
    reader, writer = os.pipe()
    os.close(reader)
    argv = home.argv("exec", "-w", str(workspace), *flags, "--", "touch", "n")
    with os.fdopen(writer, "wb") as broken:
        done = subprocess.run(argv, env=home.environment, stdout=broken, stderr=broken, check=False,
                              stdin=subprocess.DEVNULL, timeout=120)  # fmt: skip
    assert done.returncode == code
    assert (workspace / "n").exists() == ("always" in flags)
    assert len(home.run("approvals", "list", "--json").json["requests"]) == (code == 120)


def test_a_command_reaches_what_it_serves_itself(home, workspace):
    """The loopback is up; that there is no other interface is for the escape suite."""
    script = """
import http.server, threading, urllib.request
for family, host in ((2, "127.0.0.1"), (10, "::1")):
    kind = type("Server", (http.server.ThreadingHTTPServer,), {"address_family": family})
    server = kind((host, 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = f"[{host}]" if family == 10 else host
    print(urllib.request.urlopen(f"http://{where}:{server.server_port}/a.txt").read())
"""
    told = home.exec(workspace, "python3", "-c", script).json
    assert told["stdout"] == "b'one\\ntwo\\n'\n" * 2, told


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_output_that_cannot_be_written_loses_no_effects(home, workspace, flags):
    argv = home.argv("exec", "-w", str(workspace), "--publish", "always", *flags, "--",
                     "sh", "-c", "echo out; echo new > n")  # fmt: skip
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(argv, env=home.environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
                              stdin=subprocess.DEVNULL, timeout=120)  # fmt: skip
    assert "Traceback" not in done.stderr
    assert (workspace / "n").read_text() == "new\n", done.stderr
    assert done.returncode == (125 if flags else 0), done.stderr
    assert "cannot be written" in done.stderr


def test_json_keeps_what_a_command_said_whose_effects_are_refused(home, workspace):
    result = home.exec(workspace, "sh", "-c", "echo important; echo bad >&2; mkfifo p")
    value = result.json
    assert (result.code, value["status"], value["stdout"], value["stderr"]) == (122, "refused", "important\n", "bad\n")
    assert value["error"]["type"] == "ChangesetRefused"
    missing = home.exec(workspace, "no-such-program").json
    assert (missing["status"], missing["exit_code"], missing["stdout"]) == ("unchanged", 127, "")


def test_two_processes_that_approve_at_once_publish_once(home, workspace):
    request = home.exec(workspace, "sh", "-c", "echo new > n").json["request_id"]
    argv = home.argv("approvals", "approve", request)
    both = [subprocess.Popen(argv, env=home.environment, stderr=subprocess.PIPE) for _ in range(2)]
    codes = sorted((process.communicate(timeout=60), process.returncode)[1] for process in both)
    assert codes == [0, 122]
    kinds = [json.loads(line)["kind"] for line in home.run("ledger", "export").out.splitlines()[1:]]
    assert kinds.count("request.claimed") == 1


def test_a_busy_folder_leaves_no_approval_standing(home, workspace, monkeypatch):
    from luminaguard.approvals import Verdict
    from luminaguard.errors import PublishError
    from luminaguard.runtime import Runtime, decisions
    from luminaguard.settings import Folders, load_settings

    request_id = home.exec(workspace, "touch", "n").json["request_id"]
    monkeypatch.setenv("LUMINAGUARD_HOME", str(home.folder))
    monkeypatch.setattr(decisions, "_LOCK_WAIT_S", 0.1)
    folders = Folders.from_environment()
    runtime = Runtime(load_settings(folders), folders)
    request = runtime.approvals.get(request_id)
    with runtime.publisher.lock(request.workspace), pytest.raises(PublishError, match="Another process"):
        runtime.decisions.approve_and_publish(request, decisions.Answer(Verdict.APPROVE, "test"))
    assert runtime.approvals.get(request_id).state.value == "pending"
    runtime.close()
    assert home.run("approvals", "deny", request_id).code == 0


def test_an_interrupted_publish_is_told_by_the_next_command_and_one_of_unknown_outcome_can_be_closed(home, workspace):
    request = home.exec(workspace, "sh", "-c", "echo new > n").json["request_id"]
    journals = home.folder / "state" / "journal"
    journals.mkdir()
    (journals / f"{request}.json").write_text("{ damaged")
    script = f"UPDATE requests SET state = 'claimed' WHERE id = '{request}'"
    import sqlite3

    with sqlite3.connect(home.folder / "state" / "luminaguard.db") as raw:
        raw.execute(script)
    raw.close()
    result = home.run("exec", "-w", str(workspace), "--", "true")
    assert result.code == 0
    assert "recovered:" in result.err and "cannot be read" in result.err
    assert home.run("approvals", "list", "--json").json["requests"][0]["state"] == "unknown"
    closed = home.run("approvals", "close", request)
    assert (closed.code, ".closed" in closed.out) == (0, True)
    assert home.run("approvals", "list", "--json").json == {"requests": []}
    assert home.run("approvals", "close", request).code == 122
    assert home.run("exec", "-w", str(workspace), "--", "true").err == ""


def test_a_workspace_that_contains_our_own_folders_keeps_them_out(home, tmp_path):
    """As with a home folder: keys stay on the host, and nothing that runs can change the settings."""
    home.exec(tmp_path / "home", "true")  # refused: it is our own
    (tmp_path / "mine").write_text("x")
    listed = home.exec(tmp_path, "sh", "-c", "ls -a; ls home/state/keys").json
    assert "mine" in listed["stdout"]
    assert ".key" not in listed["stdout"]
    evil = home.exec(
        tmp_path, "sh", "-c", "mkdir -p home/config; echo 'require_jail = false' > home/config/luminaguard.toml"
    )
    assert evil.code == 122
    assert "LuminaGuard itself" in evil.json["error"]["message"]
    assert home.exec(tmp_path / "home" / "state", "true").code == 122


def test_a_new_mode_of_the_folder_itself_is_not_published_and_said_so(home, workspace):
    workspace.chmod(0o750)
    result = home.run("exec", "-w", str(workspace), "--publish", "always", "--", "chmod", "777", ".")
    assert (result.code, "0777" in result.err) == (0, True)
    assert workspace.stat().st_mode & 0o777 == 0o750
    assert home.run("exec", "-w", str(workspace), "--", "true").err == ""


def test_an_index_that_is_wrong_is_found_out_and_forgotten(home, workspace):
    """As after a program that went on writing through a mapping, which changes no time."""
    import hashlib

    info = (workspace / "a.txt").stat()
    row = [info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, "0" * 64]
    indexes = home.folder / "cache" / "indexes"
    indexes.mkdir(exist_ok=True)
    name = hashlib.sha256(os.fsencode(workspace)).hexdigest()[:32]
    (indexes / f"{name}.json").write_text(json.dumps({"format": 1, "files": {"a.txt": row}}))
    first = home.exec(workspace, "cat", "a.txt")
    assert (first.code, first.json["error"]["type"]) == (122, "WorkspaceChanged")
    assert home.exec(workspace, "cat", "a.txt").json["stdout"] == "one\ntwo\n"
