"""One server in a machine with copies of its folders; what it changed is asked for when it has ended."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from luminaguard.errors import LuminaGuardError, McpServerFailed, first_of
from luminaguard.runtime.mcp.folders import folder_of

if TYPE_CHECKING:
    from luminaguard.mcp.session import Peer, Session
    from luminaguard.microvm.channel import Call
    from luminaguard.runtime.core import Runtime
    from luminaguard.runtime.rehearsal import Execution
    from luminaguard.settings import StdioServer

__all__ = ["Ended", "last_words", "open_in_machine"]

_MOST_SAID = 64 << 10
_END_S = 2.0


class Ended:
    """What the machine did, once it has ended."""

    def __init__(self) -> None:
        self.execution: Execution | None = None
        self.is_gone: Callable[[], bool] = lambda: False
        """Whether the server has ended by itself."""
        self.follow: Callable[[frozenset[str]], None] = lambda _: None
        """Takes the labels of what the machine is given."""


@asynccontextmanager
async def open_in_machine(
    runtime: Runtime, name: str, server: StdioServer, ended: Ended, peer: Peer | None = None
) -> AsyncIterator[Session]:
    """Run a server in a machine, for as long as this context lasts; its effects wait afterwards.

    Raises:
        McpServerFailed: it ends, or does not begin to speak.
        LuminaGuardError: what :meth:`Runtime.exec` raises.
    """
    from luminaguard.mcp.pipe import Pipe
    from luminaguard.mcp.session import NOBODY, open_session
    from luminaguard.microvm.channel import CallFailed
    from luminaguard.microvm.machine import Command
    from luminaguard.runtime.mcp.egress import Egress, environment

    pipe, said = Pipe(), bytearray()
    ended.is_gone = lambda: pipe.gone
    settings = runtime.settings

    async def output(stream: int, data: bytes) -> None:
        if stream == 1:
            await pipe.take(data)
        else:
            said.extend(data)
            del said[:-_MOST_SAID]

    async def feed(call: Call) -> None:
        async for line in pipe.given():
            await call.write(line)
        await call.write_eof()
        await anyio.sleep(_END_S)
        await call.signal(signal.SIGTERM)  # many servers have a timer or a socket that keeps them

    failure: list[LuminaGuardError] = []
    begun, done = False, anyio.Event()

    async def work() -> None:
        egress = Egress(runtime, name, server) if server.network == "rules" else None
        ended.follow = egress.follow if egress else ended.follow
        command = Command(server.command, processes=settings.processes, profile=settings.profile,
                          environment=(environment() if egress else {}) | server.environment)  # fmt: skip
        try:
            execution = await runtime.exec(
                folder_of(runtime, name, server),
                command,
                output=output,
                feed=feed,
                layer=server.layer,
                outside=egress.way if egress else None,
                beside=server.folders,
            )
        except CallFailed as error:
            failure.append(McpServerFailed(f"The server {name!a} could not be started ({error.code}).",
                                           hint="Check its command; see 'luminaguard exec'."))  # fmt: skip
        except LuminaGuardError as error:
            failure.append(error)
        else:
            if begun:
                ended.execution = execution
            code = execution.outcome.exit_code
            failure.append(McpServerFailed(f"The server {name!a} ended with status {code}.", hint=last_words(said)))
        pipe.ended(failure[0])
        done.set()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            try:
                async with open_session(
                    name, pipe.transport(), pipe.explain, server.timeout_s, peer or NOBODY
                ) as session:
                    begun = True
                    yield session
            finally:
                pipe.to_server.close()  # end of file, upon which a server ends
                with anyio.CancelScope(shield=True), anyio.move_on_after(2 * _END_S):
                    await done.wait()
                if not done.is_set():
                    failure.append(McpServerFailed(
                        f"The server {name!a} did not end: its machine was destroyed.",
                        hint="A server ends when its standard input does, or upon SIGTERM.",
                        kept="Nothing that it changed was kept.",
                    ))  # fmt: skip
                    tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_of(group) from None
    finally:
        pipe.close()
    if begun and ended.execution is None and failure:
        raise failure[0]


def last_words(said: bytearray) -> str:
    """The last line that a server printed on standard error."""
    lines = said.decode("utf-8", "replace").strip().splitlines()
    last = ascii(lines[-1])[1:-1][:300] if lines else ""
    return f"It said last: {last}" if last else "It said nothing on standard error."
