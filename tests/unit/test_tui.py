"""The terminal interface, driven without a terminal: what it shows, what its keys do, how it looks in every theme.

The pictures in ``tests/snapshots`` are written anew with ``UPDATE_SNAPSHOTS=1``.
"""

import asyncio
import os
import re
import time
from pathlib import Path

import pytest
from textual.widgets import DataTable, Input, Static

from luminaguard.approvals import State, Verdict
from luminaguard.effects.card import CardItem
from luminaguard.effects.outside import RemoteCall
from luminaguard.runtime import Runtime
from luminaguard.runtime.decisions import Answer
from luminaguard.settings import Folders, load_settings
from luminaguard.testing.requests import ask_for, ask_for_changes
from luminaguard.tui.app import CliffApp
from luminaguard.tui.desk import Desk
from luminaguard.tui.inbox import Inbox
from luminaguard.tui.review import Review
from luminaguard.tui.rows import Row, TreeRow, byte_row, byte_rows, side_by_side, tree, unified
from luminaguard.tui.syntax import coloured, lexer_for
from luminaguard.tui.themes import THEMES
from luminaguard.tui.views import ChangeTree, ChangeView

SNAPSHOTS = Path(__file__).parent.parent / "snapshots"
CODE = b"import os\n\n\ndef main(name: str) -> int:\n    return len(name)  # how long\n"
HOSTILE = b"plain\x1b[2J\x1b[H then\n\xe2\x80\xaeevil\n\tx\n"


@pytest.fixture
def runtime(tmp_path):
    base = tmp_path / "home"
    folders = Folders(base / "config", base / "state", base / "cache", base / "run").ensure()
    made = Runtime(load_settings(folders), folders)
    yield made
    made.close()


def drive(runtime, steps, *, size=(100, 30), only=None, theme="", ended=lambda: False):
    """Run the application and the steps on it; return its result."""
    app = CliffApp(Desk(runtime, only, ended), theme)

    async def run():
        async with app.run_test(size=size) as pilot:
            await steps(app, pilot)
        return app.return_value

    return asyncio.run(run())


async def until(pilot, condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await pilot.pause(0.02)


async def opened(app, pilot):
    """The first request's screen, with its card and its first change."""
    await until(pilot, lambda: isinstance(app.screen, Inbox) and app.screen.query_one(DataTable).row_count)
    await pilot.press("enter")
    await card_of(app, pilot)


async def card_of(app, pilot):
    await until(pilot, lambda: isinstance(app.screen, Review) and app.screen.query(ChangeView))
    await until(pilot, lambda: app.screen.query_one(ChangeView)._rows)


def text_of(view):
    """What a view shows, row by row."""
    return [view.render_line(y).text.rstrip() for y in range(view.size.height)]


def pressing(*keys, then=lambda app: None):
    async def steps(app, pilot):
        await opened(app, pilot)
        for key in keys:
            await pilot.press(key)
            await pilot.pause(0.05)
        await until(pilot, lambda: not app.screen._busy if isinstance(app.screen, Review) else True)
        await pilot.pause(0.1)
        then(app)

    return steps


# -- the inbox ------------------------------------------------------------------------------------------


def test_the_inbox_shows_what_waits_and_follows_other_processes(runtime, workspace):
    ask_for_changes(runtime, workspace, {"a.txt": b"1"}, command=("sed", "x\x1b[2J"))

    async def steps(app, pilot):
        await until(pilot, lambda: app.screen.query_one(DataTable).row_count == 1)
        row = app.screen.query_one(DataTable).get_row_at(0)
        assert row[0].plain == "low" and row[4].plain == "sed x\\x1b[2J"
        hook = {".git": 0o755, ".git/hooks": 0o755, ".git/hooks/post-merge": b"x"}
        ask_for_changes(runtime, workspace, hook)
        await until(pilot, lambda: app.screen.query_one(DataTable).row_count == 2)
        assert app.screen.query_one(DataTable).get_row_at(0)[0].plain == "!!critical"  # the most severe first
        for request in runtime.approvals.list():
            runtime.decisions.deny(request, Answer(Verdict.DENY, "elsewhere"))
        await until(pilot, lambda: app.screen.query_one(DataTable).row_count == 0)
        assert "Nothing waits" in str(app.screen.query_one("#empty", Static).render())
        await pilot.press("q")

    drive(runtime, steps)


# -- one request ------------------------------------------------------------------------------------------


def test_a_request_is_looked_at_and_approved(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"one\n2\n", "new.py": CODE})

    async def steps(app, pilot):
        await opened(app, pilot)
        assert [row for row in text_of(app.screen.query_one(ChangeTree)) if row] == [
            ">~ a.txt".replace("~", " ~", 1),
            "  + new.py",
        ]
        view = app.screen.query_one(ChangeView)
        assert "-two" in text_of(view) and "+2" in text_of(view)
        await pilot.press("down")
        await until(pilot, lambda: "+import os" in text_of(view))
        await pilot.press("v")
        assert any("│+import os" in row for row in text_of(view))
        await pilot.press("a")
        await until(pilot, lambda: isinstance(app.screen, Inbox))

    drive(runtime, steps)
    assert (workspace / "new.py").read_bytes() == CODE
    decided = runtime.approvals.decisions(request.id)
    assert (decided[0].verdict, decided[0].means) == (Verdict.APPROVE, "terminal")


