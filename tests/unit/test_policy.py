"""The rules: how they judge, what may never be let through, and errors that point at their place."""

import datetime as dt
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard.actions import Action, Risk
from luminaguard.actions.files import RulesFile, parse_policy
from luminaguard.actions.patterns import climbs, host_forms, leaves, literal, matches, matches_path, name_words
from luminaguard.actions.positions import places
from luminaguard.effects import Change, Changeset, FileEntry, LinkEntry
from luminaguard.errors import ActionInvalid, PolicyInvalid
from luminaguard.runtime.policy import built_in_rules

DATA = Path(__file__).parent.parent / "data"
NOON = dt.datetime(2026, 11, 25, 12, 0, tzinfo=dt.UTC)  # a Wednesday
TRAPS = ("delete_mailing_list", "wipe_status", "drop_query", "get_and_remove")


def policy(user="", workspace=None):
    own = RulesFile(".luminaguard.toml", workspace) if workspace is not None else None
    return parse_policy(RulesFile("luminaguard.toml", user), built_in_rules(), own)


def rule(risk="GREEN", when="{}", name="mine"):
    return f'[[policy.rules]]\nname = "{name}"\nrisk = "{risk}"\nreason = "because"\nwhen = {when}\n'


def judge(action, user="", workspace=None, now=NOON):
    return policy(user, workspace).judge(Action.from_json(action), now)


def files(*paths, **more):
    return {"effect": "changeset", "files": [{"path": path, **more} for path in paths]}


# -- the corpus -------------------------------------------------------------------------------------------


