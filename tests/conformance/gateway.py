"""The gateway in front of one server, for the conformance suite, which sends no token: it is added here.

gateway.py URL    of a server; prints where the gateway is, and serves until it is ended
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import anyio

from luminaguard.mcp.gateway.alone import make_server_alone
from luminaguard.runtime import Runtime
from luminaguard.runtime.gateway import Gateway
from luminaguard.runtime.gateway.alone import Alone
from luminaguard.service.gateway import gateway_app
from luminaguard.service.server import Server
from luminaguard.settings import Folders, load_settings
from luminaguard.storage.clients import Clients

SETTINGS = """
[mcp_servers.fixtures]
url = "{url}"

[policy]
trusted_servers = ["fixtures"]

[[policy.rules]]
name = "fixtures"
risk = "GREEN"
reason = "The fixtures of the conformance suite do no harm."
when = {{ effect = "call", server = "fixtures" }}
"""


class WithToken:
    """An ASGI application around the gateway's: each request bears a token."""

    def __init__(self, inner: Any, token: str) -> None:
        self._inner, self._header = inner, (b"authorization", f"Bearer {token}".encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            scope = scope | {"headers": [*scope["headers"], self._header]}
        await self._inner(scope, receive, send)


async def main(url: str, home: Path) -> None:
    """Serve until the process is ended."""
    os.environ["LUMINAGUARD_HOME"] = str(home)
    folders = Folders.from_environment().ensure()
    (folders.config / "luminaguard.toml").write_text(SETTINGS.format(url=url))
    runtime = Runtime(load_settings(folders), folders)
    async with Gateway.open(runtime, None) as gateway, Alone.serving(gateway, runtime, "fixtures") as alone:
        protocol = await make_server_alone(alone)
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        app = WithToken(gateway_app(runtime, gateway, address, server=protocol), Clients(folders.state).renew("suite"))
        server = Server(app, address, None, None, lifespan="on")
        await server.serve_at(lambda: print(f"http://{address}/mcp", flush=True))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        anyio.run(main, sys.argv[1], Path(folder))
