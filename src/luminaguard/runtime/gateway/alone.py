"""One configured server alone behind the gateway: its requests through the rules and the cliff, its questions back.

Each session of a program has one of its own with the server, in the same era and with the same capabilities, so that
what the server asks in the middle of a call is asked of the program that called. A server in a machine has one session.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.abc
import anyio.to_thread
import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.shared.message import ServerMessageMetadata
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel

from luminaguard.errors import LuminaGuardError, McpServerFailed
from luminaguard.mcp.gateway.changes import Changes, List
from luminaguard.mcp.gateway.methods import LISTED, said_by, send
from luminaguard.mcp.session import More, Peer, Session
from luminaguard.runtime.gateway.backend import END_S, Gateway, Silent, beside, tell_ended, waits
from luminaguard.runtime.gateway.further import ListeningServers
from luminaguard.runtime.gateway.kept import Kept, KeptServers
from luminaguard.runtime.mcp import McpServers, Opened
from luminaguard.settings import HttpServer
from mcp import MCPError

if TYPE_CHECKING:
    from luminaguard.runtime.core import Runtime

__all__ = ["Alone"]

T = TypeVar("T")
Context = ServerRequestContext[Any]
_SESSION = "mcp-session-id"
_NOBODY = types.ErrorData(code=types.INVALID_REQUEST, message="nobody who could be asked is at this call")


class _Line:
    """What leads back from a session with the server to the program whose calls are in it."""

    def __init__(self, mode: str, has: types.ClientCapabilities) -> None:
        self._at: list[Context] = []
        self.peer = Peer(
            mode, self._elicit if has.elicitation else None, self._sample if has.sampling else None,
            self._roots if has.roots else None, self._log, self._hear,
        )  # fmt: skip

    def enter(self, context: Context) -> None:
        """A call of the program is in it."""
        self._at.append(context)

    def leave(self, context: Context) -> None:
        """It has ended."""
        self._at.remove(context)

    @property
    def idle(self) -> bool:
        """Whether no call is in it."""
        return not self._at

    @property
    def _caller(self) -> Context | None:
        """A call of the program whose calls are in it; None if there is none, or if they are of several programs."""
        return self._at[-1] if len({_whose(one) for one in self._at}) == 1 else None

    # The SDK gives each its own session with the server; whom it concerns is known here.
    # ruff: noqa: ARG002  # its callbacks have a context that is of no use here

    async def _ask(self, request: Any, result: type[T]) -> T | types.ErrorData:
        if (context := self._caller) is None:
            return _NOBODY
        try:
            metadata = ServerMessageMetadata(related_request_id=context.request_id)
            return await context.session.send_request(request, result, metadata=metadata)  # type: ignore[type-var]  # T is one of three
        except MCPError as error:
            return error.error

    async def _elicit(self, context: Any, params: types.ElicitRequestParams) -> types.ElicitResult | types.ErrorData:
        return await self._ask(types.ElicitRequest(params=params), types.ElicitResult)

    async def _sample(
        self, context: Any, params: types.CreateMessageRequestParams
    ) -> types.CreateMessageResult | types.ErrorData:
        return await self._ask(types.CreateMessageRequest(params=params), types.CreateMessageResult)

    async def _roots(self, context: Any) -> types.ListRootsResult | types.ErrorData:
        return await self._ask(types.ListRootsRequest(), types.ListRootsResult)

    async def _log(self, params: types.LoggingMessageNotificationParams) -> None:
        if (context := self._caller) is not None:
            said = types.LoggingMessageNotification(params=params)
            await context.session.send_notification(said, context.request_id)

    async def _hear(self, message: Any) -> None:
        if (context := self._caller) is not None and isinstance(message, types.ResourceUpdatedNotification):
            await context.session.send_resource_updated(message.params.uri)


def _whose(context: Context) -> str:
    """Tells programs apart: by their token, and in the older era by their session; over stdio there is one."""
    headers = getattr(context.request, "headers", {})
    who = f"{headers.get('authorization', '')} {headers.get(_SESSION, '')}"
    return hashlib.sha256(who.encode()).hexdigest()[:32]


class Alone:
    """One server behind one gateway; made by :meth:`open`."""

    def __init__(self, gateway: Gateway, runtime: Runtime, name: str, tasks: anyio.abc.TaskGroup) -> None:
        self._gateway, self._name = gateway, name
        self._mcp = McpServers(runtime)
        self.changes = Changes()
        self._shared = not isinstance(self._mcp.settings(name), HttpServer)
        self._lines: dict[str, _Line] = {}
        self._kept = KeptServers(self, tasks, runtime.settings.gateway.idle_s, self._ended)
        self._schemas: dict[str, dict[str, Any]] = {}

    @classmethod
    @asynccontextmanager
    async def serving(cls, gateway: Gateway, runtime: Runtime, name: str) -> AsyncIterator[Alone]:
        """Serve one server for as long as this context lasts; raises SettingsError if there is none of this name."""
        async with anyio.create_task_group() as tasks:
            alone = cls(gateway, runtime, name, tasks)
            try:
                async with beside(alone.changes.tell):
                    yield alone
            finally:
                alone._kept.retire()
                tasks.cancel_scope.deadline = anyio.current_time() + END_S

    def open(self, key: str) -> AbstractAsyncContextManager[Opened]:
        """A session with the server, for the line of this key."""
        return ListeningServers(self._mcp, self._changed).open(self._name, self._lines[key].peer)

    async def _changed(self, _server: str, what: List) -> None:
        for kept in self._kept.open.values():
            kept.forget_tools()
        self.changes.note(what)

    def _ended(self, key: str, opened: Opened) -> None:
        line = self._lines.get(key)
        if line is not None and line.idle and key not in self._kept.open:  # else it is another session's by now
            del self._lines[key]
        tell_ended(self._name, opened)

    # -- what it has ----------------------------------------------------------------------------------------

    async def capabilities(self) -> types.ServerCapabilities:
        """What the server has."""
        async with self._mcp.open(self._name) as opened:
            return opened.session.client.server_capabilities

    async def tools(self, context: Context) -> types.ListToolsResult:
        """Its tools, those that were accepted, with what it says of how long that holds."""

        async def do(kept: Kept) -> types.ListToolsResult:
            now = await kept.tools(time.monotonic())
            found = await anyio.to_thread.run_sync(self._mcp.check, self._name, now)
            page = await kept.opened.session.client.session.list_tools()
            self._schemas = {tool: dict(now[tool].get("inputSchema") or {}) for tool in found.same}
            shown = [types.Tool.model_validate(dict(now[tool])) for tool in now if tool in found.same]
            return types.ListToolsResult(tools=shown, ttl_ms=page.ttl_ms, cache_scope=page.cache_scope)

        return await self._with(context, do)

    def schema(self, name: str) -> dict[str, Any] | None:
        """The schema of a tool's arguments."""
        return self._schemas.get(name)

    # -- what it does ---------------------------------------------------------------------------------------

    async def call(
        self, context: Context, name: str, arguments: dict[str, Any], more: More
    ) -> types.CallToolResult | types.InputRequiredResult:
        """Call a tool; see :class:`luminaguard.mcp.gateway.alone.AloneBackend`."""

        async def do(kept: Kept) -> types.CallToolResult | types.InputRequiredResult:
            now = await kept.tools(time.monotonic())
            answer = await self._mcp.call_further(kept.opened, name, arguments, more, task=self._gateway.task, now=now)
            await self._gateway.follow(self._name, name, now[name])
            return answer

        answer = await self._gateway.when_let(lambda: self._with(context, do), Silent())
        return waits(answer) if isinstance(answer, str) else answer

    async def request(self, context: Context, method: str, params: dict[str, Any]) -> BaseModel:
        """Make another request; see :class:`luminaguard.mcp.gateway.alone.AloneBackend`."""

        async def do(kept: Kept) -> BaseModel:
            session = kept.opened.session
            if method in LISTED:
                return await send(session, method, params)
            said = {key: value for key, value in params.items() if key != "_meta"}
            sending = partial(send, session, method, params)
            return await self._mcp.ask(kept.opened, method, said, sending, task=self._gateway.task)

        answer = await self._gateway.when_let(lambda: self._with(context, do), Silent())
        if isinstance(answer, str):
            raise McpServerFailed(f"This waits for the approval of a person: {answer}.", hint="Ask again after it.")
        return answer

    async def _with(self, context: Context, do: Callable[[Kept], Awaitable[T]]) -> T:
        """Do something in the session that belongs to a program's; what the server says of it goes on as it is."""
        key = self._key(context)
        if key not in self._lines:
            modern = context.protocol_version in MODERN_PROTOCOL_VERSIONS
            mode = "auto" if self._shared else context.protocol_version if modern else "legacy"
            self._lines[key] = _Line(mode, context.session.client_capabilities or types.ClientCapabilities())
        line = self._lines[key]
        line.enter(context)
        session: Session | None = None
        try:
            async with self._kept.use(key) as kept:
                session = kept.opened.session
                return await do(kept)
        except LuminaGuardError as error:
            if session is not None and (said := said_by(session, error)) is not None:
                raise said from error
            raise
        finally:
            line.leave(context)

    def _key(self, context: Context) -> str:
        if self._shared:
            return self._name
        if context.protocol_version in MODERN_PROTOCOL_VERSIONS:
            has = context.session.client_capabilities or types.ClientCapabilities()
            return f"{_whose(context)} {context.protocol_version} {has.model_dump_json(exclude_none=True)}"
        return _whose(context)
