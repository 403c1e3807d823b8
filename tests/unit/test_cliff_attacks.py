"""Attempts on the cliff that once worked: each must be refused, and the ledger must say so."""

import dataclasses
import datetime as dt
import json
import time

import pytest

from luminaguard.actions import Action, Risk
from luminaguard.actions.files import RulesFile, parse_policy
from luminaguard.actions.patterns import matches, matches_path
from luminaguard.approvals import State, Verdict
from luminaguard.effects.outside import NetworkRequest, RemoteCall, SecretUse, outside_from_json
from luminaguard.errors import ActionInvalid, ApprovalError, Forbidden, LuminaGuardError, PolicyChanged, PolicyInvalid
from luminaguard.runtime import Runtime
from luminaguard.runtime.decisions import Again, Answer
from luminaguard.runtime.policy import built_in_rules
from luminaguard.settings import Folders, load_settings
from luminaguard.testing.requests import ask_for, ask_for_changes

YES = Answer(Verdict.APPROVE, "test")
NOON = dt.datetime(2026, 11, 25, 12, 0, tzinfo=dt.UTC)


@pytest.fixture
def runtime(tmp_path):
    base = tmp_path / "home"
    made = Runtime(
        load_settings(f := Folders(base / "config", base / "state", base / "cache", base / "run").ensure()), f
    )
    yield made
    made.close()


def rules(runtime, text):
    (runtime.folders.config / "luminaguard.toml").write_text(text)


def rule(risk, when, name="mine"):
    return f'[[policy.rules]]\nname = "{name}"\nrisk = "{risk}"\nreason = "because"\nwhen = {when}\n'


def edit(runtime, statement):
    """What somebody can do who may write to the database, and to nothing else."""
    with runtime.ledger.database.write() as connection:
        connection.exec_driver_sql(statement)


def judge(action, user):
    return parse_policy(RulesFile("luminaguard.toml", user), built_in_rules()).judge(Action.from_json(action), NOON)


# -- approvals -------------------------------------------------------------------------------------------


def test_what_was_approved_before_is_not_published_in_another_way(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"changed", "run.sh": None})
    approved = runtime.decisions.decide(request, YES)
    with pytest.raises(ApprovalError, match="in another way"):
        runtime.decisions.approve_and_publish(approved, dataclasses.replace(YES, part=("a.txt",)))
    assert (workspace / "run.sh").exists()


def test_a_stop_reaches_what_was_approved_and_what_comes_after(runtime, workspace):
    first = ask_for(runtime, RemoteCall("s", "t", {}), task="W")
    second = ask_for(runtime, RemoteCall("s", "t", {"n": 1}), task="W")
    for request in (first, second):
        runtime.decisions.approve_and_hand_over(request, YES)
    runtime.decisions.deny(runtime.approvals.get(first.id), Answer(Verdict.STOP, "test", reason="dangerous"))
    assert runtime.tasks.stopped("W") == "dangerous"
    for request in (first, second):
        assert runtime.approvals.get(request.id).state is State.STOPPED
        with pytest.raises(ApprovalError):
            runtime.decisions.hand_over(request.id)
    with pytest.raises(Forbidden, match="stopped by a person"):
        ask_for_changes(runtime, workspace, {"a.txt": b"1"}, task="W")


def test_time_and_taint_are_judged_when_it_is_decided_and_when_it_is_done(runtime, workspace):
    approved = ask_for(runtime, SecretUse("token", "deploy", "git.example"), task="T")
    waits = ask_for(runtime, SecretUse("token", "push", "git.example"), task="T")
    runtime.decisions.approve_and_hand_over(approved, YES)
    runtime.tasks.add_labels("T", [("web", "page")])
    with pytest.raises(Forbidden):
        runtime.decisions.hand_over(approved.id)
    with pytest.raises(Forbidden):
        runtime.decisions.approve_and_hand_over(waits, YES)
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    rules(runtime, rule("FORBIDDEN", '{ any_path = "**", until = 2000-01-01 }'))
    request = runtime.decisions.looked_at(request)
    rules(runtime, rule("FORBIDDEN", '{ any_path = "**" }'))
    with pytest.raises(Forbidden):
        runtime.decisions.approve_and_publish(request, YES)
    assert (workspace / "a.txt").read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    "statement",
    ["UPDATE requests SET people = 1, severity = 'low'", "UPDATE requests SET risk = 'GREEN', rule = 'x', people = 1"],
)
def test_what_the_database_says_of_severity_and_people_is_not_taken(runtime, workspace, statement):
    rules(runtime, '[policy]\ntwo_people_from = "critical"\n')
    request = ask_for_changes(runtime, workspace, {".luminaguard.toml": b""})
    edit(runtime, statement)
    with pytest.raises(PolicyChanged):
        edited = runtime.approvals.get(request.id)
        runtime.decisions.approve_and_publish(edited, runtime.decisions.without_asking(edited) or YES)
    assert runtime.approvals.get(request.id).judged.people == 2


