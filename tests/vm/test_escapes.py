"""The escape suite in a real machine: every attempt is made, and none succeeds."""

import json

import pytest

from luminaguard.microvm.firecracker import bodies
from luminaguard.microvm.qemu.command import kernel_command_line
from luminaguard.runtime.escapes import ATTEMPTS, judge, suite
from luminaguard.runtime.hardening import (
    CMDLINE,
    SYSCTLS,
    judge_cmdline,
    judge_kernel,
    judge_mounts,
    judge_settings,
)

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
    (current,) = [image for image in home.run("image", "list", "--json").json["images"] if image["current"]]
    most = {"distribution": 4, "hardened": 10}[current["kernel_kind"]]
    assert len(sysctls["waived"]) <= most, "settings of later kernels, and of what the hardened one was built without"

    checks = {check["name"]: check for check in result.json["checks"]}
    assert checks["cmdline"]["faults"] == []
    assert len(checks["cmdline"]["waived"]) <= 18, "what emulation makes pointless"
    assert checks["mounts"]["verdict"] == checks["kernel"]["verdict"] == "pass"


def test_the_command_line_is_right_on_hardware_and_its_waivers_are_named_under_emulation():
    assert len(CMDLINE) == 65
    hardware = kernel_command_line("kvm", 0)
    assert judge_cmdline(hardware).verdict == "pass"
    emulated = judge_cmdline(kernel_command_line("tcg", 2_000_000))
    assert (emulated.verdict, len(emulated.waived), emulated.faults) == ("waived", 18, ())
    assert emulated.reasons
    assert judge_cmdline(bodies.boot(256, 3)["boot-source"]["boot_args"]).verdict == "pass"


@pytest.mark.parametrize("name", sorted(CMDLINE))
def test_each_parameter_that_is_wrong_fails(name):
    hardware = kernel_command_line("kvm", 0)
    spoiled = judge_cmdline(f"{hardware} {name}=wrong")
    if name.startswith(("spectre", "spec_", "l1tf", "mds", "tsx_a", "srbds", "mmio", "retbleed", "gather", "reg_file",
                        "tsa", "indirect", "vmscape")):  # fmt: skip
        spoiled = judge_cmdline(f"{hardware} mitigations=auto {name}=off")
    assert spoiled.verdict == "fail"
    assert any(fault.startswith(name) for fault in spoiled.faults)


MOUNTS = """/dev/vda / squashfs ro,nosuid,nodev 0 0
tmpfs /tmp tmpfs rw,nosuid,nodev,size=1k,nr_inodes=9 0 0
proc /proc proc rw,nosuid,nodev,noexec,hidepid=invisible 0 0"""


@pytest.mark.parametrize(
    ("was", "spoiled", "words"),
    [
        (" ro,", " rw,", "not a read-only squashfs"),
        ("squashfs", "ext4", "not a read-only squashfs"),
        ("nosuid,nodev,size", "nodev,size", "/tmp has no nosuid"),
        ("nosuid,nodev,size", "nosuid,size", "/tmp has no nodev"),
        ("size=1k,", "", "/tmp has no limit of its size"),
        (",nr_inodes=9", "", "/tmp has no limit of its files"),
        (",hidepid=invisible", "", "shows the processes of others"),
        ("tmpfs /tmp tmpfs", "debugfs /tmp debugfs", "is a debugfs"),
        ("tmpfs /tmp tmpfs", "bpf /tmp bpf", "is a bpf"),
    ],
)
def test_each_mount_that_is_wrong_fails(was, spoiled, words):
    assert judge_mounts(MOUNTS).verdict == "pass"
    found = judge_mounts(MOUNTS.replace(was, spoiled, 1))
    assert found.verdict == "fail"
    assert any(words in fault for fault in found.faults), found


def test_a_kernel_without_lockdown_or_with_another_module_fails():
    facts = {"lockdown": "none integrity [confidentiality]", "modules": "squashfs 1 2 - Live 0x0", "landlock": "2"}
    settings = {"kernel/modules_disabled": "1"}
    assert judge_kernel(facts, settings).verdict == "pass"
    for change in ({"lockdown": "[none] integrity"}, {"modules": "evil 1 0"}, {"landlock": "1"}, {"landlock": "none"}):
        assert judge_kernel(facts | change, settings).verdict == "fail", change
    assert judge_kernel(facts, {}).verdict == "fail"
    assert judge_kernel({}, settings).verdict == "fail"


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
