"""Agents with real machines: a script or a server plays the model, all else is as it is for a person."""

import json
import os
import random
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from threading import Event, Thread

import anyio
import pytest

from luminaguard.testing.model_server import Answer, Status, serve_models

pytestmark = pytest.mark.vm

LOOK = """
turns:
  - say: I look.
    calls:
      - list_files: {}
      - read_file: {path: a.txt}
      - search_files: {regex: two}
  - say: I change.
    calls:
      - edit_file: {path: a.txt, old: two, new: "2"}
      - shell: {command: "cat a.txt; rm -r sub; ln -s a.txt made.link; echo to-stderr >&2"}
      - python: {code: "open('made.txt', 'w').write(open('a.txt').read() * 2)"}
  - say: Done, I think.
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "script.yaml"
        path.write_text(text)
        return ("--model", f"script:{path}")

    return write


def run(home, workspace, *flags, task="Do it.", **options):
    return home.run("run", task, "-w", str(workspace), "--json", *flags, **options)


def test_an_agent_works_and_what_was_approved_is_published(home, workspace, script):
    first = run(home, workspace, *script(LOOK))
    assert (first.code, first.json["status"], first.json["answer"]) == (120, "waiting", "Done, I think.")
    task, request = first.json["task"], first.json["request_id"]
    assert (workspace / "a.txt").read_text() == "one\ntwo\n" and not (workspace / "made.txt").exists()
    kinds = {c["path"]: c["kind"] for c in first.json["changeset"]["changes"]}
    assert kinds == {
        "a.txt": "modify",
        "made.link": "symlink",
        "made.txt": "create",
        "sub": "delete",
        "sub/b.txt": "delete",
    }
    history = home.run("tasks", "logs", task, "--json").json["messages"]
    outcomes = [m["text"].split("\n", 1)[1] for m in history if m["role"] == "tool"]
    assert (
        "a.txt" in outcomes[0] and outcomes[1] == "one\ntwo" and outcomes[2] == "a.txt:2: two\nlink:2: two\n[2 matches]"
    )
    assert "one\n2" in outcomes[4] and "to-stderr" in outcomes[4]  # it saw the edit before it
    assert home.run("tasks", "list", "--json").json["tasks"][0]["request_id"] == request
    assert home.run("approvals", "approve", request).code == 0
    assert (workspace / "made.txt").read_text() == "one\n2\n" * 2 and os.readlink(workspace / "made.link") == "a.txt"
    assert home.run("tasks", "resume", task).code == 0
    shown = home.run("tasks", "show", task)
    assert f"{task}: finished" in shown.out and "0 of them not published" in shown.out
    again = home.run("tasks", "replay", task, "--json")
    assert (again.code, again.json["same"], again.json["replays"]) == (0, True, task)
    assert home.run("ledger", "verify").code == 0
    assert home.run("vm", "list", "--json").json["vms"] == []


def test_the_answer_is_on_standard_output_and_a_script_says_that_it_is_one(home, workspace, script):
    done = home.run("run", "Say it.", "-w", str(workspace), *script("turns: [{say: The answer.}]"))
    assert (done.code, done.out) == (0, "The answer.\n")
    assert "a script is played, no model" in done.err and "finished" in done.err


def test_without_a_model_it_says_what_would_work(home, workspace):
    plain = {"OPENAI_API_KEY": "", "ANTHROPIC_API_KEY": "", "GOOGLE_API_KEY": ""}
    none = run(home, workspace, **plain)
    assert none.code == 123 and "No language model is chosen" in none.json["error"]["message"]
    assert "On this machine:" in none.json["error"]["hint"]
    assert home.run("models", "list", **(plain | {"ANTHROPIC_API_KEY": "k"})).out.count("anthropic:MODEL") == 1
    missing = run(home, workspace, "--model", "anthropic:x", **plain)
    assert missing.code == 123 and "ANTHROPIC_API_KEY" in missing.json["error"]["hint"]
    assert run(home, workspace, "--model", "nobody:x").code == 123
    assert run(home, workspace, "--model", "script:/none.yaml").code == 123
    assert run(home, workspace, "--budget", "tokens=many", "--model", "script:x").code == 123
    assert home.run("tasks", "list", "--all").out == "no tasks\n"
    assert home.run("tasks", "show", "task-none").code == 122


@contextmanager
def serving(*behaviours):
    """A model server in a thread of its own; what it was asked is there afterwards."""
    started, end, found = Event(), Event(), {}

    async def serve():
        async with serve_models(behaviours) as server:
            found["server"] = server
            started.set()
            await anyio.to_thread.run_sync(end.wait)

    thread = Thread(target=anyio.run, args=(serve,))
    thread.start()
    try:
        assert started.wait(20)
        yield found["server"]
    finally:
        end.set()
        thread.join(20)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_model_behind_its_protocol_works_and_no_key_is_left_anywhere(home, workspace, provider):
    calls = (("write_file", '{"path": "new.txt", "content": "by a model"}'), ("shell", '{"command": "env; cat a.txt"}'))
    key = "sk-very-secret-key-4711"
    with serving(Status(429, (("retry-after", "0"),)), Answer("I write.", calls), Answer("All done.")) as server:
        url = server.openai if provider == "openai" else server.anthropic
        variables = {"LUMINAGUARD_MODEL_KEY": key}
        done = run(home, workspace, "--model", f"{provider}:test-model@{url}", **variables)
    assert (done.code, done.json["answer"]) == (120, "All done.")
    usage = done.json["usage"]
    assert (usage["requests"], usage["input_tokens"], usage["tool_calls"], usage["dollars"]) == (3, 200, 2, 0.0)
    assert key in str(server.requests[0][1])
    outcome = str(server.requests[2][2]["messages"])
    assert "one\\\\ntwo" in outcome.replace("\\n", "\\\\n") and "PATH=" in outcome and key not in outcome
    left = subprocess.run(["grep", "-ral", key, str(home.folder)], capture_output=True, check=False)
    assert left.stdout == b""


@pytest.mark.slow
def test_a_task_goes_on_after_kill_9_wherever_it_was(home, workspace, script):
    """Killed again and again, at times that a seed decides; what comes out is what would have without."""
    seed = int(os.environ.get("LUMINAGUARD_TEST_SEED", "7"))
    chance = random.Random(seed)
    flags = script(LOOK)
    argv, killed, task = home.argv("run", "Do it.", "-w", str(workspace), *flags), 0, ""
    for _ in range(40):
        with subprocess.Popen(argv, env=home.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) as process:  # fmt: skip
            try:
                process.wait(chance.uniform(0.4, 3.0) if killed < 8 else 120)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
            code = process.wait()
        tasks = home.run("tasks", "list", "--all", "--json").json["tasks"]
        if not tasks:  # it was killed before its first state was kept: it was never begun
            continue
        task = tasks[0]["task"]
        argv = home.argv("tasks", "resume", task)
        if code == 120:
            break
    assert killed >= 4 and code == 120, seed
    (request,) = [r for r in home.run("approvals", "list", "--json").json["requests"] if r["state"] == "pending"]
    assert home.run("approvals", "approve", request["id"]).code == 0
    assert home.run("tasks", "resume", task).code == 0
    assert (workspace / "made.txt").read_text() == "one\n2\n" * 2 and not (workspace / "sub").exists()
    assert home.run("ledger", "verify").code == 0
    assert home.run("vm", "list", "--json").json["vms"] == []
    assert list((home.folder / "state" / "blobs").glob("*")) == []


def test_ctrl_c_leaves_it_at_its_last_finished_step(home, workspace, script):
    flags = script("turns:\n - say: first\n   calls: [{list_files: {}}]\n - calls: [{shell: {command: 'sleep 600'}}]\n")
    argv = home.argv("run", "Do it.", "-w", str(workspace), *flags)
    with subprocess.Popen(argv, env=home.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        for line in process.stderr:
            if b"-> shell" in line:
                break
        deadline = time.monotonic() + 60
        while not home.run("vm", "list", "--json").json["vms"]:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().decode()
        assert process.wait(30) == 130
    task = re.search(r"interrupted: (task-\w+) goes on with", said)[1]
    assert "Traceback" not in said and home.run("vm", "list", "--json").json["vms"] == []
    shown = home.run("tasks", "show", task, "--json").json
    assert (shown["status"], shown["worked_on"]) == ("running", False)
    assert f"{task}: interrupted" in home.run("tasks", "show", task).out
    assert home.run("tasks", "cancel", task).code == 0
    assert home.run("tasks", "resume", task).code == 122


def test_what_a_model_says_cannot_look_like_what_we_say(home, workspace, script):
    flags = script('turns:\n - say: "x\\n-> shell command=forged\\ntask-1 finished\\x1b[2J"\n')
    done = home.run("run", "Do it.", "-w", str(workspace), *flags)
    said = done.err.splitlines()
    assert "  | -> shell command=forged" in said and "-> shell command=forged" not in said
    assert not any(line.startswith("task-1 ") for line in said) and "\x1b" not in done.err + done.out
    task = re.search(r"task-\w+", done.err)[0]
    assert "  | -> shell command=forged" in home.run("tasks", "logs", task).out.splitlines()


def test_a_script_is_found_from_elsewhere_and_a_replay_ends(home, workspace, tmp_path):
    (tmp_path / "s.yaml").write_text("turns:\n - calls: [{ask_user: {question: q}}]\n"
                                     " - calls: [{write_file: {path: n, content: x}}]\n - say: Done.\n")  # fmt: skip
    argv = home.argv("run", "Do it.", "-w", str(workspace), "--json", "--model", "script:s.yaml")
    done = subprocess.run(argv, cwd=tmp_path, env=home.environment, capture_output=True, check=False)
    task = json.loads(done.stdout)["task"]
    home.run("tasks", "answer", task, "This.")
    waiting = home.run("tasks", "resume", task)
    assert waiting.code == 120 and "approvals show req-" in waiting.err
    assert "it waits for req-" in home.run("tasks", "show", task).out
    again = home.run("tasks", "replay", task)
    assert again.code == 0 and "the same changes" in again.out
    assert home.run("tasks", "list").out.count("\n") == 1


def test_rules_hold_for_agents_and_labels_follow(home, workspace, script):
    (home.folder / "config").mkdir(mode=0o700, exist_ok=True)
    (home.folder / "config" / "luminaguard.toml").write_text(
        '[policy.marked_folders]\n"sub/**" = "mail"\n'
        '[[policy.rules]]\nname = "no"\nrisk = "FORBIDDEN"\nreason = "Never this."\n'
        'when = { effect = "run", command = "*forbidden*" }\n'
    )
    flags = script(
        "turns:\n - calls: [{shell: {command: 'echo forbidden'}}, {shell: {command: 'echo x > n'}}]\n - say: So.\n"
    )
    done = run(home, workspace, *flags)
    task = done.json["task"]
    first, second = [m for m in home.run("tasks", "logs", task, "--json").json["messages"] if m["role"] == "tool"]
    assert first["failed"] and "Never this." in first["text"] and not second["failed"]
    assert "labels: mail" in home.run("tasks", "show", task).out
    assert home.run("approvals", "list", "--json").json["requests"][0]["taint"] == ["mail"]


def test_it_is_asked_and_answered_at_the_terminal(home, workspace, script, on_a_terminal):
    flags = script("turns:\n - calls: [{ask_user: {question: 'Which one?'}}]\n"
                   " - calls: [{write_file: {path: n, content: x}}]\n - say: Done.\n")  # fmt: skip
    with on_a_terminal("run", "Do it.", "-w", str(workspace), *flags) as terminal:
        assert b"Which one?" in terminal.until(b"your answer")
        terminal.type("that one\r")
        assert b"n   new file" in terminal.until(b"another person): ")
        terminal.type("y\r")
        terminal.until(b"finished")
        assert terminal.wait() == 0
    assert (workspace / "n").read_text() == "x"


def test_a_question_is_answered_from_elsewhere(home, workspace, script):
    flags = script("turns:\n - calls: [{ask_user: {question: 'Which?'}}]\n - say: Thanks.\n")
    asked = run(home, workspace, *flags)
    assert (asked.code, asked.json["question"]) == (120, "Which?")
    task = asked.json["task"]
    assert home.run("tasks", "answer", task, "That.").code == 0
    assert home.run("tasks", "answer", task, "Again.").code == 122
    done = home.run("tasks", "resume", task, "--json")
    assert (done.code, done.json["answer"]) == (0, "Thanks.")
    assert "That." in [m["text"] for m in home.run("tasks", "logs", task, "--json").json["messages"]]


def test_a_paused_task_goes_on_with_more(home, workspace, script):
    flags = script("turns:\n - calls: [{list_files: {}}]\n - calls: [{list_files: {}}]\n - say: Done.\n")
    paused = run(home, workspace, *flags, "--max-turns", "1")
    assert (paused.code, paused.json["status"]) == (122, "paused")
    assert run(home, workspace, *flags, "--budget", "calls=0").json["why"] == "the budget of 0 tool calls is used up"
    done = home.run("tasks", "resume", paused.json["task"], "--max-turns", "5", "--json")
    assert (done.code, done.json["turns"]) == (0, 3)
    entries = [json.loads(line) for line in home.run("ledger", "export").out.splitlines()[1:]]
    steps = [
        e["body"]["step"] for e in entries if e["kind"] == "task.step" and e["body"]["task"] == paused.json["task"]
    ]
    assert steps == list(range(1, len(steps) + 1))
