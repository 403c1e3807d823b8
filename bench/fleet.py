"""A fleet, measured: our part of a turn with PostgreSQL, and what its queue adds; machines are played."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import anyio

from agents import turns
from luminaguard.runtime import Runtime
from luminaguard.runtime.tasks import LocalTasks
from luminaguard.runtime.worker import Worker
from luminaguard.settings import Folders, load_settings
from luminaguard.tasks.model import Status, Task
from luminaguard.testing.bench import PlayedBench
from luminaguard.testing.postgres import find_postgres, running_postgres

__all__ = ["measure"]

_SCRIPT = "turns:\n" + "  - calls:\n      - list_files: {}\n" * 5 + "  - say: Done.\n"
_STEPS = 12
"""Of a task with this script: five answers, five calls, the last answer, and the end."""


def measure(folder: Path, *, count: int, tasks: int) -> dict[str, Any] | None:
    """Milliseconds of a turn with PostgreSQL, and steps a second of one worker; None without PostgreSQL."""
    if (programs := find_postgres()) is None:
        return None
    with running_postgres(programs) as cluster:
        laps = turns(_runtime(folder / "turns-home", cluster.create()), folder, count)
        took = _worker(_runtime(folder / "worker-home", cluster.create()), folder, tasks)
    return {"turns_ms": laps, "steps_per_s": round(tasks * _STEPS / took, 1)}


def _runtime(base: Path, url: str) -> Runtime:
    folders = Folders(base / "config", base / "state", base / "cache", base / "run").ensure()
    return Runtime(load_settings(folders, {"database_url": url, "host": "bench", "slots": 2}), folders)


def _worker(runtime: Runtime, folder: Path, count: int) -> float:
    """Seconds that a worker takes for some tasks."""
    workspace, script = folder / "fleet", folder / "fleet.yaml"
    workspace.mkdir()
    script.write_text(_SCRIPT)

    async def run() -> float:
        begun = LocalTasks(runtime, PlayedBench)
        for number in range(count):
            task = Task(f"task-b{number}", "x", str(workspace), f"script:{script}", 1 + number, home="bench")
            await begun.engine.create(task)
        start = time.perf_counter()
        async with anyio.create_task_group() as group:
            group.start_soon(Worker(runtime, bench=PlayedBench).run)
            while len(begun.store.all(Task.from_json, [Status.FINISHED.value])[0]) < count:  # noqa: ASYNC110  # a database
                await anyio.sleep(0.05)
            taken = time.perf_counter() - start
            group.cancel_scope.cancel()
        return taken

    return anyio.run(run)
