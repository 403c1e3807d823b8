"""The newcomer's commands are interrupted anywhere, and then work as if nothing had been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luminaguard.testing import Home

pytestmark = pytest.mark.vm
TREE = Path(__file__).parents[2]


def interrupted(argv: list[str], number: int, after_s: float, **options) -> int:
    """Run a command in a session of its own and send it a signal, as a terminal does, after a while."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(argv, start_new_session=True, **pipes, **options) as process:
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
        return process.wait(60)


@pytest.mark.slow
def test_building_an_image_can_be_interrupted_anywhere(cache, tmp_path):
    own = tmp_path / "cache"
    own.mkdir()
    shutil.copytree(cache / "packages", own / "packages")  # fetched before; not to be asked for again
    home = Home(tmp_path / "home", own)
    chance = random.Random(1)
    argv = home.argv("image", "build")
    codes = []
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        codes.append(interrupted(argv, number, chance.uniform(0.3, 3.5), env=home.environment))
        listed = home.run("image", "list", "--json").json
        assert listed["damaged"] == []
    assert set(codes) & {130, 143, -9}, codes
    built = home.run("image", "build", "--json", timeout_s=170)
    assert built.code == 0, built.err
    assert home.run("image", "verify").code == 0
    assert [path.name for path in (own / "images").glob(".*") if "building" in path.name] == []
    assert built.json["id"] == (cache / "images" / "current").read_text().strip()


@pytest.fixture
def demo(tmp_path, home):
    """The examples in a tree of their own: the demo makes its folder beside them."""
    shutil.copytree(TREE / "examples", tmp_path / "tree" / "examples")
    script = tmp_path / "tree" / "examples" / "demo.py"
    return [sys.executable, "-W", "error", str(script), "--yes"], tmp_path / "tree" / "demo" / "bookkeeping", home


def test_the_demos_answer_is_in_the_ledger_as_the_demos(demo):
    argv, folder, home = demo
    done = subprocess.run(argv, env=home.environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    assert "the ledger verifies" in done.stdout
    assert "published" in done.stderr
    entries = [json.loads(line) for line in home.run("ledger", "export").out.splitlines()[1:]]
    (decided,) = (entry["body"] for entry in entries if entry["kind"] == "request.decided")
    assert decided["means"] == "flag --publish always (make demo)"
    assert (folder / ".git" / "hooks").is_dir()


def test_the_demo_can_be_interrupted_anywhere(demo):
    argv, _, home = demo
    chance = random.Random(2)
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        interrupted(argv, number, chance.uniform(0.2, 2.5), env=home.environment)
    done = subprocess.run(argv, env=home.environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 10
    while home.run("vm", "list", "--json").json["vms"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert home.run("vm", "list", "--json").json == {"vms": []}
    assert home.run("ledger", "verify").code == 0


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="installs system packages where some are missing")
def test_setup_can_be_interrupted_and_repeated(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(TREE, tree, ignore=shutil.ignore_patterns(".venv", ".git", ".*_cache", ".hypothesis", "demo"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    for number, after_s in ((signal.SIGINT, 4.0), (signal.SIGKILL, 7.0), (signal.SIGTERM, 9.0), (signal.SIGKILL, 14.0)):
        interrupted(["tools/setup"], number, after_s, cwd=tree, env=environment)
    done = subprocess.run(["tools/setup"], cwd=tree, env=environment, capture_output=True, text=True, timeout=400,
                          check=False, stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ready" in done.stdout
    told = subprocess.run([tree / ".venv/bin/luminaguard", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("luminaguard ")
    again = subprocess.run(["tools/setup"], cwd=tree, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.count("==>") == 1, again.stdout  # there was nothing to do