@pytest.mark.parametrize(("key", "state"), [("d", State.DENIED), ("c", State.RETURNED), ("s", State.STOPPED)])
def test_no_takes_a_reason(runtime, workspace, key, state):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"}, task="books")
    drive(runtime, pressing(key, "n", "o", "enter"))
    assert runtime.approvals.get(request.id).state is state
    assert runtime.approvals.outcome(request.id) == "no"
    assert (workspace / "a.txt").read_text() == "one\ntwo\n"


def test_a_change_of_mind_leaves_it_waiting(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    drive(runtime, pressing("d", "x", "escape", "escape"))
    assert runtime.approvals.get(request.id).state is State.PENDING


def test_what_is_critical_takes_a_second_step(runtime, workspace):
    hook = {".git": 0o755, ".git/hooks": 0o755, ".git/hooks/pre-commit": b"x"}
    request = ask_for_changes(runtime, workspace, hook)
    drive(runtime, pressing("a", "y", "enter", "escape"))
    assert runtime.approvals.get(request.id).state is State.PENDING
    drive(runtime, pressing("a", *"publish", "enter"))
    assert runtime.approvals.get(request.id).state is State.PUBLISHED


def test_a_part_is_chosen_file_by_file(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"d": 0o755, "d/x": b"1", "d/y": b"2", "z": b"3"})

    def look(app):
        assert app.screen.query_one(ChangeTree).left_out == {0, 1, 2}  # without the folder, nothing in it

    drive(runtime, pressing("space", then=look))
    drive(runtime, pressing("space", "down", "space", "a"))  # the folder out, then a file of it in
    assert (workspace / "d" / "x").exists() and (workspace / "z").exists()
    assert not (workspace / "d" / "y").exists()
    assert runtime.approvals.decisions(request.id)[0].part == ("d", "d/x", "z")


def test_a_grant_is_made_from_what_is_shown(runtime, workspace):
    ask_for_changes(runtime, workspace, {"a.txt": b"1"}, command=("make", "fmt"))

    async def steps(app, pilot):
        await opened(app, pilot)
        await pilot.press("g")
        await until(pilot, lambda: app.screen.query(Input) and app.screen.query(".dialog-text"))
        assert "command: make fmt" in str(app.screen.query_one(".dialog-text Static", Static).render())
        app.screen.query_one(Input).value = "3 1"
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Inbox))

    drive(runtime, steps)
    (standing,) = runtime.grants.list()
    assert standing.grant.limits.uses == 3
    assert (workspace / "a.txt").read_text() == "1"


def test_asked_about_one_request_the_answer_is_returned(runtime, workspace):
    ask_for_changes(runtime, workspace, {"b": b"1"})
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})

    async def steps(app, pilot):
        await card_of(app, pilot)
        await pilot.press("a")
        await pilot.pause(0.1)

    answer = drive(runtime, steps, only=request)
    assert (answer.verdict, answer.part) == (Verdict.APPROVE, None)
    assert runtime.approvals.get(request.id).state is State.PENDING  # whoever asked carries it out


