"""MCP, measured: our client beside the bare SDK, the gateway's hop, and what balancing does under faults."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx2
from mcp.client.streamable_http import streamable_http_client

from luminaguard.errors import MaybeExecuted, McpServerFailed
from luminaguard.mcp.balancing import Balancer, Chosen
from luminaguard.mcp.http.session import HttpSession, open_http
from luminaguard.settings import HttpServer
from luminaguard.testing import Home
from luminaguard.testing.mcp_lab import Fault, LabServer, serve_lab
from mcp import Client

__all__ = ["measure"]

_PARALLEL = 16
_LAB = """
import sys, anyio
from luminaguard.testing.mcp_lab import LabServer, serve_lab
async def main():
    server = LabServer()
    async with serve_lab(server):
        print(server.url, flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""
Call = Callable[[], Awaitable[object]]


def measure(folder: Path, *, calls: int) -> dict[str, Any]:
    """Milliseconds and calls a second of each path, and what came of calls under faults.

    Args:
        folder: for homes.
        calls: how many of each.
    """
    found: dict[str, Any] = {"balancer_us": _decisions(max(calls, 2000))}
    with _lab() as url:
        found |= anyio.run(_paths, folder, url, calls)
    found["one_of_three_killed"] = anyio.run(_killed, 10 * calls)
    found["a_third_refused"] = anyio.run(_refused, 2 * calls)
    return found


@contextmanager
def _lab() -> Iterator[str]:
    """A server in a process of its own; its address."""
    with subprocess.Popen([sys.executable, "-c", _LAB], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


async def _laps(call: Call, calls: int) -> dict[str, float]:
    for _ in range(20):
        await call()
    laps = []
    for _ in range(calls):
        start = time.perf_counter()
        await call()
        laps.append((time.perf_counter() - start) * 1e3)
    laps.sort()

    async def many() -> None:
        for _ in range(calls // _PARALLEL):
            await call()

    start = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(_PARALLEL):
            tasks.start_soon(many)
    rate = calls // _PARALLEL * _PARALLEL / (time.perf_counter() - start)
    return {"p50_ms": round(laps[len(laps) // 2], 2), "p99_ms": round(laps[int(len(laps) * 0.99)], 2),
            "calls_per_s_at_16": round(rate)}  # fmt: skip


async def _paths(folder: Path, url: str, calls: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with Client(url) as client:
        found["sdk"] = await _laps(lambda: client.call_tool("look", {"key": "a"}), calls)
    async with open_http("lab", HttpServer(url=url), {}) as http:
        found["client"] = await _laps(lambda: http.session.call_whole("look", {"key": "a"}), calls)
    async with _gateway(folder, url) as client:
        assert not (await client.call_tool("lab__look", {"key": "a"})).is_error
        found["gateway"] = await _laps(lambda: client.call_tool("lab__look", {"key": "a"}), calls)
    ratio = found["client"]["p50_ms"] / found["sdk"]["p50_ms"]
    hop = found["gateway"]["p50_ms"] - found["sdk"]["p50_ms"]
    return found | {"client_to_sdk": round(ratio, 2), "goal_client_to_sdk": 1.15, "gateway_hop_ms": round(hop, 2),
                    "goal_gateway_hop_ms": 5.0, "goal_gateway_calls_per_s": 180}  # fmt: skip


@asynccontextmanager
async def _gateway(folder: Path, url: str) -> Any:
    """A client of a gateway before the server, which is trusted; its tool is green."""
    home = Home(folder / "gateway-home")
    config = home.folder / "config"
    config.mkdir(mode=0o700)
    (config / "luminaguard.toml").write_text(
        f'[policy]\ntrusted_servers = ["lab"]\n[mcp_servers.lab]\nurl = "{url}"\n[gateway]\nper_minute = 10000000\n'
    )
    token = home.run("gateway", "token", "bench").out.strip()
    argv = home.argv("gateway", "--http", "127.0.0.1:17717")
    with subprocess.Popen(  # noqa: ASYNC220  # it is begun before anything is measured
        argv, env=home.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            process.stderr.readline()
            async with (
                httpx2.AsyncClient(headers={"authorization": f"Bearer {token}"}, timeout=60, trust_env=False) as http,
                Client(streamable_http_client("http://127.0.0.1:17717/mcp", http_client=http)) as client,
            ):
                yield client
        finally:
            process.terminate()


def _decisions(count: int) -> dict[str, float]:
    """Microseconds of one choice and its record, with three endpoints."""
    balancer = Balancer(random.Random(1))  # no secret
    balancer.set_endpoints({"a": 1.0, "b": 1.0, "c": 1.0}, 0.0)
    start, now = time.perf_counter(), 0.0
    for _ in range(count):
        now += 0.001
        chosen = balancer.choose(now)
        assert isinstance(chosen, Chosen)
        balancer.succeeded(balancer.begin(chosen.name, now), now + 0.0005)
    each_us = (time.perf_counter() - start) / count * 1e6
    served = [one.served for one in balancer.endpoints.values()]
    return {"each": round(each_us, 1), "goal": 100.0,
            "spread_percent": round((max(served) - min(served)) / (count / 3) * 100, 1)}  # fmt: skip


async def _killed(calls: int) -> dict[str, Any]:
    """Three endpoints at full load, and one of them is killed after a third of the calls."""
    servers = [LabServer(takes_s=0.002) for _ in range(3)]
    ends: Counter[str] = Counter()
    started = 0

    async def caller(http: HttpSession) -> None:
        nonlocal started
        while started < calls:
            started += 1
            if started == calls // 3:
                servers[0].kill()
            await _one(http, str(started), ends)

    async with serve_lab(*servers), _opened(servers) as http, anyio.create_task_group() as tasks:
        for _ in range(_PARALLEL):
            tasks.start_soon(caller, http)
    twice = sum(count > 1 for count in sum((server.executed for server in servers), Counter()).values())
    share = round(100 * ends["ok"] / ends.total(), 2)
    return dict(ends) | {"calls": ends.total(), "ok_percent": share, "goal_ok_percent": 99.0, "executed_twice": twice}


async def _refused(calls: int) -> dict[str, Any]:
    """Of all answers of three endpoints, 30 % are a 503."""
    chance = random.Random(1)  # no secret

    def plan(message: dict[str, Any]) -> Fault | None:
        refuses = message["method"] == "tools/call" and chance.random() < 0.3
        return Fault("status", executed=False, status=503) if refuses else None

    servers = [LabServer(plan=plan) for _ in range(3)]
    ends: Counter[str] = Counter()
    async with serve_lab(*servers), _opened(servers) as http:
        for number in range(calls):
            await _one(http, str(number), ends)
        retries = http.transport.balancer.retries.spent
    share = round(100 * ends["ok"] / ends.total(), 2)
    return dict(ends) | {"ok_percent": share, "goal_ok_percent": 99.5, "retries_per_call": round(retries / calls, 2)}


@asynccontextmanager
async def _opened(servers: list[LabServer]) -> Any:
    settings = HttpServer(url=tuple(server.url for server in servers), check_s=0, timeout_s=10)
    async with open_http("lab", settings, {}) as http:
        yield http


async def _one(http: HttpSession, key: str, ends: Counter[str]) -> None:
    try:
        await http.session.call("add", {"key": key})
        ends["ok"] += 1
    except MaybeExecuted:
        ends["maybe_executed"] += 1
    except McpServerFailed:
        ends["not_executed"] += 1
