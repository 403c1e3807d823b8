"""The commands of the cliff, as a person and their programs use them; without machines."""

import json

import pytest

from luminaguard.runtime import Runtime
from luminaguard.settings import Folders, load_settings
from luminaguard.testing.requests import ask_for_changes

RULES = """
[[policy.rules]]
name = "notes"
risk = "GREEN"
severity = "low"
reason = "Notes."
when = { every_path = "notes/**" }
"""
CALL = {"effect": "call", "server": "mail", "tool": "send", "arguments": {"to": "a@example.org"}}


@pytest.fixture
def runtime(bare_home):
    base = bare_home.folder
    folders = Folders(base / "config", base / "state", base / "cache", base / "run").ensure()
    made = Runtime(load_settings(folders), folders)
    yield made
    made.close()


def write(folder, name, value):
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


# -- rules ------------------------------------------------------------------------------------------------


def test_check_lists_the_rules_or_says_where_one_is_wrong(bare_home, tmp_path):
    (bare_home.folder / "config").mkdir(parents=True)
    write(bare_home.folder / "config", "luminaguard.toml", "memory_mib = 300\n" + RULES)
    good = bare_home.run("policy", "check", "--json").json
    assert (good["status"], good["rules"][0]["origin"]) == ("valid", "luminaguard.toml:3")
    assert "the rules are valid" in bare_home.run("policy", "check").out
    write(tmp_path, ".luminaguard.toml", RULES)
    bad = bare_home.run("policy", "check", "-w", str(tmp_path))
    assert bad.code == 123
    assert ".luminaguard.toml, line 4, column 1: rules[1].risk: a workspace can only make things stricter" in bad.err
    (tmp_path / ".luminaguard.toml").unlink()
    (tmp_path / ".luminaguard.toml").symlink_to("/dev/zero")
    assert bare_home.run("policy", "check", "-w", str(tmp_path)).code == 123


def test_an_invalid_policy_stops_everything(bare_home, tmp_path, workspace):
    (bare_home.folder / "config").mkdir(parents=True)
    write(
        bare_home.folder / "config", "luminaguard.toml", '[[policy.rules]]\nname = "x"\nrisk = "BLUE"\nreason = "r"\n'
    )
    result = bare_home.run("approvals", "request", write(tmp_path, "call", CALL), "--json")
    assert result.code == 123
    assert result.json["error"]["type"] == "PolicyInvalid"
    assert "line 3, column 1" in result.json["error"]["message"]
    assert bare_home.run("approvals", "list", "--json").json == {"requests": []}


def test_explain_says_which_rule_decides_and_why_the_others_do_not(bare_home, tmp_path):
    told = bare_home.run("policy", "explain", write(tmp_path, "call", CALL))
    assert told.code == 0
    assert "= call-that-speaks" in told.out and "RED, high" in told.out
    assert "  call-that-pays" in told.out and "no word of the tool's name is in its list" in told.out
    as_json = bare_home.run("policy", "explain", "-", "--json", stdin=json.dumps(CALL).encode()).json
    assert as_json["risk"] == "RED" and as_json["steps"][-1]["matched"] is True


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"effect": "fly"}', '{"effect": "run", "more": 1}', "\x00", "[" * 100_000],
    ids=["empty", "half", "list", "no effect", "more", "nul", "deep"],
)
def test_what_is_no_action_is_a_refusal_with_a_hint(bare_home, tmp_path, text):
    for command in (("policy", "explain"), ("approvals", "request"), ("policy", "test")):
        result = bare_home.run(*command, write(tmp_path, "x", text))
        assert "Traceback" not in result.err
        assert (result.code, "hint" in result.err) == (122, True) or (command[1], text) == ("test", ""), command