def test_two_people_answer_one_after_the_other(runtime, workspace):
    (runtime.folders.config / "luminaguard.toml").write_text('[policy]\ntwo_people_from = "low"\n')
    runtime.approvers.add("ada", "a long passphrase")
    request = ask_for_changes(runtime, workspace, {"a.txt": b"new\n"})

    def heading(app):
        return str(app.screen.query_one("#heading", Static).render())

    async def steps(app, pilot):
        await opened(app, pilot)
        assert "2 different people must approve it" in heading(app) and "waits 59 min more" in heading(app)
        await pilot.press("a")
        await until(pilot, lambda: runtime.approvals.decisions(request.id))
        await until(pilot, lambda: isinstance(app.screen, Inbox))
        await opened(app, pilot)
        await until(pilot, lambda: "so far: owner" in heading(app))
        for phrase in ("a wrong passphrase", "a long passphrase"):
            await pilot.press("p")
            await until(pilot, lambda: app.screen.query(".dialog"))
            app.screen.query_one(Input).value = "ada"
            await pilot.press("enter")
            await until(pilot, lambda: app.screen.query(Input) and app.screen.query_one(Input).password)
            app.screen.query_one(Input).value = phrase
            assert phrase not in picture(app)
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.screen, Review))
            assert phrase == "a long passphrase" or "answering as" not in heading(app)
        await until(pilot, lambda: "answering as ada" in heading(app))
        await pilot.press("a")
        await until(pilot, lambda: runtime.approvals.get(request.id).state is State.PUBLISHED)

    drive(runtime, steps)
    assert (workspace / "a.txt").read_text() == "new\n"
    assert [d.person for d in runtime.approvals.decisions(request.id)] == ["owner", "ada"]
    assert [e.kind for e in runtime.ledger.entries()].count("approver.refused") == 1


def test_two_columns_are_moved_sideways_together(runtime, workspace):
    (workspace / "a.txt").write_text("old " + "x" * 50 + " END1\n")
    ask_for_changes(runtime, workspace, {"a.txt": b"new " + b"y" * 50 + b" END2\n"})

    async def steps(app, pilot):
        await opened(app, pilot)
        await pilot.press("v")
        view = app.screen.query_one(ChangeView)
        view.focus()
        await until(pilot, lambda: view.two_columns)
        assert not any("END" in row for row in text_of(view))
        for _ in range(80):
            await pilot.press("right")
            if any("END1" in row and "END2" in row for row in text_of(view)):
                return
        raise AssertionError(text_of(view))

    drive(runtime, steps)


def test_an_answer_elsewhere_closes_the_request(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})

    async def steps(app, pilot):
        await opened(app, pilot)
        runtime.decisions.deny(request, Answer(Verdict.DENY, "elsewhere"))
        await until(pilot, lambda: isinstance(app.screen, Inbox))

    drive(runtime, steps)


def test_rules_that_change_meanwhile_are_shown_and_nothing_is_published(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    strict = '[[policy.rules]]\nname = "mine"\nrisk = "RED"\nseverity = "high"\nreason = "Look here."\nwhen = {}\n'

    async def steps(app, pilot):
        await opened(app, pilot)
        (runtime.folders.config / "luminaguard.toml").write_text(strict)
        await pilot.press("a")
        await until(pilot, lambda: "HIGH: Look here." in str(app.screen.query_one("#heading", Static).render()))
        assert (workspace / "a.txt").read_text() == "one\ntwo\n"
        await pilot.press("a")
        await until(pilot, lambda: isinstance(app.screen, Inbox))

    drive(runtime, steps)
    assert runtime.approvals.get(request.id).state is State.PUBLISHED


def test_why_tells_the_story_and_the_rules(runtime, workspace):
    ask_for_changes(runtime, workspace, {"a.txt": b"1"}, task="books", taint=("web",))

    async def steps(app, pilot):
        await opened(app, pilot)
        assert "follows untrusted input: web" in str(app.screen.query_one("#heading", Static).render())
        await pilot.press("i")
        await until(pilot, lambda: app.screen.query(".dialog-text Static"))
        text = str(app.screen.query_one(".dialog-text Static", Static).render())
        assert "request.created" in text and "= changeset: matches" in text
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, Review))

    drive(runtime, steps)


