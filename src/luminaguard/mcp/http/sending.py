"""Sends one request to one address and gives its answer as it comes: aiohttp below the SDK's httpx2.

Written in C where it matters, it takes less than half of the processor time of httpx2's own transport, which is most of
what a call costs on this side. Nothing is followed, decoded or remembered here. A GET or DELETE whose kept connection
had ended is sent once more; a POST is not.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import cache
from typing import Any

import aiohttp
import httpx2
from yarl import URL

__all__ = ["Sending"]

_AUTOMATIC = ("accept", "accept-encoding", "content-type", "user-agent")
_CHUNK = 64 << 10
Trace = Callable[[str, Any], Awaitable[None]]


class Sending(httpx2.AsyncBaseTransport):
    """Keeps connections for a while.

    Args:
        most: connections at once.
        keep_s: for how long one is kept that nobody uses.
    """

    def __init__(self, most: int, keep_s: float) -> None:
        self._most, self._keep_s, self._ssl = most, keep_s, _ssl_context()
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request.

        Raises:
            httpx2.HTTPError: it failed.
            ValueError: it cannot be sent as it is.
        """
        connect_s = (request.extensions.get("timeout") or {}).get("connect")
        try:
            answer = await self._opened().request(
                request.method, URL(str(request.url), encoded=True),
                headers=[(key.decode("ascii"), value.decode("latin-1")) for key, value in request.headers.raw],
                data=await request.aread() or None, allow_redirects=False, skip_auto_headers=_AUTOMATIC,
                timeout=aiohttp.ClientTimeout(total=None, connect=connect_s),
                server_hostname=request.extensions.get("sni_hostname"),
                trace_request_ctx=request.extensions.get("trace"),
            )  # fmt: skip
        except (aiohttp.ClientError, TimeoutError, RuntimeError) as error:  # the last one when it is closed already
            raise _as_httpx2(error, request) from error
        return httpx2.Response(answer.status, headers=list(answer.raw_headers), stream=_Body(answer, request))

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:  # made where its event loop runs
            tracing = aiohttp.TraceConfig()
            tracing.on_request_headers_sent.append(_tell_sent)
            connector = aiohttp.TCPConnector(limit=self._most, keepalive_timeout=self._keep_s, ssl=self._ssl)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False,
                trace_configs=[tracing],
            )  # fmt: skip
        return self._session

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


@cache
def _ssl_context() -> ssl.SSLContext:
    """Made once, for it reads hundreds of certificates."""
    return httpx2.create_ssl_context(trust_env=False)


class _Body(httpx2.AsyncByteStream):
    """What is left of an answer."""

    def __init__(self, answer: aiohttp.ClientResponse, request: httpx2.Request) -> None:
        self._answer, self._request = answer, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer.content.iter_any():
                yield chunk
        except (TimeoutError, aiohttp.ClientError) as error:
            raise _as_httpx2(error, self._request) from error

    async def aclose(self) -> None:
        """Keep the connection if all was read, and close it otherwise."""
        with suppress(aiohttp.ClientError):
            if self._answer.content.at_eof():
                self._answer.release()
            else:
                self._answer.close()


async def _tell_sent(_session: object, context: Any, _params: object) -> None:
    """Called before the first byte is written."""
    trace: Trace | None = context.trace_request_ctx
    if trace is not None:
        await trace("http11.send_request_headers.started", {})


def _as_httpx2(error: Exception, request: httpx2.Request) -> httpx2.HTTPError:
    said = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return httpx2.ConnectTimeout(said, request=request)
    if isinstance(error, TimeoutError):
        return httpx2.ReadTimeout(said, request=request)
    if isinstance(error, aiohttp.ClientConnectorError):
        return httpx2.ConnectError(said, request=request)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return httpx2.RemoteProtocolError("the server ended the connection without an answer", request=request)
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientResponseError):
        return httpx2.RemoteProtocolError(said[:300], request=request)
    return httpx2.ReadError(said[:300], request=request)
