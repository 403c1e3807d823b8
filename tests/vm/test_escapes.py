"""The escape suite in a real machine: every attempt is made, and none succeeds."""

import json

import pytest

from luminaguard.runtime.escapes import ATTEMPTS, judge, suite
from luminaguard.runtime.hardening import SYSCTLS, judge_settings

pytestmark = pytest.mark.vm


def test_every_attempt_is_made_and_none_succeeds(home):
    result = home.run("image", "audit", "--live", "--json", timeout_s=170)
    assert result.code == 0, result
    attempts = {attempt["name"]: attempt for attempt in result.json["attempts"]}
    assert len(attempts) >= 60
    assert set(attempts) == {attempt.name for attempt in ATTEMPTS}
    assert {attempt["verdict"] for attempt in attempts.values()} == {"held"}
    assert all(attempt["techniques"] for attempt in attempts.values())
    assert home.run("vm", "list", "--json").json["vms"] == []
    assert home.run("approvals", "list", "--json").json["requests"] == []
    assert home.run("ledger", "verify").code == 0
    (sysctls,) = [check for check in result.json["checks"] if check["name"] == "sysctls"]
    assert sysctls["faults"] == []
    assert len(sysctls["waived"]) <= 4, "settings that only later kernels have"


def test_a_setting_that_is_wrong_fails_and_one_that_is_missing_is_waived():
    assert judge_settings(dict(SYSCTLS)).verdict == "pass"
    wrong = judge_settings(SYSCTLS | {"kernel/sysrq": "438"})
    assert (wrong.verdict, wrong.faults) == ("fail", ("kernel/sysrq=438",))
    missing = judge_settings({name: value for name, value in SYSCTLS.items() if name != "kernel/sysrq"})
    assert (missing.verdict, missing.waived) == ("waived", ("kernel/sysrq",))
    assert missing.reasons


def good() -> dict[str, str]:
    return {attempt.name: min(attempt.fails_with) for attempt in ATTEMPTS}


def test_names_are_unique_and_techniques_are_identifiers():
    assert len({attempt.name for attempt in ATTEMPTS}) == len(ATTEMPTS)
    for attempt in ATTEMPTS:
        assert any(t.startswith("ASI") for t in attempt.techniques), attempt
        assert any(t.startswith("AML.T") for t in attempt.techniques), attempt
        assert any(t.startswith("T1") for t in attempt.techniques), attempt
        assert "DID IT" not in attempt.fails_with


@pytest.mark.parametrize("attempt", ATTEMPTS[::20], ids=lambda attempt: attempt.name)
def test_an_attempt_that_succeeds_or_is_not_made_is_told(attempt):
    assert {result.verdict for result in judge(good())} == {"held"}
    (escaped,) = [r for r in judge(good() | {attempt.name: "DID IT"}) if r.verdict != "held"]
    assert (escaped.attempt, escaped.verdict) == (attempt, "escaped")
    missing = good()
    del missing[attempt.name]
    (absent,) = [r for r in judge(missing) if r.verdict != "held"]
    assert (absent.attempt, absent.verdict) == (attempt, "not made")


def test_a_probe_that_says_nothing_or_whose_forgery_is_believed_is_told():
    assert suite.read_outcomes(b"", 0) == {}
    assert suite.read_outcomes(b"[1]\n", suite.PROBE_STATUS) == {}
    line = json.dumps({"call.ptrace": "EPERM"}).encode() + b"\n"
    assert suite.read_outcomes(line, 0) == {"call.ptrace": "EPERM"}, "the forgery was not made"
    believed = suite.read_outcomes(line + suite.FORGED, 0)
    assert believed["protocol.forged-answer"] == "exit 0"
    assert suite.read_outcomes(line + suite.FORGED, 71)["protocol.forged-answer"] == "only output"