def corpus():
    return [json.loads(line) for line in (DATA / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_corpus_is_judged_as_expected():
    rules = policy((DATA / "corpus_policy.toml").read_text())
    rows, wrong = corpus(), []
    for row in rows:
        judgement = rules.judge(Action.from_json(row["action"]), NOON)
        expected = (row["risk"], row.get("severity", judgement.severity.value))
        if (judgement.risk.value, judgement.severity.value) != expected:
            wrong.append((row["name"], expected, judgement.risk, judgement.rule))
    assert not wrong
    assert len(rows) >= 300
    assert len({row["name"] for row in rows}) == len(rows)
    assert {row["action"].get("tool") for row in rows} >= set(TRAPS)


def test_without_rules_of_the_user_nothing_that_leaves_the_machine_is_green():
    """A rule that comes with LuminaGuard is no rule that the person wrote."""
    rules = policy()
    green = [row["name"] for row in corpus() if row["action"]["effect"] != "run"
             and rules.judge(Action.from_json(row["action"]), NOON).risk is Risk.GREEN]  # fmt: skip
    assert green == []


# -- first match wins, no match is RED ----------------------------------------------------------------------


def test_the_first_rule_that_matches_decides_and_the_others_say_why_not():
    user = rule("FORBIDDEN", '{ any_path = "x/**" }', "a") + rule("GREEN", '{ every_path = "**" }', "b")
    assert judge(files("x/1"), user).rule == "a (luminaguard.toml:1)"
    judgement = judge(files("y/1"), user)
    assert (judgement.risk, judgement.rule) == (Risk.GREEN, "b (luminaguard.toml:6)")
    assert [(step.rule, step.why) for step in judgement.steps] == [("a", "no path matches its patterns"), ("b", "")]


def test_no_match_is_red():
    judgement = judge(files("x"), "[policy]\nbuilt_in = false\n")
    assert (judgement.risk, judgement.rule) == (Risk.RED, "no rule")


def test_a_rule_without_an_effect_does_not_speak_of_what_runs_in_the_machine():
    user = rule("FORBIDDEN", '{ any_argument = "*rm -rf*" }')
    run = {"effect": "run", "tool": "exec", "arguments": {"command": ["sh", "-c", "rm -rf /"]}}
    assert judge(run, user).risk is Risk.GREEN
    assert judge(run | {"effect": "changeset"}, user).risk is Risk.FORBIDDEN
    assert judge(run, rule("FORBIDDEN", '{ effect = "run", command = "*rm -rf*" }')).risk is Risk.FORBIDDEN


def test_a_workspace_can_only_make_things_stricter():
    green = rule("GREEN", '{ every_path = "**" }')
    strict = rule("RED", '{ any_path = "vendor/**" }', "theirs")
    assert judge(files("a"), green, strict).risk is Risk.GREEN
    assert judge(files("vendor/a"), green, strict).risk is Risk.RED
    # What it calls mild does not make mild what the user forbids.
    assert judge(files("vendor/a"), rule("FORBIDDEN", "{}"), strict).risk is Risk.FORBIDDEN
    with pytest.raises(PolicyInvalid, match=r"\.luminaguard\.toml, line 3, column 1: .*only make things stricter"):
        policy(workspace=rule("GREEN"))
    with pytest.raises(PolicyInvalid, match="trusted_servers"):
        policy(workspace='[policy]\ntrusted_servers = ["x"]\n')
    with pytest.raises(PolicyInvalid, match="column 1"):
        policy(workspace='kernel = "hardened"\n')


# -- what no rule may let through ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action",
    [
        {"effect": "call", "server": "unknown", "tool": "read", "annotations": {"readOnlyHint": True}},
        {"effect": "call", "server": "mine", "tool": "r\u0435ad"},
        {"effect": "call", "server": "mine", "tool": ""},
        files("a", ".luminaguard.toml"), files("sub/.LuminaGuard.toml"), files(".luminaguardignore"),
        files("pay\u202egnp.exe"), files("p\u0430ypal.txt"),
        {"effect": "request", "method": "GET", "url": "https://x.test/", "arguments": {"headers": {"cookie": "a"}}},
        {"effect": "secret", "secret": "t\u043eken"},
    ],
)  # fmt: skip
def test_never_green_whatever_a_rule_says(action):
    user = '[policy]\ntrusted_servers = ["mine"]\n' + rule("GREEN", "{}")
    assert judge(action, user).risk is not Risk.GREEN


@pytest.mark.parametrize("name", TRAPS)
def test_names_and_hints_of_a_server_only_raise_the_risk(name):
    action = {"effect": "call", "server": "mail", "tool": name, "annotations": {"readOnlyHint": True}}
    untrusted, trusted = judge(action), judge(action, '[policy]\ntrusted_servers = ["mail"]\n')
    assert (untrusted.risk, trusted.risk) == (Risk.RED, Risk.RED)
    assert untrusted.severity.value == "high"


# -- strict for GREEN, wide for the others -------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"path": "docs/../../etc"}, {"path": "docs/%2e%2e/x"}, {"path": "docs/x", "more": 1}, {"path": ["docs/x"]},
     {"path": {"a": "docs/x"}}, {"path": "DOCS/x"}, {"path": "docs/x\u200b"}, {"other": "docs/x"}, [], "docs/x",
     {"path": '{"path": "docs/x"}'}, {"path": "docs/x", "e": []}, {"": {"path": "docs/x"}}, {"path": "docs\\..\\x"}],
)  # fmt: skip
def test_a_green_rule_takes_arguments_by_the_letter(arguments):
    user = '[policy]\ntrusted_servers = ["s"]\n' + rule(
        "GREEN", '{ effect = "call", arguments = { path = "docs/**" } }'
    )
    assert judge({"effect": "call", "server": "s", "tool": "t", "arguments": arguments}, user).risk is Risk.RED
    fits = {"effect": "call", "server": "s", "tool": "t", "arguments": {"path": "docs/x"}}
    assert judge(fits, user).risk is Risk.GREEN


@pytest.mark.parametrize(
    "arguments",
    [{"q": "DROP  table x"}, {"a": {"b": [{"c": "drop table x"}]}}, {"q": '{"sql": "drop table x"}'},
     {"q": json.dumps(json.dumps({"q": "drop table x"}))}, {"q": "%64rop%20table x"}, {"q": "drop/**/table x"},
     {"drop table x": 1}, {"q": "\uff44rop table x"}],
)  # fmt: skip
def test_a_rule_that_stops_is_not_fooled_by_spelling(arguments):
    user = rule("FORBIDDEN", '{ any_argument = "*drop table*" }')
    assert judge({"effect": "call", "server": "s", "tool": "t", "arguments": arguments}, user).risk is Risk.FORBIDDEN


