"""``luminaguard worker``, ``hosts`` and ``database``: one host's part in a fleet, and what all of it shares."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luminaguard.cli import signals
from luminaguard.cli.common import Json, open_runtime
from luminaguard.errors import SettingsError

if TYPE_CHECKING:
    from luminaguard.cli.remote import Service
    from luminaguard.cli.signals import Held
    from luminaguard.runtime import Runtime
    from luminaguard.runtime.worker import Worker

__all__ = ["database_app", "hosts", "remote_app", "serve", "worker"]

_PATIENCE_S = 15.0
database_app = typer.Typer(help="The database that a fleet shares.", no_args_is_help=True, rich_markup_mode=None)


remote_app = typer.Typer(help="Requests of a fleet, through its service, with your own key.", no_args_is_help=True,
                         rich_markup_mode=None)  # fmt: skip
RequestId = Annotated[str, typer.Argument(metavar="ID")]
As = Annotated[str, typer.Option("--as", metavar="NAME", help="Your name as an approver; asks for your passphrase.")]
Url = Annotated[str | None, typer.Option("--service", metavar="URL", help="https://HOST:PORT")]
Authority = Annotated[
    str | None, typer.Option("--authority", metavar="FILE", help="The authority of its certificate, in PEM.")
]
Reason = Annotated[str, typer.Option("--reason", help="What the agent gets to read.")]


def serve(
    listen: Annotated[str, typer.Option("--listen", metavar="ADDRESS:PORT")] = "127.0.0.1:8443",
    certificate: Annotated[Path | None, typer.Option("--certificate", metavar="FILE", help="PEM.")] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="PEM.")] = None,
) -> None:
    """Let approvers look at requests and answer them over HTTPS, with their own keys, until interrupted."""
    import anyio

    from luminaguard.errors import first_of
    from luminaguard.service.app import build
    from luminaguard.service.server import Server

    with signals.held() as held:
        runtime = open_runtime()
        _ = runtime.approvals
        server = Server(build(runtime), listen, certificate, key)

        async def run() -> None:
            async with anyio.create_task_group() as tasks:

                async def until_signal() -> None:
                    await held.ending()
                    server.should_exit = True

                tasks.start_soon(until_signal)
                where = f"{'https' if certificate else 'http'}://{listen}"
                await server.serve_at(lambda: _tell(f"approvers may ask at {where} (Ctrl-C ends it)"))
                tasks.cancel_scope.cancel()

        try:
            anyio.run(run)
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        signals.over()
        held.take()


@remote_app.command("list")
def remote_list(
    person: As, everything: Annotated[bool, typer.Option("--all", help="Those that were decided, too.")] = False,
    service: Url = None, authority: Authority = None, as_json: Json = False,
) -> None:  # fmt: skip
    """List the requests that wait for a decision."""
    from luminaguard.cli import remote

    remote.show_list(_service(person, service, authority, as_json=as_json), everything=everything, as_json=as_json)


@remote_app.command("show")
def remote_show(
    request_id: RequestId, person: As, full: Annotated[bool, typer.Option("--full", help="Whole diffs.")] = False,
    service: Url = None, authority: Authority = None,
) -> None:  # fmt: skip
    """Show the card of a request."""
    from luminaguard.cli import remote

    remote.show_one(_service(person, service, authority), request_id, full=full)


@remote_app.command("approve")
def remote_approve(
    request_id: RequestId, person: As,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="PATH", help="This path alone; may be repeated.")]
    = None,
    digest: Annotated[str, typer.Option("--digest", help="Of what you saw: approve that, without being asked.")] = "",
    service: Url = None, authority: Authority = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Show a request and approve it, if you say so; the host that has the folder publishes it."""
    from luminaguard.approvals import State, Verdict
    from luminaguard.cli import remote
    from luminaguard.errors import EXIT_PENDING

    desk = _service(person, service, authority, as_json=as_json)
    part = tuple(only) if only else None
    after = remote.answer(desk, request_id, Verdict.APPROVE, "", part, digest=digest, as_json=as_json)
    if after.state is State.PENDING:
        sys.exit(EXIT_PENDING)


