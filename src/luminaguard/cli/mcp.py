"""``luminaguard mcp``: servers of tools in machines of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luminaguard.cli import signals
from luminaguard.cli.common import Json, open_runtime

if TYPE_CHECKING:
    from luminaguard.cli.questions import Questions
    from luminaguard.images.layers.store import Source
    from luminaguard.mcp.definitions import Comparison, Definition
    from luminaguard.runtime.core import Runtime
    from luminaguard.runtime.mcp import McpServers, Opened

__all__ = ["mcp_app"]

mcp_app = typer.Typer(help="MCP servers, each in a machine of its own.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="SERVER")]


@mcp_app.command("list")
def mcp_list(as_json: Json = False) -> None:
    """List the configured servers."""
    from luminaguard.cli.output import print_json
    from luminaguard.effects.text import visible
    from luminaguard.settings import StdioServer

    runtime = open_runtime(as_json=as_json)
    servers = runtime.settings.mcp_servers
    if as_json:
        print_json({"servers": {name: server.model_dump(mode="json") for name, server in servers.items()}})
        return
    for name, server in servers.items():
        if isinstance(server, StdioServer):
            place = "ON THIS MACHINE, without isolation" if server.isolation == "none" else "in a machine"
            more = ", may ask for the network" if server.network == "rules" else ""
            folders = [str(server.folder or "with a folder of its own"), *map(str, server.folders.values())]
            where = f"{place}{more}, {', '.join(folders)}: {' '.join(server.command)}"
            if server.layer:
                where = f"{_layer_name(runtime, server.layer)} {where}"
        else:
            where = " ".join(server.urls)
        print(f"{name:16}  {visible(where)}")
    if not servers:
        print("no servers; see: luminaguard mcp add --help")


def _layer_name(runtime: Runtime, layer: str) -> str:
    from luminaguard.errors import LuminaGuardError

    try:
        return runtime.layers.load(layer).name
    except LuminaGuardError:
        return f"(its layer {layer[:12]} is missing)"


@mcp_app.command("add")
def mcp_add(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    command: Annotated[list[str] | None, typer.Argument(metavar="-- COMMAND...", help="What is run in a machine.")]
    = None,
    *,
    url: Annotated[list[str] | None, typer.Option("--url", help="A server elsewhere; may be repeated for endpoints "
                                                  "that do the same.")] = None,
    folder: Annotated[list[Path] | None, typer.Option("--folder", metavar="DIR", help="The command begins in a copy of "
                                                      "it; of several, each lies there under its name.")] = None,
    oauth: Annotated[bool, typer.Option("--oauth", help="It wants a login: luminaguard mcp login.")] = False,
    header: Annotated[list[str] | None, typer.Option("--header", metavar="NAME=VARIABLE", help="A header, and the "
                                                     "environment variable that has its value.")] = None,
    network: Annotated[bool, typer.Option("--network", help="Its programs may reach by HTTP what the rules let, and "
                                          "ask for the rest.")] = False,
    variable: Annotated[list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="A variable of the command; "
                                                       "nothing secret. May be repeated.")] = None,
    npm: Annotated[str, typer.Option("--npm", metavar="PACKAGE", help="Build a layer with this package of npm; "
                                     "-- ARGUMENTS are the server's.")] = "",
    pypi: Annotated[str, typer.Option("--pypi", metavar="PACKAGE", help="Build a layer with this package of PyPI; "
                                      "-- ARGUMENTS are the server's.")] = "",
    also: Annotated[list[str] | None, typer.Option("--with", metavar="PACKAGE", help="Another package or requirement "
                                                   "that must hold; may be repeated.")] = None,
) -> None:  # fmt: skip
    """Write a server into luminaguard.toml."""
    from luminaguard.cli.paths import absolute
    from luminaguard.errors import SettingsError
    from luminaguard.runtime.mcp.setup import add_server, check_new

    package = npm or pypi
    if url and (folder or network or variable):
        raise SettingsError("A server elsewhere has no folder, network or variables here.", hint="Leave them away.")
    if bool(url) + bool(package) + bool(command and not package) != 1 or (npm and pypi) or (also and not package):
        raise SettingsError("A server has one of --url, --npm, --pypi, or a command.",
                            hint="luminaguard mcp add notes --folder DIR -- python3 server.py")  # fmt: skip
    settings: dict[str, Any] = {}
    if url:
        settings["url"] = url[0] if len(url) == 1 else url
        if oauth:
            settings["oauth"] = True
        if header:
            settings["headers"] = dict(one.partition("=")[::2] for one in header)
    else:
        settings["command"] = command or [package]
        settings |= _folders([absolute(one) for one in folder or ()])
        if network:
            settings["network"] = "rules"
        if variable:
            settings["environment"] = dict(one.partition("=")[::2] for one in variable)
    runtime = open_runtime()
    check_new(runtime.settings, name)
    if package:
        settings |= _layer(runtime, "npm" if npm else "pypi", package, tuple(also or ()), command or [])
    add_server(runtime.folders.config, runtime.settings, name, settings)
    print(f"added {name}; see its tools: luminaguard mcp tools {name}")


def _folders(given: list[Path]) -> dict[str, Any]:
    """How the folders of a server are written: one that it begins in, or several by their names."""
    from luminaguard.errors import SettingsError

    if len(given) < 2:
        return {"folder": str(given[0])} if given else {}
    named = {folder.name: str(folder) for folder in given}
    if len(named) < len(given):
        raise SettingsError("Two of the folders have the same name.",
                            hint='Name them by hand: folders = { NAME = "DIR" } in luminaguard.toml.')  # fmt: skip
    return {"folders": named}


def _layer(
    runtime: Runtime, source: Source, package: str, also: tuple[str, ...], arguments: list[str]
) -> dict[str, Any]:
    """Build a layer, and say how its server is started."""
    from luminaguard.cli.output import Progress
    from luminaguard.errors import SettingsError
    from luminaguard.images.layers.build import build_layer

    progress = Progress()
    try:
        layer = build_layer(runtime.layers, runtime.images.current(), runtime.images.packages, source, package, also,
                            progress)  # fmt: skip
    finally:
        progress.clear()
    programs = layer.manifest.programs
    print(f"{layer.name}: {layer.manifest.packages} packages, {layer.manifest.parts['layer.squashfs'].size >> 20} MiB")
    if arguments and arguments[0] in programs:
        return {"command": arguments, "layer": layer.folder.name}
    if len(programs) != 1:
        raise SettingsError(f"{package} has several programs: {', '.join(programs)}.",
                            hint="Name one: -- PROGRAM ARGUMENTS.")  # fmt: skip
    return {"command": [programs[0], *arguments], "layer": layer.folder.name}


@mcp_app.command("audit")
def mcp_audit(
    server: Name,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build it again from its lock, and compare.")] = False,
    as_json: Json = False,
) -> None:
    """Look at the layer of a server from npm or PyPI as an auditor would."""
    from luminaguard.cli.audit import audit_layer

    raise typer.Exit(audit_layer(open_runtime(as_json=as_json), server, rebuild=rebuild, as_json=as_json))


@mcp_app.command("login")
def mcp_login(
    server: Name, logout: Annotated[bool, typer.Option("--logout", help="Forget what it gave.")] = False,
) -> None:  # fmt: skip
    """Log in at a server that has oauth = true, with the browser of this machine."""
    import anyio.to_thread

    from luminaguard.runtime.mcp import McpServers
    from luminaguard.runtime.mcp.login import Tokens

    with signals.held() as held:
        runtime = open_runtime()
        if logout:
            print("forgotten" if Tokens(runtime.folders.state, server).forget() else "there was nothing")
            return

        async def show(url: str) -> None:
            import webbrowser

            sys.stderr.write(f"log in here: {url}\n")
            sys.stderr.flush()
            await anyio.to_thread.run_sync(webbrowser.open, url)

        count = signals.interruptible(held, lambda: McpServers(runtime).login(server, show))
        signals.over()
        held.take()
    print(f"logged in at {server}; it offers {count} tools")


@mcp_app.command("remove")
def mcp_remove(server: Name) -> None:
    """Take a server out of luminaguard.toml; what was accepted of its tools stays on record."""
    from luminaguard.runtime.mcp.setup import remove_server
    from luminaguard.settings import load_settings

    runtime = open_runtime()
    remove_server(runtime.folders.config, server)
    servers = load_settings(runtime.folders).mcp_servers.values()
    runtime.layers.collect({getattr(one, "layer", "") for one in servers})
    print(f"removed {server}")


@mcp_app.command("import")
def mcp_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="With mcpServers, as other hosts write it.")],
    folder: Annotated[Path | None, typer.Option("--folder", metavar="DIR", help="Servers that are run get a copy of "
                                                "it.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Take over the servers of another host's file; it stays as it is."""
    from luminaguard.cli.output import print_json
    from luminaguard.cli.paths import absolute
    from luminaguard.effects.text import visible
    from luminaguard.errors import SettingsError
    from luminaguard.runtime.mcp.setup import add_server, read_other
    from luminaguard.settings import load_settings

    runtime = open_runtime(as_json=as_json)
    told = []
    for one in read_other(file, absolute(folder) if folder else None):
        notes = list(one.notes)
        added = False
        if one.settings is not None:
            try:
                add_server(runtime.folders.config, load_settings(runtime.folders), one.name, one.settings)
                added = True
            except SettingsError as error:
                notes.append(error.message)
        told.append({"name": one.name, "added": added, "notes": notes})
        if not as_json:
            print(f"{'added' if added else 'left out'}  {one.name}{''.join(f'; {visible(note)}' for note in notes)}")
    if as_json:
        print_json({"servers": told})