def test_time_and_taint_and_counts():
    office = rule("GREEN", '{ every_path = "**", days = ["mon", "wed"], hours = "09:00-17:30", untainted = true }')
    assert judge(files("a"), office).risk is Risk.GREEN
    assert judge(files("a"), office, now=NOON.replace(hour=18)).risk is Risk.RED
    assert judge(files("a"), office, now=NOON + dt.timedelta(days=1)).risk is Risk.RED
    assert judge(files("a") | {"taint": ["web"]}, office).risk is Risk.RED
    night = rule("GREEN", '{ every_path = "**", hours = "22:00-06:00" }')
    assert judge(files("a"), night, now=NOON.replace(hour=23)).risk is Risk.GREEN
    assert judge(files("a"), night).risk is Risk.RED
    until = rule("GREEN", '{ every_path = "**", until = 2026-11-25 }')
    assert judge(files("a"), until).risk is Risk.GREEN
    assert judge(files("a"), until, now=NOON + dt.timedelta(days=1)).risk is Risk.RED
    few = rule("GREEN", "{ files = { at_most = 2 }, deleted = { at_most = 0 }, lines = { at_most = 5 } }")
    assert judge(files("a", "b") | {"lines": 5}, few).risk is Risk.GREEN
    assert judge(files("a", "b") | {"lines": 6}, few).risk is Risk.RED
    assert judge(files("a", "b"), few).risk is Risk.RED  # nobody counted the lines
    assert judge(files("a", kind="delete") | {"lines": 0}, few).risk is Risk.RED


def test_a_sink_can_be_closed_to_an_origin():
    user = rule("FORBIDDEN", '{ effect = ["request", "call"], taint = "customer:*", host = "*.example" }')
    request = {"effect": "request", "method": "POST", "url": "https://api.example/x"}
    assert judge(request | {"taint": ["customer:42"]}, user).risk is Risk.FORBIDDEN
    assert judge(request | {"taint": ["web"]}, user).risk is Risk.RED


def test_a_changeset_is_judged_by_what_was_observed():
    changes = Changeset.of([
        Change("hooks.txt", None, FileEntry(0o644, 5, "a" * 64)), Change("out", None, LinkEntry("/etc")),
    ])  # fmt: skip
    action = Action.of_changeset(changes, workspace="/w", command=("make",))
    judgement = policy().judge(action, NOON)
    assert (judgement.severity.value, judgement.rule.split()[0]) == ("critical", "leaves-the-folder")


# -- errors with their place ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("x = \n", 1, 5, "Invalid value"),
        ("[policy]\nrules = [1]\n", 2, 10, r"rules\[1\]"),
        (rule("GREN"), 3, 1, "GREEN"),
        (rule(when='{ tool = "x", wen = 3 }'), 5, 22, "wen"),
        (rule(when='{ any_mark = ["hook", "hok"] }'), 5, 10, "hok"),
        (rule(name="Bad Name"), 2, 1, "name"),
        (rule() + rule(), 7, 1, "second rule"),
        ("[policy]\nbuild_in = false\n", 2, 1, "build_in"),
        ('[[policy.rules]]\nname = "a"\nrisk = "RED"\nreason = """\n[[a]]\n"""\nwhen.files.at_most = -1\n', 7, 1, "g"),
        ('[[policy.rules]]\nrisk = "RED"\n', 1, 1, "name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_line_and_column(text, line, column, words):
    with pytest.raises(PolicyInvalid, match=rf"luminaguard\.toml, line {line}, column {column}: .*{words}"):
        policy(text)


def test_a_huge_file_of_rules_is_refused():
    with pytest.raises(PolicyInvalid, match="larger"):
        policy("#" * ((1 << 20) + 1))


def test_places_of_a_document():
    text = 'a.b = 1\n[t]\nk = [ 1,\n  { x = "]" } ]\n[[t.r]]\n[[t.r]]\nq = \'#\' # c\n"a b" = 2\n'
    found = places(text)
    assert {where: tuple(place) for where, place in found.items()} == {
        ("a",): (1, 1), ("a", "b"): (1, 1), ("t",): (2, 1), ("t", "k"): (3, 1), ("t", "k", 0): (3, 7),
        ("t", "k", 1): (4, 3), ("t", "k", 1, "x"): (4, 5), ("t", "r", 0): (5, 1), ("t", "r", 1): (6, 1),
        ("t", "r", 1, "q"): (7, 1), ("t", "r", 1, "a b"): (8, 1),
    }  # fmt: skip


@given(st.text(alphabet="ab.[]{}=\"'\n #,1", max_size=60))
def test_whatever_is_in_the_file_is_a_policy_or_an_error_with_its_place(text):
    told = ""
    try:
        policy(text)
    except PolicyInvalid as error:
        told = error.message
    assert not told or re.match(r"luminaguard.toml, line \d+, column \d+: ", told)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=12))  # fmt: skip