@remote_app.command("deny")
def remote_deny(
    request_id: RequestId, person: As, reason: Reason = "", service: Url = None, authority: Authority = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Deny a request; its changes are discarded."""
    _answer("deny", request_id, person, reason, service, authority, as_json=as_json)


@remote_app.command("return")
def remote_return(
    request_id: RequestId, person: As, reason: Reason = "", service: Url = None, authority: Authority = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Ask for changes: nothing is published, and the agent reads what should be different."""
    _answer("ask for changes", request_id, person, reason, service, authority, as_json=as_json)


@remote_app.command("stop")
def remote_stop(
    request_id: RequestId, person: As, reason: Reason = "", service: Url = None, authority: Authority = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Deny a request and stop its task."""
    _answer("stop the task", request_id, person, reason, service, authority, as_json=as_json)


def _answer(
    verdict: str, request_id: str, person: str, reason: str, url: str | None, authority: str | None, *, as_json: bool
) -> None:
    from luminaguard.approvals import Verdict
    from luminaguard.cli import remote

    desk = _service(person, url, authority, as_json=as_json)
    remote.answer(desk, request_id, Verdict(verdict), reason, None, as_json=as_json)


def _service(person: str, url: str | None, authority: str | None, *, as_json: bool = False) -> Service:
    """The service, with the approver's key, which lies on this machine and nowhere else."""
    from luminaguard.cli.approvals import passphrase
    from luminaguard.cli.remote import Service

    runtime = open_runtime(as_json=as_json, service_url=url, service_authority=authority)
    s = runtime.settings
    if not s.service_url:
        raise SettingsError("No service is named.", hint="Give --service URL, or set service_url.")
    key = runtime.approvers.unlock(person, passphrase(f"Passphrase of {person}: "))
    return Service(s.service_url, s.service_authority, person, key)


def worker(
    slots: Annotated[int | None, typer.Option("--slots", help="How many machines run at once.", min=1)] = None,
) -> None:
    """Do the steps of all tasks that can be done on this host, until interrupted."""
    import anyio

    from luminaguard.errors import first_of
    from luminaguard.runtime.worker import Worker

    with signals.held() as held:
        runtime = open_runtime(slots=slots)
        work = Worker(runtime, _tell)
        _end_anyway(held, work)

        async def run() -> None:
            async with anyio.create_task_group() as tasks:

                async def until_signal() -> None:
                    await held.ending()
                    tasks.cancel_scope.cancel()

                tasks.start_soon(until_signal)
                await work.run()

        try:
            anyio.run(run)
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        signals.over()
        held.take()
        _tell("ended; what was begun goes on at its last finished step")


def _end_anyway(held: Held, work: Worker) -> None:
    """See to it that a worker ends when it is told to: a database that stands still would hold it up for ever."""
    import threading
    import time

    def watch() -> None:
        while not held.told:
            time.sleep(0.5)
        time.sleep(_PATIENCE_S)
        work.kill_machines()  # all that was finished is kept
        os._exit(0)

    threading.Thread(target=watch, name="end-anyway", daemon=True).start()


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
    print(
        f"{waiting} {'step waits' if waiting == 1 else 'steps wait'} for a host"
        if found
        else "no host was ever there: start 'luminaguard worker' on one"
    )


def _in_a_fleet(runtime: Runtime) -> None:
    if not runtime.host:
        raise SettingsError(
            "There is no fleet here: no database is shared.",
            hint="Set LUMINAGUARD_DATABASE_URL to the URL of a PostgreSQL database.",
        )


@database_app.command("upgrade")
def database_upgrade(
    role: Annotated[
        str, typer.Option("--role", help="A role for workers: it may read and write the tables, and change none.")
    ] = "",
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
    keys = runtime.folders.state / "keys"
    _ = runtime.ledger, runtime.approvers.owner()  # made now, so that they can be copied to the other hosts
    if as_json:
        print_json({"database": database.name, "revision": REVISIONS[-1], "role": role or None})
    else:
        print(f"{database.name} has the tables of revision {REVISIONS[-1]}; nobody but its owner"
              + (f" and {role}" if role else "") + " may connect\n"
              f"the fleet's keys: copy ledger.key, approver.key and approvers (if there is one) from {keys} "
              "to the other hosts")  # fmt: skip