@mcp_app.command("status")
def mcp_status(
    server: Annotated[str, typer.Argument(metavar="[SERVER]")] = "", as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
) -> None:  # fmt: skip
    """Ask each endpoint of the servers over HTTP for its tools, and tell what it is worth."""
    import anyio

    from luminaguard.cli.machines import watch as again
    from luminaguard.cli.output import print_json
    from luminaguard.effects.text import visible
    from luminaguard.runtime.mcp import McpServers

    runtime = open_runtime(as_json=as_json)
    servers = McpServers(runtime)
    names = [server] if server else list(runtime.settings.mcp_servers)
    for name in names:
        servers.settings(name)

    def draw() -> None:
        found = anyio.run(servers.status, names)
        if as_json:
            print_json({"servers": found})
            return
        for name, one in found.items():
            print(f"{name}: {visible(one['state'])}")
            for row in one["endpoints"]:
                print(f"  {visible(row['endpoint']):50}  {row['health']:9}  {visible(row['different'])}")
        if not found:
            print("no servers; see: luminaguard mcp add --help")

    if watch:
        again(draw, as_json=as_json)
    else:
        draw()


@mcp_app.command("test")
def mcp_test(
    server: Annotated[str, typer.Argument(metavar="[SERVER]")] = "", as_json: Json = False,
) -> None:  # fmt: skip
    """Begin each server, or one: does it speak, and are its tools what was accepted? Nothing is accepted by this."""
    from luminaguard.cli.output import print_json
    from luminaguard.effects.text import visible
    from luminaguard.errors import EXIT_REFUSED
    from luminaguard.runtime.mcp import McpServers

    with signals.held() as held:
        runtime = open_runtime(as_json=as_json)
        servers = McpServers(runtime)
        names = [server] if server else list(runtime.settings.mcp_servers)
        for name in names:
            servers.settings(name)
        found: list[dict[str, Any]] = []

        async def work() -> None:
            for name in names:
                found.append(await servers.test(name))
                if not as_json:
                    row = found[-1]
                    print(f"{'ok  ' if row['ok'] else 'FAIL'}  {name:16}  {visible(row['detail'])}", flush=True)

        signals.interruptible(held, work)
        signals.over()
        held.take()
    if as_json:
        print_json({"servers": found})
    elif not names:
        print("no servers; see: luminaguard mcp add --help")
    sys.exit(0 if all(row["ok"] for row in found) else EXIT_REFUSED)


