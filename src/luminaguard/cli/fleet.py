"""``luminaguard worker``, ``hosts`` and ``database``: one host's part in a fleet, and what all of it shares."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luminaguard.cli import signals
from luminaguard.cli.common import Json, open_runtime
from luminaguard.errors import SettingsError

if TYPE_CHECKING:
    from luminaguard.runtime import Runtime

__all__ = ["database_app", "hosts", "worker"]

database_app = typer.Typer(help="The database that a fleet shares.", no_args_is_help=True, rich_markup_mode=None)


def worker(
    slots: Annotated[int | None, typer.Option("--slots", help="How many machines run at once.", min=1)] = None,
) -> None:
    """Do the steps of all tasks that can be done on this host, until interrupted."""
    import anyio

    from luminaguard.runtime.worker import Worker

    with signals.held() as held:
        runtime = open_runtime(slots=slots)
        work = Worker(runtime, _tell)

        async def run() -> None:
            async with anyio.create_task_group() as tasks:

                async def until_signal() -> None:
                    while await held.next() not in signals.ENDING:
                        pass
                    tasks.cancel_scope.cancel()

                tasks.start_soon(until_signal)
                await work.run()

        try:
            anyio.run(run)
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        signals.over()
        held.take()
        _tell("ended; what was begun goes on at its last finished step")


def _tell(sentence: str) -> None:
    from luminaguard.effects.text import visible

    sys.stderr.write(f"{visible(sentence)}\n")
    sys.stderr.flush()


def hosts(as_json: Json = False) -> None:
    """Show the hosts of the fleet, their slots, and what waits for them."""
    from luminaguard.cli.output import print_json
    from luminaguard.storage.hosts import Hosts
    from luminaguard.storage.queue import Jobs

    runtime = open_runtime(as_json=as_json)
    _in_a_fleet(runtime)
    database = runtime.ledger.database
    found, waiting = Hosts(database, runtime.host, "", runtime.settings.lease_s).all(), Jobs(database).waiting()
    if as_json:
        rows: list[dict[str, Any]] = [
            {"host": one.name, "slots": one.slots, "busy": one.busy, "alive": one.alive,
             "silent_s": round(one.silent_s, 1)} for one in found]  # fmt: skip
        print_json({"hosts": rows, "waiting": waiting})
        return
    for one in found:
        stands = "alive" if one.alive else "gone"
        print(f"{one.name:36}  {stands:5}  {one.busy} of {one.slots} machines  heard {one.silent_s:.0f} s ago")
    print(f"{waiting} steps wait for a host" if found else "no host was ever there: start 'luminaguard worker' on one")


def _in_a_fleet(runtime: Runtime) -> None:
    if not runtime.host:
        raise SettingsError(
            "There is no fleet here: no database is shared.",
            hint="Set LUMINAGUARD_DATABASE_URL to the URL of a PostgreSQL database.",
        )


@database_app.command("upgrade")
def database_upgrade(
    role: Annotated[str, typer.Option("--role", help="A role that workers use; it gets no right on tables.")] = "",
    as_json: Json = False,
) -> None:
    """Create or upgrade the tables in PostgreSQL, as the database's owner, and let nobody else connect."""
    from luminaguard.cli.output import print_json
    from luminaguard.storage.database import Database
    from luminaguard.storage.schema import REVISIONS

    runtime = open_runtime(as_json=as_json)
    _in_a_fleet(runtime)
    database = Database.upgrade(runtime.settings.database_url, role=role)
    database.close()
    if as_json:
        print_json({"database": database.name, "revision": REVISIONS[-1], "role": role or None})
    else:
        print(f"{database.name} has the tables of revision {REVISIONS[-1]}; nobody but its owner"
              + (f" and {role}" if role else "") + " may connect")  # fmt: skip
