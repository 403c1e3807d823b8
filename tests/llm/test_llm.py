"""A model that emits anything: the loop stays within rules and budgets, and nothing reaches the folder.

llama.cpp's server speaks OpenAI's protocol; its model has random weights (``tools/tiny_model.py``), and its grammar
makes the calls that come fit their schema. ``make test-llm`` builds both.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

BASE = Path(os.environ.get("LUMINAGUARD_LLAMA", "/nonexistent"))
pytestmark = [pytest.mark.vm, pytest.mark.llm, pytest.mark.timeout(900)]
TASKS = 8
RULES = """
[[policy.rules]]
name = "no-python"
risk = "FORBIDDEN"
reason = "No Python here."
when = { effect = "run", tool = "python" }

[[policy.rules]]
name = "no-shell"
risk = "FORBIDDEN"
reason = "No shell here."
when = { effect = "run", tool = "shell" }
"""


@pytest.fixture(scope="module")
def server():
    if not (BASE / "llama-server").exists():
        pytest.skip("make test-llm builds the server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [str(BASE / "llama-server"), "-m", str(BASE / "tiny.gguf"), "--host", "127.0.0.1", "--port", str(port),
            "-c", "16384", "-n", "300", "-s", "7",
            "--jinja", "--chat-template-file", str(BASE / "template.jinja")]  # fmt: skip
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                        if json.load(answer)["status"] == "ok":
                            break
                except OSError:
                    assert process.poll() is None, "the server ended"
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def test_whatever_a_model_emits_stays_within_rules_and_budgets(home, workspace, server):
    (home.folder / "config").mkdir(mode=0o700)
    (home.folder / "config" / "luminaguard.toml").write_text(RULES)
    before = {p: p.read_bytes() for p in sorted(workspace.rglob("*")) if p.is_file()}
    statuses, calls = [], 0
    for number in range(TASKS):
        asked = f"Task {number}: list the files, then read a.txt."
        done = home.run("run", asked, "-w", str(workspace), "--json", "--model", f"openai:tiny@{server}",
                        "--max-turns", "4", "--budget", "requests=12,calls=8,time=3min", timeout_s=300)  # fmt: skip
        assert done.code in {0, 120, 122}, done
        found = done.json
        statuses.append(found["status"])
        usage = found["usage"]
        assert found["turns"] <= 4 and usage["requests"] <= 12 + 3 and usage["tool_calls"] <= 8 + 64
        calls += usage["tool_calls"]
    assert set(statuses) <= {"finished", "waiting", "paused"}
    assert calls > 0, f"the model called no tool in {TASKS} tasks: {statuses}"
    assert {p: p.read_bytes() for p in sorted(workspace.rglob("*")) if p.is_file()} == before
    assert home.run("ledger", "verify").code == 0
    entries = [json.loads(line) for line in home.run("ledger", "export").out.splitlines()[1:]]
    started = [e["body"]["command"] for e in entries if e["kind"] == "exec.started"]
    assert all(command[:2] == ["python3", "-I"] for command in started)  # the file tools, and no other
    assert home.run("vm", "list", "--json").json["vms"] == []
    print(f"{TASKS} tasks: {sorted(statuses)}, {calls} tool calls, {len(started)} machines, "
          f"{sum(e['kind'] == 'run.forbidden' for e in entries)} calls forbidden")  # fmt: skip