@mcp_app.command("tools")
def mcp_tools(
    server: Name,
    now: Annotated[bool, typer.Option("--now", help="Ask the server itself, even if its layer is locked.")] = False,
    as_json: Json = False,
) -> None:
    """List a server's tools as it describes them now; of one in a layer that was used before, without starting it."""
    from luminaguard.runtime.mcp import McpServers

    async def work(servers: McpServers, opened: Opened) -> None:
        tools = await opened.session.list_tools()
        _list_tools(server, tools, servers.check(server, tools), as_json=as_json)

    if not now and (known := McpServers(open_runtime(as_json=as_json)).cached(server)) is not None:
        from luminaguard.mcp.definitions import compare

        _list_tools(server, known, compare(known, known), as_json=as_json)
        return
    _with(server, work, as_json=as_json, quiet=True)


def _list_tools(server: str, tools: Mapping[str, Definition], found: Comparison, *, as_json: bool) -> None:
    from luminaguard.cli.output import print_json
    from luminaguard.effects.text import visible

    if as_json:
        print_json({"server": server, "tools": list(tools.values()), "quarantined": list(found.quarantined),
                    "gone": list(found.gone)})  # fmt: skip
        return
    width = max((len(visible(name)) for name in (*tools, *found.gone)), default=0)
    for name, tool in tools.items():
        state = "QUARANTINED" if name in found.quarantined else "accepted"
        lines = visible(str(tool.get("description", ""))).splitlines() or [""]
        print(f"{visible(name):{width}}  {state:11}  {lines[0][:100]}")
    for name in found.gone:
        print(f"{visible(name):{width}}  gone")


