"""What is printed for people: rows that cannot pass for others, progress, the log, escaped names."""

import io
import json
import os
import stat
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luminaguard import log
from luminaguard.cli import output
from luminaguard.effects.text import hides_something, visible, visible_name


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    return Screen()


def test_a_long_name_cannot_pass_for_a_second_line(narrow):
    name = "a" * 30 + " " * 20 + "- .git/hooks/pre-commit   deleted"
    output.print_lines([("path", f"+ {name}"), ("path", "~ b")], narrow)
    rows = narrow.getvalue().splitlines()
    assert rows[0].startswith("+ aaa")
    assert rows[-1] == "~ b"
    assert len(rows) > 2
    assert all(row.startswith("  ↪ ") for row in rows[1:-1])


@given(st.text(st.characters(exclude_categories=("C", "Z", "M")), max_size=200), st.integers(20, 100))
def test_no_row_is_wider_than_the_terminal_and_nothing_is_lost(text, width):
    rows = list(output._rows(text, width))
    assert "".join([rows[0], *(row.removeprefix("  ↪ ") for row in rows[1:])]) == text
    for row in rows:
        assert sum(2 if output.unicodedata.east_asian_width(c) in "WF" else 1 for c in row) <= width


def test_what_is_no_terminal_gets_whole_lines():
    stream = io.StringIO()
    output.print_lines([("plain", "x" * 500)], stream)
    assert stream.getvalue() == "x" * 500 + "\n"


@given(st.text())
def test_a_name_never_looks_like_an_escape_of_another(name):
    assert visible_name(name) == visible_name(name)
    if visible_name(name) == r"\u202e":
        assert name == "\u202e"


def test_a_backslash_in_a_name_is_told_from_an_escape():
    assert visible_name(r"\u202e") == r"\\u202e"
    assert visible_name("\u202e") == r"\u202e"


@pytest.mark.parametrize("text", ["👩‍🚀 and 👩🏽‍🚀", "❤️‍🔥", "🏳️‍🌈 ok ✅"])
def test_emoji_that_are_joined_hide_nothing(text):
    assert visible(text) == text
    assert not hides_something(text)


@pytest.mark.parametrize(
    "text", ["a\u200db", "x\ufe0f", "✅\ufe0f\ufe0f", "✅\u200d", "\u200d✅", "✅\u200d\u200d✅", "✅\ufe0e"]
)
def test_joiners_elsewhere_are_shown(text):
    assert hides_something(text)
    assert visible(text) != text


def test_what_is_over_soon_is_not_told_and_what_takes_long_is(monkeypatch, capsys):
    monkeypatch.setattr(output, "_EVERY_S", 0.05)
    with output.Progress().slowly("quick"):
        pass
    with output.Progress(quiet=True).slowly("silent"):
        time.sleep(0.2)
    assert capsys.readouterr().err == ""
    said = ""
    with output.Progress().slowly("publishing") as step:
        step("stage a")
        while "stage a" not in said:
            time.sleep(0.01)
            said += capsys.readouterr().err
    assert "publishing: stage a" in said
    assert not any(t.name == "progress" for t in threading.enumerate())


def test_progress_elsewhere_says_little(monkeypatch, capsys):
    progress = output.Progress()
    for number in range(100):
        progress(f"step {number}")
    progress.clear()
    assert capsys.readouterr().err.count("\n") == 1


def test_progress_on_a_terminal_leaves_nothing(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(output.sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    progress = output.Progress()
    progress("reading [bold]\x1b[31m")
    progress.clear()
    text = screen.getvalue()
    assert r"[bold]\x1b[31m" in text
    assert text.rstrip().endswith("\x1b[2K") or "\x1b[2K" in text


def test_the_log_is_private_bounded_and_has_one_object_a_line(tmp_path, monkeypatch):
    log.configure(tmp_path / "log")
    try:
        log.event("machine.ended", vm="vm-1", reason="x" * 10_000)
        (line,) = (tmp_path / "log" / "luminaguard.jsonl").read_text().splitlines()
        entry = json.loads(line)
        assert (entry["event"], entry["vm"], entry["pid"]) == ("machine.ended", "vm-1", os.getpid())
        assert len(entry["reason"]) == 2000
        assert stat.S_IMODE((tmp_path / "log" / "luminaguard.jsonl").stat().st_mode) == 0o600
        monkeypatch.setattr(log, "_MAX_BYTES", 100)
        log.configure(tmp_path / "log")
        log.event("again")
        assert (tmp_path / "log" / "luminaguard.old.jsonl").exists()
        assert len((tmp_path / "log" / "luminaguard.jsonl").read_text().splitlines()) == 1
    finally:
        log.configure(None)
