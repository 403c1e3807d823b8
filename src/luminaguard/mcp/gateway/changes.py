"""Tells programs that a list has changed: on the streams that listen (the new era), and in sessions (the older)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import anyio
import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import NotificationOptions, Server
from mcp.server.models import InitializationOptions
from mcp.server.session import ServerSession
from mcp.server.subscriptions import (
    InMemorySubscriptionBus,
    ListenHandler,
    PromptsListChanged,
    ResourcesListChanged,
    ServerEvent,
    ToolsListChanged,
)
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from luminaguard import log
from mcp import MCPError

__all__ = ["Changes", "List", "TellingServer"]

List = Literal["tools", "prompts", "resources"]
_MOST_SESSIONS, _MOST_STREAMS, _MOST_EVENTS = 1024, 256, 64
_TELL_S, _PAUSE_S = 5.0, 1.0
_EVENTS: dict[List, ServerEvent] = {
    "tools": ToolsListChanged(), "prompts": PromptsListChanged(), "resources": ResourcesListChanged(),
}  # fmt: skip
_NOTICES: dict[List, types.ServerNotification] = {
    "tools": types.ToolListChangedNotification(), "prompts": types.PromptListChangedNotification(),
    "resources": types.ResourceListChangedNotification(),
}  # fmt: skip


class TellingServer(Server[Any]):
    """A server that says of itself that it tells when a list has changed."""

    def create_initialization_options(
        self, notification_options: NotificationOptions | None = None, *args: Any, **kwargs: Any
    ) -> InitializationOptions:
        """See the SDK."""
        options = notification_options or NotificationOptions(True, True, True)
        return super().create_initialization_options(options, *args, **kwargs)


class Changes:
    """Who is told."""

    def __init__(self) -> None:
        self._bus = InMemorySubscriptionBus()
        self.listen = ListenHandler(self._bus, max_subscriptions=_MOST_STREAMS, max_buffered_events=_MOST_EVENTS)
        """Serves ``subscriptions/listen``."""
        self._sessions: OrderedDict[str, ServerSession] = OrderedDict()
        self._changed = set[List]()
        self._noted = anyio.Event()

    def meet(self, context: ServerRequestContext[Any]) -> None:
        """Remember who has listed something, and is to be told when that is another list."""
        if context.protocol_version in MODERN_PROTOCOL_VERSIONS:
            return  # these listen
        key = getattr(context.request, "headers", {}).get("mcp-session-id", "")
        self._sessions[key] = context.session
        self._sessions.move_to_end(key)
        while len(self._sessions) > _MOST_SESSIONS:
            self._sessions.popitem(last=False)

    def note(self, changed: List) -> None:
        """A list has changed; :meth:`tell` says so."""
        self._changed.add(changed)
        self._noted.set()

    async def tell(self) -> None:
        """Tell all what has changed, for ever: once a second at most, however often it does."""
        while True:
            await self._noted.wait()
            self._noted, changed = anyio.Event(), sorted(self._changed)
            self._changed.clear()
            for one in changed:
                await self._bus.publish(_EVENTS[one])
            async with anyio.create_task_group() as tasks:
                for key, session in self._sessions.items():
                    tasks.start_soon(self._tell_one, key, session, changed)
            await anyio.sleep(_PAUSE_S)

    async def _tell_one(self, key: str, session: ServerSession, changed: Sequence[List]) -> None:
        try:
            with anyio.fail_after(_TELL_S):
                for one in changed:
                    await session.send_notification(_NOTICES[one])
        except (MCPError, TimeoutError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            self._sessions.pop(key, None)  # it has left, or does not read
            log.event("gateway.not_told", why=type(error).__name__)
