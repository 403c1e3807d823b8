"""Tasks, their histories and long outputs: the only code that writes these tables.

A save is one transaction: the row, compared with the number of steps that it was read at; what was said
since; and the ledger's entry. Two who work on one task cannot both save: the second is told, and stops.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from sqlalchemy import ColumnElement, Connection, exists, func, insert, select, update

from luminaguard.effects.text import visible
from luminaguard.errors import ChangesetRefused, StorageError, TaskError, TaskNotFound
from luminaguard.storage import schema as tables
from luminaguard.storage.approvals import Approvals, Transaction

__all__ = ["Due", "Enqueue", "Needs", "Stored", "TaskStore"]

HERE = "here"
"""What a step needs that no queue offers: the process that began its task."""
Needs = Literal["turn", "machine", "folder"]
"""What the next step of a task needs: a model, a machine, or the host that has the folder."""
_MOST_DUE = 10_000
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError, LookupError,
               ChangesetRefused)  # fmt: skip
_UNANSWERED = ("pending", "claimed", "unknown")


@dataclass(frozen=True, slots=True)
class Due:
    """A step that can be done now.

    Attributes:
        task: of which task.
        step: its number, which is how many are saved.
        needs: what it needs.
        home: the host that has the task's folder.
    """

    task: str
    step: int
    needs: Needs
    home: str


Enqueue = Callable[[Connection, Due], None]


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
    @property
    def request(self) -> str: ...  # noqa: D102
    @property
    def home(self) -> str: ...  # noqa: D102
    def to_json(self) -> dict[str, Any]:
        """What is kept beside the columns."""


T = TypeVar("T", bound=Stored)
M = TypeVar("M")
Read = Callable[[Any, Any], T]


class TaskStore:
    """The tasks of a database.

    Args:
        approvals: whose transactions are used.
        enqueue: told in the same transaction of each step that can be done from then on.
        here: what is stored is done by this process alone; no queue offers it.
    """

    def __init__(self, approvals: Approvals, enqueue: Enqueue | None = None, *, here: bool = False) -> None:
        self._approvals = approvals
        self._enqueue = enqueue
        self._here = here

    def create(self, task: Stored, status: str, messages: Sequence[dict[str, Any]], **told: Any) -> None:
        """Store a new task with the beginning of its history."""
        with self._approvals.transaction() as t:
            t.connection.execute(insert(tables.tasks).values(
                id=task.id, workspace=task.workspace, status=status, step=task.step, created_ns=task.created_ns,
                updated_ns=t.now, body=json.dumps(task.to_json()), waits_for=task.request, home=task.home,
                needs=HERE if self._here else "turn",
            ))  # fmt: skip
            self._say(t, task.id, messages)
            self._next(t, Due(task.id, task.step, "turn", task.home), status)
            t.record("task.created", task=task.id, workspace=task.workspace, **told)

    def save(
        self, task: Stored, status: str, messages: Sequence[dict[str, Any]] = (),
        outputs: dict[str, str] | None = None, *, needs: Needs = "turn", **told: Any,
    ) -> None:  # fmt: skip
        """Store a task after a step; ``task.step`` is the number that it was read at, ``needs`` is about the next.

        Raises:
            TaskError: somebody else saved a step of it meanwhile; nothing was stored.
        """
        with self._approvals.transaction() as t:
            where = (tables.tasks.c.id == task.id) & (tables.tasks.c.step == task.step)
            values = {"status": status, "step": task.step + 1, "updated_ns": t.now, "body": json.dumps(task.to_json()),
                      "waits_for": task.request, "needs": HERE if self._here else needs}  # fmt: skip
            if t.connection.execute(update(tables.tasks).where(where).values(**values)).rowcount != 1:
                raise TaskError(
                    f"{task.id} was worked on by another process meanwhile.",
                    hint=f"See 'luminaguard tasks show {task.id}'.",
                    kept="What the other process did stands; this step was not saved.",
                )
            self._say(t, task.id, messages)
            for name, text in (outputs or {}).items():
                # PostgreSQL stores no NUL: what cannot be shown is not kept either.
                kept = text.replace("\0", "\ufffd")
                t.connection.execute(insert(tables.outputs).values(task=task.id, name=name, text=kept))
            self._next(t, Due(task.id, task.step + 1, needs, task.home), status)
            t.record("task.step", task=task.id, step=task.step + 1, status=status, **told)

    def get(self, task_id: str, read: Read[T]) -> T:
        """One task; raises TaskNotFound."""
        with self._approvals.reading() as connection:
            query = select(tables.tasks).where(tables.tasks.c.id == task_id)
            row = connection.execute(query).first() if task_id.isascii() and task_id.isprintable() else None
        if row is None:
            raise TaskNotFound(f"There is no task '{visible(task_id[:64])}'.", hint="See 'luminaguard tasks list'.")
        return self._read(row, read)

    def all(self, read: Read[T], statuses: Sequence[str] = ()) -> tuple[list[T], list[str]]:
        """Tasks, oldest first: all, or those of some statuses; and the ids of those that cannot be read."""
        query = select(tables.tasks).order_by(tables.tasks.c.created_ns)
        if statuses:
            query = query.where(tables.tasks.c.status.in_(statuses))
        with self._approvals.reading() as connection:
            rows = connection.execute(query).all()
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
        with self._approvals.reading() as connection:
            rows = connection.execute(query.order_by(tables.messages.c.seq)).all()
        try:
            if not rows:
                raise LookupError("it has no history")
            return [read(json.loads(row.body)) for row in rows]
        except _UNREADABLE as error:
            raise _damaged(task_id, error) from error

    def output(self, task_id: str, name: str) -> str | None:
        """A long output, whole; None if there is none of that name."""
        if not name.isascii() or not name.isprintable():  # half a surrogate pair, NUL: what no database takes
            return None
        where = (tables.outputs.c.task == task_id) & (tables.outputs.c.name == name)
        with self._approvals.reading() as connection:
            return connection.execute(select(tables.outputs.c.text).where(where)).scalar()

    def due(self) -> list[Due]:
        """The steps that can be done now, oldest task first: of what runs, or waited for what was answered."""
        with self._approvals.reading() as connection:
            return self.due_in(connection)

    def due_step(self, task_id: str, step: int) -> Due | None:
        """One step, if it can be done now."""
        row = tables.tasks.c
        with self._approvals.reading() as connection:
            found = self.due_in(connection, (row.id == task_id) & (row.step == step))
        return found[0] if found else None

    def step_of(self, task_id: str) -> int:
        """How many steps of a task are saved; -1 if there is no such task, or it has ended or waits."""
        row = tables.tasks.c
        query = select(row.step).where((row.id == task_id) & row.status.in_(("running", "waiting")))
        with self._approvals.reading() as connection:
            found = connection.execute(query).scalar()
        return -1 if found is None else int(found)

    @staticmethod
    def due_in(connection: Connection, only: ColumnElement[bool] | None = None) -> list[Due]:
        """:meth:`due` in the caller's transaction, or those of some tasks."""
        row, requests = tables.tasks.c, tables.requests
        # What a rule lets through waits for nobody: a crash came between asking and letting it through.
        by_rule = (requests.c.state == "pending") & (requests.c.risk == "GREEN") & (requests.c.people == 1)
        asked = (requests.c.id == row.waits_for) & requests.c.state.in_(_UNANSWERED)
        unanswered = exists().where(asked & ~by_rule)
        waited = (row.status == "waiting") & (row.waits_for != "") & ~unanswered
        runs = ((row.status == "running") | waited) & (row.needs != HERE)
        query = select(row.id, row.step, row.needs, row.home).where(runs if only is None else only & runs)
        rows = connection.execute(query.order_by(row.created_ns).limit(_MOST_DUE)).all()
        return [Due(one.id, one.step, one.needs or "turn", one.home) for one in rows
                if isinstance(one.step, int) and isinstance(one.id, str) and isinstance(one.home, str)]  # fmt: skip

    def _next(self, t: Transaction, due: Due, status: str) -> None:
        if (
            self._enqueue is not None
            and not self._here
            and (status == "running" or (status == "waiting" and due.needs == "folder"))
        ):
            self._enqueue(t.connection, due)

    @staticmethod
    def _say(t: Transaction, task_id: str, messages: Sequence[dict[str, Any]]) -> None:
        row = tables.messages.c
        after = select(func.coalesce(func.max(row.seq), 0) + 1).where(row.task == task_id).scalar_subquery()
        for body in messages:
            values = {"task": task_id, "seq": after, "body": json.dumps(body)}
            t.connection.execute(insert(tables.messages).values(**values))

    @staticmethod
    def _read(row: Any, read: Read[T]) -> T:
        try:
            return read(row, json.loads(row.body))
        except _UNREADABLE as error:
            raise _damaged(str(row.id), error) from error


def _damaged(task_id: str, error: Exception) -> StorageError:
    return StorageError(
        f"The task {visible(task_id[:64])} in the database cannot be read ({error}).",
        hint="The database was damaged or edited: restore it from a backup.",
        kept="Nothing was deleted.",
    )
