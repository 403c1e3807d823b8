"""Tasks, their histories and long outputs: the only code that writes these tables.

A save is one transaction: the row, compared with the number of steps that it was read at; what was said
since; and the ledger's entry. Two who work on one task cannot both save: the second is told, and stops.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from sqlalchemy import func, insert, select, update

from luminaguard.effects.text import visible
from luminaguard.errors import ChangesetRefused, StorageError, TaskError, TaskNotFound
from luminaguard.storage import database as tables
from luminaguard.storage.approvals import Approvals, Transaction

__all__ = ["Stored", "TaskStore"]


class Stored(Protocol):
    """What a task must be to be stored."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def workspace(self) -> str: ...  # noqa: D102
    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def created_ns(self) -> int: ...  # noqa: D102
    def to_json(self) -> dict[str, Any]:
        """What is kept beside the columns."""


T = TypeVar("T", bound=Stored)
M = TypeVar("M")
Read = Callable[[Any, Any], T]


class TaskStore:
    """The tasks of a database."""

    def __init__(self, approvals: Approvals) -> None:
        self._approvals = approvals

    def create(self, task: Stored, status: str, messages: Sequence[dict[str, Any]], **told: Any) -> None:
        """Store a new task with the beginning of its history."""
        with self._approvals.transaction() as t:
            t.connection.execute(insert(tables.tasks).values(
                id=task.id, workspace=task.workspace, status=status, step=task.step, created_ns=task.created_ns,
                updated_ns=t.now, body=json.dumps(task.to_json()),
            ))  # fmt: skip
            self._say(t, task.id, messages)
            t.record("task.created", task=task.id, workspace=task.workspace, **told)

    def save(
        self, task: Stored, status: str, messages: Sequence[dict[str, Any]] = (),
        outputs: dict[str, str] | None = None, **told: Any,
    ) -> None:  # fmt: skip
        """Store a task after a step; ``task.step`` is the number that it was read at.

        Raises:
            TaskError: somebody else saved a step of it meanwhile; nothing was stored.
        """
        with self._approvals.transaction() as t:
            where = (tables.tasks.c.id == task.id) & (tables.tasks.c.step == task.step)
            values = {"status": status, "step": task.step + 1, "updated_ns": t.now, "body": json.dumps(task.to_json())}
            if t.connection.execute(update(tables.tasks).where(where).values(**values)).rowcount != 1:
                raise TaskError(
                    f"{task.id} was worked on by another process meanwhile.",
                    hint=f"See 'luminaguard tasks show {task.id}'.",
                    kept="What the other process did stands; this step was not saved.",
                )
            self._say(t, task.id, messages)
            for name, text in (outputs or {}).items():
                t.connection.execute(insert(tables.outputs).values(task=task.id, name=name, text=text))
            t.record("task.step", task=task.id, step=task.step + 1, status=status, **told)

    def get(self, task_id: str, read: Read[T]) -> T:
        """One task; raises TaskNotFound."""
        with self._approvals.transaction() as t:
            query = select(tables.tasks).where(tables.tasks.c.id == task_id)
            row = t.connection.execute(query).first() if task_id.isascii() else None
        if row is None:
            raise TaskNotFound(f"There is no task '{visible(task_id[:64])}'.", hint="See 'luminaguard tasks list'.")
        return self._read(row, read)

    def all(self, read: Read[T], statuses: Sequence[str] = ()) -> tuple[list[T], list[str]]:
        """Tasks, oldest first: all, or those of some statuses; and the ids of those that cannot be read."""
        query = select(tables.tasks).order_by(tables.tasks.c.created_ns)
        if statuses:
            query = query.where(tables.tasks.c.status.in_(statuses))
        with self._approvals.transaction() as t:
            rows = t.connection.execute(query).all()
        found, damaged = [], []
        for row in rows:
            try:
                found.append(self._read(row, read))
            except StorageError:
                damaged.append(visible(str(row.id)[:64]))
        return found, damaged

    def history(self, task_id: str, read: Callable[[Any], M]) -> list[M]:
        """What was said, oldest first.

        Raises:
            StorageError: a message cannot be read.
        """
        query = select(tables.messages.c.body).where(tables.messages.c.task == task_id)
        with self._approvals.transaction() as t:
            rows = t.connection.execute(query.order_by(tables.messages.c.seq)).all()
        try:
            return [read(json.loads(row.body)) for row in rows]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(task_id, error) from error

    def output(self, task_id: str, name: str) -> str | None:
        """A long output, whole; None if there is none of that name."""
        if not name.isascii():  # such as half a surrogate pair, which no database takes
            return None
        where = (tables.outputs.c.task == task_id) & (tables.outputs.c.name == name)
        with self._approvals.transaction() as t:
            return t.connection.execute(select(tables.outputs.c.text).where(where)).scalar()

    @staticmethod
    def _say(t: Transaction, task_id: str, messages: Sequence[dict[str, Any]]) -> None:
        if not messages:
            return
        query = select(func.max(tables.messages.c.seq)).where(tables.messages.c.task == task_id)
        first = (t.connection.execute(query).scalar() or 0) + 1
        rows = [{"task": task_id, "seq": first + at, "body": json.dumps(body)} for at, body in enumerate(messages)]
        t.connection.execute(insert(tables.messages), rows)

    @staticmethod
    def _read(row: Any, read: Read[T]) -> T:
        try:
            return read(row, json.loads(row.body))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ChangesetRefused) as error:
            raise _damaged(str(row.id), error) from error


def _damaged(task_id: str, error: Exception) -> StorageError:
    return StorageError(
        f"The task {visible(task_id[:64])} in the database cannot be read ({error}).",
        hint="The database was damaged or edited: restore it from a backup.",
        kept="Nothing was deleted.",
    )