def test_a_corpus_is_compared_line_by_line(bare_home, tmp_path):
    rows = [{"name": "a", "action": CALL, "risk": "RED", "severity": "high"}, {"action": CALL, "risk": "GREEN"}]
    corpus = write(tmp_path, "corpus", "\n".join(map(json.dumps, rows)) + "\n")
    result = bare_home.run("policy", "test", corpus, "--json")
    assert (result.code, result.json["actions"]) == (122, 2)
    assert [(row["line"], row["expected"]) for row in result.json["wrong"]] == [(2, ["GREEN", "high"])]


def test_the_built_in_rules_can_be_read_and_copied(bare_home):
    shown = bare_home.run("policy", "show").out
    assert 'name = "git-hook"' in shown
    (bare_home.folder / "config").mkdir(parents=True)
    write(bare_home.folder / "config", "luminaguard.toml", shown.replace('name = "', 'name = "my-'))
    assert bare_home.run("policy", "check").code == 0


def test_suggestions_are_the_narrowest_rules_and_work(bare_home, runtime, workspace):
    for number in range(3):
        request = ask_for_changes(runtime, workspace, {"a.txt": str(number).encode()}, command=("make", "it*"))
        assert bare_home.run("approvals", "approve", request.id).code == 0
    denied = ask_for_changes(runtime, workspace, {"b": b"1"}, command=("rm",))
    bare_home.run("approvals", "deny", denied.id)
    result = bare_home.run("policy", "suggest")
    assert result.out.count("[[policy.rules]]") == 1 and "nothing was changed" in result.err.lower()
    (bare_home.folder / "config" / "luminaguard.toml").write_text(result.out)
    same = ask_for_changes(runtime, workspace, {"a.txt": b"9"}, command=("make", "it*"))
    assert same.judged.risk.value == "GREEN"
    others = [({"b": b"9"}, "it*"), ({"a.txt": None}, "it*"), ({"a.txt": b"9"}, "it all"), ({"a.txt": b"123"}, "it*")]
    for changes, what in others:
        command = ("make", what)
        assert ask_for_changes(runtime, workspace, changes, command=command).judged.risk.value == "RED"
    assert bare_home.run("policy", "suggest", "--at-least", "4").out == ""


# -- answers ------------------------------------------------------------------------------------------------