def test_a_search_goes_on_through_all_changes(runtime, workspace):
    ask_for_changes(runtime, workspace, {"a.txt": b"one\nneedle\n", "b": b"x\n" * 100, "c": b"y\n" * 50 + b"NEEDLE\n"})

    async def steps(app, pilot):
        await opened(app, pilot)
        tree_view, view = app.screen.query_one(ChangeTree), app.screen.query_one(ChangeView)
        await pilot.press("slash", *"needle", "enter")
        await until(pilot, lambda: view.wanted == "needle")
        await pilot.press("n")
        await until(pilot, lambda: tree_view.index == 2)
        await until(pilot, lambda: any("NEEDLE" in row for row in text_of(view)))

    drive(runtime, steps)


def test_a_call_is_shown_and_approved(runtime):
    request = ask_for(runtime, RemoteCall("mail", "send_mail", {"to": "a@example.org", "text": "hi\x1b[31m"}))

    async def steps(app, pilot):
        await opened(app, pilot)
        assert "server: mail" in str(app.screen.query_one("#heading", Static).render())
        await pilot.press("down")
        view = app.screen.query_one(ChangeView)
        await until(pilot, lambda: any("hi\\x1b[31m" in row for row in text_of(view)))
        await pilot.press("space")  # a call has no parts
        await pilot.press("a")
        await until(pilot, lambda: isinstance(app.screen, Inbox))

    drive(runtime, steps)
    assert runtime.approvals.get(request.id).state is State.APPROVED


# -- content that is hostile, or very large --------------------------------------------------------------------


def test_hostile_content_stays_in_its_place(runtime, workspace):
    ask_for_changes(runtime, workspace, {"n\x1b[2J\u202e": HOSTILE}, command=("x\x1b]0;t\x07",), task="t\x1b[2J")

    async def steps(app, pilot):
        await opened(app, pilot)
        await pilot.pause(0.2)
        drawn = "\n".join([*text_of(app.screen.query_one(ChangeTree)), *text_of(app.screen.query_one(ChangeView)),
                           str(app.screen.query_one("#heading", Static).render()),
                           str(app.screen.query_one("#loud", Static).render())])  # fmt: skip
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", drawn)
        assert "\\x1b[2J" in drawn and "\\u202eevil" in drawn

    drive(runtime, steps)


def test_markup_in_names_is_no_markup(runtime, workspace):
    ask_for_changes(runtime, workspace, {"[red]x": b"[bold]y\n"}, command=("[blink]z",))

    async def steps(app, pilot):
        await until(pilot, lambda: app.screen.query_one(DataTable).row_count == 1)
        assert app.screen.query_one(DataTable).get_row_at(0)[4].plain == "[blink]z"
        await opened(app, pilot)
        assert "[blink]z" in str(app.screen.query_one("#what").render())
        assert any("[red]x" in row for row in text_of(app.screen.query_one(ChangeTree)))
        assert "+[bold]y" in text_of(app.screen.query_one(ChangeView))

    drive(runtime, steps)


