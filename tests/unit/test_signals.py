"""What signals do to the process itself, where no machine is needed."""

import json
import signal
import subprocess
import sys
import time

import anyio
import pytest

from luminaguard.cli import execute, signals
from luminaguard.cli.output import Progress
from luminaguard.errors import StorageError, first_of
from luminaguard.microvm.machine import Command


def test_an_import_is_not_left_in_the_middle(tmp_path):
    """The signal comes while a module is loaded; it is raised once that is over, and never lost."""
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.05)\nwhole = True\n"
    )
    script = (
        "from luminaguard.cli import signals\nimport sys, time\nsignals.install()\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import slow\n    time.sleep(20)\n"
        "except signals.Interrupted as end:\n    print(sys.modules['slow'].whole, end.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True 143\n", "")


def test_an_import_that_ends_the_program_takes_the_signal_with_it(tmp_path):
    """Once the outcome was told, what was put off must not come back."""
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    script = (
        "from luminaguard.cli import signals\nimport sys, time\nsignals.install()\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\nimport slow\nsignals.over()\ntime.sleep(0.1)\nprint('told')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("told\n", "")


def test_a_signal_while_the_command_line_is_read_is_not_lost(bare_home):
    """Python swallows an exception in a finalizer, and the library that reads the command line has some."""
    script = (
        "import os, signal, sys\n"
        "class Leaves:\n"
        "    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT)\n        sum(range(1000))\n"
        "import typer.core\nread = typer.core.TyperGroup.parse_args\n"
        "def parse(*words):\n    Leaves()\n    return read(*words)\n"
        "typer.core.TyperGroup.parse_args = parse\n"
        "from luminaguard.__main__ import main\nsys.argv[1:] = ['ledger', 'export']\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=bare_home.environment, capture_output=True, text=True,
                          check=False, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_signal_while_signals_begin_to_be_held_leaves_nothing_open():
    script = (
        "import os, signal, socket\nfrom luminaguard.cli import signals\n"
        "signals.install()\npair = socket.socketpair\n"
        "def made():\n    ends = pair()\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    sum(range(1000))\n    return ends\n"
        "socket.socketpair = made\n"
        "try:\n    with signals.held() as held:\n        import time\n        time.sleep(0.1)\n        print('whole')\n"
        "except signals.Interrupted as end:\n    print(end.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False,
                          timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n130\n", "")


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["exec", "--json", "--", "ls"], True), (["exec", "-w", "x", "--json", "ls"], True),
        (["exec", "ls", "--json"], False), (["exec", "--", "ls", "--json"], False),
        (["exec", "-w", "--json", "ls"], False), (["approvals", "list", "--json"], True), (["exec"], False),
    ],
)  # fmt: skip
def test_only_our_own_flag_asks_for_json(words, asked):
    assert ("--json" in signals._own_flags(words)) == asked


def test_ctrl_c_at_any_moment_of_the_start_shows_no_traceback(bare_home):
    for step in range(20):
        process = subprocess.Popen(bare_home.argv("approvals", "list", "--json"), env=bare_home.environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        with process:
            time.sleep(0.035 + step * 0.01)  # before, it is Python that starts
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert b"/luminaguard/" not in err, err  # no line of ours
        if process.returncode == 130:
            assert json.loads(out)["error"]["type"] == "Interrupted"
        else:
            # Where it is slow, it is still Python itself that starts.
            assert process.returncode in {0, -signal.SIGINT} or b"KeyboardInterrupt" in err, err


def test_what_fails_because_of_an_interruption_is_not_told_instead_of_it(tmp_path):
    """The helper that packs the workspace dies of the same Ctrl-C, and its error comes after the signal."""

    class Broken:
        async def exec(self, *_args, **_options):
            held.keep(signal.SIGINT)
            try:
                await anyio.sleep_forever()
            finally:
                raise StorageError("mksquashfs ended early.", hint="")

    options = execute.Options(publish="never", as_json=True, terminal=False)
    with signals.held() as held:
        parts = (Command(["true"]), options, None, Progress(quiet=True), held)
        assert anyio.run(execute._run, Broken(), tmp_path, *parts) == (None, signal.SIGINT)


def test_an_interruption_is_told_before_what_it_brought_about():
    end = signals.Interrupted(signal.SIGINT)
    group = BaseExceptionGroup(
        "", [StorageError("a", hint=""), BaseExceptionGroup("", [StorageError("b", hint=""), end])]
    )
    assert first_of(group) is end
    assert first_of(BaseExceptionGroup("", [StorageError("a", hint=""), StorageError("b", hint="")])).message == "a"
