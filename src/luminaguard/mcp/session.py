"""One session with a server: the official SDK speaks the protocol, over whatever carries its lines.

Every fault of a server becomes an error of the call that met it, within the call's deadline.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from mcp.client.session import ElicitationFnT, ListRootsFnT, LoggingFnT, MessageHandlerFnT, SamplingFnT
from mcp.shared.dispatcher import ProgressFnT
from mcp_types import (
    HEADER_MISMATCH,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    UNSUPPORTED_PROTOCOL_VERSION,
    CallToolResult,
    InputRequiredResult,
    InputResponses,
    RequestParamsMeta,
)
from pydantic import ValidationError

from luminaguard.errors import (
    LuminaGuardError,
    MaybeExecuted,
    McpServerFailed,
    NotExecuted,
    SessionLost,
    first_of,
)
from luminaguard.mcp.definitions import Definition
from mcp import Client, MCPError

__all__ = ["NOBODY", "More", "Peer", "Result", "Session", "check_sendable", "open_session"]

# What the SDK warns of are texts of servers, which are no texts for a terminal.
for _name in ("mcp", "httpx2", "httpcore2"):
    logging.getLogger(_name).addHandler(logging.NullHandler())
    logging.getLogger(_name).propagate = False
_PROBE_S = 2.0
"""Servers are first asked as ones of the new era, and get so long to say something to that."""
_REFUSALS = frozenset({METHOD_NOT_FOUND, INVALID_PARAMS, INVALID_REQUEST, HEADER_MISMATCH,
                       MISSING_REQUIRED_CLIENT_CAPABILITY, UNSUPPORTED_PROTOCOL_VERSION})  # fmt: skip
"""With these a server says that it did not do what it was asked for."""
_MOST_TOOLS = 1000
_MOST_DEFINITION = 256 << 10
_MOST_ARGUMENTS = 4 << 20
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


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom a server speaks with: what it may ask, None for what it may not, and in which era.

    Attributes:
        mode: ``auto``, ``legacy``, or a revision of the new era, which then is not asked for first.
        logging, message: are told what it says by itself.
    """

    mode: str = "auto"
    elicitation: ElicitationFnT | None = None
    sampling: SamplingFnT | None = None
    roots: ListRootsFnT | None = None
    logging: LoggingFnT | None = None
    message: MessageHandlerFnT | None = None


NOBODY = Peer()


@dataclass(frozen=True, slots=True)
class More:
    """What a call has beside its arguments: of a round after the first, and who is told how far it is."""

    input_responses: InputResponses | None = None
    request_state: str | None = None
    progress: ProgressFnT | None = None
    meta: RequestParamsMeta | None = None


def check_sendable(arguments: dict[str, Any]) -> None:
    """Refuse what cannot be written as JSON in UTF-8, such as halves of characters; raises NotExecuted."""
    try:
        size = len(json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError) as error:
        raise NotExecuted("The arguments cannot be sent: they are no JSON in Unicode.", hint="Change them.") from error
    if size > _MOST_ARGUMENTS:
        raise NotExecuted(f"The arguments have {size:,} bytes.", hint=f"Send at most {_MOST_ARGUMENTS >> 20} MiB.")


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
            NotExecuted, SessionLost: it was not done.
            MaybeExecuted: it did not answer in time, or says what cannot be.
        """
        answer = await self.call_further(tool, arguments, More())
        if not isinstance(answer, CallToolResult):
            raise MaybeExecuted(
                self.failed("it wants to ask something first, and nobody here can be asked").message,
                hint="Use it through 'luminaguard gateway --server', whose client can be asked.",
                kept="It was not repeated.",
            )
        return answer

    async def call_further(
        self, tool: str, arguments: dict[str, Any], more: More
    ) -> CallToolResult | InputRequiredResult:
        """Call a tool, or go on with a call that the server has asked something of; raises as :meth:`call_whole`."""
        check_sendable(arguments)
        try:
            with self.failures(), anyio.fail_after(self.timeout_s):
                # Not the client's own call_tool, which sends a call again when a server says so.
                return await self.client.session.call_tool(
                    tool, arguments, progress_callback=more.progress, input_responses=more.input_responses,
                    request_state=more.request_state, meta=more.meta, allow_input_required=True,
                )  # fmt: skip
        except (MaybeExecuted, NotExecuted, SessionLost):
            raise
        except McpServerFailed as error:  # whatever else went wrong, it was sent
            raise MaybeExecuted(
                f"{error.message} The call may have been executed.", hint=error.hint, kept="It was not repeated."
            ) from error

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
            why = f"{ascii(error.message[:500])[1:-1]} ({error.code})"
            if error.code in _REFUSALS:
                raise NotExecuted(session.failed(why).message, hint=session.failed(why).hint) from error
            raise session.failed(why) from error
        if isinstance(error, anyio.BrokenResourceError | anyio.ClosedResourceError):
            raise session.failed("the connection ended") from error
        if isinstance(error, ValidationError | RuntimeError | ValueError):
            raise session.failed(f"what it says cannot be: {ascii(str(error)[:300])[1:-1]}") from error


@asynccontextmanager
async def open_session(
    name: str, transport: AbstractAsyncContextManager[Any], explain: Callable[[MCPError], LuminaGuardError | None],
    timeout_s: float, peer: Peer = NOBODY,
) -> AsyncIterator[Session]:  # fmt: skip
    """Speak with a server, for as long as this context lasts.

    Args:
        name: what people call it.
        transport: gives the SDK what it reads from, and what it writes to.
        explain: what is known of an error beside what it says.
        timeout_s: how long the server may take to begin, and for each answer.
        peer: whom the server speaks with.

    Raises:
        McpServerFailed: it does not begin to speak in time.
    """
    client = Client(
        transport, read_timeout_seconds=timeout_s, mode=peer.mode, elicitation_callback=peer.elicitation,
        sampling_callback=peer.sampling, list_roots_callback=peer.roots, logging_callback=peer.logging,
        message_handler=peer.message,
    )  # fmt: skip
    session = Session(name, client, explain, timeout_s)
    begun, late, done = anyio.Event(), False, False

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
                done = True
    except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
        if not done:
            raise session.failed("the connection ended") from error
    except BaseExceptionGroup as group:
        first = first_of(group)
        if done and isinstance(first, anyio.BrokenResourceError | anyio.ClosedResourceError):
            return  # an answer that came while it was closed, and nobody waits for
        if not begun.is_set():
            with session.failures():
                raise first from None
        raise first from None
    if late:
        raise session.failed(f"it did not begin to speak within {timeout_s:g} s")