def test_a_go_ahead_is_not_given_again_because_a_row_says_so(runtime):
    request = ask_for(runtime, RemoteCall("s", "t", {}))
    runtime.decisions.approve_and_hand_over(request, YES)
    runtime.decisions.hand_over(request.id)
    edit(runtime, "UPDATE requests SET state = 'approved'")
    with pytest.raises(ApprovalError, match="used before"):
        runtime.decisions.hand_over(request.id)


def test_an_effect_that_was_exchanged_in_the_database_is_not_approved(runtime, workspace):
    shown = ask_for_changes(runtime, workspace, {"sub/b.txt": b"1"})
    other = ask_for_changes(runtime, workspace, {"run.sh": None})
    for column in ("body", "digest"):
        edit(runtime, f"UPDATE requests SET {column} = (SELECT {column} FROM requests WHERE id = '{other.id}')")
    for _ in range(2):  # it is judged anew, as what it is now; then it is not what was asked for
        with pytest.raises(ApprovalError):
            runtime.decisions.approve_and_publish(runtime.approvals.get(shown.id), YES)
    assert (workspace / "run.sh").exists()
    refused = [json.loads(e.body)["request"] for e in runtime.ledger.entries() if e.kind == "request.refused"]
    assert shown.id in refused


@pytest.mark.parametrize("column", ["expires_ns", "people", "workspace", "command", "body", "taint", "reason"])
@pytest.mark.parametrize("value", ["x'00'", "'[1]'", "'" + "[" * 3000 + "'", "NULL"])
def test_any_value_in_a_row_is_a_refusal(runtime, workspace, column, value):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    try:
        edit(runtime, f"UPDATE requests SET {column} = {value}")
    except Exception:  # noqa: BLE001  # the database itself refuses some
        return
    with pytest.raises(LuminaGuardError) as caught:
        runtime.decisions.approve_and_publish(runtime.approvals.get(request.id), YES)
    assert caught.value.hint
    assert (workspace / "a.txt").read_text() == "one\ntwo\n"


def test_arguments_too_large_to_look_through_are_no_way_around_what_is_forbidden(runtime):
    padding = {f"a{n}": n for n in range(2100)}
    runtime.tasks.add_labels("P", [("private", "x")])
    with pytest.raises(Forbidden):
        ask_for(runtime, RemoteCall("s", "t", padding), task="P")
    forbidden = rule("FORBIDDEN", '{ any_argument = "*secret*" }')
    action = {"effect": "call", "server": "s", "tool": "t", "arguments": padding}
    assert judge(action, forbidden).risk is Risk.FORBIDDEN  # nobody can say that it is not among them


def test_only_what_is_unknown_is_closed(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    runtime.decisions.decide(request, YES)
    runtime.approvals.claim(request.id, request.digest, runtime.approvers.public())
    with pytest.raises(ApprovalError, match="not unknown"):
        runtime.decisions.close_unknown(request.id)
    assert runtime.approvals.get(request.id).state is State.CLAIMED


def test_a_part_that_is_refused_is_recorded(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    with pytest.raises(LuminaGuardError):
        runtime.decisions.approve_and_publish(request, dataclasses.replace(YES, part=("zzz",)))
    assert "request.refused" in [entry.kind for entry in runtime.ledger.entries()]


# -- grants --------------------------------------------------------------------------------------------------

POST = NetworkRequest("POST", "https://api.example/x", (), 10, "aa" * 32, "")
TOOL = RemoteCall("s", "t", {"a": 1}, {"description": "reads"})
SECRET = SecretUse("token", "deploy", "git.example")


@pytest.mark.parametrize(
    ("shown", "comes"),
    [
        (POST, dataclasses.replace(POST, body_sha256="bb" * 32)), (POST, dataclasses.replace(POST, body_size=11)),
        (POST, dataclasses.replace(POST, headers=(("X-Account", "evil"),))),
        (POST, dataclasses.replace(POST, url="https://api.example/x?k=v")),
        (TOOL, dataclasses.replace(TOOL, definition={"description": "deletes"})),
        (TOOL, dataclasses.replace(TOOL, arguments={"a": 2})),
        (TOOL, dataclasses.replace(TOOL, arguments={"a": 1, "b": []})),
        (SECRET, dataclasses.replace(SECRET, purpose="send it to whoever")),
        (SECRET, dataclasses.replace(SECRET, host="evil.example")),
    ],
)  # fmt: skip
def test_a_grant_of_an_effect_is_for_that_effect(runtime, shown, comes):
    request = ask_for(runtime, shown)
    runtime.decisions.approve_and_hand_over(request, YES, again=Again(5, 60))
    assert runtime.decisions.without_asking(ask_for(runtime, comes)) is None
    assert runtime.decisions.without_asking(ask_for(runtime, shown)) is not None


@pytest.mark.parametrize("content", ["x\u202ey\n".encode(), b"\x1b[2J\n", b"\0binary"])
def test_a_grant_does_not_answer_for_marks_that_only_contents_show(runtime, workspace, content):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"plain\n"})
    runtime.decisions.approve_and_publish(request, YES, again=Again(5, 60))
    assert runtime.decisions.without_asking(ask_for_changes(runtime, workspace, {"a.txt": content})) is None


