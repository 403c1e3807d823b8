"""One session with a server: the official SDK speaks the protocol, over whatever carries its lines.

Every fault of a server becomes an error of the call that met it, within the call's deadline.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from mcp_types import CallToolResult
from pydantic import ValidationError

from luminaguard.errors import LuminaGuardError, McpServerFailed, first_of
from luminaguard.mcp.definitions import Definition
from mcp import Client, MCPError

__all__ = ["Result", "Session", "open_session"]

_PROBE_S = 10.0
"""The SDK asks servers of the new era first, and waits so long for those that say nothing to that."""
_MOST_TOOLS = 1000
_MOST_DEFINITION = 256 << 10
_MOST_TEXT = 4 << 20


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
    explain: Callable[[MCPError], LuminaGuardError | None]
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
        """Call a tool, for people; see :meth:`call_whole`."""
        return self.in_words(await self.call_whole(tool, arguments))

    async def call_whole(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        """Call a tool.

        Raises:
            McpServerFailed: it does not answer in time, refuses, or says what cannot be. It may have done it.
        """
        with self.failures(), anyio.fail_after(self.timeout_s):
            return await self.client.call_tool(tool, arguments)

    def in_words(self, answer: CallToolResult) -> Result:
        """What a tool gave, as text; raises McpServerFailed if it is too long."""
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
            if (known := session.explain(error)) is not None:
                raise known from error
            raise session.failed(f"{ascii(error.message[:500])[1:-1]} ({error.code})") from error
        if isinstance(error, ValidationError | RuntimeError | ValueError):
            raise session.failed(f"what it says cannot be: {ascii(str(error)[:300])[1:-1]}") from error


@asynccontextmanager
async def open_session(
    name: str, transport: AbstractAsyncContextManager[Any], explain: Callable[[MCPError], LuminaGuardError | None],
    timeout_s: float,
) -> AsyncIterator[Session]:  # fmt: skip
    """Speak with a server, for as long as this context lasts.

    Args:
        name: what people call it.
        transport: gives the SDK what it reads from, and what it writes to.
        explain: what is known of an error beside what it says.
        timeout_s: how long the server may take to begin, and for each answer.

    Raises:
        McpServerFailed: it does not begin to speak in time.
    """
    session = Session(name, Client(transport, read_timeout_seconds=timeout_s), explain, timeout_s)
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
