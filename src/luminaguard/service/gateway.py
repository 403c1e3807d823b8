"""The gateway over HTTP: who has a token may speak MCP, so much and no more; pages of a browser may not.

A page on any site can send requests to this machine; what it cannot do is to send them without its own Origin, under
our Host, with a token. All three are looked at before a byte of the body is read.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mcp.server.transport_security import TransportSecuritySettings
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from luminaguard import log
from luminaguard.errors import StorageError
from luminaguard.mcp.gateway import make_server
from luminaguard.storage.clients import Clients

if TYPE_CHECKING:
    from mcp.server.lowlevel import Server

    from luminaguard.runtime import Runtime
    from luminaguard.runtime.gateway import Gateway

__all__ = ["Guard", "gateway_app"]

_MOST_BODY = 4 << 20
_SESSIONS, _SESSIONS_OF_ONE = 1024, 64
_SESSION_IDLE_S = 600.0
_SESSION = b"mcp-session-id"
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def gateway_app(
    runtime: Runtime, gateway: Gateway, listen: str, hosts: tuple[str, ...] = (), *, server: Server[Any] | None = None
) -> Guard:
    """The application of one gateway, at ``/mcp``, and its metrics at ``/metrics``.

    Args:
        runtime: the parts.
        gateway: what it serves.
        listen: where, as ``ADDRESS:PORT``.
        hosts: what clients call it beside that.
        server: what speaks the protocol, if not all servers of the gateway are served.
    """
    # Host and Origin are looked at here, before anything else is.
    security = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    inner = (server or make_server(gateway)).streamable_http_app(
        json_response=False, transport_security=security, max_request_body_size=_MOST_BODY, max_sessions=_SESSIONS,
        session_idle_timeout=_SESSION_IDLE_S,
    )  # fmt: skip
    settings = runtime.settings.gateway
    inner.router.routes.append(Route("/metrics", lambda _request: PlainTextResponse(gateway.metrics())))
    return Guard(inner, Clients(runtime.folders.state), _names_of(listen, hosts), settings.at_once, settings.per_minute)


def _names_of(listen: str, hosts: tuple[str, ...]) -> frozenset[str]:
    """What the Host header of a request to us says."""
    address, _, port = listen.rpartition(":")
    names = {listen, *hosts}
    try:
        if ipaddress.ip_address(address.strip("[]")).is_loopback:
            names |= {f"{name}:{port}" for name in ("localhost", "127.0.0.1", "[::1]")}
    except ValueError:
        pass  # whoever listens says what is wrong with it
    return frozenset(name.lower() for name in names)


@dataclass(slots=True)
class _Usage:
    """What one client does."""

    running: int = 0
    calls: float = 0.0
    since: float = 0.0
    sessions: dict[str, float] = field(default_factory=dict)
    """Of the older era: which are this client's, and when each was used last."""


@dataclass(slots=True)
class Guard:
    """Lets through who may come in; an ASGI application around one.

    Attributes:
        at_once, per_minute: requests of one client.
    """

    inner: Any
    clients: Clients
    hosts: frozenset[str]
    at_once: int
    per_minute: int
    clock: Callable[[], float] = time.monotonic
    refused: Counter[int] = field(default_factory=Counter)
    _usage: dict[str, _Usage] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self.inner(scope, receive, send)
            return
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in headers and name in {b"host", b"origin", b"authorization"}:
                await self._refuse(send, 400, "a header comes twice")
                return
            headers[name] = value
        status, why = self._may_not_enter(headers)
        if status:
            await self._refuse(send, status, why)
            return
        client = self._client(headers)
        if not client:
            await self._refuse(send, 401, "a token is needed: luminaguard gateway token CLIENT")
            return
        usage = self._usage.setdefault(client, _Usage(since=self.clock()))
        if why := self._too_much(usage, scope["method"]):
            await self._refuse(send, 429, why)
            return
        session = headers.get(_SESSION, b"").decode("latin-1")
        if refused := self._may_not_use(usage, session, scope["method"]):
            await self._refuse(send, *refused)
            return

        async def watch(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = dict(message["headers"]).get(_SESSION, b"").decode("latin-1")
                if given:
                    usage.sessions[given] = self.clock()
                if scope["method"] == "DELETE" and message["status"] < 300:
                    usage.sessions.pop(session, None)
            await send(message)

        usage.running += 1
        try:
            await self.inner(scope, receive, watch)
        finally:
            usage.running -= 1

    def _may_not_use(self, usage: _Usage, session: str, method: str) -> tuple[int, str] | None:
        """Why a request may not be made in a session; None if it may."""
        now = self.clock()
        for name in [name for name, at in usage.sessions.items() if now - at > _SESSION_IDLE_S]:
            del usage.sessions[name]
        if session:
            if session not in usage.sessions:  # another client's is none of this one's business
                return 404, "there is no such session"
            usage.sessions[session] = now
        elif method == "POST" and len(usage.sessions) >= _SESSIONS_OF_ONE:
            return 429, f"more than {_SESSIONS_OF_ONE} sessions: end some"
        return None

    def _may_not_enter(self, headers: dict[bytes, bytes]) -> tuple[int, str]:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if host not in self.hosts:
            return 421, "this is not the host that was asked for"
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] not in self.hosts:
            return 403, "pages of other sites may not ask"
        return 0, ""

    def _client(self, headers: dict[bytes, bytes]) -> str:
        scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        try:
            return self.clients.who(token.strip()) if scheme.lower() == "bearer" and token else ""
        except StorageError as error:
            log.event("gateway.no_clients", why=error.message)
            return ""

    def _too_much(self, usage: _Usage, method: str) -> str:
        now = self.clock()
        usage.calls = max(0.0, usage.calls - (now - usage.since) * self.per_minute / 60)
        usage.since = now
        if method == "POST" and usage.running >= self.at_once:  # streams that only listen are bounded by the sessions
            return f"more than {self.at_once} requests at once"
        if usage.calls + 1 > self.per_minute:
            return f"more than {self.per_minute} requests in a minute"
        usage.calls += 1
        return ""

    async def _refuse(self, send: Send, status: int, why: str) -> None:
        self.refused[status] += 1
        log.event("gateway.kept_out", status=status, why=why)
        headers = [(b"content-type", b"application/json")]
        if status == 401:
            headers.append((b"www-authenticate", b'Bearer realm="luminaguard"'))
        if status == 429:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"error": why}).encode()})
