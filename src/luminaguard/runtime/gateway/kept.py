"""Servers that stay open between calls: begun when first used, ended when nobody has used them for a while.

Each has a task of its own, so that one that crashes, hangs or does not begin concerns nobody else; it is begun
again for the next call, after a pause that grows with each failure.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import anyio
import anyio.abc

from luminaguard import log
from luminaguard.errors import LuminaGuardError, McpServerFailed, SessionLost
from luminaguard.mcp.definitions import Definition
from luminaguard.runtime.mcp import Opened

__all__ = ["Kept", "KeptServers", "Opens"]

_LONGEST_PAUSE_S = 30.0
_LISTED_S = 5.0
"""For so long a listing of tools is taken to be what the server says."""


@dataclass(slots=True)
class Kept:
    """A server that is open.

    Attributes:
        users: calls that are at it.
        retire: set when it is to end.
    """

    opened: Opened
    users: int = 0
    used_at: float = 0.0
    retire: anyio.Event = field(default_factory=anyio.Event)
    left: anyio.Event = field(default_factory=anyio.Event)
    """Set, and then another one, when a call has ended."""
    _listed: Mapping[str, Definition] | None = None
    _listed_at: float = 0.0

    def forget_tools(self) -> None:
        """What it said of its tools is not what it says now."""
        self._listed = None

    async def tools(self, now: float) -> Mapping[str, Definition]:
        """What it says of its tools, a moment ago at most; raises McpServerFailed."""
        if self._listed is None or now - self._listed_at > _LISTED_S:
            self._listed = await self.opened.session.list_tools()
            self._listed_at = now
        return self._listed


class Opens(Protocol):
    """Opens servers."""

    def open(self, name: str) -> AbstractAsyncContextManager[Opened]:
        """Speak with one, for as long as the context lasts."""


class KeptServers:
    """The servers of one gateway.

    Args:
        servers: opens them.
        tasks: outlives all of them.
        idle_s: after how long without use one is ended.
        ended: told of each that has ended, with what its machine did.
    """

    def __init__(
        self, servers: Opens, tasks: anyio.abc.TaskGroup, idle_s: float,
        ended: Callable[[str, Opened], None] = lambda *_: None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._servers, self._tasks, self._idle_s = servers, tasks, idle_s
        self._ended, self._clock = ended, clock
        self._kept: dict[str, Kept] = {}
        self._locks: dict[str, anyio.Lock] = {}
        self._failures: dict[str, tuple[int, float]] = {}

    @property
    def open(self) -> dict[str, Kept]:
        """Those that are open, by name."""
        return dict(self._kept)

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Kept]:
        """A server, for one call.

        Raises:
            McpServerFailed: it does not begin, or failed a moment ago.
        """
        async with self._locks.setdefault(name, anyio.Lock()):
            kept = self._kept.get(name)
            if kept is None or kept.opened.gone:
                kept = await self._begin(name)
        kept.users += 1
        try:
            yield kept
            self._failures.pop(name, None)
        except McpServerFailed as error:
            if kept.opened.gone or isinstance(error, SessionLost):
                self._failed(name)
                kept.retire.set()
                self._kept.pop(name, None)
            raise
        finally:
            kept.users -= 1
            kept.used_at = self._clock()
            kept.left.set()
            kept.left = anyio.Event()

    def retire(self) -> None:
        """Let all of them end, each after the calls that are at it; what they changed is asked for."""
        for kept in self._kept.values():
            kept.retire.set()

    async def _begin(self, name: str) -> Kept:
        times, not_before = self._failures.get(name, (0, 0.0))
        if (left_s := not_before - self._clock()) > 0:
            raise McpServerFailed(
                f"The server {name!a} failed {times} times in a row; it is begun again in {left_s:.0f} s.",
                hint=f"See 'luminaguard mcp tools {name}'.", kept="It was not called.",
            )  # fmt: skip
        if (old := self._kept.pop(name, None)) is not None:
            old.retire.set()
        try:
            kept: Kept = await self._tasks.start(self._keep, name)
        except LuminaGuardError:
            self._failed(name)
            raise
        return kept

    def _failed(self, name: str) -> None:
        times = self._failures.get(name, (0, 0.0))[0] + 1
        pause_s = min(_LONGEST_PAUSE_S, 2.0 ** (times - 1)) if times > 1 else 0.0
        self._failures[name] = (times, self._clock() + pause_s)

    async def _keep(self, name: str, *, task_status: anyio.abc.TaskStatus[Kept]) -> None:
        kept: Kept | None = None
        try:
            async with self._servers.open(name) as opened:
                kept = self._kept[name] = Kept(opened, used_at=self._clock())
                task_status.started(kept)
                await self._until_idle(kept)
        except LuminaGuardError as error:
            if kept is None:
                raise  # to whoever wanted it
            log.event("mcp.server_ended", server=name, why=error.message)
        finally:
            if kept is not None:
                if self._kept.get(name) is kept:
                    del self._kept[name]
                self._ended(name, kept.opened)

    async def _until_idle(self, kept: Kept) -> None:
        while not kept.retire.is_set():
            with anyio.move_on_after(self._idle_s):
                await kept.retire.wait()
            if not kept.users and self._clock() - kept.used_at >= self._idle_s:
                return
        while kept.users:
            await kept.left.wait()
