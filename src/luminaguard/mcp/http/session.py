"""A session with a server over HTTP: its endpoints are found, compared, looked at from time to time, and balanced."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import httpx2
from mcp.client.streamable_http import streamable_http_client

from luminaguard import log
from luminaguard.errors import LuminaGuardError, MaybeExecuted, McpServerFailed, NotExecuted, SessionLost, first_of
from luminaguard.mcp.balancing import Balancer
from luminaguard.mcp.definitions import Definition, compare
from luminaguard.mcp.http.exchange import Target, Times
from luminaguard.mcp.http.transport import BalancedTransport, Trust
from luminaguard.mcp.session import NOBODY, Peer, Session, open_session
from luminaguard.settings import HttpServer
from mcp import MCPError

__all__ = ["HttpSession", "look_at", "measured", "open_http"]

_MOST_EVENT = 8 << 20
_GRACE_S = 1.0
_LOOK_S = 4.0
"""What one endpoint gets to tell its tools when it is looked at."""
_MOST_ADDRESSES = 64


@dataclass(slots=True)
class HttpSession:
    """A server that answers, and what carries its messages.

    Attributes:
        transport: its balancer has what is known of each endpoint.
    """

    session: Session
    transport: BalancedTransport


@asynccontextmanager
async def open_http(
    name: str,
    server: HttpServer,
    headers: Mapping[str, str],
    *,
    trust: Callable[[str], Trust] = lambda _: Trust(),
    pinned: Mapping[str, Definition] | None = None,
    auth: httpx2.Auth | None = None,
    peer: Peer = NOBODY,
    chance: random.Random | None = None,
) -> AsyncIterator[HttpSession]:
    """Speak with a server, for as long as this context lasts.

    Args:
        name: what people call it.
        server: where it is.
        headers: that each request bears, such as of who asks.
        trust: what is known of a tool.
        pinned: the definitions that were accepted; an endpoint that has others gets nothing.
        auth: gets and renews what the server wants to see of who asks.
        peer: whom the server speaks with.
        chance: for tests.

    Raises:
        McpServerFailed: it does not answer.
    """
    targets, weights = await _find(server)
    balancer = Balancer(chance or random.SystemRandom(), strategy=server.strategy)
    balancer.set_endpoints(weights, time.monotonic())
    transport = BalancedTransport(
        server.urls[0], balancer, targets, Times(server.timeout_s), trust=trust, stateless=server.stateless,
        hedge=server.hedge, busy_is_not_done=server.busy_is_not_done, auth=auth,
    )  # fmt: skip

    def explain(error: MCPError) -> LuminaGuardError | None:
        return _explained(name, transport, error)

    checks = _Checks(name, server, headers, transport, auth, pinned)
    try:
        async with (
            httpx2.AsyncClient(transport=transport, headers=dict(headers), timeout=None, trust_env=False) as client,
            anyio.create_task_group() as tasks,
        ):  # fmt: skip
            if len(targets) > 1:
                await checks.all_once()
            if server.check_s and (len(targets) > 1 or server.resolve):
                tasks.start_soon(checks.from_time_to_time)
            stream = streamable_http_client(server.urls[0], http_client=client, max_sse_event_size=_MOST_EVENT)
            # The transport has the deadline, and says what became of a call; the session's is behind it.
            async with open_session(name, stream, explain, server.timeout_s + _GRACE_S, peer) as session:
                yield HttpSession(session, transport)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_of(group) from None


async def _find(server: HttpServer) -> tuple[dict[str, Target], dict[str, float]]:
    """Where the endpoints are, and the share of each."""
    if server.resolve:
        targets = await _resolve(server.urls[0])
        return targets, dict.fromkeys(targets, 1.0)
    weights = server.weights or (1.0,) * len(server.urls)
    return {url: Target(httpx2.URL(url)) for url in server.urls}, dict(zip(server.urls, weights, strict=True))


async def _resolve(address: str) -> dict[str, Target]:
    url = httpx2.URL(address)
    try:
        found = await anyio.getaddrinfo(url.host, url.port or (443 if url.scheme == "https" else 80),
                                        type=socket.SOCK_STREAM)  # fmt: skip
    except OSError as error:
        raise McpServerFailed(
            f"The name {url.host!a} has no address: {error.strerror}.", hint="Check the server's url, and the network."
        ) from error
    hosts = sorted({str(one[4][0]) for one in found})[:_MOST_ADDRESSES]
    return {f"{address} at {host}": Target(url.copy_with(host=host), url.host) for host in hosts}


def _explained(name: str, transport: BalancedTransport, error: MCPError) -> LuminaGuardError | None:
    """A failure that the transport told of, as an error of ours."""
    failure = transport.failure(error.error.data)
    if failure is None:
        return None
    where, why = ascii(failure.endpoint)[1:-1], ascii(failure.why)[1:-1]
    match failure.kind:
        case "maybe executed":
            return MaybeExecuted(
                f"The server {name!a} may have executed this call, or not: {why} ({where}).",
                hint="Look there before you ask for it again.", kept="It was not repeated.",
            )  # fmt: skip
        case "session lost":
            return SessionLost(
                f"The session with {name!a} is lost: {why} ({where}).",
                hint="Begin a new one; 'stateless = true' lets such a session be opened anew by itself.",
                kept="It was not executed.",
            )
        case _:
            return NotExecuted(
                f"The server {name!a} failed: {why} ({where}).", hint=f"See 'luminaguard mcp status {name}'."
            )


class _Checks:
    """Asks each endpoint by itself for its tools: whether it answers, and whether it is what the others are."""

    def __init__(
        self, name: str, server: HttpServer, headers: Mapping[str, str], transport: BalancedTransport,
        auth: httpx2.Auth | None, pinned: Mapping[str, Definition] | None,
    ) -> None:  # fmt: skip
        self._name = name
        self._server = server
        self._headers = headers
        self._transport = transport
        self._auth = auth
        self._pinned = pinned

    async def all_once(self) -> None:
        """Look at all of them.

        If nothing was accepted yet, the first in the settings that answers says what the others must be, whichever is
        the fastest.
        """
        found: dict[str, dict[str, Definition] | str] = {}

        async def look(endpoint: str) -> None:
            found[endpoint] = await self._look(endpoint)

        async with anyio.create_task_group() as tasks:
            for endpoint in self._transport.targets:
                tasks.start_soon(look, endpoint)
        answers = [one for endpoint in self._transport.targets if not isinstance(one := found[endpoint], str)]
        # Where none is any more what was accepted, all may have changed together: whoever calls finds that out.
        accepted = self._pinned is not None and any(_same(self._pinned, one) for one in answers)
        reference = self._pinned if accepted else next(iter(answers), None)
        for endpoint, one in found.items():
            self._take(endpoint, one, reference)

    async def from_time_to_time(self) -> None:
        """Look at all of them again and again, and at the addresses of the name."""
        while True:
            await anyio.sleep(self._server.check_s)
            if self._server.resolve:
                await self._resolve_again()
            await self.all_once()

    async def _resolve_again(self) -> None:
        try:
            targets = await _resolve(self._server.urls[0])
        except McpServerFailed as error:  # the ones that were there may be there yet
            log.event("mcp.no_address", server=self._name, why=error.message)
            return
        transport = self._transport
        transport.targets.update(targets)
        transport.balancer.set_endpoints(dict.fromkeys(targets, 1.0), time.monotonic())
        for gone in transport.targets.keys() - transport.balancer.endpoints.keys():  # others end what they have
            del transport.targets[gone]

    def _take(
        self, endpoint: str, found: dict[str, Definition] | str, reference: Mapping[str, Definition] | None
    ) -> None:
        now, balancer = time.monotonic(), self._transport.balancer
        if isinstance(found, str):
            log.event("mcp.check_failed", server=self._name, endpoint=endpoint, why=found)
            balancer.checked(endpoint, now, well=False)
            return
        compared = compare(found if reference is None else reference, found)
        others = [*compared.quarantined, *compared.gone]
        different = f"its tools are not the same: {', '.join(others)[:200]}" if others else ""
        if different:
            log.event("mcp.endpoint_differs", server=self._name, endpoint=endpoint, tools=others[:20])
        balancer.checked(endpoint, now, well=True, different=different)

    async def _look(self, endpoint: str) -> dict[str, Definition] | str:
        """Its tools, or why they are not to be had."""
        target = self._transport.targets[endpoint]
        alone = Balancer(random.SystemRandom())
        alone.set_endpoints({endpoint: 1.0}, time.monotonic())
        limit_s = min(self._server.timeout_s, _LOOK_S)
        url = self._server.urls[0]
        transport = BalancedTransport(url, alone, {endpoint: target}, Times(limit_s), auth=self._auth)
        with anyio.move_on_after(limit_s + _GRACE_S):
            return await self._ask(transport, url, limit_s)
        return f"no answer within {limit_s:g} s"

    async def _ask(self, transport: BalancedTransport, url: str, limit_s: float) -> dict[str, Definition] | str:
        try:
            async with (
                httpx2.AsyncClient(transport=transport, headers=dict(self._headers), timeout=None,
                                   trust_env=False) as client,
                open_session(self._name, streamable_http_client(url, http_client=client), lambda _: None,
                             limit_s + _GRACE_S) as session,
            ):  # fmt: skip
                return json.loads(json.dumps(await session.list_tools()))  # type: ignore[no-any-return]  # as it was
        except LuminaGuardError as error:
            return error.message
        except BaseExceptionGroup as group:
            return str(first_of(group))


def _same(one: Mapping[str, Definition], other: Mapping[str, Definition]) -> bool:
    compared = compare(one, other)
    return not (compared.quarantined or compared.gone)


def measured(transport: BalancedTransport) -> list[dict[str, Any]]:
    """What people see of each endpoint."""
    return transport.balancer.table(time.monotonic())


async def look_at(
    name: str, server: HttpServer, headers: Mapping[str, str], *, pinned: Mapping[str, Definition] | None = None,
    auth: httpx2.Auth | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Look at each endpoint once, and tell what people see of it; raises McpServerFailed if there is none."""
    targets, weights = await _find(server)
    balancer = Balancer(random.SystemRandom(), strategy=server.strategy)
    balancer.set_endpoints(weights, time.monotonic())
    transport = BalancedTransport(server.urls[0], balancer, targets, Times(server.timeout_s))
    try:
        await _Checks(name, server, headers, transport, auth, pinned).all_once()
    finally:
        await transport.aclose()
    return measured(transport)
