"""MCP over standard input and output, measured: our client beside the bare SDK's, on the host and with a machine."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
from mcp.client.stdio import stdio_client

from luminaguard.runtime import Runtime
from luminaguard.runtime.mcp import McpServers
from luminaguard.settings import Folders, load_settings
from luminaguard.testing import Home
from mcp import Client, StdioServerParameters

__all__ = ["measure"]

_SERVER = """
import json, sys, time
TOOL = {"name": "spent", "description": "Its processor time.", "inputSchema": {"type": "object"}}
for line in sys.stdin:
    said = json.loads(line)
    if "id" not in said:
        continue
    about = {"name": "b", "version": "1"}
    answer = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": about}
    if said["method"] == "tools/list":
        answer = {"tools": [TOOL]}
    elif said["method"] == "tools/call":
        answer = {"content": [{"type": "text", "text": repr(time.process_time())}]}
    elif said["method"] != "initialize":
        print(json.dumps({"jsonrpc": "2.0", "id": said["id"], "error": {"code": -32601, "message": "no"}}), flush=True)
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": said["id"], "result": answer}), flush=True)
"""
_LAYER = "0" * 64
Call = Callable[[], Awaitable[Any]]


def measure(home: Home, folder: Path, *, calls: int) -> dict[str, Any]:
    """Milliseconds of each path, with and without the server's own processor time; and of listing a server's tools.

    Args:
        home: whose image and template are ready.
        folder: for the server.
        calls: how many of each.
    """
    folder.mkdir()
    (folder / "server.py").write_text(_SERVER)
    config = home.folder / "config"
    config.mkdir(mode=0o700, exist_ok=True)
    (config / "luminaguard.toml").write_text(
        f'[mcp_servers.host]\ncommand = ["{sys.executable}", "server.py"]\nfolder = "{folder}"\nisolation = "none"\n'
        f'[mcp_servers.machine]\ncommand = ["python3", "server.py"]\nfolder = "{folder}"\n'
        f'[mcp_servers.known]\ncommand = ["x"]\nlayer = "{_LAYER}"\n'
    )
    found = anyio.run(_paths, home, folder, calls)
    for name in ("host", "machine"):
        one, bare = found[name], found["sdk"]
        found[f"{name}_to_sdk"] = round(one["p50_ms"] / bare["p50_ms"], 2)
        rest, bare_rest = (kind["p50_ms"] - kind["server_cpu_ms"] for kind in (one, bare))
        found[f"{name}_to_sdk_without_the_server"] = round(rest / bare_rest, 2)
    laps = []
    for _ in range(9):
        start = time.perf_counter()
        told = home.run("mcp", "tools", "known", "--json")
        laps.append((time.perf_counter() - start) * 1e3)
        assert told.code == 0, told.err
    return found | {"goal_host_to_sdk": 1.3, "goal_machine_to_sdk": 3.0, "mcp_tools_ms": round(statistics.median(laps)),
                    "goal_mcp_tools_ms": 400}  # fmt: skip


async def _paths(home: Home, folder: Path, calls: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    parameters = StdioServerParameters(command=sys.executable, args=["server.py"], cwd=folder)
    async with Client(stdio_client(parameters), mode="legacy") as client:
        found["sdk"] = await _laps(lambda: client.session.call_tool("spent", {}), calls)
    folders = Folders(*(home.folder / name for name in ("config", "state", "cache", "run"))).ensure()
    with closing(Runtime(load_settings(folders), folders)) as runtime:
        servers = McpServers(runtime)
        servers.check("known", {"spent": json.loads('{"name": "spent", "inputSchema": {"type": "object"}}')})
        for name in ("host", "machine"):
            async with servers.open(name) as opened:
                session = opened.session
                found[name] = await _laps(lambda session=session: session.call_whole("spent", {}), calls)
    return found


async def _laps(call: Call, calls: int) -> dict[str, float]:
    for _ in range(20):
        await call()
    laps, before = [], float((await call()).content[0].text)
    for _ in range(calls):
        start = time.perf_counter()
        last = await call()
        laps.append((time.perf_counter() - start) * 1e3)
    laps.sort()
    cpu_ms = (float(last.content[0].text) - before) * 1e3 / calls
    return {"p50_ms": round(laps[len(laps) // 2], 2), "p99_ms": round(laps[int(len(laps) * 0.99)], 2),
            "server_cpu_ms": round(cpu_ms, 2)}  # fmt: skip