def test_a_part_and_a_reason_and_a_return(bare_home, runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1", "b": b"2"})
    wrong = bare_home.run("approvals", "approve", request.id, "--only", "zzz")
    assert (wrong.code, "is not one of the changes" in wrong.err) == (122, True)
    part = bare_home.run("approvals", "approve", request.id, "--only", "b")
    assert "published a part: 1 of 2 changes" in part.out
    assert (workspace / "a.txt").read_text() == "one\ntwo\n"
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    assert bare_home.run("approvals", "return", request.id, "--reason", "use tabs").code == 0
    shown = bare_home.run("approvals", "show", request.id, "--json").json
    assert (shown["state"], shown["outcome"], shown["decisions"][0]["verdict"]) == (
        "returned",
        "use tabs",
        "ask for changes",
    )
    assert "ask for changes by owner: use tabs" in bare_home.run("approvals", "show", request.id).err


def test_grants_are_made_listed_used_and_revoked(bare_home, runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"}, command=("make", "fmt"))
    flags = ("--again", "5", "--for", "2h", "--loosen", "command=make *")
    assert bare_home.run("approvals", "approve", request.id, *flags[2:]).code == 122  # a pattern for no grant
    approved = bare_home.run("approvals", "approve", request.id, *flags)
    assert approved.code == 0 and "command: make *" in approved.out
    (grant,) = bare_home.run("grants", "list", "--json").json["grants"]
    assert (grant["state"], grant["of"], grant["scope"]["values"]["command"]) == ("active", 5, "make *")
    assert "modify a.txt" in bare_home.run("grants", "list").out
    assert bare_home.run("grants", "revoke", grant["id"]).code == 0
    assert bare_home.run("grants", "list", "--json").json["grants"][0]["state"] == "revoked"
    assert bare_home.run("grants", "revoke", "gr-none").code == 122
    for bad in (("--for", "forever"), ("--loosen", "command"), ("--again", "100000")):
        request = ask_for_changes(runtime, workspace, {"a.txt": bad[0].encode()})
        result = bare_home.run("approvals", "approve", request.id, "--again", "1", *bad)
        assert (result.code, "hint" in result.err) == (122, True), bad


def test_another_person_approves_with_their_passphrase(bare_home, runtime, workspace):
    assert bare_home.run("approvers", "add", "ada", stdin=b"a long passphrase\n").code == 0
    assert "ada" in bare_home.run("approvers", "list").out
    (bare_home.folder / "config" / "luminaguard.toml").write_text('[policy]\ntwo_people_from = "low"\n')
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    first = bare_home.run("approvals", "approve", request.id)
    assert (first.code, "another person" in first.out) == (120, True)
    wrong = bare_home.run("approvals", "approve", request.id, "--as", "ada", stdin=b"guess\n")
    assert (wrong.code, (workspace / "a.txt").read_text()) == (122, "one\ntwo\n")
    assert bare_home.run("approvals", "approve", request.id, "--as", "ada", stdin=b"a long passphrase\n").code == 0
    assert (workspace / "a.txt").read_text() == "1"
    assert bare_home.run("approvers", "remove", "ada").code == 0
    assert bare_home.run("approvers", "remove", "ada").code == 122
    kinds = [json.loads(line)["kind"] for line in bare_home.run("ledger", "export").out.splitlines()[1:]]
    assert {"approver.added", "approver.removed"} <= set(kinds)
    assert b"a long passphrase" not in b"".join(
        p.read_bytes() for p in (bare_home.folder / "state").rglob("*") if p.is_file()
    )


# -- effects that somebody else carries out --------------------------------------------------------------------


def test_a_call_waits_and_is_let_go_once(bare_home, tmp_path):
    file = write(tmp_path, "call", CALL)
    asked = bare_home.run("approvals", "request", file, "--json")
    assert (asked.code, asked.json["state"]) == (120, "pending")
    request = asked.json["id"]
    assert bare_home.run("approvals", "take", request).code == 120
    assert "to" in bare_home.run("approvals", "show", request).err
    assert bare_home.run("approvals", "approve", request).code == 0
    taken = bare_home.run("approvals", "take", request)
    assert (taken.code, "go ahead, once" in taken.out) == (0, True)
    again = bare_home.run("approvals", "take", request)
    assert (again.code, "done: handed over" in again.out) == (122, True)
    denied = bare_home.run("approvals", "request", file, "--json").json["id"]
    bare_home.run("approvals", "deny", denied, "--reason", "not that one")
    told = bare_home.run("approvals", "take", denied)
    assert (told.code, "not that one" in told.out) == (121, True)
    assert bare_home.run("ledger", "verify").code == 0


def test_what_a_rule_lets_through_is_let_go_at_once(bare_home, tmp_path):
    (bare_home.folder / "config").mkdir(parents=True)
    rule = RULES.replace("every_path", "method").replace("notes/**", "GET")
    write(bare_home.folder / "config", "luminaguard.toml", rule)
    request = {"effect": "request", "method": "GET", "url": "https://index.example/x"}
    assert bare_home.run("approvals", "request", write(tmp_path, "get", request)).code == 0
    assert bare_home.run("approvals", "request", write(tmp_path, "post", request | {"method": "POST"})).code == 120
    forbidden = request | {"url": "http://169.254.169.254/"}
    write(bare_home.folder / "config", "luminaguard.toml", "")
    assert bare_home.run("approvals", "request", write(tmp_path, "bad", forbidden)).code == 122


def test_the_inbox_needs_a_terminal(bare_home):
    result = bare_home.run("approve")
    assert (result.code, "approvals list" in result.err) == (123, True)
