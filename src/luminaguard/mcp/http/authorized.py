"""Requests with proof of who asks, below the balancer: the flow of OAuth ends before an answer is judged.

Above it, the SDK's flow would hold its lock until an answer was read, and calls would wait for each other.
"""

from __future__ import annotations

import anyio
import httpx2

from luminaguard.errors import LuminaGuardError, McpServerFailed

__all__ = ["OF_THE_SERVER", "Authorized", "NotAuthorized"]

OF_THE_SERVER = "luminaguard_mcp"
"""The extension that requests to the MCP server itself bear; others go to an authorization server."""
_MOST_BODY = 1 << 20


class NotAuthorized(Exception):
    """Nobody could be shown that we may ask; the server did nothing."""


class Authorized(httpx2.AsyncBaseTransport):
    """Sends requests as ``auth`` wants them.

    Args:
        inner: sends one request to one address.
        auth: the flow; None for none.
        limit_s: for each request to an authorization server.
    """

    def __init__(self, inner: httpx2.AsyncBaseTransport, auth: httpx2.Auth | None, limit_s: float) -> None:
        self._inner = inner
        self._limit_s = limit_s
        self._client: httpx2.AsyncClient | None = None
        if auth is not None:
            self._client = httpx2.AsyncClient(transport=_Both(inner, limit_s), auth=auth, timeout=None, trust_env=False)
            self._client.headers.clear()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request.

        Raises:
            NotAuthorized: the flow failed.
            httpx2.HTTPError: the request did.
        """
        if self._client is None:
            return await self._inner.handle_async_request(request)
        request.extensions = dict(request.extensions) | {OF_THE_SERVER: True}
        try:
            return await self._client.send(request, stream=True)
        except (httpx2.HTTPError, httpx2.StreamError, OSError, NotAuthorized):
            raise
        except LuminaGuardError as error:
            raise NotAuthorized(f"{error.message} {error.hint}") from error
        except Exception as error:  # the SDK's errors of a flow, and whatever else a flow raises
            raise NotAuthorized(f"{type(error).__name__}: {error}"[:300]) from error

    async def aclose(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()
        await self._inner.aclose()


class _Both(httpx2.AsyncBaseTransport):
    """To the server as it is; to an authorization server within bounds, and its failure is none of the server's."""

    def __init__(self, inner: httpx2.AsyncBaseTransport, limit_s: float) -> None:
        self._inner, self._limit_s = inner, limit_s

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.extensions.get(OF_THE_SERVER):
            return await self._inner.handle_async_request(request)
        request.extensions = dict(request.extensions) | {"timeout": {"connect": self._limit_s, "read": self._limit_s}}
        try:
            with anyio.fail_after(self._limit_s):
                response = await self._inner.handle_async_request(request)
                return await _bounded(response, request)
        except (httpx2.HTTPError, httpx2.StreamError, OSError, TimeoutError, McpServerFailed) as error:
            why = f"{type(error).__name__}: {error}"[:300]
            raise NotAuthorized(f"the authorization server {request.url.host} failed: {why}") from error


async def _bounded(response: httpx2.Response, request: httpx2.Request) -> httpx2.Response:
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > _MOST_BODY:
            await response.aclose()
            raise McpServerFailed("It answers with more than 1 MiB.", hint="")
    await response.aclose()
    return httpx2.Response(response.status_code, headers=response.headers, content=bytes(content), request=request)
