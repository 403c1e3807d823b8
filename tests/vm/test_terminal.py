"""The terminal interface in a real terminal (tmux): looked at, scrolled, approved, and always put back."""

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import time

import pytest

pytestmark = [pytest.mark.vm, pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")]


class Terminal:
    """A tmux session with a shell in it."""

    def __init__(self, folder, environment, columns=80, lines=24):
        self.socket = f"luminaguard-{secrets.token_hex(4)}"
        self.environment = environment | {"SHELL": "/bin/sh", "PS1": "$ ", "TMUX": ""}
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(lines), "-c", str(folder), "sh")
        self.until_prompt()

    def tmux(self, *arguments):
        done = subprocess.run(["tmux", "-L", self.socket, *arguments], env=self.environment, capture_output=True,
                              text=True, check=True, timeout=30, stdin=subprocess.DEVNULL)  # fmt: skip
        return done.stdout

    def type(self, line):
        self.tmux("send-keys", "-l", line)
        self.keys("Enter")

    def keys(self, *names):
        self.tmux("send-keys", *names)

    def text(self):
        return self.tmux("capture-pane", "-p")

    def until(self, wanted, timeout_s=40):
        """Wait for a text, which may be a pattern of a line."""
        deadline = time.monotonic() + timeout_s
        while not re.search(wanted, self.text(), re.MULTILINE):
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        return self.text()

    def until_prompt(self):
        """Wait for the shell, and let it begin on an empty screen."""
        self.until(r"\A(.*\n)*\$\s*\Z")
        self.type("clear")
        self.until(r"\A\$\s*\Z")

    def in_alternate_screen(self):
        return self.tmux("display-message", "-p", "#{alternate_on}").strip() == "1"

    def is_put_back(self):
        """The shell's own screen and modes: what is typed is seen, and a line is a line."""
        self.until_prompt()
        assert not self.in_alternate_screen()
        self.type("stty -a | tr -s ' ;' '\\n' | grep -xE -- '-?(echo|icanon)' | paste -sd' '")
        self.until("^icanon echo$")
        flags = "#{mouse_any_flag}#{mouse_button_flag}#{cursor_flag}"
        assert self.tmux("display-message", "-p", flags).strip() == "001"  # no mouse is told of; the cursor is seen

    def child(self):
        """The process of ours that runs in it."""
        tty = self.tmux("display-message", "-p", "#{pane_tty}").strip().removeprefix("/dev/")
        argv = ["pgrep", "-t", tty, "-f", "luminaguard"]
        return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[0])

    def close(self):
        subprocess.run(["tmux", "-L", self.socket, "kill-server"], capture_output=True, check=False, timeout=30)


@pytest.fixture
def terminal(home, workspace):
    made = Terminal(workspace, home.environment | {"LUMINAGUARD_INTERFACE": "full", "COLORTERM": "truecolor"})
    yield made
    made.close()


def command(home, *arguments):
    return shlex.join(home.argv(*arguments))


def test_an_exec_is_looked_at_scrolled_and_approved(home, workspace, terminal):
    change = "seq 500 > many.txt; printf 'one\\nTWO\\n' > a.txt; rm sub/b.txt"
    terminal.type(command(home, "exec", "-w", str(workspace), "--", "sh", "-c", change))
    terminal.until("Approve")
    terminal.until("MEDIUM: Entries are deleted")
    terminal.until(r"~ a\.txt")
    assert terminal.in_alternate_screen()
    terminal.until(r"\+TWO")
    terminal.keys("Down")
    terminal.until(r"\+1$")
    terminal.keys("Tab", "End")
    terminal.until(r"\+500")
    assert (workspace / "sub" / "b.txt").exists()
    terminal.keys("a")
    terminal.until("published 3 changes")
    assert (workspace / "a.txt").read_text() == "one\nTWO\n"
    assert (workspace / "many.txt").read_text().endswith("\n500\n")
    assert not (workspace / "sub" / "b.txt").exists()
    terminal.is_put_back()
    assert home.run("ledger", "verify").code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_puts_the_terminal_back_and_leaves_the_request(home, workspace, terminal, number):
    request = home.exec(workspace, "sh", "-c", "echo new > n").json["request_id"]
    terminal.type(command(home, "approve"))
    terminal.until("1 waiting")
    terminal.until("low")
    terminal.keys("Enter")
    terminal.until("Approve")
    os.kill(terminal.child(), number)
    terminal.is_put_back()
    assert home.run("approvals", "show", request, "--json").json["state"] == "pending"


def test_the_inbox_follows_and_publishes_what_another_process_asks(home, workspace, terminal):
    terminal.type(command(home, "approve"))
    terminal.until("Nothing waits")
    home.exec(workspace, "sh", "-c", "echo new > n")
    terminal.until("1 waiting")
    terminal.keys("Enter")
    terminal.until(r"\+ n")
    terminal.keys("a")
    terminal.until("Nothing waits")
    assert (workspace / "n").read_text() == "new\n"
    terminal.keys("q")
    terminal.is_put_back()


def test_without_a_capable_terminal_the_question_is_plain(home, workspace, terminal):
    terminal.type(f"TERM=dumb {command(home, 'exec', '-w', str(workspace), '--', 'touch', 'n')}")
    terminal.until("behind them")
    assert not terminal.in_alternate_screen()
    terminal.type("n not now")
    terminal.until("denied: not now; nothing was published")
    terminal.until_prompt()
    assert not (workspace / "n").exists()
    home.exec(workspace, "touch", "m")
    terminal.type(f"TERM=dumb {command(home, 'approve')}")
    terminal.until("behind them")
    terminal.type("y")
    terminal.until(r"^published\s*$")
    assert (workspace / "m").exists()


def test_at_the_size_of_a_small_window_the_question_is_plain(home, workspace):
    small = Terminal(workspace, home.environment | {"LUMINAGUARD_INTERFACE": "full"}, columns=50, lines=12)
    try:
        small.type(command(home, "exec", "-w", str(workspace), "--", "touch", "n"))
        small.until("behind")
        small.keys("l", "Enter")
        small.until("pending")
    finally:
        small.close()


def test_an_agents_changes_are_looked_at_and_approved_in_full_screen(home, workspace, terminal, tmp_path):
    script = tmp_path / "s.yaml"
    script.write_text("turns:\n - calls: [{write_file: {path: made.txt, content: by-an-agent}}]\n - say: I made it.\n")
    terminal.type(command(home, "run", "Make it.", "-w", str(workspace), "--model", f"script:{script}"))
    terminal.until("Approve")
    terminal.until(r"\+ made\.txt")
    terminal.until(r"\+by-an-agent")
    assert terminal.in_alternate_screen() and not (workspace / "made.txt").exists()
    terminal.keys("a")
    terminal.until("task-[0-9a-f]+ finished")
    assert (workspace / "made.txt").read_text() == "by-an-agent"
    terminal.is_put_back()
