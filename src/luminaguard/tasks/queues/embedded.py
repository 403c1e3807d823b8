"""The queue of one host: the tasks' table itself, looked at again when something was enqueued or time has passed."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio
from sqlalchemy import Connection

from luminaguard import log
from luminaguard.errors import StorageError
from luminaguard.storage.tasks import Due, TaskStore
from luminaguard.tasks.queues.port import Handler, Later

__all__ = ["EmbeddedQueue"]

_LOOK_S = 0.5


class EmbeddedQueue:
    """The work of one host; its caller sees to it that there is one.

    Args:
        store: the tasks.
        machines, turns: how many steps that need a machine, and others, are done at once.
    """

    def __init__(self, store: Callable[[], TaskStore], *, machines: int, turns: int) -> None:
        self._store = store
        self._free = {"machine": machines, "other": turns}
        self._doing: set[str] = set()
        self._again: dict[str, tuple[int, int, float]] = {}
        """Tasks whose step is tried again: its number, how often it was tried, and when it is due."""
        self._wake = anyio.Event()

    def enqueue(self, connection: Connection, due: Due) -> None:
        """Look soon."""
        del connection, due
        self._wake.set()

    async def run(self, handle: Handler) -> None:
        """Do steps until cancelled."""
        async with anyio.create_task_group() as tasks:
            while True:
                self._wake = anyio.Event()
                for due in self._due():
                    tasks.start_soon(self._do, handle, due)
                with anyio.move_on_after(_LOOK_S):
                    await self._wake.wait()

    def _due(self) -> list[Due]:
        """What can be started now; its slot is taken."""
        try:
            found = self._store().due()
        except StorageError as error:
            log.event("queue.database", error=error.message)
            return []
        chosen = []
        for due in found:
            number, _, at = self._again.get(due.task, (-1, 0, 0.0))
            kind = "machine" if due.needs == "machine" else "other"
            waits = number == due.step and time.monotonic() < at
            if due.task not in self._doing and not waits and self._free[kind]:
                self._free[kind] -= 1
                self._doing.add(due.task)
                chosen.append(due)
        return chosen

    async def _do(self, handle: Handler, due: Due) -> None:
        number, tries, _ = self._again.get(due.task, (-1, 0, 0.0))
        tries = tries if number == due.step else 0
        try:
            await handle(due, tries)
            self._again.pop(due.task, None)
        except Later as later:
            self._again[due.task] = (due.step, tries + 1, time.monotonic() + later.after_s)
        finally:
            self._free["machine" if due.needs == "machine" else "other"] += 1
            self._doing.discard(due.task)
            self._wake.set()
