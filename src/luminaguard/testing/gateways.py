"""The gateway as a program of its own, and the official client at it."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx2
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client

from luminaguard.testing.homes import Home
from mcp import Client, StdioServerParameters

__all__ = ["over_http", "over_stdio", "serving_gateway"]


@asynccontextmanager
async def over_stdio(home: Home, *words: str, era: Any = "auto", **options: Any) -> AsyncIterator[Client]:
    """A client at ``gateway --stdio``, which it starts."""
    argv = home.argv("gateway", "--stdio", *words)
    parameters = StdioServerParameters(command=argv[0], args=argv[1:], env=home.environment)
    async with Client(stdio_client(parameters), mode=era, read_timeout_seconds=60, **options) as client:
        yield client


@contextmanager
def serving_gateway(home: Home, *words: str) -> Iterator[str]:
    """``gateway --http`` on a free port; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = home.argv("gateway", "--http", f"127.0.0.1:{port}", *words)
    with subprocess.Popen(argv, env=home.environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            assert "MCP at" in said, said + process.stderr.read()
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@asynccontextmanager
async def over_http(url: str, token: str, era: Any = "auto", **options: Any) -> AsyncIterator[Client]:
    """A client at a gateway's address."""
    headers = {"authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60, trust_env=False) as http,
        Client(streamable_http_client(url, http_client=http), mode=era, **options) as client,
    ):
        yield client
