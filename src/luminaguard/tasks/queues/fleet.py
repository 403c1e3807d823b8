"""The queue of a fleet: procrastinate on PostgreSQL as the dispatcher, with what must stand around it.

* a fence: a job is ended or put back only by the worker that still has it;
* a lease for each host (:mod:`.lease`): whoever loses it kills its own machines, and writes nothing any more;
* a reaper that every worker runs: what dead hosts were at goes to whoever is there;
* a sweep: each step that can be done has a job, whatever was lost, and a job that somebody has is being done;
* a loop around it all: a database that was restarted, and a lost lease, are begun anew.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
from anyio.from_thread import BlockingPortal
from procrastinate import App, JobContext, PsycopgConnector, RetryDecision
from procrastinate.exceptions import ConnectorException, ProcrastinateException
from procrastinate.jobs import Job
from procrastinate.jobs import Status as JobStatus
from procrastinate.manager import JobManager
from procrastinate.retry import BaseRetryStrategy
from psycopg import Error as PsycopgError
from psycopg_pool import PoolTimeout
from sqlalchemy import Connection

from luminaguard import log
from luminaguard.errors import DatabaseUnreachable, LeaseLost, StorageError, TaskError
from luminaguard.storage import postgres
from luminaguard.storage.database import Database
from luminaguard.storage.hosts import Hosts
from luminaguard.storage.queue import FINISH, REGISTER, RETRY, STEP, Jobs, queues_of
from luminaguard.storage.tasks import Due, TaskStore
from luminaguard.tasks.queues.lease import Lease
from luminaguard.tasks.queues.port import Handler, Later

__all__ = ["FleetQueue"]

_SWEEP_S = 1.0
_PATIENCE_S = 1.0
_POLL_S = 1.0
_FOR_EVER_S = 10.0**6
_BROKEN = (ConnectorException, ProcrastinateException, PsycopgError, PoolTimeout, StorageError, OSError)


class FleetQueue:
    """One host's part in a fleet.

    Args:
        database: the fleet's.
        url: of the same database, for the queue's own connections.
        host: what this host is called; one worker of that name is alive at a time.
        store: the tasks.
        machines, turns: how many steps that need a machine, and others, are done at once.
        lease_s: how long a host that is silent still counts as alive.
        busy: how many machines run here.
        kill: ends all machines of this worker; called in a thread when the lease is lost.
        tell: told in a sentence how this host stands.
    """

    def __init__(
        self, database: Database, url: str, host: str, store: Callable[[], TaskStore], *, machines: int, turns: int,
        lease_s: float, busy: Callable[[], int], kill: Callable[[], None], tell: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._database, self._url, self._host, self._store = database, url, host, store
        self._machines, self._turns, self._lease_s = machines, turns, lease_s
        self._busy, self._kill, self._tell = busy, kill, tell
        self._told = ""
        self._jobs = Jobs(database, host)
        self._hosts: Hosts | None = None
        self._doing: dict[str, tuple[int, anyio.CancelScope]] = {}
        self._handled: set[int] = set()

    def guard(self, connection: Connection) -> None:
        """Refuse to write anything without a lease; see :meth:`Hosts.guard`."""
        if self._hosts is None:
            raise LeaseLost(f"The host {self._host!a} has no lease.", hint="It takes one as soon as it can.")
        self._hosts.guard(connection)

    def enqueue(self, connection: Connection, due: Due) -> None:
        """Add a job for a step, near what this host has in its cache."""
        self._jobs.enqueue(connection, due)

    async def run(self, handle: Handler) -> None:
        """Take part in the fleet until cancelled.

        Raises:
            TaskError: a worker of this name stays alive.
            StorageError: every role of the server may connect to the database.
        """
        logging.getLogger("procrastinate").setLevel(logging.CRITICAL)  # what matters of it is in our own log
        logging.getLogger("psycopg").setLevel(logging.CRITICAL)
        await anyio.to_thread.run_sync(self._refuse_open)
        while True:
            hosts = Hosts(self._database, self._host, secrets.token_hex(16), self._lease_s)
            try:
                await self._join(hosts)
                self._say(f"{self._host}: {self._machines} machines at once; waiting for tasks")
                await self._with_lease(hosts, handle)
            except _BROKEN as error:
                self._broken(error)
            except BaseExceptionGroup as group:
                broken, others = group.split(_BROKEN)
                self._broken(broken)
                if others is not None:
                    raise others from None
            finally:
                self._hosts = None
            await anyio.sleep(0.2 + random.random() * 0.5)  # noqa: S311  # not to come back all at once

    def _broken(self, error: BaseException | None) -> None:
        log.event("fleet.broken", host=self._host, error=repr(error)[:300])
        self._say(f"{self._host}: the database does not answer; it is tried again until it does")

    def _say(self, sentence: str) -> None:
        """Tell how this host stands, if it stands otherwise than before."""
        if sentence != self._told:
            self._tell(sentence)
        self._told = sentence

    def _refuse_open(self) -> None:
        with contextlib.suppress(DatabaseUnreachable), self._database.read() as connection:
            postgres.refuse_open(connection, self._database.name)

    async def _join(self, hosts: Hosts) -> None:
        """Take the lease; that of a worker of this name that was killed runs out first."""
        with anyio.move_on_after(self._lease_s * 1.5):
            while True:
                try:
                    await anyio.to_thread.run_sync(hosts.join, self._machines)
                    return
                except TaskError:
                    self._say(f"{self._host}: a worker of this name lives, or did a moment ago; waiting for its lease")
                    await anyio.sleep(self._lease_s / 20)
        await anyio.to_thread.run_sync(hosts.join, self._machines)

    async def _with_lease(self, hosts: Hosts, handle: Handler) -> None:
        """Work until the lease is lost or the queue ends; all that was begun has ended then."""
        async with BlockingPortal() as portal, anyio.create_task_group() as tasks:

            def lost() -> None:
                self._say(f"{self._host}: the lease was lost; its machines were ended")
                self._kill()  # first: the loop may be waiting for a database that does not answer
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    portal.start_task_soon(tasks.cancel_scope.cancel)

            self._hosts = hosts
            with Lease(hosts, self._lease_s, self._busy, lost):
                tasks.start_soon(self._look_after, hosts)
                try:
                    await self._workers(hosts, handle)
                finally:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                        await self._leave(hosts)
                tasks.cancel_scope.cancel()

    @staticmethod
    async def _leave(hosts: Hosts) -> None:
        try:
            await anyio.to_thread.run_sync(hosts.leave, abandon_on_cancel=True)
        except StorageError as error:
            log.event("fleet.not_left", error=error.message)  # then it runs out

    async def _workers(self, hosts: Hosts, handle: Handler) -> None:
        """Two workers of the queue: for what needs a machine, and for all else."""
        connector = PsycopgConnector(kwargs=postgres.conninfo(postgres.parse_url(self._url)), min_size=1, max_size=6,
                                     timeout=5)  # fmt: skip
        app = App(connector=connector)
        app.job_manager = _Fenced(connector, hosts.token)

        async def step(context: JobContext, /, task: object = None, number: object = None, **_: object) -> None:
            if isinstance(task, str) and isinstance(number, int):  # else somebody else wrote it, and it ends here
                await self._do(context.job, task, number, handle)

        app.task(name=STEP, pass_context=True, retry=_Again())(step)
        async with app.open_async(), anyio.create_task_group() as tasks:
            for queues, count in zip(queues_of(self._host), (self._machines, self._turns), strict=True):
                tasks.start_soon(self._worker, app, queues, count, tasks.cancel_scope)

    async def _worker(self, app: App, queues: list[str], count: int, scope: anyio.CancelScope) -> None:
        await app.run_worker_async(
            queues=queues, concurrency=count, fetch_job_polling_interval=_POLL_S, shutdown_graceful_timeout=0,
            install_signal_handlers=False, delete_jobs="always", update_heartbeat_interval=_FOR_EVER_S,
            stalled_worker_timeout=_FOR_EVER_S, listen_notify=True,
        )  # fmt: skip
        scope.cancel()  # it returns when its connection broke: all is begun anew

    async def _do(self, job: Job, task: str, number: int, handle: Handler) -> None:
        due = self._store().due_step(task, number)
        if due is None:  # it was done, or waits for somebody
            return
        assert job.id is not None
        self._handled.add(job.id)
        with anyio.CancelScope() as scope:
            self._doing[task] = (number, scope)
            try:
                await handle(due, job.attempts)
            finally:
                self._doing.pop(task, None)
                self._handled.discard(job.id)

    async def _look_after(self, hosts: Hosts) -> None:
        """Reap, sweep, put back what was lost, and stop what somebody else did or ended meanwhile."""
        while True:
            await self._tried(self._reap, hosts)
            await self._tried(self._jobs.sweep, _PATIENCE_S)
            await self._tried(self._jobs.put_back, hosts.token, set(self._handled))
            await self._tried(self._stop_what_is_done)
            await anyio.sleep(_SWEEP_S * (0.75 + random.random() / 2))  # noqa: S311  # not all at once

    @staticmethod
    async def _tried(function: Callable[..., object], *arguments: object) -> None:
        """Each by itself: what stops one must not stop the others."""
        try:
            await anyio.to_thread.run_sync(function, *arguments)
        except Exception as error:  # noqa: BLE001  # as the line above says
            log.event("fleet.not_looked_after", what=function.__name__, error=repr(error)[:300])

    def _reap(self, hosts: Hosts) -> None:
        for name in hosts.reap():
            log.event("fleet.host_died", host=name, found_by=self._host)

    def _stop_what_is_done(self) -> None:
        for task, (number, scope) in tuple(self._doing.items()):
            if self._store().step_of(task) != number:
                anyio.from_thread.run_sync(scope.cancel)


class _Again(BaseRetryStrategy):
    """A step that could not be done, or was interrupted, is tried again."""

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> RetryDecision:
        if isinstance(exception, Later):
            near = job.queue.startswith("m@") and exception.elsewhere
            return RetryDecision(retry_in={"milliseconds": int(exception.after_s * 1000)},
                                 queue="machines" if near else None)  # fmt: skip
        return RetryDecision(retry_in={"milliseconds": 500})


class _Fenced(JobManager):
    """Ends and puts back only what is still this worker's."""

    def __init__(self, connector: PsycopgConnector, token: str) -> None:
        super().__init__(connector)
        self._token = token

    async def register_worker(self) -> int:
        row = await self.connector.execute_query_one_async(query=REGISTER, token=self._token)
        return int(row["worker_id"])

    async def finish_job(self, job: Job, status: JobStatus, delete_job: bool) -> None:  # theirs
        del delete_job
        with _logged(job):
            await self.connector.execute_query_async(query=FINISH, status=status.value, **_mine(job))

    async def retry_job(self, job: Job, retry_at: Any = None, priority: Any = None, queue: Any = None,
                        lock: Any = None) -> None:  # fmt: skip
        del priority, lock
        with _logged(job):
            await self.connector.execute_query_async(query=RETRY, retry_at=retry_at, queue=queue, **_mine(job))


@contextlib.contextmanager
def _logged(job: Job) -> Iterator[None]:
    """Whoever calls this could do nothing about a failure; the look at what is not being done puts the job back."""
    try:
        yield
    except (ConnectorException, PsycopgError, PoolTimeout) as error:
        log.event("fleet.job_not_ended", job=job.id, error=repr(error)[:300])


def _mine(job: Job) -> dict[str, Any]:
    return {"job_id": job.id, "worker_id": job.worker_id, "attempts": job.attempts}