def test_a_grant_does_not_answer_for_taint_severity_or_another_link(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"l": "a.txt", "a.txt": b"1"}, task="T")
    runtime.decisions.approve_and_publish(request, YES, again=Again(9, 60))
    (workspace / "l").unlink()
    for changes in ({"l": "run.sh"}, {"l": "../other"}):
        again = ask_for_changes(runtime, workspace, changes, task="T")
        assert runtime.decisions.without_asking(again) is None
    assert runtime.decisions.without_asking(ask_for_changes(runtime, workspace, {"l": "a.txt"}, task="T")) is not None
    rules(runtime, rule("RED", '{ any_path = "a.txt" }').replace("reason", 'severity = "high"\nreason'))
    assert runtime.decisions.without_asking(ask_for_changes(runtime, workspace, {"a.txt": b"2"}, task="T")) is None
    rules(runtime, "")
    runtime.tasks.add_labels("T", [("web", "x")])
    assert runtime.decisions.without_asking(ask_for_changes(runtime, workspace, {"a.txt": b"2"}, task="T")) is None


def test_no_grant_is_left_by_a_publish_that_was_refused(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    (workspace / "a.txt").write_text("meanwhile")
    with pytest.raises(LuminaGuardError):
        runtime.decisions.approve_and_publish(request, YES, again=Again(5, 60))
    assert runtime.grants.list() == []


def test_a_grants_uses_and_its_end_are_in_the_ledger_alone(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    runtime.decisions.approve_and_publish(request, YES, again=Again(1, 60))
    assert runtime.decisions.without_asking(ask_for_changes(runtime, workspace, {"a.txt": b"2"})) is not None
    columns = {column.name for column in __import__("luminaguard.storage.schema", fromlist=["x"]).grants.c}
    assert not columns & {"uses", "revoked_ns"}
    assert runtime.decisions.without_asking(ask_for_changes(runtime, workspace, {"a.txt": b"3"})) is None


@pytest.mark.parametrize("pattern", ["**[]!-~]**", "* * * *", "[!a]*", "?*", "[a-z]*[a-z]"])
def test_a_pattern_that_takes_nearly_everything_is_no_pattern_for_a_grant(runtime, workspace, pattern):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"}, command=("make", "-j", "4", "all"))
    with pytest.raises(ApprovalError, match="No such grant"):
        runtime.decisions.scope(request, {"command": pattern})


# -- rules --------------------------------------------------------------------------------------------------------


def test_lines_that_were_not_compared_are_not_none(runtime, workspace):
    rules(runtime, rule("GREEN", '{ every_path = "**", lines = { at_most = 10 } }'))
    for content in (b"x" * (2 << 20), b"\0binary", "é\n".encode("latin-1") * 5000, b"x\n" * 11):
        request = ask_for_changes(runtime, workspace, {"new": content})
        assert request.judged.risk is Risk.RED, content[:10]
    assert ask_for_changes(runtime, workspace, {"new": b"x\n" * 10}).judged.risk is Risk.GREEN
    rules(runtime, rule("FORBIDDEN", "{ lines = { at_least = 1000 } }"))
    with pytest.raises(Forbidden):
        ask_for_changes(runtime, workspace, {"new": b"long line\n" * 210_000})


@pytest.mark.parametrize(
    "arguments",
    [{"K" * 20_000: {f"a{n}": 1 for n in range(1000)}}, {f"a{n}": "b" for n in range(20_000)},
     {"a": json.dumps([1] * 5000)}, {"a": "x" * 600_000}, [[[[]]]] * 3000],
    ids=["long key", "many", "hidden", "long", "lists"],
)  # fmt: skip
def test_arguments_that_nobody_can_look_through_are_critical_and_quickly_so(arguments):
    start = time.monotonic()
    judgement = judge({"effect": "call", "server": "s", "tool": "t", "arguments": arguments},
                      '[policy]\ntrusted_servers = ["s"]\n' + rule("GREEN", "{}"))  # fmt: skip
    assert (judgement.risk, judgement.severity.value) == (Risk.RED, "critical")
    assert time.monotonic() - start < 30  # it was minutes


@pytest.mark.parametrize("pattern", ["**/*_*_*_*_*.md", "*a*a*a*a*a*b", "**/**/**/x"])
def test_no_pattern_takes_long(pattern):
    assert not matches_path(pattern, "/".join(["a_" * 100] * 20), wide=True)


def test_a_star_within_a_class_is_a_character():
    assert matches("*x[*]yz", "x*yz", wide=False)
    assert not matches("*x[*]yz", "xayz", wide=True)


@pytest.mark.parametrize(
    "url",
    ["https://h.example//admin/x", "https://h.example/./admin/x", "https://h.example/b/../admin/x",
     "https://h.example/admin;x/y", "https://h.example\\admin\\x", "https://h.example/%61dmin/x",
     "https://h.example/admin/" + "x" * 5000, "https://h.example/ADMIN"],
)  # fmt: skip
def test_a_path_that_is_forbidden_is_so_in_every_spelling(url):
    action = {"effect": "request", "method": "GET", "url": url}
    assert judge(action, rule("FORBIDDEN", '{ url_path = "/admin/**" }')).risk is Risk.FORBIDDEN


@pytest.mark.parametrize("line", ["rm\t-rf /", "rm\n-rf /", " " * 600 + "rm -rf /", "rm /**/ -rf"])
def test_a_command_that_is_forbidden_is_so_in_every_spelling(line):
    action = {"effect": "run", "tool": "exec", "arguments": {"command": ["sh", "-c", line]}}
    user = rule("FORBIDDEN", '{ effect = "run", command = "*rm -rf*" }')
    assert judge(action, user).risk is Risk.FORBIDDEN


def test_a_workspace_does_not_lower_the_number_of_people(runtime, workspace):
    rules(
        runtime,
        '[policy]\ntwo_people_from = "high"\n' + rule("GREEN", "{}").replace("reason", 'severity = "high"\nreason'),
    )
    (workspace / ".luminaguard.toml").write_text(rule("RED", "{}").replace("reason", 'severity = "low"\nreason'))
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    assert (request.judged.risk, request.judged.people) == (Risk.RED, 2)


@pytest.mark.parametrize(
    "text",
    [rule("RED", '{ tool = "[z-a]" }'), "x = 1" + "0" * 5000,
     rule("RED", "{ files = { at_least = 0xfffffffffffffff } }"),
     rule("RED", '{ hours = "10:00Z-12:00Z" }'), ".".join("a" * 40) + " = 1",
     '[policy.marked_folders]\n"[z-a]" = "web"\n'],
)  # fmt: skip
def test_a_file_of_rules_that_cannot_be_used_is_told_with_its_place(text):
    with pytest.raises(PolicyInvalid, match="line"):
        judge({"effect": "run"}, text)


def test_keys_that_are_written_with_escapes_are_keys():
    user = rule("FORBIDDEN", "{}").replace("[[policy.rules]]", '[["\\u0070olicy".rules]]')
    assert judge({"effect": "changeset", "files": [{"path": "a"}]}, user).risk is Risk.FORBIDDEN


@pytest.mark.parametrize(
    "raw",
    [{"effect": "call", "server": "s", "tool": "t", "arguments": None},
     {"effect": "request", "method": "GET", "url": "http://x", "preview": "\ud800"},
     {"effect": "request", "method": "GET", "url": "http://x", "body_size": float("inf")},
     {"effect": "secret", "name": "n", "purpose": "p", "host": "good.example/@evil.example"}],
)  # fmt: skip
def test_what_nobody_could_be_shown_is_not_asked(raw):
    with pytest.raises(ActionInvalid):
        outside_from_json(raw.pop("effect"), raw)


def test_bytes_that_are_no_text_on_the_command_line(bare_home):
    for words in (("approvals", "show"), ("grants", "revoke"), ("approvals", "deny")):
        result = bare_home.run(*words, "\udcff")
        assert result.code == 122, result.err


def test_one_folders_rules_do_not_close_the_inbox(runtime, workspace, tmp_path):
    from luminaguard.tui.desk import Desk

    other = tmp_path / "other"
    other.mkdir()
    ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    ask_for_changes(runtime, other, {"b": b"1"})
    (other / ".luminaguard.toml").write_text("[policy\n")
    assert len(Desk(runtime).waiting()) == 2
