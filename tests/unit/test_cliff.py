"""Decisions, parts, grants, two people, tasks and changed rules: with a real database, without machines."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from luminaguard.actions.model import Action
from luminaguard.approvals import Judged, Scope, State, Verdict
from luminaguard.effects.outside import NetworkRequest, RemoteCall, SecretUse, ToolRun, outside_from_json
from luminaguard.effects.outside_card import make_outside_card
from luminaguard.effects.page import page
from luminaguard.effects.render import render
from luminaguard.errors import (
    ActionInvalid,
    ApprovalError,
    ApprovalNeeded,
    ChangesetRefused,
    Forbidden,
    LuminaGuardError,
    PolicyChanged,
    StorageError,
)
from luminaguard.runtime import Runtime
from luminaguard.runtime.decisions import Again, Answer
from luminaguard.settings import Folders, load_settings
from luminaguard.testing.requests import ask_for, ask_for_changes

YES = Answer(Verdict.APPROVE, "test")
GREEN = '[[policy.rules]]\nname = "notes"\nrisk = "GREEN"\nreason = "Notes."\nwhen = { every_path = "notes/**" }\n'
FORBID = '[[policy.rules]]\nname = "never"\nrisk = "FORBIDDEN"\nreason = "Never."\nwhen = { any_path = "**" }\n'


def open_runtime(folder):
    folders = Folders(folder / "config", folder / "state", folder / "cache", folder / "run").ensure()
    return Runtime(load_settings(folders), folders)


@pytest.fixture
def runtime(tmp_path):
    made = open_runtime(tmp_path / "home")
    yield made
    made.close()


def rules(runtime, text):
    (runtime.folders.config / "luminaguard.toml").write_text(text)


def kinds(runtime):
    return [entry.kind for entry in runtime.ledger.entries()]


# -- parts ----------------------------------------------------------------------------------------------


def test_a_part_is_published_and_the_rest_is_not(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"new": 0o755, "new/x": b"x", "a.txt": b"changed", "run.sh": None})
    with pytest.raises(ChangesetRefused, match="cannot be changed without 'new'"):
        runtime.decisions.approve_and_publish(request, dataclasses.replace(YES, part=("new/x",)))
    assert runtime.approvals.get(request.id).state is State.PENDING
    done = runtime.decisions.approve_and_publish(request, dataclasses.replace(YES, part=("new", "new/x")))
    assert done.state is State.PUBLISHED
    assert (workspace / "new" / "x").read_bytes() == b"x"
    assert (workspace / "a.txt").read_text() == "one\ntwo\n"
    assert (workspace / "run.sh").exists()
    assert runtime.approvals.outcome(request.id) == "published a part: 2 of 4 changes"
    with pytest.raises(ApprovalError):
        runtime.decisions.approve_and_publish(done, YES)


def test_what_a_folder_held_goes_with_it(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"sub": None, "sub/b.txt": None})
    changeset = runtime.approvals.changeset(request.id)
    assert changeset.needed_with("sub") == {"sub/b.txt"}
    with pytest.raises(ChangesetRefused):
        changeset.part(["sub"])
    assert len(changeset.part(["sub/b.txt"])) == 1
    for wrong in ([], ["other"]):
        with pytest.raises(ChangesetRefused):
            changeset.part(wrong)


def test_a_part_that_was_not_signed_is_not_published(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1", "b": b"2"})
    runtime.decisions.decide(request, dataclasses.replace(YES, part=("a.txt",)))
    with runtime.ledger.database.write() as connection:
        connection.exec_driver_sql("""UPDATE decisions SET part = '["a.txt", "b"]'""")
    with pytest.raises(ApprovalError):
        runtime.decisions.publish(request.id)
    assert not (workspace / "b").exists()


# -- answers other than yes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "state"),
    [(Verdict.DENY, State.DENIED), (Verdict.RETURN, State.RETURNED), (Verdict.STOP, State.STOPPED)],
)
def test_no_is_said_with_a_reason_that_the_agent_reads(runtime, workspace, verdict, state):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"}, task="books")
    ended = runtime.decisions.deny(request, Answer(verdict, "test", reason="use tabs"))
    assert (ended.state, runtime.approvals.outcome(request.id)) == (state, "use tabs")
    assert not (runtime.blobs.folder / request.id).exists()
    with pytest.raises(ApprovalError):
        runtime.decisions.approve_and_publish(ended, YES)


def test_stopping_a_task_ends_its_requests_and_lasts(runtime, workspace, tmp_path):
    first = ask_for_changes(runtime, workspace, {"a.txt": b"1"}, task="books")
    second = ask_for_changes(runtime, workspace, {"b": b"1"}, task="books")
    other = ask_for_changes(runtime, workspace, {"c": b"1"}, task="other")
    runtime.decisions.deny(first, Answer(Verdict.STOP, "test", reason="enough"))
    assert runtime.approvals.get(second.id).state is State.STOPPED
    assert runtime.approvals.get(other.id).state is State.PENDING
    runtime.close()
    again = open_runtime(tmp_path / "home")
    assert (again.tasks.stopped("books"), again.tasks.stopped("other")) == ("enough", None)
    again.close()


# -- rules, and rules that change -------------------------------------------------------------------------------


def test_a_rule_that_the_person_wrote_answers_and_the_ledger_says_so(runtime, workspace):
    rules(runtime, GREEN)
    request = ask_for_changes(runtime, workspace, {"notes": 0o755, "notes/a": b"1"} | {"notes/b": b"2"})
    assert runtime.decisions.without_asking(request) is None  # `notes` itself is not within notes/**
    (workspace / "notes").mkdir()
    request = ask_for_changes(runtime, workspace, {"notes/a": b"1"})
    answer = runtime.decisions.without_asking(request)
    assert runtime.decisions.approve_and_publish(request, answer).state is State.PUBLISHED
    decided = [json.loads(e.body) for e in runtime.ledger.entries() if e.kind == "request.decided"]
    assert decided[0]["means"] == "rule notes (luminaguard.toml:1)"


def test_what_is_forbidden_is_not_asked_and_not_kept(runtime, workspace):
    rules(runtime, FORBID)
    with pytest.raises(Forbidden, match="Never"):
        ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    assert runtime.approvals.list(everything=True) == []
    assert kinds(runtime) == ["effect.forbidden"]


def test_rules_that_changed_since_it_was_shown_are_shown_again(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    rules(runtime, GREEN)
    with pytest.raises(PolicyChanged):
        runtime.decisions.approve_and_publish(request, YES)
    assert (workspace / "a.txt").read_text() == "one\ntwo\n"
    again = runtime.approvals.get(request.id)
    assert runtime.decisions.approve_and_publish(again, YES).state is State.PUBLISHED


def test_rules_that_forbid_now_end_what_waits_and_what_was_approved(runtime, workspace):
    waits = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    approved = runtime.decisions.decide(ask_for_changes(runtime, workspace, {"b": b"1"}), YES)
    rules(runtime, FORBID)
    with pytest.raises(Forbidden):
        runtime.decisions.approve_and_publish(waits, YES)
    with pytest.raises(Forbidden):
        runtime.decisions.publish(approved.id)
    assert {r.state for r in runtime.approvals.list(everything=True)} == {State.DENIED}
    assert not (workspace / "b").exists()


def test_rules_that_cannot_be_read_stop_approving_but_not_denying(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    (workspace / ".luminaguard.toml").write_text("[policy\n")
    with pytest.raises(Exception, match=r"\.luminaguard\.toml, line 1"):
        runtime.decisions.approve_and_publish(request, YES)
    assert runtime.approvals.get(request.id).state is State.PENDING
    assert runtime.decisions.deny(request, Answer(Verdict.DENY, "test")).state is State.DENIED


def test_the_workspaces_own_rules_cannot_be_changed_by_what_they_let_through(runtime, workspace):
    rules(runtime, GREEN.replace("notes/**", "**"))
    request = ask_for_changes(runtime, workspace, {".luminaguard.toml": b"", "a.txt": b"1"})
    assert runtime.decisions.without_asking(request) is None
    assert request.judged.severity.value == "critical"


# -- grants ---------------------------------------------------------------------------------------------------


def granted(runtime, workspace, changes, again, **more):
    request = ask_for_changes(runtime, workspace, changes, **more)
    return runtime.decisions.approve_and_publish(request, YES, again=again)


def test_a_grant_answers_for_what_was_shown_so_often_and_so_long(runtime, workspace):
    granted(runtime, workspace, {"a.txt": b"1"}, Again(2, 3600), command=("make", "fmt"))
    for content in (b"2", b"3"):
        request = ask_for_changes(runtime, workspace, {"a.txt": content}, command=("make", "fmt"))
        answer = runtime.decisions.without_asking(request)
        assert runtime.decisions.approve_and_publish(request, answer).state is State.PUBLISHED
    request = ask_for_changes(runtime, workspace, {"a.txt": b"4"}, command=("make", "fmt"))
    assert runtime.decisions.without_asking(request) is None
    used = [json.loads(e.body) for e in runtime.ledger.entries() if e.kind == "grant.used"]
    assert [(body["use"], body["of"]) for body in used] == [(1, 2), (2, 2)]
    assert used[0]["scope"]["values"]["command"] == "make fmt"


@pytest.mark.parametrize(
    ("changes", "more"),
    [({"b.txt": b"1"}, {}), ({"a.txt": b"1", "b.txt": b"1"}, {}), ({"a.txt": None}, {}), ({"a.txt": "link"}, {}),
     ({"a.txt": b"1"}, {"command": ("make", "all")}), ({"a.txt": b"1"}, {"task": "other"})],
)  # fmt: skip
def test_a_grant_is_no_wider_than_what_was_shown(runtime, workspace, changes, more):
    granted(runtime, workspace, {"a.txt": b"0"}, Again(5, 3600), command=("make", "fmt"))
    request = ask_for_changes(runtime, workspace, changes, **{"command": ("make", "fmt"), **more})
    assert runtime.decisions.without_asking(request) is None


def test_a_grant_is_for_its_folder_and_ends_when_it_is_revoked(runtime, workspace, tmp_path):
    granted(runtime, workspace, {"a.txt": b"0"}, Again(5, 3600))
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("x")
    assert runtime.decisions.without_asking(ask_for_changes(runtime, other, {"a.txt": b"1"})) is None
    (standing,) = runtime.grants.list()
    runtime.grants.revoke(standing.grant.id)
    assert runtime.decisions.without_asking(ask_for_changes(runtime, workspace, {"a.txt": b"1"})) is None
    with pytest.raises(ApprovalError):
        runtime.grants.revoke(standing.grant.id)
    with pytest.raises(ApprovalError):
        runtime.grants.revoke("gr-none")


def test_a_pattern_loosens_one_value_and_never_all(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"0"}, command=("make", "fmt"))
    for pattern in ("*", "**", "?*", "[!a]*", "ninja *"):
        with pytest.raises(ApprovalError, match="No such grant"):
            runtime.decisions.scope(request, {"command": pattern})
    with pytest.raises(ApprovalError, match="nothing is called"):
        runtime.decisions.scope(request, {"files": "x"})
    runtime.decisions.approve_and_publish(request, YES, again=Again(9, 60, {"command": "make *"}))
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"}, command=("make", "all"))
    assert runtime.decisions.without_asking(request) is not None


@pytest.mark.parametrize("again", [Again(0, 60), Again(10**6, 60), Again(1, 0), Again(1, 10**9)])
def test_no_grant_is_for_ever(runtime, workspace, again):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"0"})
    with pytest.raises(ApprovalError, match="at most"):
        runtime.decisions.approve_and_publish(request, YES, again=again)
    assert runtime.approvals.get(request.id).state is State.PENDING


def test_what_is_critical_is_asked_for_each_time(runtime, workspace):
    hook = {".git": 0o755, ".git/hooks": 0o755, ".git/hooks/pre-commit": b"x"}
    request = ask_for_changes(runtime, workspace, hook)
    with pytest.raises(ApprovalError, match="critical"):
        runtime.decisions.approve_and_publish(request, YES, again=Again(1, 60))


def test_a_grant_that_was_edited_in_the_database_is_not_used(runtime, workspace):
    granted(runtime, workspace, {"a.txt": b"0"}, Again(1, 3600))
    with runtime.ledger.database.write() as connection:
        connection.exec_driver_sql("UPDATE grants SET max_uses = 1000")
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    assert runtime.decisions.without_asking(request) is None
    assert "grant.refused" in kinds(runtime)
    with runtime.ledger.database.write() as connection:
        connection.exec_driver_sql("UPDATE grants SET scope = '[]'")
    with pytest.raises(StorageError, match="cannot be read"):
        runtime.grants.list()


def test_values_of_a_list_are_values_of_their_own():
    action = Action.from_json({"effect": "call", "server": "s", "tool": "t", "arguments": {"to": ["a", "b"]}})
    scope = Scope.of(action, Judged())
    assert scope.problem(action, Judged()) == ""
    for other in (["a"], ["a", "c"], ["a", "b", "c"], "a", {"0": "a"}):
        wider = Action.from_json({"effect": "call", "server": "s", "tool": "t", "arguments": {"to": other}})
        assert scope.problem(wider, Judged()), other
    assert Scope.from_json(json.loads(json.dumps(scope.to_json()))) == scope


# -- two people -------------------------------------------------------------------------------------------------


def test_two_people_must_approve_the_same(runtime, workspace):
    rules(runtime, '[policy]\ntwo_people_from = "low"\n')
    runtime.approvers.add("ada", "a long passphrase")
    ada = dataclasses.replace(YES, person="ada", key=runtime.approvers.unlock("ada", "a long passphrase"))
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1", "b": b"1"})
    assert request.judged.people == 2
    assert runtime.decisions.approve_and_publish(request, YES).state is State.PENDING
    with pytest.raises(ApprovalError, match="decided already"):
        runtime.decisions.approve_and_publish(request, YES)
    with pytest.raises(ApprovalError, match="another part"):
        runtime.decisions.approve_and_publish(request, dataclasses.replace(ada, part=("b",)))
    assert not (workspace / "b").exists()
    assert runtime.decisions.approve_and_publish(request, ada).state is State.PUBLISHED


def test_one_person_is_not_two_and_one_no_is_enough(runtime, workspace):
    rules(runtime, '[policy]\ntwo_people_from = "low"\n' + GREEN.replace("notes/**", "**"))
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    assert runtime.decisions.without_asking(request) is None  # a rule is nobody
    runtime.decisions.decide(request, YES)
    with runtime.ledger.database.write() as connection:
        connection.exec_driver_sql("UPDATE requests SET state = 'approved', people = 1")
    with pytest.raises(ApprovalError, match="different people"):
        runtime.decisions.publish(request.id)
    with runtime.ledger.database.write() as connection:
        connection.exec_driver_sql("UPDATE requests SET state = 'pending'")
    runtime.approvers.add("ada", "a long passphrase")
    ada = runtime.approvers.unlock("ada", "a long passphrase")
    no = Answer(Verdict.DENY, "test", person="ada", key=ada)
    assert runtime.decisions.deny(request, no).state is State.DENIED


def test_a_key_opens_with_its_passphrase_alone(runtime, workspace):
    runtime.approvers.add("ada", "a long passphrase")
    with pytest.raises(ApprovalError, match="not the passphrase"):
        runtime.approvers.unlock("ada", "another passphrase")
    with pytest.raises(ApprovalError, match="no approver"):
        runtime.approvers.unlock("bob", "x")
    for name, words in (("Ada", "a long passphrase"), ("owner", "a long passphrase"), ("ada", "a long passphrase"),
                        ("bob", "short"), ("../x", "a long passphrase")):  # fmt: skip
        with pytest.raises(ApprovalError):
            runtime.approvers.add(name, words)
    path = runtime.folders.state / "keys" / "approvers" / "ada.json"
    assert path.stat().st_mode & 0o777 == 0o600
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    key = runtime.approvers.unlock("ada", "a long passphrase")
    runtime.decisions.decide(request, dataclasses.replace(YES, person="ada", key=key))
    runtime.approvers.remove("ada")
    with pytest.raises(ApprovalError, match="not validly signed"):
        runtime.decisions.publish(request.id)  # whose approval counts no more


def test_of_two_approvers_at_once_one_answer_counts(tmp_path, workspace):
    first = open_runtime(tmp_path / "home")
    request = ask_for_changes(first, workspace, {"a.txt": b"1"})
    first.close()
    barrier = threading.Barrier(2)

    def decide(verdict):
        runtime = open_runtime(tmp_path / "home")
        try:
            mine = runtime.approvals.get(request.id)
            barrier.wait(10)
            return runtime.decisions.decide(mine, Answer(verdict, "test")).state
        except ApprovalError:
            return None
        finally:
            runtime.close()

    with ThreadPoolExecutor(2) as pool:
        states = list(pool.map(decide, (Verdict.APPROVE, Verdict.DENY)))
    assert sorted(states, key=str).count(None) == 1, states


def test_a_request_whose_folder_is_gone_is_refused_and_recorded(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    workspace.rename(workspace.with_name("elsewhere"))
    with pytest.raises(Exception, match="folder|workspace") as caught:
        runtime.decisions.approve_and_publish(request, YES)
    assert caught.value.hint
    assert "request.finished" in kinds(runtime) or "request.refused" in kinds(runtime)


# -- effects that are no files --------------------------------------------------------------------------------------

CALL = RemoteCall("mail", "send", {"to": ["a@example.org"], "body": "hi\n\x1b[2J\u202eevil", "n": 3},
                  {"name": "send", "description": "now"}, {"name": "send", "description": "then"})  # fmt: skip
REQUEST = NetworkRequest("POST", "http://api.example/x?k=v", (("X-A", "b"),), 2000,
                         "ab" * 32, "first line\nsecond")  # fmt: skip
SECRET = SecretUse("deploy-token", "push", "git.example")


RUN = ToolRun("exec", {"command": ["make", "deploy\x1b[2J"]}, "/srv/site")


@pytest.mark.parametrize("effect", [CALL, REQUEST, SECRET, RUN])
def test_every_effect_is_asked_for_shown_and_handed_over_once(runtime, effect):
    request = ask_for(runtime, effect)
    stored = runtime.approvals.effect(request.id)
    assert (stored, stored.digest) == (effect, effect.digest)
    assert runtime.decisions.card(request).digest == effect.digest
    with pytest.raises(ApprovalError, match="nobody has approved"):
        runtime.decisions.hand_over(request.id)
    runtime.decisions.approve_and_hand_over(request, YES)
    assert runtime.decisions.hand_over(request.id).state is State.DONE
    with pytest.raises(ApprovalError):
        runtime.decisions.hand_over(request.id)
    with pytest.raises(ApprovalError, match="not about files"):
        runtime.approvals.changeset(request.id)


def test_cards_say_all_and_draw_nothing():
    text = "\n".join(line for _, line in render(make_outside_card(CALL)))
    assert "CHANGED since it was pinned" in text
    assert '-  "description": "then",' in text and '+  "description": "now",' in text
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[2J\\u202eevil" in text
    text = "\n".join(line for _, line in render(make_outside_card(REQUEST)))
    assert "not encrypted" in text and "query: k=v" in text and "2,000 bytes" in text and "1,983 bytes are not" in text
    assert "not pinned before" in "".join(
        fact.value for fact in make_outside_card(dataclasses.replace(CALL, pinned=None)).facts
    )
    assert "git.example" in make_outside_card(SECRET).facts[2].value


HELD_BACK = (
    '[[policy.rules]]\nname = "deploys"\nrisk = "RED"\nreason = "It deploys."\n'
    'when = { effect = "run", command = "*deploy*" }\n'
)


def test_a_tool_that_a_rule_holds_back_runs_once_for_each_approval(runtime):
    rules(runtime, HELD_BACK)

    def permit(run=RUN, task="t"):
        runtime.permits.permit(run, runtime.policy(None), task, frozenset({"web"}))

    permit(ToolRun("exec", {"command": ["make", "all"]}, "/srv/site"))
    with pytest.raises(ApprovalNeeded) as first:
        permit()
    with pytest.raises(ApprovalNeeded) as second:
        permit()
    assert first.value.request_id == second.value.request_id  # it does not ask twice for the same
    request = runtime.approvals.get(first.value.request_id)
    assert (request.judged.reason, request.taint, request.command[0]) == ("It deploys.", ("web",), "exec")
    card = "\n".join(line for _, line in render(runtime.decisions.card(request)))
    assert "deploy\\u001b[2J" in card and "\x1b" not in card
    runtime.decisions.approve_and_hand_over(request, YES)
    for other in (dataclasses.replace(RUN, workspace="/srv/other"), dataclasses.replace(RUN, tool="shell")):
        with pytest.raises(ApprovalNeeded):
            permit(other)
    with pytest.raises(ApprovalNeeded):
        permit(task="another")
    permit()
    assert runtime.approvals.get(request.id).state is State.DONE
    with pytest.raises(ApprovalNeeded) as again:
        permit()
    assert again.value.request_id != request.id
    rules(runtime, HELD_BACK.replace("RED", "FORBIDDEN"))
    with pytest.raises(Forbidden):
        permit()
    assert kinds(runtime)[-1] == "run.forbidden"


def test_a_grant_lets_a_held_back_tool_run_again(runtime):
    rules(runtime, HELD_BACK)
    with pytest.raises(ApprovalNeeded) as needed:
        runtime.permits.permit(RUN, runtime.policy(None), "t", frozenset())
    request = runtime.approvals.get(needed.value.request_id)
    runtime.decisions.approve_and_hand_over(request, YES, again=Again(1, 600))
    for _ in range(2):  # the approval itself, then the grant
        runtime.permits.permit(RUN, runtime.policy(None), "t", frozenset())
    with pytest.raises(ApprovalNeeded):
        runtime.permits.permit(RUN, runtime.policy(None), "t", frozenset())


class Markup(HTMLParser):
    """Which elements a page has, and its text."""

    def __init__(self):
        super().__init__()
        self.elements, self.text = set(), ""

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        assert all(not name.startswith("on") and name not in {"src", "href", "style"} for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


def test_a_page_shows_what_the_terminal_shows_and_markup_is_text():
    hostile = dataclasses.replace(CALL, tool="</title><script>x</script>", arguments={"a": '"><img src=x onerror=y>'})
    lines = list(render(make_outside_card(hostile)))
    found = Markup()
    found.feed(page("</title><b>", lines))
    assert found.elements <= {"html", "head", "meta", "title", "style", "body", "main", "div"}
    assert all(line in found.text for _, line in lines)


def test_a_call_that_was_interrupted_between_claim_and_end_may_have_been_done(runtime):
    request = ask_for(runtime, CALL)
    runtime.decisions.approve_and_hand_over(request, YES)
    runtime.approvals.claim(request.id, CALL.digest, runtime.approvers.public())
    assert "may have been done" in runtime.decisions.recover()[0]
    assert runtime.approvals.get(request.id).state is State.UNKNOWN


@pytest.mark.parametrize("raw", [{}, {"effect": "call"}, {"effect": "call", "server": "s", "tool": 3},
                                 {"effect": "call", "server": "s", "tool": "t", "arguments": []},
                                 {"effect": "request", "method": "GET", "url": "http://[x"},
                                 {"effect": "request", "method": "GET", "url": "http://x", "body_size": -1},
                                 {"effect": "request", "method": "GET", "url": "http://x", "body_size": 1},
                                 {"effect": "request", "method": "GET", "url": "http://x",
                                  "headers": [["Authorization", "Bearer s3cret"]]},
                                 {"effect": "fly"}])  # fmt: skip
def test_what_is_no_effect_is_refused(raw):
    with pytest.raises(ActionInvalid):
        outside_from_json(raw.pop("effect", ""), raw)


def test_taint_stays_with_its_task(runtime, tmp_path):
    assert runtime.tasks.add_labels("books", [("web", "downloads/x"), ("web", "again")]) == {"web"}
    runtime.close()
    again = open_runtime(tmp_path / "home")
    assert again.tasks.add_labels("books", [("mail", "m")]) == {"web", "mail"}
    assert again.tasks.labels("other") == frozenset()
    assert [json.loads(e.body)["origin"] for e in again.ledger.entries()] == ["downloads/x", "m"]
    again.close()


# -- any order of everything ----------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


class CliffMachine(RuleBasedStateMachine):
    """Ask, answer, grant, revoke, expire, crash, restart, change the rules, ask for two people: never an effect
    without a valid approval, never twice, and the folder always holds exactly what was published last."""

    @initialize()
    def start(self):
        import tempfile
        from pathlib import Path

        self.temporary = tempfile.TemporaryDirectory()
        self.base = Path(self.temporary.name)
        self.workspace = self.base / "w"
        self.workspace.mkdir()
        (self.workspace / "f").write_text("0")
        self.runtime = open_runtime(self.base / "home")
        self.requests, self.published, self.content, self.uses = {}, [], 0, 0
        self.contents, self.inside = {}, "0"
        self.forbidden, self.people = False, 1
        self.runtime.approvers.add("ada", "a long passphrase")
        self.ada = self.runtime.approvers.unlock("ada", "a long passphrase")

    @rule(ttl=st.sampled_from([10**12, 1]))
    def ask(self, ttl):
        self.content += 1
        try:
            request = ask_for_changes(self.runtime, self.workspace, {"f": str(self.content).encode()}, ttl_ns=ttl)
        except Forbidden:
            assert self.forbidden
            return
        assert not self.forbidden
        self.requests[request.id] = (request, ttl)
        self.contents[request.id] = str(self.content)

    def _some(self, number):
        keys = sorted(self.requests, key=lambda key: self.requests[key][0].created_ns)
        return self.requests[keys[number % len(keys)]] if keys else None

    def _published(self, request_id):
        """It is in the folder now: was it right?"""
        assert not self.forbidden and request_id not in self.published
        assert self.requests[request_id][1] > 1
        approvers = {d.approver for d in self.runtime.approvals.decisions(request_id)}
        assert len(approvers) >= self.people
        self.published.append(request_id)
        self.inside = self.contents[request_id]

    @rule(number=st.integers(0, 9), again=st.booleans(), twice=st.booleans(), ada=st.booleans())
    def approve(self, number, again, twice, ada):
        if not (found := self._some(number)):
            return
        answer = dataclasses.replace(YES, person="ada", key=self.ada) if ada else YES
        for _ in range(1 + twice):
            request = self.runtime.approvals.get(found[0].id)
            try:
                grant = Again(2, 600) if again else None
                done = self.runtime.decisions.approve_and_publish(request, answer, again=grant)
            except LuminaGuardError:
                continue
            if done.state is State.PUBLISHED:
                self._published(request.id)
                self.uses += 2 if again else 0
            else:
                assert done.state is State.PENDING and self.people == 2

    @rule(number=st.integers(0, 9), at=st.integers(0, 6))
    def crash(self, number, at):
        """The process ends in the middle; the next one recovers."""
        if not (found := self._some(number)):
            return
        left = [at]

        def step(_):
            left[0] -= 1
            if left[0] < 0:
                raise Crash

        request = self.runtime.approvals.get(found[0].id)
        was = request.state
        try:
            if self.runtime.decisions.approve_and_publish(request, YES, step=step).state is State.PUBLISHED:
                self._published(request.id)
            return
        except LuminaGuardError:
            return
        except Crash:
            assert was in {State.PENDING, State.APPROVED}
        self.restart()
        ended = self.runtime.approvals.get(request.id).state
        assert ended in {State.PUBLISHED, State.REFUSED}
        if ended is State.PUBLISHED:
            self._published(request.id)

    @rule(number=st.integers(0, 9), verdict=st.sampled_from([Verdict.DENY, Verdict.RETURN, Verdict.STOP]))
    def say_no(self, number, verdict):
        if found := self._some(number):
            try:
                self.runtime.decisions.deny(found[0], Answer(verdict, "test"))
                assert found[0].id not in self.published
            except ApprovalError:
                pass

    @rule(number=st.integers(0, 9))
    def by_grant(self, number):
        if not (found := self._some(number)):
            return
        request = self.runtime.approvals.get(found[0].id)
        if request.state is not State.PENDING or not (answer := self.runtime.decisions.without_asking(request)):
            return
        self.uses -= 1
        assert self.uses >= 0 and self.people == 1
        try:
            self.runtime.decisions.approve_and_publish(request, answer)
            self._published(request.id)
        except LuminaGuardError:
            pass

    @rule()
    def revoke_grants(self):
        for standing in self.runtime.grants.list():
            if standing.revoked_ns is None:
                self.uses -= standing.grant.limits.uses - standing.uses
                self.runtime.grants.revoke(standing.grant.id)

    @rule(forbid=st.booleans(), two=st.booleans())
    def change_rules(self, forbid, two):
        rules(self.runtime, '[policy]\ntwo_people_from = "low"\n' * two + FORBID * forbid)
        self.forbidden, self.people = forbid, 1 + two

    @rule()
    def restart(self):
        self.runtime.close()
        self.runtime = open_runtime(self.base / "home")
        self.runtime.decisions.recover()

    @invariant()
    def the_ledger_is_whole_and_no_request_was_done_twice(self):
        if hasattr(self, "runtime"):
            self.runtime.ledger.verify()
            bodies = [json.loads(e.body) for e in self.runtime.ledger.entries() if e.kind == "request.claimed"]
            claimed = [body["request"] for body in bodies]
            assert len(claimed) == len(set(claimed))
            assert set(self.published) <= set(claimed)
            assert (self.workspace / "f").read_text() == self.inside
            assert [p.name for p in self.workspace.iterdir()] == ["f"]

    def teardown(self):
        if hasattr(self, "runtime"):
            self.runtime.close()
            self.temporary.cleanup()


TestCliffMachine = CliffMachine.TestCase
TestCliffMachine.settings = settings(
    max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
