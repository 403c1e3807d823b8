"""An agent's task with the tools of other servers: asked for, made once, and never twice after a crash."""

import os
import signal
import subprocess

import pytest

from luminaguard.testing.mcp_lab import Fault, LabServer, running_lab

TWO_CALLS = """
turns:
  - say: I look.
    calls:
      - lab__look: {key: a}
  - say: I count.
    calls:
      - lab__add: {key: a}
  - say: Done.
"""


@pytest.fixture
def agent(bare_home, workspace, tmp_path):
    """Runs a script with one server, and goes on with its task."""
    lab = LabServer()
    (tmp_path / "script.yaml").write_text(TWO_CALLS)

    class Agent:
        home, server = bare_home, lab
        words = ("run", "Do it.", "-w", str(workspace), "--json", "--model", f"script:{tmp_path / 'script.yaml'}")

        def run(self):
            return bare_home.run(*self.words)

        def resume(self, task):
            return bare_home.run("tasks", "resume", task, "--json")

        def waiting(self):
            return bare_home.run("approvals", "list", "--json").json["requests"]

    with running_lab(lab) as Agent.portal:
        config = bare_home.folder / "config"
        config.mkdir(mode=0o700)
        (config / "luminaguard.toml").write_text(
            f'[policy]\ntrusted_servers = ["lab"]\n[mcp_servers.lab]\nurl = "{lab.url}"\ntimeout_s = 5\n'
        )
        yield Agent()


def test_a_call_is_green_or_waits_and_is_made_once(agent):
    first = agent.run()
    assert (first.code, first.json["status"]) == (120, "waiting"), first.err
    (request,) = agent.waiting()
    assert request["task"] == first.json["task"] and request["taint"] == ["mcp:lab"] and not agent.server.executed
    assert agent.home.run("approvals", "approve", request["id"]).code == 0
    done = agent.resume(first.json["task"])
    assert (done.code, done.json["status"], done.json["answer"]) == (0, "finished", "Done."), done.err
    assert agent.server.executed == {"a": 1}
    assert agent.home.run("ledger", "verify").code == 0


def test_a_no_is_told_to_the_model(agent):
    first = agent.run()
    (request,) = agent.waiting()
    assert agent.home.run("approvals", "deny", request["id"], "--reason", "not today").code == 0
    done = agent.resume(first.json["task"])
    assert done.json["status"] == "finished" and not agent.server.executed
    assert "not today" in agent.home.run("tasks", "logs", first.json["task"]).out


def test_a_server_that_is_gone_is_an_outcome_like_any_other(agent):
    first = agent.run()
    (request,) = agent.waiting()
    agent.home.run("approvals", "approve", request["id"])
    agent.portal.call(agent.server.kill)
    done = agent.resume(first.json["task"])
    assert done.json["status"] == "finished", done.err
    assert "Connect" in agent.home.run("tasks", "logs", first.json["task"]).out


def test_a_call_that_a_crash_interrupted_is_put_to_a_person_and_not_repeated(agent):
    first = agent.run()
    (request,) = agent.waiting()
    agent.home.run("approvals", "approve", request["id"])
    agent.server.plan = lambda m: Fault("hang") if m["method"] == "tools/call" else None
    argv = agent.home.argv("tasks", "resume", first.json["task"], "--json")
    with subprocess.Popen(argv, env=agent.home.environment, stdout=subprocess.PIPE) as process:
        agent.portal.call(agent.server.until, "got", 2)
        os.kill(process.pid, signal.SIGKILL)
    assert agent.server.executed == {"a": 1}
    agent.server.plan = lambda _: None
    done = agent.resume(first.json["task"])
    assert done.json["status"] == "finished", done.err
    assert agent.server.executed == {"a": 1}
    assert "called before" in agent.home.run("tasks", "logs", first.json["task"]).out
    assert [(one["id"], one["state"]) for one in agent.waiting()] == [(request["id"], "unknown")]
    assert agent.home.run("approvals", "close", request["id"]).code == 0
    assert agent.home.run("ledger", "verify").code == 0
