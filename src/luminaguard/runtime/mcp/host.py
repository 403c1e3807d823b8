"""One server on this machine, without a machine of its own: only where the settings say ``isolation = "none"``.

It runs with the user's rights. What it does cannot be seen or taken back, so each call of it is asked for as one of
a server elsewhere; ``doctor`` and every card say so.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import anyio.abc

from luminaguard.errors import McpServerFailed, first_of
from luminaguard.runtime.mcp.folders import folder_of
from luminaguard.runtime.mcp.machine import Ended, last_words

if TYPE_CHECKING:
    from luminaguard.mcp.session import Peer, Session
    from luminaguard.runtime.core import Runtime
    from luminaguard.settings import StdioServer

__all__ = ["open_on_host"]

_KEPT = ("HOME", "LANG", "LC_ALL", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "USER")
"""Of our environment; all else may hold secrets."""
_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--no-new-privs", "--")
"""However this process ends, the server does."""
_MOST_SAID = 64 << 10
_END_S = 2.0


@asynccontextmanager
async def open_on_host(
    runtime: Runtime, name: str, server: StdioServer, ended: Ended, peer: Peer | None = None
) -> AsyncIterator[Session]:
    """Run a server on this machine, for as long as this context lasts.

    Raises:
        McpServerFailed: it cannot be started, ends, or does not begin to speak.
    """
    from luminaguard.mcp.pipe import Pipe
    from luminaguard.mcp.session import NOBODY, open_session

    pipe, said = Pipe(), bytearray()
    ended.is_gone = lambda: pipe.gone
    environment = {key: os.environ[key] for key in _KEPT if key in os.environ} | server.environment
    try:
        process = await anyio.open_process(
            [*_WITH_US, *server.command], cwd=folder_of(runtime, name, server), env=environment,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise McpServerFailed(
            f"The server {name!a} could not be started ({error.strerror}).", hint="Check its command and folder."
        ) from error

    async def listen() -> None:
        assert process.stdout is not None
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                await pipe.take(await process.stdout.receive())
        code = await process.wait()
        pipe.ended(McpServerFailed(f"The server {name!a} ended with status {code}.", hint=last_words(said)))

    async def hear() -> None:
        assert process.stderr is not None
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                said.extend(await process.stderr.receive())
                del said[:-_MOST_SAID]

    async def speak() -> None:
        assert process.stdin is not None
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for line in pipe.given():
                await process.stdin.send(line)
        await process.stdin.aclose()

    try:
        async with process, anyio.create_task_group() as tasks:
            for work in (listen, hear, speak):
                tasks.start_soon(work)
            try:
                async with open_session(
                    name, pipe.transport(), pipe.explain, server.timeout_s, peer or NOBODY
                ) as session:
                    yield session
            finally:
                pipe.to_server.close()  # end of file, upon which a server ends
                with anyio.CancelScope(shield=True):
                    await _end(process)
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_of(group) from None
    finally:
        pipe.close()


async def _end(process: anyio.abc.Process) -> None:
    """Let it end, then make it, with all that it started."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        with anyio.move_on_after(_END_S):
            await process.wait()
            break
    with suppress(ProcessLookupError):  # what it left behind in its group
        os.killpg(process.pid, signal.SIGKILL)