@pytest.mark.slow
def test_fifty_thousand_changes_open_and_scroll(runtime, tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()
    ask_for_changes(runtime, folder, {f"d{n // 100:03}/f{n:05}": f"link{n}" for n in range(50_000)})

    async def steps(app, pilot):
        await opened(app, pilot)
        view = app.screen.query_one(ChangeTree)
        assert len(view.rows) == 50_500
        await pilot.press("end")
        await until(pilot, lambda: any("f49999" in row for row in text_of(view)))
        await pilot.press("pageup", "home")
        await until(pilot, lambda: any("f00000" in row for row in text_of(view)))

    drive(runtime, steps)


def test_a_file_too_large_to_compare_is_shown_byte_by_byte(runtime, workspace):
    size = 100 << 20
    request = ask_for_changes(runtime, workspace, {"big": b"B" * 4096})
    content = runtime.blobs.folder / request.id / runtime.approvals.changeset(request.id).changes[0].after.sha256

    async def steps(app, pilot):
        await card_of(app, pilot)
        view = app.screen.query_one(ChangeView)
        with content.open("r+b") as file:
            file.truncate(size)  # a hundred mebibytes, of which only what is looked at is read
        raw = app.screen._card.raw(0)
        view.show("big", [Row("note", "too large")], tui_raw(raw, size))
        assert view.virtual_size.height == 1 + byte_rows(size)
        view.scroll_to(y=view.virtual_size.height - 5, animate=False, force=True)
        await pilot.pause(0.1)
        assert any("063ffff0  00 00" in row for row in text_of(view))

    drive(runtime, steps, only=request)


def tui_raw(raw, size):
    from luminaguard.tui.desk import Raw

    return Raw(size, raw.read)


def test_a_binary_file_is_shown_as_bytes(runtime, workspace):
    ask_for_changes(runtime, workspace, {"x.bin": b"\0\1\2ABC" * 10})

    async def steps(app, pilot):
        await opened(app, pilot)
        await until(pilot, lambda: any("00 01 02 41 42 43" in row for row in text_of(app.screen.query_one(ChangeView))))

    drive(runtime, steps)


# -- the way out ----------------------------------------------------------------------------------------------


def test_a_signal_ends_it_and_nothing_is_decided(runtime, workspace):
    request = ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    asked = []

    async def steps(app, pilot):
        await opened(app, pilot)
        asked.append(1)
        await until(pilot, lambda: app._exit)

    assert drive(runtime, steps, ended=lambda: bool(asked)) is None
    assert runtime.approvals.get(request.id).state is State.PENDING


def test_when_whoever_started_it_is_gone_it_ends(runtime, workspace, monkeypatch):
    async def steps(app, pilot):
        monkeypatch.setattr(os, "getppid", lambda: 1 << 22)
        await until(pilot, lambda: app._exit)

    drive(runtime, steps)


def test_a_refusal_is_told_and_the_request_stays(runtime, workspace):
    ask_for_changes(runtime, workspace, {"a.txt": b"1"})
    (workspace / "a.txt").write_text("meanwhile")

    async def steps(app, pilot):
        await opened(app, pilot)
        await pilot.press("a")
        await until(pilot, lambda: any("not the ones" in str(n.message) or "changed" in str(n.message)
                                       for n in app._notifications))  # fmt: skip

    drive(runtime, steps)
    assert (workspace / "a.txt").read_text() == "meanwhile"


def test_an_error_inside_is_raised_after_the_terminal_is_back(runtime, monkeypatch, capsys):
    monkeypatch.setattr(Inbox, "on_mount", lambda self: 1 / 0)
    app = CliffApp(Desk(runtime))
    with pytest.raises(ZeroDivisionError):
        app.see_through()
    assert "Traceback" not in capsys.readouterr().err


# -- pictures ----------------------------------------------------------------------------------------------------


def picture(app):
    """The screen as SVG, without what differs from one run to the next."""
    svg = app.export_screenshot()
    return re.sub(r"terminal-\d+", "terminal", svg)


def example(runtime, *, critical):
    """A request that looks the same on every run."""
    folder = Path("/nonexistent/books")
    changes = {
        "report.py": CODE,
        "run.sh": b"#!/bin/sh\n",
        "out": "/etc/passwd" if critical else "totals.csv",
        "totals.csv": b"month,sum\n1,20\n",
    }
    first = ask_for_changes(
        runtime, folder, changes, command=("python3", "tidy.py"), task="books", request_id="req-0000000001"
    )
    ask_for(
        runtime,
        RemoteCall("mail", "send_mail", {"to": "a@example.org"}, {"name": "send_mail"}),
        request_id="req-0000000002",
    )
    return first


LOOKS = [(theme.name.removeprefix("luminaguard-"), (80, 24)) for theme in THEMES]


@pytest.mark.parametrize(("theme", "size"), [*LOOKS, ("dark", (200, 50))])
@pytest.mark.parametrize(
    "screen", ["inbox", "review", "columns", "deny", "why", "grant", "search", "call", "second step"]
)
def test_every_screen_in_every_theme(runtime, monkeypatch, screen, theme, size):
    first = example(runtime, critical=screen != "grant")
    monkeypatch.setattr(Desk, "now_ns", lambda self: first.created_ns + 90 * 10**9)
    monkeypatch.setattr(Desk, "story", lambda self, request: [(first.created_ns, "request.created: changes 4")])
    taken = []

    async def steps(app, pilot):
        await until(pilot, lambda: app.screen.query_one(DataTable).row_count == 2)
        if screen in {"call", "grant"}:  # the other one is more severe
            await pilot.press("down")
        if screen == "call":
            await pilot.press("enter")
            await card_of(app, pilot)
        elif screen != "inbox":
            await opened(app, pilot)
            await pilot.press("down")
            view = app.screen.query_one(ChangeView)
            await until(pilot, lambda: any("import os" in row for row in text_of(view)))
            await until(pilot, lambda: "LOOK TWICE" in str(app.screen.query_one("#loud", Static).render()))
            if screen != "review":
                await pilot.press({"columns": "v", "deny": "d", "why": "i", "grant": "g", "search": "slash",
                                   "second step": "a"}[screen])  # fmt: skip
                await until(pilot, lambda: screen in {"columns", "search"} or app.screen.query(".dialog"))
        await pilot.pause(0.3)
        deadline = time.monotonic() + 10  # a busy machine draws the rest later
        while picture(app) != wanted and time.monotonic() < deadline and not os.environ.get("UPDATE_SNAPSHOTS"):
            await pilot.pause(0.1)
        taken.append(picture(app))

    kept = SNAPSHOTS / f"{screen.replace(' ', '-')}-{theme}-{size[0]}x{size[1]}.svg"
    wanted = kept.read_text(encoding="utf-8") if kept.exists() else ""
    drive(runtime, steps, size=size, theme=theme)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        kept.write_text(taken[0], encoding="utf-8")
    assert taken[0] == kept.read_text(encoding="utf-8"), f"{kept.name} looks otherwise; UPDATE_SNAPSHOTS=1 if it should"


def test_no_information_is_in_a_colour_alone(runtime, workspace, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    ask_for_changes(runtime, workspace, {"a.txt": b"one\n2\n", ".envrc": b"x"})

    async def steps(app, pilot):
        await opened(app, pilot)
        rows = text_of(app.screen.query_one(ChangeTree))
        assert rows[0].startswith(">!+ .envrc") and rows[1].startswith("  ~ a.txt")
        await pilot.press("down")
        await until(pilot, lambda: "-two" in text_of(app.screen.query_one(ChangeView)))

    drive(runtime, steps)


# -- the rows themselves -------------------------------------------------------------------------------------------


def test_rows_of_two_columns():
    item = CardItem("p", "modify", "h", (), ("@@ -1 +1 @@", " a", "-b", "-c", "+d", " e", "+f"))
    assert [(row.text, row.other) for row in side_by_side(unified(item))] == [
        ("h", None), ("@@ -1 +1 @@", None), (" a", " a"), ("-b", "+d"), ("-c", ""), (" e", " e"), ("", "+f"),
    ]  # fmt: skip


def test_rows_of_a_tree():
    assert tree(["a", "b/c/d", "b/e", "f/g"]) == [
        TreeRow(0, "a", 0), TreeRow(0, "b/", None), TreeRow(1, "c/", None), TreeRow(2, "d", 1), TreeRow(1, "e", 2),
        TreeRow(0, "f/", None), TreeRow(1, "g", 3),
    ]  # fmt: skip
    assert tree(["a", "a/b"]) == [TreeRow(0, "a", 0), TreeRow(1, "b", 1)]


def test_rows_of_bytes():
    assert byte_row(16, b"A\x1b\xff").text.startswith("00000010  41 1b ff") and byte_row(16, b"A\x1b").text.endswith(
        "A·"
    )
    assert (byte_rows(0), byte_rows(1), byte_rows(16), byte_rows(17)) == (0, 1, 1, 2)


@pytest.mark.parametrize("line", ["def f(): return 'x'", "", "    ", "\t# c", "x" * 5000, "'unterminated"])
def test_coloured_lines_are_the_lines(line):
    lexer = lexer_for("src/x.py")
    assert "".join(text for text, _ in coloured(lexer, line)) == line
    assert lexer_for("notes") is None