def test_any_arguments_are_judged(arguments):
    user = rule("FORBIDDEN", '{ any_argument = "*x*" }')
    judgement = judge({"effect": "call", "server": "s", "tool": "t", "arguments": arguments}, user)
    assert (judgement.risk is Risk.FORBIDDEN) or "x" not in json.dumps(arguments, ensure_ascii=False)


NO_FILES = [{"path": ""}, {"path": "a", "marks": ["nice"]}, {"path": "a", "after": {"type": "file", "size": -1}}]


@pytest.mark.parametrize(
    "raw",
    [1, {}, {"effect": "fly"}, {"effect": "run", "x": 1}, {"effect": "run", "bytes": -1}]
    + [{"effect": "changeset", "files": [file]} for file in NO_FILES],
)
def test_what_is_no_action_is_refused(raw):
    with pytest.raises(ActionInvalid):
        Action.from_json(raw)


# -- patterns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "found"),
    [("docs/**", "docs/a/b", True), ("docs/**", "docs", False), ("docs/*", "docs/a/b", False), ("**/x", "x", True),
     ("**/x", "a/b/x", True), ("**/x", "a/bx", False), ("*.md", "a.md", True), ("*.md", "a/b.md", False),
     ("a?c", "a/c", False), ("[ab]x", "bx", True), ("[!ab]x", "cx", True), ("[!ab]x", "/x", False), ("a[", "a[", True),
     ("**", "a/b", True), ("a.b", "axb", False)],
)  # fmt: skip
def test_globs_of_paths(pattern, path, found):
    assert matches_path(pattern, path, wide=False) is found


@given(st.text(max_size=30))
def test_a_literal_pattern_matches_its_text_alone(text):
    assert matches(literal(text), text, wide=False)
    assert not matches(literal(text), text + "x", wide=False)


@given(st.text(alphabet="ab*?", max_size=8), st.text(alphabet="ab", max_size=8))
def test_globs_agree_with_the_standard_library(pattern, text):
    import fnmatch

    assert matches(pattern, text, wide=False) == fnmatch.fnmatchcase(text, pattern)


def test_matching_takes_time_that_grows_with_the_text_alone():
    text = "update " * 300_000  # two megabytes in which a naive matcher would look for the rest again and again
    assert not matches("*update * set * where * or *", text, wide=True)


@pytest.mark.parametrize(("name", "words"), [("getAndRemove", "remove"), ("GET-AND-REMOVE", "remove"), ("rm2", "rm"),
                                             ("DeLeTe_file", "delete"), ("check_out", "checkout"),
                                             ("re\u0332move", "remove")])  # fmt: skip
def test_words_of_names(name, words):
    assert words in name_words(name)


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f.1", "017700000001", "127.1", "::ffff:127.0.0.1", "127\u30020.0.1"]
)
def test_one_host_in_many_spellings(host):
    assert "127.0.0.1" in host_forms(host)


def test_a_number_too_long_for_a_host_is_none():
    assert host_forms("9" * 5000)


@pytest.mark.parametrize("path", ["../a", "a/..", "a/%2e%2e/b", "a/..;/b", "a\\..\\b", "a/\uff0e\uff0e/b", "a/.. /b"])
def test_paths_that_climb(path):
    assert climbs(path)
    assert not climbs("a/b..c/.d")


def test_no_two_places_in_arguments_have_the_same_name():
    value = {"a": {"b": 1}, "a.b": 2, "c": [3], "c[]": 4, "d": '{"e": 5}', "d!": 6, "": {"a": 7}}
    names = [name for name, _ in leaves(value)]
    assert len(names) == len(set(names)), names


@pytest.mark.parametrize("profile", ["workspace", "travel", "banking", "slack"])
def test_the_profiles_of_the_examples_are_rules_that_let_reading_through_and_nothing_else(tmp_path, profile):
    text = (Path(__file__).parent.parent.parent / "examples" / "profiles" / f"{profile}.toml").read_text()
    reads = {
        "workspace": "list_files",
        "travel": "get_hotels_prices",
        "banking": "get_balance",
        "slack": "get_channels",
    }
    call = {"effect": "call", "server": profile, "tool": reads[profile], "arguments": {"x": "y"}}
    assert judge(call, text).risk is Risk.GREEN
    for changed in (
        {"tool": "send_money"},
        {"server": "other"},
        {"tool": "get_webpage", "arguments": {"url": "www.evil.test"}},
    ):
        assert judge(call | changed, text).risk is Risk.RED
