"""Which accelerator and backend are taken: only one that was tried, and never another than was asked for."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from luminaguard.errors import HypervisorUnavailable
from luminaguard.microvm import select
from luminaguard.microvm.jail import Jail
from luminaguard.microvm.qemu import probe
from luminaguard.microvm.qemu.probe import KvmProbe, probe_kvm
from luminaguard.settings import Settings


@pytest.fixture
def guest(tmp_path, monkeypatch):
    """Puts a program in the place of the one that runs the guest, on a device that is there."""

    def replaced_by(program: str, *, device: bool = True) -> None:
        script = tmp_path / "guest.py"
        script.write_text(program)
        monkeypatch.setattr(probe, "kvm_guest", SimpleNamespace(__file__=str(script)))
        monkeypatch.setattr(probe, "_DEVICE", str(tmp_path if device else tmp_path / "none"))

    return replaced_by


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print(41.5)", "took 41.5 ms: no hardware runs it"),
        ("import sys; sys.exit('OSError: no such ioctl')", "could not run: OSError: no such ioctl"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "could not run: it ended with status -11"),
        ("print('fast')", "could not run"),
        ("", "could not run"),
        ("print('nan')", "could not run"),
        ("raise SystemExit(3)", "could not run: it ended with status 3"),
    ],
)
def test_a_kvm_that_does_not_really_run_a_guest_is_not_used(guest, program, words):
    guest(program)
    found = probe_kvm()
    assert not found.usable
    assert words in found.reason


def test_a_kvm_that_hangs_is_left_alone_after_a_moment(guest, monkeypatch):
    monkeypatch.setattr(probe, "_PROBE_TIMEOUT_S", 0.3)
    guest("import time; time.sleep(60)")
    assert probe_kvm() == KvmProbe(False, "a six-byte guest did not end within 0.3 s")


def test_without_the_device_nothing_is_started(guest):
    guest("import time; time.sleep(60)", device=False)
    assert probe_kvm().reason.startswith("there is no ")


def test_a_fast_guest_is_hardware(guest):
    guest("print(0.21)")
    assert probe_kvm() == KvmProbe(True, "a six-byte guest took 0.21 ms", 0.21)


def test_the_real_probe_says_something_about_this_machine():
    found = probe_kvm()
    assert found.reason
    assert not found.usable or found.milliseconds <= probe.KVM_LIMIT_MS


def choose(tmp_path: Path, **wishes: str):
    return select.choose_hypervisor(Settings(**wishes), tmp_path, Jail())


@pytest.mark.parametrize(("usable", "accelerator"), [(True, "kvm"), (False, "tcg")])
def test_auto_takes_kvm_only_when_it_ran_a_guest(tmp_path, monkeypatch, usable, accelerator):
    monkeypatch.setattr(select, "probe_kvm", lambda: KvmProbe(usable, "said so"))
    assert choose(tmp_path, backend="qemu").accelerator == accelerator
    monkeypatch.setattr(select, "probe_kvm", lambda: pytest.fail("this was found out before"))
    assert choose(tmp_path, backend="qemu").accelerator == accelerator


def test_kvm_that_was_asked_for_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "probe_kvm", lambda: KvmProbe(False, "it took 41.5 ms"))
    with pytest.raises(HypervisorUnavailable, match="took 41.5 ms") as caught:
        choose(tmp_path, backend="qemu", accelerator="kvm")
    assert "accelerator" in caught.value.hint


def test_tcg_that_was_asked_for_needs_no_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "probe_kvm", lambda: pytest.fail("nobody asked for KVM"))
    assert choose(tmp_path, backend="qemu", accelerator="tcg").accelerator == "tcg"


def test_what_was_found_out_does_not_outlive_a_reboot_or_another_qemu(tmp_path, monkeypatch):
    answers = iter([KvmProbe(False, "first"), KvmProbe(True, "second")])
    monkeypatch.setattr(select, "probe_kvm", lambda: next(answers))
    assert choose(tmp_path, backend="qemu").accelerator == "tcg"
    real = select._identity
    monkeypatch.setattr(select, "_identity", lambda settings: [*real(settings), "another boot"])
    assert choose(tmp_path, backend="qemu").accelerator == "kvm"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1}', '{"key": [], "found": 3}'])
def test_a_damaged_memory_of_it_is_found_out_again(tmp_path, monkeypatch, damage):
    (tmp_path / "hypervisor.json").write_text(damage)
    monkeypatch.setattr(select, "probe_kvm", lambda: KvmProbe(False, "asked"))
    assert choose(tmp_path, backend="qemu").accelerator == "tcg"


def test_a_template_depends_on_the_qemu_and_the_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "probe_kvm", lambda: KvmProbe(False, "no"))
    hypervisor = choose(tmp_path, backend="qemu")
    before = hypervisor.fingerprint
    assert before == choose(tmp_path, backend="qemu").fingerprint
    hypervisor.qemu = replace(hypervisor.qemu, build=hypervisor.qemu.build + " (another)")
    assert hypervisor.fingerprint != before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is tried is Linux's")
def test_old_qemu_is_refused(tmp_path):
    old = tmp_path / "qemu"
    old.write_text("#!/bin/sh\necho QEMU emulator version 6.2.0\n")
    old.chmod(0o755)
    with pytest.raises(HypervisorUnavailable, match=r"6\.2\.0 is too old"):
        probe.find_qemu(str(old))
