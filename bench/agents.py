"""Agents, measured without what is not ours: no machine, no model; and from the command line to the first request."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import anyio

from luminaguard.reasoning.script import ScriptModel
from luminaguard.runtime import Runtime
from luminaguard.runtime.tasks import LocalTasks
from luminaguard.tasks.model import Task
from luminaguard.tasks.ports import Watcher
from luminaguard.testing.bench import PlayedBench
from luminaguard.testing.model_server import Answer, ModelServer, serve_models

__all__ = ["first_request", "turns", "waiting"]


def _tasks(runtime: Runtime) -> LocalTasks:
    return LocalTasks(runtime, PlayedBench)


def turns(runtime: Runtime, folder: Path, count: int) -> list[float]:
    """Milliseconds of our own in each turn: the model's answer saved, and one call answered and saved."""
    workspace = folder / "turns"
    workspace.mkdir()
    (workspace / "a.txt").write_text("x")
    tasks, laps = _tasks(runtime), []
    model = ScriptModel("script:bench", [("", [("list_files", {})])] * count)

    async def run() -> None:
        engine = tasks.engine
        task = await engine.create(Task("task-bench", "x", str(workspace), "script:bench", 1, max_turns=count))
        for _ in range(count):
            start = time.perf_counter()
            task, _ = await engine.step(task, model, Watcher())  # the answer
            task, _ = await engine.step(task, model, Watcher())  # its call
            laps.append((time.perf_counter() - start) * 1000)

    anyio.run(run)
    return laps


def waiting(runtime: Runtime, folder: Path, count: int) -> dict[str, Any]:
    """What tasks that wait for a person cost: bytes on disk of each, in memory none, for nothing of them runs."""
    workspace = folder / "waiting"
    workspace.mkdir()
    for number in range(20):
        (workspace / f"f{number}").write_text("x" * 1000)
    tasks = _tasks(runtime)
    model = ScriptModel("script:bench", [("", [("write_file", {"path": "new", "content": "y"})]), ("Done.", [])])
    before = _size(runtime.folders.state)

    async def run() -> None:
        for number in range(count):
            task = Task(f"task-w{number}", "x", str(workspace), "script:bench", 1 + number)
            task = await tasks.engine.create(task)
            await tasks.run(task, model, Watcher())

    anyio.run(run)
    each = (_size(runtime.folders.state) - before) / count
    return {"tasks": len(runtime.approvals.list()), "kib_on_disk_each": round(each / 1024, 1), "goal_kib_each": 1024,
            "processes": 0, "met": each < 1 << 20}  # fmt: skip


def _size(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def first_request(home: dict[str, str], folder: Path, count: int) -> list[float]:
    """Milliseconds from the start of ``luminaguard run`` to the model's first request on the wire."""
    workspace = folder / "first"
    workspace.mkdir()
    (workspace / "a.txt").write_text("x")
    laps: list[float] = []
    with _Server() as server:
        argv = [sys.executable, "-m", "luminaguard", "run", "Do it.", "-w", str(workspace), "--json", "--model",
                f"openai:bench@{server.openai}"]  # fmt: skip
        for _ in range(count):
            came = len(server.requests)
            start = time.perf_counter()
            with subprocess.Popen(argv, env=os.environ | home, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL) as process:  # fmt: skip
                while len(server.requests) == came and process.poll() is None:
                    time.sleep(0.002)
                laps.append((time.perf_counter() - start) * 1000)
                process.wait(60)
    return laps


class _Server:
    """A model's server in a thread, for as long as this context lasts."""

    def __enter__(self) -> ModelServer:
        self._started, self._end, self._found = threading.Event(), threading.Event(), [ModelServer(0, [])]
        self._thread = threading.Thread(target=anyio.run, args=(self._serve,))
        self._thread.start()
        self._started.wait(20)
        return self._found[0]

    async def _serve(self) -> None:
        async with serve_models([Answer("Done.")]) as server:
            self._found[0] = server
            self._started.set()
            await anyio.to_thread.run_sync(self._end.wait)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(20)
