"""The queue's rows in PostgreSQL: each is a hint that a step can be done; what is true stands in the tasks' table.

The statements use functions of procrastinate's schema by their versioned names, so that whoever only begins a task
need not load it.
"""

from __future__ import annotations

import json

from sqlalchemy import Connection, text

from luminaguard.storage.database import Database
from luminaguard.storage.tasks import Due, TaskStore

__all__ = ["FINISH", "REGISTER", "RETRY", "STEP", "Jobs", "queues_of"]

STEP = "luminaguard.step"
"""What the queue calls the one kind of job that there is."""
FINISH = """
SELECT procrastinate_finish_job_v1(id, %(status)s::procrastinate_job_status, true) FROM (SELECT id FROM
procrastinate_jobs WHERE id = %(job_id)s AND status = 'doing' AND worker_id = %(worker_id)s
AND attempts = %(attempts)s FOR UPDATE) AS mine
"""
"""Ends a job, if it still is this worker's: one that was frozen must not end what another does by now."""
RETRY = """
SELECT procrastinate_retry_job_v2(id, %(retry_at)s, NULL, %(queue)s, NULL) FROM (SELECT id FROM
procrastinate_jobs WHERE id = %(job_id)s AND status = 'doing' AND worker_id = %(worker_id)s
AND attempts = %(attempts)s FOR UPDATE) AS mine
"""
REGISTER = """
WITH made AS (INSERT INTO procrastinate_workers DEFAULT VALUES RETURNING id)
INSERT INTO host_workers (worker_id, token) SELECT id, %(token)s FROM made RETURNING worker_id
"""
"""A worker is known as part of its host from its first moment: a job of an unknown one is given to others."""
_MACHINES = "machines"
_WRONG = """(task_name <> :step OR (CASE WHEN jsonb_typeof(args) = 'object'
THEN jsonb_typeof(args -> 'task') IS DISTINCT FROM 'string' OR jsonb_typeof(args -> 'number') IS DISTINCT FROM 'number'
OR (args ->> 'task') || chr(58) || (args ->> 'number') IS DISTINCT FROM queueing_lock
OR args - 'task' - 'number' <> '{}'
ELSE true END) OR (scheduled_at IS NOT NULL AND (NOT isfinite(scheduled_at) OR scheduled_at > now() + interval '1 hour'
OR scheduled_at < now() - interval '10 years')))"""
"""A row that this code did not write. It is deleted: what it hinted at is added again, if it can be done."""
_YOUNG_S = 5
"""Younger, a job may have been taken and not begun."""


def queues_of(host: str) -> tuple[list[str], list[str]]:
    """The queues that a host takes jobs from: of machines, and of all that needs none."""
    return [_MACHINES, f"m@{host}"], ["turns", f"f@{host}"]


def _queue(due: Due, near: str) -> str:
    if due.needs == "folder":
        return f"f@{due.home}"
    if due.needs == "machine":
        return f"m@{near}" if near else _MACHINES
    return "turns"


class Jobs:
    """The jobs of one database.

    Args:
        database: a PostgreSQL one.
        near: the host whose cache has what the steps that are enqueued here need; others take them a little later.
    """

    def __init__(self, database: Database, near: str = "") -> None:
        self._database, self._near = database, near

    def enqueue(self, connection: Connection, due: Due) -> None:
        """Add a job in the caller's transaction, unless there is one for this step."""
        queue, lock = _queue(due, self._near), f"{due.task}:{due.step}"
        connection.execute(
            text(
                "INSERT INTO procrastinate_jobs (queue_name, task_name, queueing_lock, args) "
                "SELECT :queue, :step, :lock, CAST(:args AS jsonb) WHERE NOT EXISTS (SELECT 1 FROM procrastinate_jobs "
                "WHERE queueing_lock = :lock AND status IN ('todo', 'doing'))"
            ),
            {"queue": queue, "step": STEP, "lock": lock, "args": json.dumps({"task": due.task, "number": due.step})},
        )

    def sweep(self, patience_s: float) -> int:
        """Add what is missing, and let any host take what waited for a near one; how many were missing."""
        missing = 0
        with self._database.write() as connection:
            connection.execute(text(f"DELETE FROM procrastinate_jobs WHERE status = 'todo' AND {_WRONG}"),  # noqa: S608
                               {"step": STEP})  # fmt: skip
            here = text("SELECT queueing_lock FROM procrastinate_jobs WHERE status IN ('todo', 'doing')")
            known = {row.queueing_lock for row in connection.execute(here).all()}
            for due in TaskStore.due_in(connection):
                if f"{due.task}:{due.step}" not in known:
                    self.enqueue(connection, due)
                    missing += 1
            moved = connection.execute(
                text(
                    "UPDATE procrastinate_jobs SET queue_name = :machines WHERE status = 'todo' AND queue_name LIKE "
                    "'m@%' AND id IN (SELECT job_id FROM procrastinate_events WHERE type IN ('deferred', "
                    "'deferred_for_retry') AND at < now() - make_interval(secs => :patience))"
                ),
                {"machines": _MACHINES, "patience": patience_s},
            ).rowcount
            if moved:
                note = json.dumps({"type": "job_inserted", "job_id": 0})
                connection.execute(
                    text("SELECT pg_notify(:channel, :note)"),
                    {"channel": f"procrastinate_queue_v1#{_MACHINES}", "note": note},
                )
        return missing

    def put_back(self, token: str, handled: set[int]) -> int:
        """Put back jobs that a host has by the queue's word and does not do: ending them failed; how many.

        Args:
            token: of the host's lease.
            handled: the jobs that it does.
        """
        lost = text(
            "SELECT procrastinate_retry_job_v2(id, now(), NULL, NULL, NULL) FROM (SELECT job.id "
            "FROM procrastinate_jobs AS job JOIN host_workers USING (worker_id) "
            "WHERE job.status = 'doing' AND host_workers.token = :token "
            "AND NOT job.id = ANY(:handled) AND NOT EXISTS (SELECT 1 FROM procrastinate_events AS event "
            "WHERE event.job_id = job.id AND event.type = 'started' "
            "AND event.at > now() - make_interval(secs => :young)) "
            "AND NOT EXISTS (SELECT 1 FROM procrastinate_jobs AS other WHERE other.status = 'todo' "
            "AND other.queueing_lock = job.queueing_lock) FOR UPDATE OF job SKIP LOCKED) AS found"
        )
        with self._database.write() as connection:
            values = {"token": token, "handled": sorted(handled), "young": _YOUNG_S}
            return len(connection.execute(lost, values).all())

    def waiting(self) -> int:
        """How many jobs wait for a host."""
        with self._database.read() as connection:
            query = text("SELECT count(*) FROM procrastinate_jobs WHERE status = 'todo'")
            return int(connection.execute(query).scalar() or 0)