@mcp_app.command("call")
def mcp_call(
    server: Name, tool: Annotated[str, typer.Argument(metavar="TOOL")],
    arguments: Annotated[str, typer.Argument(metavar="JSON", help="An object; - is standard input.")] = "{}",
    as_json: Json = False,
) -> None:  # fmt: skip
    """Call a tool; what the server changes in its folder waits for your approval."""
    from luminaguard.cli.questions import Questions, at_a_terminal
    from luminaguard.effects.text import visible_text

    given = _arguments(arguments)
    told: dict[str, Any] = {}
    asks = Questions(server) if at_a_terminal() and not as_json else None

    async def work(servers: McpServers, opened: Opened) -> None:
        if asks is None:
            answer = await servers.call(opened, tool, given)
        else:
            answer = await asks.call(servers, opened, tool, given)
        result = opened.session.in_words(answer)
        told.update({"text": result.text, "structured": result.structured, "failed": result.failed})
        if not as_json:
            print(visible_text(result.text))

    _with(server, work, as_json=as_json, told=told, asks=asks)


@mcp_app.command("accept")
def mcp_accept(
    server: Name, yes: Annotated[bool, typer.Option("--yes", help="Accept without being asked.")] = False,
) -> None:  # fmt: skip
    """Show what changed in a server's tools since you accepted them, and accept them as they are now."""
    import anyio.to_thread

    from luminaguard.effects.text import visible
    from luminaguard.errors import Forbidden
    from luminaguard.mcp.definitions import difference

    async def work(servers: McpServers, opened: Opened) -> None:
        now = await opened.session.list_tools()
        found, before = servers.check(server, now), servers.pinned(server) or {}
        if not found.quarantined and not found.gone:
            print("nothing changed")
            return
        for name in (*found.quarantined, *found.gone):
            print("\n".join(map(visible, difference(name, before.get(name), now.get(name)))))
        if not yes and not (sys.stdin.isatty() and await anyio.to_thread.run_sync(_asked)):
            raise Forbidden("The definitions were not accepted.", hint="'--yes' accepts them without a terminal.",
                            kept="What was accepted before still holds.")  # fmt: skip
        servers.accept(server, now)
        print(f"accepted {len(now)} tools of {server}")

    _with(server, work, as_json=False, quiet=True)


def _asked() -> bool:
    return input("accept these definitions? [y/N] ").strip().lower() == "y"


def _arguments(text: str) -> dict[str, Any]:
    from luminaguard.errors import SettingsError

    raw = sys.stdin.read(8 << 20) if text == "-" else text
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SettingsError("The arguments are no JSON object.", hint='For example: \'{"path": "a.txt"}\'')
    return found


def _with(
    server: str, work: Callable[[McpServers, Opened], Awaitable[None]], *, as_json: bool,
    told: dict[str, Any] | None = None, quiet: bool = False, asks: Questions | None = None,
) -> None:  # fmt: skip
    """Do something with a server; then tell what it changed in a machine, which waits."""
    from luminaguard.effects.text import visible
    from luminaguard.errors import EXIT_PENDING
    from luminaguard.runtime.mcp import McpServers

    with signals.held() as held:
        runtime = open_runtime(as_json=as_json)

        async def run() -> list[str]:
            peer = asks.peer() if asks is not None else None
            async with (servers := McpServers(runtime)).open(server, peer) as opened:
                await work(servers, opened)
            if opened.execution is not None and opened.execution.refusal is not None:
                sys.stderr.write(f"note: not kept: {visible(opened.execution.detail)}\n")
            return [request.id for request in opened.requests]

        waiting = signals.interruptible(held, run)
        signals.over()
        held.take()
    _tell(waiting, told, as_json=as_json and not quiet)
    failed = bool(told and told.get("failed"))
    sys.exit(EXIT_PENDING if waiting else 1 if failed else 0)


def _tell(waiting: list[str], told: dict[str, Any] | None, *, as_json: bool) -> None:
    from luminaguard.cli.output import print_json

    if as_json:
        print_json((told or {}) | {"request_id": waiting[0] if waiting else None, "request_ids": waiting})
        return
    for request_id in waiting:
        sys.stderr.write(f"it changed files; nothing of it is published before you approve: {request_id}\n"
                         f"  look at it: luminaguard approvals show {request_id}\n")  # fmt: skip
