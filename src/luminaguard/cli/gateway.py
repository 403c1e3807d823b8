"""``luminaguard gateway``: LuminaGuard as an MCP server for other programs."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luminaguard.cli import signals
from luminaguard.cli.common import open_runtime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from anyio import Event
    from mcp.server.lowlevel import Server

    from luminaguard.runtime import Runtime
    from luminaguard.runtime.gateway import Gateway

__all__ = ["gateway_app"]

_MOST_CONNECTIONS = 512

gateway_app = typer.Typer(help="LuminaGuard as an MCP server for other programs.", rich_markup_mode=None,
                          invoke_without_command=True)  # fmt: skip


@gateway_app.callback()
def gateway(
    context: typer.Context,
    stdio: Annotated[bool, typer.Option("--stdio", help="Speak on standard input and output.")] = False,
    http: Annotated[str, typer.Option("--http", metavar="ADDRESS:PORT", help="Listen; each client needs a token.")]
    = "",
    workspace: Annotated[
        Path | None, typer.Option("--workspace", "-w", metavar="DIR", help="Offer tools for this folder, too.")
    ] = None,
    server: Annotated[str, typer.Option("--server", metavar="SERVER", help="This server alone, under its own names, "
                                        "with its resources, prompts and questions.")] = "",
    certificate: Annotated[Path | None, typer.Option("--certificate", metavar="PEM")] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="PEM")] = None,
    host: Annotated[list[str] | None, typer.Option("--host", metavar="NAME[:PORT]", help="What clients call it, "
                                                   "beside its address; may be repeated.")] = None,
) -> None:  # fmt: skip
    """Serve all configured servers, and the tools of a folder, to another program."""
    from luminaguard.errors import SettingsError

    if context.invoked_subcommand is not None:
        return
    if stdio == bool(http):
        raise SettingsError("One of --stdio and --http is needed.", hint="For example: luminaguard gateway --stdio")
    if server and workspace is not None:
        raise SettingsError("A server alone comes without the tools of a folder.", hint="Leave --workspace away.")
    if stdio:
        _run(workspace, server, _serve_stdio)
        return

    async def serve(runtime: Runtime, gateway: Gateway, protocol: Server[Any], stop: Event) -> None:
        import anyio

        from luminaguard.service.gateway import gateway_app as build
        from luminaguard.service.server import Server as HttpServer

        app = build(runtime, gateway, http, hosts=tuple(host or ()), server=protocol)
        listener = HttpServer(app, http, certificate, key, lifespan="on", most=_MOST_CONNECTIONS)
        where = f"{'https' if certificate else 'http'}://{http}/mcp"

        async def end() -> None:
            await stop.wait()
            listener.should_exit = True

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end)
            await listener.serve_at(lambda: _tell(f"MCP at {where} (Ctrl-C ends it)"))
            tasks.cancel_scope.cancel()

    _run(workspace, server, serve)


@gateway_app.command("token")
def gateway_token(
    client: Annotated[str, typer.Argument(metavar="CLIENT")],
    revoke: Annotated[bool, typer.Option("--revoke", help="End the client's token.")] = False,
) -> None:
    """Make a token for a client, and print it once; an older one of the same client ends."""
    from luminaguard.errors import SettingsError
    from luminaguard.storage.clients import Clients

    runtime = open_runtime()
    clients = Clients(runtime.folders.state)
    if not revoke:
        token = clients.renew(client)
        runtime.ledger.append("gateway.token", client=client)
        print(token)
    elif clients.revoke(client):
        runtime.ledger.append("gateway.revoked", client=client)
    else:
        raise SettingsError(f"{client[:40]!a} has no token.", hint=f"Who has one: {', '.join(clients.names())}.")


@gateway_app.command("install")
def gateway_install(
    host: Annotated[str, typer.Argument(metavar="HOST", help="claude-code, cursor or vscode.")],
    project: Annotated[Path | None, typer.Option("--project", metavar="DIR", help="For this project alone.")] = None,
    workspace: Annotated[Path | None, typer.Option("--workspace", "-w", metavar="DIR", help="Offer tools for this "
                                                   "folder, too.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Write without being asked.")] = False,
) -> None:  # fmt: skip
    """Show what would be written into another program's settings, and write it if you say so."""
    from luminaguard.cli.paths import absolute
    from luminaguard.effects.text import visible
    from luminaguard.errors import Forbidden
    from luminaguard.runtime.gateway.hosts import plan_install

    words = ["--workspace", str(absolute(workspace))] if workspace is not None else []
    change = plan_install(host, Path.home(), project.absolute() if project else None, words)
    lines = change.diff()
    if not lines:
        print("nothing to change")
        return
    print("\n".join(map(visible, lines)))
    if not yes and not (sys.stdin.isatty() and input("write this? [y/N] ").strip().lower() == "y"):
        raise Forbidden("Nothing was written.", hint="'--yes' writes it without a terminal.")
    change.write()
    print(f"written: {change.path}")


async def _serve_stdio(_runtime: Runtime, _gateway: Gateway, server: Server[Any], stop: Event) -> None:
    import anyio

    from luminaguard.mcp.gateway.stdio import stdio_streams

    async with anyio.create_task_group() as tasks:

        async def end() -> None:
            await stop.wait()
            tasks.cancel_scope.cancel()

        tasks.start_soon(end)
        async with stdio_streams() as (reads, writes):
            await server.run(reads, writes, server.create_initialization_options())
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def _protocol(runtime: Runtime, gateway: Gateway, server: str) -> AsyncIterator[Server[Any]]:
    """What speaks the protocol: of all servers, or of one alone."""
    from luminaguard.mcp.gateway import make_server
    from luminaguard.mcp.gateway.alone import make_server_alone
    from luminaguard.runtime.gateway.alone import Alone

    if not server:
        yield make_server(gateway)
        return
    async with Alone.serving(gateway, runtime, server) as alone:
        yield await make_server_alone(alone)


def _run(
    workspace: Path | None, server: str, serve: Callable[[Any, Gateway, Server[Any], Event], Awaitable[None]]
) -> None:
    import anyio

    from luminaguard.cli.paths import absolute
    from luminaguard.errors import first_of
    from luminaguard.runtime.gateway import Gateway

    with signals.held() as held:
        runtime = open_runtime()
        folder = absolute(workspace) if workspace is not None else None

        async def run() -> None:
            stop = anyio.Event()
            async with anyio.create_task_group() as tasks:

                async def until_signal() -> None:
                    await held.ending()
                    stop.set()

                tasks.start_soon(until_signal)
                async with (
                    Gateway.open(runtime, folder) as gateway,
                    _protocol(runtime, gateway, server) as protocol,
                ):
                    await serve(runtime, gateway, protocol, stop)
                tasks.cancel_scope.cancel()

        try:
            anyio.run(run)
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        signals.over()
        held.take()


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
