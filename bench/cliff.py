"""The cliff, measured: judging, publishing after an approval, and the terminal interface with a headless driver."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

from textual import events
from textual.widgets import DataTable

from luminaguard.approvals import Verdict
from luminaguard.runtime import Runtime
from luminaguard.runtime.decisions import Answer
from luminaguard.runtime.policy import action_of, judge
from luminaguard.testing.requests import ask_for_changes
from luminaguard.tui.app import CliffApp
from luminaguard.tui.desk import Desk
from luminaguard.tui.views import ChangeView

__all__ = ["interface", "judging", "publishing"]

_LINES = 10_000


def publishing(runtime: Runtime, folder: Path, count: int) -> list[float]:
    """Milliseconds from the answer to 100 files published and recorded."""
    laps = []
    for number in range(count):
        workspace = folder / f"publish-{number}"
        workspace.mkdir()
        changes = {f"f{n}": f"content {n}\n".encode() * 20 for n in range(100)}
        request = ask_for_changes(runtime, workspace, changes)
        start = time.perf_counter()
        runtime.decisions.approve_and_publish(request, Answer(Verdict.APPROVE, "benchmark"))
        laps.append((time.perf_counter() - start) * 1000)
    return laps


def judging(runtime: Runtime, folder: Path, count: int) -> list[float]:
    """Milliseconds to read all rules and judge a changeset of 100 files by them."""
    workspace = folder / "judged"
    workspace.mkdir()
    request = ask_for_changes(runtime, workspace, {f"f{n}": b"x" for n in range(100)})
    effect, laps = runtime.approvals.effect(request.id), []
    for _ in range(count):
        start = time.perf_counter()
        judge(runtime.policy(workspace), action_of(request, effect))
        laps.append((time.perf_counter() - start) * 1000)
    return laps


def interface(runtime: Runtime, folder: Path, count: int) -> dict[str, list[float]]:
    """Milliseconds to the first paint with a request on it, from a key to the screen, and of a frame; 10,000 lines."""
    workspace = folder / "interface"
    workspace.mkdir()
    old = "".join(f"def line_{n}(): return {n}\n" for n in range(_LINES // 2))
    (workspace / "code.py").write_text(old)
    new = old.replace("return", "yield").encode()
    ask_for_changes(runtime, workspace, {"code.py": new, **{f"d{n % 50}/f{n}": b"x\n" for n in range(500)}})
    gc.set_threshold(100_000, 50, 50)  # as the command line does
    return asyncio.run(_drive(runtime, count))


class _Watched(CliffApp):
    """The application, telling when it has drawn."""

    drawn: asyncio.Event

    def _display(self, screen: Any, renderable: Any) -> None:
        super()._display(screen, renderable)
        if getattr(self, "drawn", None) is not None:
            self.drawn.set()


async def _drive(runtime: Runtime, count: int) -> dict[str, list[float]]:
    laps: dict[str, list[float]] = {"first_paint": [], "key_to_screen": [], "frame": []}
    for _ in range(5):
        start = time.perf_counter()
        app = _Watched(Desk(runtime))
        app.drawn = asyncio.Event()
        async with app.run_test(size=(120, 40)):
            await asyncio.wait_for(app.drawn.wait(), 30)
            laps["first_paint"].append((time.perf_counter() - start) * 1000)
    app = _Watched(Desk(runtime))
    app.drawn = asyncio.Event()
    async with app.run_test(size=(120, 40)) as pilot:
        while not (app.screen.query(DataTable) and app.screen.query_one(DataTable).row_count):
            await pilot.pause(0.01)
        await pilot.press("enter")
        while not (app.screen.query(ChangeView) and app.screen.query_one(ChangeView).virtual_size.height > _LINES):
            await pilot.pause(0.01)
        view = app.screen.query_one(ChangeView)
        view.focus()
        await pilot.pause(0.5)
        for number in range(count):
            app.drawn.clear()
            start = time.perf_counter()
            key = events.Key("down" if number % 50 < 25 else "up", None)
            key.set_sender(app)
            app._driver.send_message(key)  # noqa: SLF001  # as a terminal's driver does
            await asyncio.wait_for(app.drawn.wait(), 5)
            laps["key_to_screen"].append((time.perf_counter() - start) * 1000)
            await asyncio.sleep(0.005)
        for number in range(count):
            view.scroll_to(y=(number * 37) % _LINES, animate=False, force=True)
            await pilot.pause()
            view.refresh()
            start = time.perf_counter()
            update = app.screen._compositor.render_update(full=True)  # noqa: SLF001  # what is sent to a terminal
            assert update is not None and update.render_segments(app.console)
            laps["frame"].append((time.perf_counter() - start) * 1000)
    return laps
