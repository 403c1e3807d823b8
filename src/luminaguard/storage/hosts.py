"""The hosts of a fleet: who is alive, by leases that the database's clock counts. PostgreSQL alone.

A worker renews its lease; whoever finds one that ran out marks it dead and gives its jobs to others. All that a
worker writes is written while its lease's row is locked for sharing: a host that was frozen and thawed, and whose
lease another one ended meanwhile, writes nothing any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

from luminaguard.errors import LeaseLost, SettingsError, TaskError
from luminaguard.storage.database import Database

__all__ = ["Host", "Hosts"]

_NOW = "(extract(epoch from clock_timestamp()) * 1000000000)::bigint"
_FRESH = (
    f"(hosts.beat_ns::numeric + least(hosts.lease_ns, 600000000000) >= {_NOW} "
    f"AND hosts.beat_ns <= {_NOW} + 60000000000)"
)
"""Whether a lease holds, whatever numbers stand there; one from the future, as after a change of servers, does not."""
_BILLION = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Host:
    """A host as the others see it.

    Attributes:
        slots, busy: machines that may run at once there, and that run.
        alive: whether its lease holds.
        silent_s: seconds since it renewed it.
    """

    name: str
    slots: int
    busy: int
    alive: bool
    silent_s: float


class Hosts:
    """The leases of one database."""

    def __init__(self, database: Database, name: str, token: str, lease_s: float) -> None:
        self._database = database
        self.name, self.token, self._lease_ns = name, token, int(lease_s * _BILLION)

    def join(self, slots: int) -> None:
        """Take the lease of this host.

        Raises:
            TaskError: a worker of this name is alive.
        """
        values = {"name": self.name, "token": self.token, "lease": self._lease_ns, "slots": slots}
        taken = text(
            f"INSERT INTO hosts (name, token, beat_ns, lease_ns, slots, busy, alive) "  # noqa: S608  # the clock's words
            f"VALUES (:name, :token, {_NOW}, :lease, :slots, 0, 1) ON CONFLICT (name) DO UPDATE SET token = :token, "
            f"beat_ns = {_NOW}, lease_ns = :lease, slots = :slots, busy = 0, alive = 1 "
            f"WHERE hosts.alive <> 1 OR NOT {_FRESH}"
        )
        with self._database.write(alone=False) as connection:
            if not connection.execute(taken, values).rowcount:
                raise TaskError(
                    f"A worker of the host {self.name!a} is alive, or was a moment ago.",
                    hint="Each host has one worker and a name of its own (host in luminaguard.toml); "
                    "a killed worker's lease runs out by itself.",
                )

    def beat(self, busy: int) -> bool:
        """Renew the lease; False if it was lost."""
        renewed = text(
            f"UPDATE hosts SET beat_ns = {_NOW}, busy = :busy "  # noqa: S608  # as above
            "WHERE name = :name AND token = :token AND alive = 1"
        )
        with self._database.write(alone=False) as connection:
            values = {"name": self.name, "token": self.token, "busy": busy}
            return connection.execute(renewed, values).rowcount == 1

    def guard(self, connection: Connection) -> None:
        """Hold the lease's row until the caller's transaction ends; raises LeaseLost."""
        mine = text("SELECT 1 FROM hosts WHERE name = :name AND token = :token AND alive = 1 FOR SHARE")
        if not connection.execute(mine, {"name": self.name, "token": self.token}).scalar():
            raise LeaseLost(
                f"The host {self.name!a} did not renew its lease in time: others do its work.",
                hint="The worker takes a new one by itself. If this comes often, look at the network, the load and "
                "lease_s.",
                kept="What was finished before is kept; this step was not saved.",
            )

    def leave(self) -> None:
        """Give the lease back."""
        with self._database.write(alone=False) as connection:
            connection.execute(text("UPDATE hosts SET alive = 0, busy = 0 WHERE name = :name AND token = :token"),
                               {"name": self.name, "token": self.token})  # fmt: skip

    def reap(self) -> list[str]:
        """Mark hosts dead whose leases ran out, and give their jobs to whoever is there; the hosts' names."""
        ended = text(
            "UPDATE hosts SET alive = 0, busy = 0 WHERE name IN (SELECT name FROM hosts "  # noqa: S608  # as above
            f"WHERE alive = 1 AND NOT {_FRESH} FOR UPDATE SKIP LOCKED) RETURNING name"
        )
        with self._database.write(alone=False) as connection:
            dead = [str(row.name) for row in connection.execute(ended).all()]
            # Jobs of workers that belong to no living lease; of one that waits already, the second is dropped.
            orphans = (
                "FROM procrastinate_jobs AS job WHERE job.status = 'doing' AND NOT EXISTS (SELECT 1 FROM host_workers "
                "JOIN hosts USING (token) WHERE host_workers.worker_id = job.worker_id AND hosts.alive = 1)"
            )
            connection.execute(text(
                f"DELETE FROM procrastinate_jobs WHERE id IN (SELECT id {orphans} AND EXISTS (SELECT 1 "  # noqa: S608
                "FROM procrastinate_jobs AS other WHERE other.status = 'todo' "
                "AND other.queueing_lock = job.queueing_lock) FOR UPDATE SKIP LOCKED)"
            ))  # fmt: skip
            connection.execute(text(
                f"SELECT procrastinate_retry_job_v2(id, now(), NULL, NULL, NULL) FROM (SELECT id {orphans} "  # noqa: S608
                "FOR UPDATE SKIP LOCKED) AS found"
            ))  # fmt: skip
            connection.execute(text(
                "DELETE FROM host_workers WHERE NOT EXISTS (SELECT 1 FROM procrastinate_workers "
                "WHERE procrastinate_workers.id = worker_id) OR NOT EXISTS (SELECT 1 FROM hosts "
                "WHERE hosts.token = host_workers.token)"
            ))  # fmt: skip
        return dead

    def all(self) -> list[Host]:
        """All hosts that ever were, by name."""
        query = text(f"SELECT *, {_NOW} AS now_ns, {_FRESH} AS fresh FROM hosts "  # noqa: S608  # as above
                     "WHERE slots > 0 ORDER BY name")  # fmt: skip
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [Host(row.name, row.slots, row.busy, row.alive == 1 and row.fresh,
                     (row.now_ns - row.beat_ns) / _BILLION) for row in rows]  # fmt: skip

    def claim_name(self, folder: str) -> None:
        """Let a state folder have this host's name, for good: what lies in its folders is its to publish and settle.

        Raises:
            SettingsError: another state folder has it.
        """
        taken = text(
            "INSERT INTO hosts (name, token, beat_ns, lease_ns, slots, busy, alive, folder) "
            "VALUES (:name, '', 0, 0, 0, 0, 0, :folder) ON CONFLICT (name) DO UPDATE SET folder = :folder "
            "WHERE hosts.folder = ''"
        )
        with self._database.write(alone=False) as connection:
            mine = text("SELECT folder FROM hosts WHERE name = :name")
            found = connection.execute(mine, {"name": self.name}).scalar()
            if not found:
                connection.execute(taken, {"name": self.name, "folder": folder})
                found = connection.execute(mine, {"name": self.name}).scalar()
        if found != folder:
            raise SettingsError(
                f"The name {self.name!a} is that of another state folder of this fleet.",
                hint="Give this one a name of its own: host in luminaguard.toml, or LUMINAGUARD_HOST.",
            )
