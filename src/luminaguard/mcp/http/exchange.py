"""One request at one endpoint: it is sent, its answer is read, and what became of it is told; nothing is raised."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2
from mcp_types import INVALID_PARAMS, METHOD_NOT_FOUND

from luminaguard.errors import McpServerFailed
from luminaguard.mcp.balancing import Call, Fate
from luminaguard.mcp.http.authorized import NotAuthorized
from luminaguard.mcp.http.events import Events, answer_in

__all__ = ["SESSION", "Exchange", "Outcome", "Post", "Target", "Times", "words"]

SESSION = "mcp-session-id"
_MOST_BODY = 8 << 20
_REDIRECTS = 3
_SESSION_ID = re.compile(r"[\x21-\x7e]{1,512}")
"""Visible ASCII (revision 2025-11-25, "Session Management")."""
_OF_THE_TRANSFER = {b"content-encoding", b"content-length", b"transfer-encoding"}


@dataclass(frozen=True, slots=True)
class Target:
    """Where an endpoint is.

    Attributes:
        url: the address that is connected to.
        host: the name that it is asked for and that its certificate bears, if the address is a number.
    """

    url: httpx2.URL
    host: str = ""


@dataclass(frozen=True, slots=True)
class Times:
    """What is waited for, in seconds.

    Attributes:
        call_s: a whole call, with all attempts.
        connect_s: one connection.
        discover_s: an answer to ``server/discover``, which servers of the older era may leave open.
        close_s: an answer to the end of a session.
    """

    call_s: float
    connect_s: float = 3.0
    discover_s: float = 5.0
    close_s: float = 2.0


@dataclass(slots=True)
class Post:
    """A message of the SDK's, and what is known of it.

    Attributes:
        raw: as the SDK made it.
        deadline: by the clock of whoever sends it.
        endless: it is answered as long as it is wanted.
    """

    raw: httpx2.Request
    body: dict[str, Any]
    call: Call
    deadline: float
    endless: bool = False
    _sent: int = 0

    def next_id(self) -> Any:
        """The id of the next attempt: what is asked for again is another request."""
        self._sent += 1
        mine = self.body.get("id")
        return mine if self._sent == 1 else f"{mine}-{self._sent}"


@dataclass(slots=True)
class Outcome:
    """What became of one attempt.

    Attributes:
        fate: in one word.
        why: for people.
        response: for the SDK, if it was answered.
        pause_s: for how long the server wants to be left alone.
        session_unknown: the server has no such session, and did nothing.
    """

    fate: Fate
    why: str = ""
    response: httpx2.Response | None = None
    pause_s: float = 0.0
    session_unknown: bool = False

    async def close(self) -> None:
        """Nobody wants it any more."""
        await _close(self.response)


class Exchange:
    """Sends requests to endpoints.

    Args:
        inner: sends one request to one address.
        times: how long is waited.
        clock: seconds.
        fail: makes the answer that says that there is none: of a post, its kind, the endpoint, and why.
    """

    def __init__(
        self, inner: httpx2.AsyncBaseTransport, times: Times, clock: Callable[[], float],
        fail: Callable[[Post, str, str, str], httpx2.Response],
    ) -> None:  # fmt: skip
        self._inner = inner
        self._times = times
        self._clock = clock
        self._fail = fail

    async def post(self, post: Post, target: Target, session: str) -> Outcome:
        """Send a message, under the id that its session has there; empty for none."""
        sent, request_id = False, post.next_id()

        async def trace(event: str, _info: Any) -> None:
            nonlocal sent
            sent = sent or event.endswith("send_request_headers.started")

        response: httpx2.Response | None = None
        kept = False
        try:
            left_s = max(0.0, post.deadline - self._clock())
            with anyio.fail_after(left_s):
                connect_s = min(self._times.connect_s, left_s)
                timeout = {"connect": connect_s, "pool": None, "read": None, "write": None}
                content = post.raw.content
                if request_id != post.body.get("id"):
                    content = json.dumps(post.body | {"id": request_id}).encode()
                response = await self._send(post.raw, target, content, session, {"timeout": timeout, "trace": trace})
                outcome = await self._judge(post, request_id, response)
                if outcome.fate is Fate.LOST and post.call.method == "server/discover":  # a server without the method
                    outcome = Outcome(Fate.ANSWERED, outcome.why, httpx2.Response(404, request=post.raw))
                kept = outcome.response is not None
                return outcome
        except NotAuthorized as error:
            return Outcome(Fate.REFUSED, f"nobody showed it who asks: {error}")
        except TimeoutError:
            return Outcome(Fate.LOST if sent else Fate.NOT_SENT, "no answer in time")
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, ValueError, OSError) as error:
            return Outcome(Fate.LOST if sent else Fate.NOT_SENT, words(error))
        except McpServerFailed as error:
            return Outcome(Fate.LOST, error.message)
        finally:
            if not kept:
                await _close(response)

    async def listen(self, raw: httpx2.Request, target: Target, session: str) -> httpx2.Response:
        """The stream of what a server of the older era says by itself; 405 if it has none."""
        try:
            response = await self._send(raw, target, raw.content, session, {"timeout": self._patience(None)})
        except (httpx2.HTTPError, httpx2.InvalidURL, NotAuthorized, ValueError, OSError):
            return httpx2.Response(405, request=raw)
        if 300 <= response.status_code < 400:
            await _close(response)
            return httpx2.Response(405, request=raw)
        # One that goes on with an answer lives no longer than its call could.
        response.stream = _Quiet(response.stream, self._times.call_s if "last-event-id" in raw.headers else None)
        return response

    async def end(self, raw: httpx2.Request, target: Target, session: str) -> httpx2.Response:
        """End a session, or try to: nobody waits long for that, and nobody reads what is said to it."""
        response, status = None, 405
        try:
            with anyio.move_on_after(self._times.close_s):
                response = await self._send(raw, target, raw.content, session, {"timeout": self._patience(None)})
                status = response.status_code if response.status_code < 300 else 405
        except (httpx2.HTTPError, httpx2.InvalidURL, NotAuthorized, ValueError, OSError):
            pass
        finally:
            await _close(response)
        return httpx2.Response(status, request=raw)

    def _patience(self, read_s: float | None) -> dict[str, float | None]:
        connect_s = self._times.connect_s
        return {"connect": connect_s, "write": connect_s, "pool": connect_s, "read": read_s}

    async def _send(
        self, raw: httpx2.Request, target: Target, content: bytes, session: str, extensions: Mapping[str, Any]
    ) -> httpx2.Response:
        """Send it, and after a redirect within the same server there."""
        left = _REDIRECTS
        while True:
            sent = _addressed(raw, target, content, session, extensions)
            response = await self._inner.handle_async_request(sent)
            response.request = sent
            elsewhere = _same_origin(target, response)
            if elsewhere is None or left == 0:
                return response
            await response.aclose()
            target, left = Target(elsewhere, target.host), left - 1

    # -- what an answer is worth --------------------------------------------------------------------------------

    async def _judge(self, post: Post, request_id: Any, response: httpx2.Response) -> Outcome:
        """What a response is worth; reads as much of it as that takes."""
        status, at = response.status_code, f"HTTP {response.status_code}"
        if status in {429, 503}:
            return Outcome(Fate.BUSY, at, pause_s=_pause(response))
        if status >= 500:
            return Outcome(Fate.BROKEN, at)
        if 300 <= status < 400:
            return Outcome(Fate.REFUSED, f"{at}: it wants to be asked for elsewhere, which is not followed")
        if status >= 400:
            return await self._judge_refusal(post, request_id, response)
        if not post.call.is_request:
            return Outcome(Fate.ANSWERED, response=_with_content(response, await _whole(response)))
        if status == 202:
            return Outcome(Fate.LOST, "it took the request and did not answer it (HTTP 202)")
        if not _SESSION_ID.fullmatch(response.headers.get(SESSION, "x")):
            return Outcome(Fate.LOST, "it names the session with what is no name")
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "text/event-stream":
            return await self._judge_events(post, request_id, response)
        if kind != "application/json":
            return Outcome(Fate.LOST, f"it answered with {kind[:60]!a}")
        message = answer_in(await _whole(response), request_id)
        if message is None:
            return Outcome(Fate.LOST, "what it answered is no answer to this request")
        return Outcome(Fate.ANSWERED, response=_with_content(response, _as_answer_to(post, message)))

    async def _judge_refusal(self, post: Post, request_id: Any, response: httpx2.Response) -> Outcome:
        content, status = await _whole(response), response.status_code
        whole = _with_content(response, content)
        message = answer_in(content, request_id)
        if post.call.session and status in {400, 404} and _knows_no_session(status, content):
            return Outcome(Fate.ANSWERED, f"it does not know the session (HTTP {status})", whole, session_unknown=True)
        if not post.call.is_request or post.call.method == "server/discover":
            return Outcome(Fate.ANSWERED, response=whole)  # the SDK knows what to do then
        if message is not None:
            return Outcome(Fate.ANSWERED, response=_with_content(response, _as_answer_to(post, message)))
        failed = self._fail(post, "not executed", str(response.request.url), f"HTTP {status}")
        return Outcome(Fate.ANSWERED, f"HTTP {status}", failed)

    async def _judge_events(self, post: Post, request_id: Any, response: httpx2.Response) -> Outcome:
        """Read until it is known that something comes; most often that is the answer itself."""
        events, begun = Events(request_id, _MOST_BODY), bytearray()
        stream = response.aiter_bytes()
        while not (events.told or post.endless):
            chunk = await anext(stream, None)
            if chunk is None:
                break
            begun += events.feed(chunk)
        promised = events.resumable and not events.told and bool(post.call.session)
        if events.answered or promised:  # all of it, or for later, where the session is
            await response.aclose()
            return Outcome(Fate.ANSWERED, response=_with_content(response, bytes(begun)))
        if not (events.told or post.endless):
            return Outcome(Fate.LOST, "it ended its answer before there was one")
        rest = _Watched(self, post, response, stream, bytes(begun), events)
        return Outcome(Fate.ANSWERED, response=httpx2.Response(
            response.status_code, headers=_own_headers(response), stream=rest, request=response.request))  # fmt: skip

    async def rest(self, post: Post, stream: AsyncIterator[bytes], events: Events) -> AsyncIterator[bytes]:
        """What else comes of a stream of events; if that is no answer, an error is."""
        why = "it ended its answer before there was one"
        try:
            while not events.answered:
                left_s = None if post.endless else max(0.0, post.deadline - self._clock())
                with anyio.fail_after(left_s):
                    chunk = await anext(stream, None)
                if chunk is None:
                    break
                if whole := events.feed(chunk):  # half an event is never passed on
                    yield whole
        except TimeoutError:
            why = "no whole answer in time"
        except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            why = words(error)
        except McpServerFailed as error:
            why = error.message
        if not events.answered and not (events.resumable and post.call.session):
            kind = "maybe executed" if post.call.leaves_traces else "not executed"
            failed = self._fail(post, kind, str(post.raw.url), why)
            yield b"event: message\ndata: " + failed.content + b"\n\n"


class _Watched(httpx2.AsyncByteStream):
    """A stream of events that ends with an answer, whatever the server does."""

    def __init__(
        self, exchange: Exchange, post: Post, response: httpx2.Response, stream: AsyncIterator[bytes], begun: bytes,
        events: Events,
    ) -> None:  # fmt: skip
        self._response = response
        self._begun = begun
        self._rest = exchange.rest(post, stream, events)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._begun
        async for chunk in self._rest:
            yield chunk

    async def aclose(self) -> None:
        await _close(self._response)


class _Quiet(httpx2.AsyncByteStream):
    """A stream that ends where it breaks."""

    def __init__(self, stream: Any, limit_s: float | None) -> None:
        self._stream = stream
        self._until = anyio.current_time() + limit_s if limit_s is not None else math.inf

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._stream)
        with suppress(httpx2.HTTPError, OSError, TimeoutError):
            while True:
                with anyio.fail_after(self._until - anyio.current_time()):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                yield chunk

    async def aclose(self) -> None:
        with suppress(httpx2.HTTPError, OSError):
            await self._stream.aclose()


async def _whole(response: httpx2.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > _MOST_BODY:
            raise McpServerFailed(f"An answer is longer than {_MOST_BODY >> 20} MiB.", hint="Ask for less at once.")
    await response.aclose()
    return bytes(content)


async def _close(response: httpx2.Response | None) -> None:
    if response is not None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(1), suppress(httpx2.HTTPError, OSError, RuntimeError):
            await response.aclose()


def _knows_no_session(status: int, content: bytes) -> bool:
    """404, says the specification; some servers say 400 with an error of their own, and the word."""
    try:
        error = json.loads(content)["error"]
        code, said = int(error["code"]), str(error["message"]).lower()
    except (ValueError, TypeError, KeyError, RecursionError):
        return status == 404
    if code in {METHOD_NOT_FOUND, INVALID_PARAMS}:  # it understood the request
        return False
    return status == 404 or (status == 400 and "session" in said)


def _own_headers(response: httpx2.Response) -> list[tuple[bytes, bytes]]:
    return [(key, value) for key, value in response.headers.raw if key.lower() not in _OF_THE_TRANSFER]


def _with_content(response: httpx2.Response, content: bytes) -> httpx2.Response:
    return httpx2.Response(response.status_code, headers=_own_headers(response), content=content,
                           request=response.request)  # fmt: skip


def _as_answer_to(post: Post, message: dict[str, Any]) -> bytes:
    return json.dumps(message | {"id": post.body["id"]}).encode()


def _addressed(
    raw: httpx2.Request, target: Target, content: bytes, session: str, more: Mapping[str, Any]
) -> httpx2.Request:
    left_out = {b"host", b"content-length"}
    headers = httpx2.Headers([(key, value) for key, value in raw.headers.raw if key.lower() not in left_out])
    extensions = dict(raw.extensions) | dict(more)
    if target.host:
        port = target.url.port
        headers["host"] = f"{target.host}:{port}" if port else target.host
        extensions["sni_hostname"] = target.host
    if session:
        headers[SESSION] = session
    return httpx2.Request(raw.method, target.url, headers=headers, content=content or None, extensions=extensions)


def _same_origin(target: Target, response: httpx2.Response) -> httpx2.URL | None:
    """Where a redirect within the same server leads; None for anything else."""
    if response.status_code not in {307, 308}:
        return None
    try:
        url = target.url.join(response.headers.get("location", ""))
    except (httpx2.InvalidURL, ValueError):
        return None
    same = (url.scheme, url.host, url.port) == (target.url.scheme, target.url.host, target.url.port)
    return url if same and not url.userinfo else None


def _pause(response: httpx2.Response) -> float:
    """The seconds of Retry-After; a date is taken for none (RFC 9110, section 10.2.3)."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0.0


def words(error: BaseException) -> str:
    """An error in a line; what is wrong with a header may hold its value."""
    if isinstance(error, httpx2.LocalProtocolError):
        return "LocalProtocolError: the request cannot be sent as it is"
    return f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__
