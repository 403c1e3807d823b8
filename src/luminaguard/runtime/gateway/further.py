"""The prompts and resources of all servers of a gateway, and what they tell of their lists."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import mcp_types as types
from mcp.client.subscriptions import SubscriptionLost
from mcp.shared.subscriptions import PromptsListChanged, ResourcesListChanged, ToolsListChanged
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from luminaguard import log
from luminaguard.errors import LuminaGuardError, SettingsError, first_of
from luminaguard.mcp.gateway.changes import List
from luminaguard.mcp.gateway.methods import said_by, send
from luminaguard.mcp.session import NOBODY, Peer
from luminaguard.runtime.mcp import McpServers, Opened
from mcp import MCPError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from luminaguard.mcp.session import Session
    from luminaguard.runtime.gateway.kept import KeptServers

__all__ = ["Further", "ListeningServers"]

_FIELDS = {"prompts/list": "prompts", "resources/list": "resources", "resources/templates/list": "resource_templates"}
_LISTED_S, _MOST_LISTING_S = 5.0, 15.0
_MOST, _MOST_PAGES, _MOST_SIZE = 1000, 100, 4 << 20
_GONE = (anyio.BrokenResourceError, anyio.ClosedResourceError)
_LISTS: dict[type, List] = {
    types.ToolListChangedNotification: "tools", types.PromptListChangedNotification: "prompts",
    types.ResourceListChangedNotification: "resources", ToolsListChanged: "tools", PromptsListChanged: "prompts",
    ResourcesListChanged: "resources",
}  # fmt: skip
Changed = Callable[[str, List], Awaitable[None]]


class ListeningServers:
    """Opens servers, and listens to what they tell of their lists for as long as they are open.

    Args:
        servers: opens them.
        changed: told the name of a server, and which list of it is another one now.
    """

    def __init__(self, servers: McpServers, changed: Changed) -> None:
        self._servers, self._changed = servers, changed

    @asynccontextmanager
    async def open(self, name: str, peer: Peer = NOBODY) -> AsyncIterator[Opened]:
        """See :meth:`McpServers.open`."""

        async def hear(message: Any) -> None:
            if (changed := _LISTS.get(type(message))) is not None:
                await self._changed(name, changed)
            elif peer.message is not None:
                await peer.message(message)

        try:
            async with (
                self._servers.open(name, replace(peer, message=hear)) as opened,
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(self._listen, name, opened.session)
                yield opened
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_of(group) from None

    async def _listen(self, name: str, session: Session) -> None:
        """Of the new era, where a server tells only those who listen."""
        if session.client.protocol_version not in MODERN_PROTOCOL_VERSIONS:
            return
        has = session.client.server_capabilities
        tools, prompts, resources = (bool(one and one.list_changed) for one in (has.tools, has.prompts, has.resources))
        if not (tools or prompts or resources):
            return
        try:
            async with session.client.listen(
                tools_list_changed=tools, prompts_list_changed=prompts, resources_list_changed=resources
            ) as events:
                async for event in events:
                    if (changed := _LISTS.get(type(event))) is not None:
                        await self._changed(name, changed)
        except (MCPError, SubscriptionLost, TimeoutError, *_GONE) as error:
            log.event("gateway.not_heard", server=name, why=ascii(str(error)[:200]))


class Further:
    """What the servers of one gateway have beside tools."""

    def __init__(self, names: Sequence[str], servers: McpServers, kept: KeptServers, task: str) -> None:
        self._names, self._servers, self._kept, self._task = tuple(names), servers, kept, task
        self._known: dict[tuple[str, str], tuple[float, list[Any]]] = {}
        self._versions: Counter[str] = Counter()

    def forget(self, server: str) -> None:
        """What was listed of a server is another list now, and what is being listed may be."""
        self._versions[server] += 1
        for key in [key for key in self._known if key[0] == server]:
            del self._known[key]

    async def listed(self, method: str) -> Mapping[str, Sequence[Any]]:
        """What each server lists; nothing of one that does not answer, or that has nothing of the kind."""
        found: dict[str, Sequence[Any]] = {}

        async def look(name: str) -> None:
            try:
                with anyio.fail_after(_MOST_LISTING_S):  # the others wait for it
                    found[name] = await self._list(name, method)
            except (LuminaGuardError, MCPError, TimeoutError) as error:  # its own are missing, and nobody else's
                log.event("gateway.server_missing", server=name, why=str(error)[:200])

        async with anyio.create_task_group() as tasks:
            for name in self._names:
                tasks.start_soon(look, name)
        return {name: found[name] for name in sorted(found)}

    async def _list(self, name: str, method: str) -> list[Any]:
        at, known = self._known.get((name, method), (-_LISTED_S, []))
        if time.monotonic() - at < _LISTED_S:
            return known
        kind = method.partition("/")[0]
        if not await self._may_have(name, kind):
            return []  # it is not begun for that
        rows, version = list[Any](), self._versions[name]
        try:
            async with self._kept.use(name) as kept:
                if await self._may_have(name, kind):
                    rows = await _all_pages(kept.opened.session, method)
        finally:  # one that failed is not asked again at once either
            if version == self._versions[name]:
                self._known[name, method] = (time.monotonic(), rows)
        return rows

    async def _may_have(self, name: str, kind: str) -> bool:
        """Whether a server has said that it has something, or was never asked."""
        has = await anyio.to_thread.run_sync(self._servers.has, name)
        return has is None or kind in has

    async def read(self, server: str, method: str, params: dict[str, Any]) -> BaseModel:
        """Make a request of a server, if the rules and people let it.

        Raises:
            SettingsError: there is none of this name.
            Forbidden, ApprovalNeeded, McpServerFailed: as :meth:`McpServers.call` does.
            MCPError: what the server itself said.
        """
        if server not in self._names:
            raise SettingsError(f"There is no server {server[:64]!a}.", hint="List again what there is.")
        session: Session | None = None
        try:
            async with self._kept.use(server) as kept:
                session = opened_session = kept.opened.session
                return await self._servers.ask(
                    kept.opened, method, params, lambda: send(opened_session, method, params), task=self._task
                )
        except LuminaGuardError as error:
            if session is not None and (said := said_by(session, error)) is not None:
                raise said from error
            raise


async def _all_pages(session: Session, method: str) -> list[Any]:
    """All that a server lists; raises McpServerFailed for too much."""
    found, size = list[Any](), 0
    params: dict[str, Any] = {}
    with session.failures(), anyio.fail_after(session.timeout_s):
        for _ in range(_MOST_PAGES):
            page = await send(session, method, params)
            rows = getattr(page, _FIELDS[method])
            found += rows
            size += sum(len(row.model_dump_json()) for row in rows)
            if len(found) > _MOST or size > _MOST_SIZE:
                break
            cursor = getattr(page, "next_cursor", None)
            if not cursor:
                return found
            params = {"cursor": cursor}
    raise session.failed(f"what it lists ({method}) is too many, too large, or without an end")
