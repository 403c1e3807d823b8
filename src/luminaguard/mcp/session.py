"""One session with a server: the official SDK speaks the protocol, over whatever carries its lines.

Every fault of a server becomes an error of the call that met it, within the call's deadline.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from mcp import Client, MCPError
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter
from pydantic import ValidationError

from luminaguard import log
from luminaguard.errors import LuminaGuardError, McpServerFailed, first_of
from luminaguard.mcp.definitions import Definition
from luminaguard.mcp.lines import Lines

__all__ = ["Pipe", "Result", "Session", "open_session"]

_PROBE_S = 10.0
"""The SDK asks servers of the new era first, and waits so long for those that say nothing to that."""
_MOST_TOOLS = 1000
_MOST_DEFINITION = 256 << 10
_MOST_TEXT = 4 << 20


class Pipe:
    """Carries lines between the SDK and a server that somebody else runs."""

    def __init__(self) -> None:
        self._lines = Lines()
        self.to_server, self._from_sdk = anyio.create_memory_object_stream[SessionMessage](0)
        self._to_sdk, self.from_server = anyio.create_memory_object_stream[SessionMessage | Exception](64)
        self.failure: LuminaGuardError | None = None

    async def take(self, data: bytes) -> None:
        """What the server printed; what is no message of the protocol is left out, as the protocol says."""
        try:
            lines = self._lines.feed(data)
        except McpServerFailed as error:
            self.ended(error)
            return
        for line in lines:
            try:
                message = SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
            except (ValidationError, RecursionError):
                log.event("mcp.not_a_message", bytes=len(line))
                continue
            try:
                await self._to_sdk.send(message)
            except (anyio.ClosedResourceError, anyio.BrokenResourceError):
                return

    async def given(self) -> AsyncIterator[bytes]:
        """What is to be written to the server."""
        async with self._from_sdk:
            async for message in self._from_sdk:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                yield text.encode() + b"\n"

    def ended(self, failure: LuminaGuardError | None = None) -> None:
        """The server is gone; whoever waits for it is told."""
        self.failure = self.failure or failure
        self._to_sdk.close()

    def close(self) -> None:
        """Nobody talks any more."""
        for stream in (self.to_server, self._from_sdk, self._to_sdk, self.from_server):
            stream.close()


@dataclass(frozen=True, slots=True)
class Result:
    """What a tool gave.

    Attributes:
        text: its texts, one after another, not longer than a few MiB.
        structured: what it gave as JSON; None if it did not.
        failed: the tool says that it could not.
    """

    text: str
    structured: Any = None
    failed: bool = False


@dataclass(slots=True)
class Session:
    """A server that answers."""

    name: str
    client: Client
    pipe: Pipe
    timeout_s: float

    async def list_tools(self) -> dict[str, Definition]:
        """What the server says of its tools now, by name.

        Raises:
            McpServerFailed: it does not answer in time, or says what cannot be.
        """
        found: dict[str, Definition] = {}
        cursor: str | None = None
        with self.failures(), anyio.fail_after(self.timeout_s):
            while True:
                page = await self.client.list_tools(cursor=cursor)
                for tool in page.tools:
                    definition = tool.model_dump(mode="json", by_alias=True, exclude_none=True)
                    if (
                        tool.name in found
                        or len(found) >= _MOST_TOOLS
                        or len(json.dumps(definition)) > _MOST_DEFINITION
                    ):
                        raise self.failed("its tools are too many, too large, or bear the same name")
                    found[tool.name] = definition
                cursor = page.next_cursor
                if not cursor:
                    break
        return found

    async def call(self, tool: str, arguments: dict[str, Any]) -> Result:
        """Call a tool.

        Raises:
            McpServerFailed: it does not answer in time, refuses, or says what cannot be. It may have done it.
        """
        with self.failures(), anyio.fail_after(self.timeout_s):
            answer = await self.client.call_tool(tool, arguments)
        texts = [part.text for part in answer.content if part.type == "text"]
        others = [f"[{part.type}, not shown]" for part in answer.content if part.type != "text"]
        text = "\n".join((*texts, *others))
        if len(text) > _MOST_TEXT:
            raise self.failed(f"its answer has {len(text):,} characters")
        return Result(text, answer.structured_content, bool(answer.is_error))

    def failures(self) -> _Failures:
        """Turns what comes of a server in a block into one error."""
        return _Failures(self)

    def failed(self, why: str) -> McpServerFailed:
        """An error of this server."""
        return McpServerFailed(
            f"The server {self.name!a} failed: {why}.", hint=f"See 'luminaguard mcp tools {self.name}'."
        )


class _Failures:
    """Turns whatever a server makes of a call into one error."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        session = self._session
        if isinstance(error, TimeoutError):
            raise session.failed(f"no answer within {session.timeout_s:g} s") from error
        if isinstance(error, MCPError):
            if session.pipe.failure is not None:
                raise session.pipe.failure from error
            raise session.failed(f"{ascii(error.message[:500])[1:-1]} ({error.code})") from error
        if isinstance(error, ValidationError | RuntimeError | ValueError):
            raise session.failed(f"what it says cannot be: {ascii(str(error)[:300])[1:-1]}") from error


@asynccontextmanager
async def open_session(name: str, pipe: Pipe, timeout_s: float) -> AsyncIterator[Session]:
    """Speak with a server through a pipe, for as long as this context lasts.

    Raises:
        McpServerFailed: it does not begin to speak in time.
    """

    @asynccontextmanager
    async def transport() -> AsyncIterator[Any]:
        yield pipe.from_server, pipe.to_server

    session = Session(name, Client(transport(), read_timeout_seconds=timeout_s), pipe, timeout_s)
    begun, late = anyio.Event(), False

    async def deadline(scope: anyio.CancelScope) -> None:
        nonlocal late
        with anyio.move_on_after(timeout_s + _PROBE_S):
            await begun.wait()
            return
        late = True
        scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(deadline, tasks.cancel_scope)
            async with session.client:
                begun.set()
                yield session
    except BaseExceptionGroup as group:
        error = first_of(group)
        if not begun.is_set():
            with session.failures():
                raise error from None
        raise error from None
    if late:
        raise session.failed(f"it did not begin to speak within {timeout_s:g} s")
