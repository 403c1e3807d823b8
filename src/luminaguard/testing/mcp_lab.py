"""A laboratory of faults: MCP servers over HTTP that do what a test tells them to, and keep what happened.

A server speaks either era of the protocol as far as tools go, listens on a free port of the loopback interface,
counts what was really executed, and ends with its context. Nothing in it waits for time to pass: what hangs hangs
until its client goes or the server is killed, and a test waits for what the log says.
"""

from __future__ import annotations

import json
import secrets
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
import anyio.from_thread
import h11

__all__ = ["LEGACY", "MODERN", "TOOLS", "Fault", "LabServer", "running_lab", "serve_lab"]

MODERN, LEGACY = "2026-07-28", "2025-11-25"
_MOST = 32 << 20
_SESSION = "mcp-session-id"


@dataclass(frozen=True)
class Fault:
    """What a server does with one request.

    Attributes:
        kind: ``status``, ``hang``, ``reset``, ``close``, ``truncate``, ``garbage``, ``wrong-id``, ``huge``, ``drip``,
            ``redirect``, ``lose-session``, ``events``, ``events-cut``, ``events-then-cut``, ``events-then-hang``,
            ``events-later``, ``other-event``, ``wait``, ``text``, ``accepted``.
        executed: whether the tool is executed before that.
        status: the HTTP status of ``status`` and ``redirect``.
        headers: that are added.
        gate: what ``wait`` waits for before it answers.
        bytes: how much ``huge`` sends.
    """

    kind: str
    executed: bool = True
    status: int = 503
    headers: tuple[tuple[str, str], ...] = ()
    gate: anyio.Event | None = None
    bytes: int = 10 << 20


TOOLS: tuple[dict[str, Any], ...] = (
    {"name": "add", "description": "Count a key.", "annotations": {"readOnlyHint": False},
     "inputSchema": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}},
    {"name": "look", "description": "Read the count of a key.",
     "annotations": {"readOnlyHint": True, "idempotentHint": True},
     "inputSchema": {"type": "object", "properties": {"key": {"type": "string"}}}},
)  # fmt: skip


class _Killed(Exception):
    """The connection ends here."""


@dataclass
class LabServer:
    """One server.

    Attributes:
        plan: gives the fault of a request, from its JSON-RPC message; None for none.
        executed: how often each key was counted, by what was really done.
        log: what happened: ``("got", method, name)``, ``("answered", ...)``, ``("gone", ...)`` for a client that left.
        strict_session: the HTTP status for a session that is not known.
        takes_s: how long a call takes, for measurements; tests leave it at nothing.
        end: how a DELETE is answered: as it should be, ``redirect``, or ``endless``.
    """

    era: str = MODERN
    plan: Callable[[dict[str, Any]], Fault | None] = lambda _: None
    tools: tuple[dict[str, Any], ...] = TOOLS
    strict_session: int = 404
    end: str = ""
    takes_s: float = 0.0
    port: int = 0
    executed: Counter[str] = field(default_factory=Counter)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    connections: int = 0
    sessions: set[str] = field(default_factory=set)
    heads: list[dict[str, str]] = field(default_factory=list)
    _changed: anyio.Event = field(default_factory=anyio.Event)
    _scope: anyio.CancelScope | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}/mcp"

    def note(self, what: str, message: dict[str, Any]) -> None:
        """Something happened."""
        name = str((message.get("params") or {}).get("name", ""))
        self.log.append((what, str(message.get("method", "")), name))
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, what: str, count: int = 1, method: str = "tools/call") -> None:
        """Wait until something has happened so often."""
        while sum(entry[:2] == (what, method) for entry in self.log) < count:
            await self._changed.wait()

    def kill(self) -> None:
        """End at once: it does not listen, and all its connections are reset."""
        if self._scope is not None:
            self._scope.cancel()

    async def run(self, listener: Any) -> None:
        """Serve until it is killed."""
        with anyio.CancelScope() as self._scope:
            async with listener:
                await listener.serve(self._serve)

    async def _serve(self, stream: anyio.abc.SocketStream) -> None:
        self.connections += 1
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST)
        try:
            async with stream:
                try:
                    while await self._one(connection, stream):
                        connection.start_next_cycle()
                except (_Killed, anyio.get_cancelled_exc_class()):
                    _reset(stream)
                    raise
        except (_Killed, anyio.BrokenResourceError, anyio.ClosedResourceError, h11.ProtocolError):
            pass

    async def _one(self, connection: h11.Connection, stream: anyio.abc.SocketStream) -> bool:
        """One request; whether there may be another on this connection."""
        head, body = await _read(connection, stream)
        if head is None:
            return False
        headers = {key.decode(): value.decode() for key, value in head.headers}
        self.heads.append(headers)
        say = _Say(connection, stream)
        if await self.answer_beside(say, head.method, head.target.decode(), headers, body):
            return connection.our_state is h11.DONE
        if head.method == b"DELETE":
            self.sessions.discard(headers.get(_SESSION, ""))
            if self.end == "redirect":
                return await say.response(307, b"", [("location", "/elsewhere")])
            if self.end == "endless":
                await say.begin(200, [])
                await say.until_gone()
                return False
            return await say.response(200, b"")
        if head.method != b"POST":
            return await say.response(405, b"")
        message = json.loads(body)
        self.note("got", message)
        fault = self.plan(message)
        if fault is not None:
            return await self._with_fault(say, fault, message, headers)
        return await self._answer(say, message, headers)

    async def answer_beside(self, say: Any, method: bytes, target: str, headers: dict[str, str], body: bytes) -> bool:
        """For servers that do more; whether the request was answered."""
        del say, method, target, headers, body
        return False

    async def _answer(self, say: _Say, message: dict[str, Any], headers: dict[str, str]) -> bool:
        if "id" not in message:
            return await say.response(202, b"")
        if refused := self._refuse_session(message, headers):
            return await say.json(self.strict_session, refused)
        more = []
        if self.era == LEGACY and message["method"] == "initialize":
            self.sessions.add(session := secrets.token_hex(8))
            more = [(_SESSION, session)]
        answer = self.result(message)
        if self.takes_s and message["method"] == "tools/call":
            await anyio.sleep(self.takes_s)
        self.note("answered", message)
        return await say.json(200, answer, more)

    def _refuse_session(self, message: dict[str, Any], headers: dict[str, str]) -> dict[str, Any] | None:
        if self.era != LEGACY or message["method"] in {"initialize", "server/discover"}:
            return None
        if headers.get(_SESSION) in self.sessions:
            return None
        return {"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32000, "message": "No valid session ID"}}

    def result(self, message: dict[str, Any]) -> dict[str, Any]:
        """Execute a request; the whole answer."""
        method, params = message["method"], message.get("params") or {}
        about = {"name": "lab", "version": "1"}
        result: dict[str, Any] | None = None
        if method == "server/discover" and self.era == MODERN:
            result = {"supportedVersions": [MODERN], "capabilities": {"tools": {}}, "resultType": "complete",
                      "ttlMs": 0, "cacheScope": "private", "serverInfo": about}  # fmt: skip
        elif method == "initialize" and self.era == LEGACY:
            result = {"protocolVersion": LEGACY, "capabilities": {"tools": {}}, "serverInfo": about}
        elif method == "tools/list":
            result = {"tools": list(self.tools), "resultType": "complete", "ttlMs": 0, "cacheScope": "private"}
        elif method == "tools/call":
            key = str((params.get("arguments") or {}).get("key", ""))
            if params["name"] == "add":
                self.executed[key] += 1
            result = {"content": [{"type": "text", "text": str(self.executed[key])}], "resultType": "complete"}
        if result is None:
            return {"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32601, "message": "Method not found"}}
        return {"jsonrpc": "2.0", "id": message["id"], "result": result}

    async def _with_fault(self, say: _Say, fault: Fault, message: dict[str, Any], headers: dict[str, str]) -> bool:
        """Do what a fault says; whether there may be another request on this connection."""
        if fault.kind == "lose-session":
            self.sessions.clear()
            return await self._answer(say, message, headers)
        answer = self.result(message) if fault.executed and "id" in message else {"jsonrpc": "2.0", "id": 0}
        if fault.kind == "wait":
            assert fault.gate is not None
            await fault.gate.wait()
        if fault.kind in {"wait", "events"}:
            self.note("answered", message)
        if fault.kind in _WHOLE:
            return await _whole(say, fault, answer)
        if "event" in fault.kind:
            more = await _events(say, fault, answer)
        else:
            more = await _broken(say, fault, answer)
        if not more:
            await say.until_gone()
            self.note("gone", message)
        return more


_WHOLE = frozenset({"status", "redirect", "accepted", "text", "garbage", "wrong-id", "huge", "wait"})
_JSON = ("content-type", "application/json")


async def _whole(say: _Say, fault: Fault, answer: dict[str, Any]) -> bool:
    """Faults of which a whole response is sent."""
    match fault.kind:
        case "status" | "redirect":
            return await say.response(fault.status, b"{}", fault.headers)
        case "accepted":
            return await say.response(202, b"")
        case "text":
            return await say.response(200, b"hello", [("content-type", "text/html")])
        case "garbage":
            return await say.response(200, b'{"jsonrpc": "2.0", \xff', [_JSON])
        case "huge":
            await say.begin(200, [_JSON])
            for _ in range(fault.bytes >> 16):
                await say.data(b" " * (1 << 16))
            return await say.end()
        case _:
            return await say.json(200, answer | {"id": "another"} if fault.kind == "wrong-id" else answer)


async def _broken(say: _Say, fault: Fault, answer: dict[str, Any]) -> bool:
    """Faults of which less comes; it returns where the client is then left waiting."""
    text = json.dumps(answer).encode()
    match fault.kind:
        case "reset":
            raise _Killed
        case "close":
            await say.stream.aclose()
            raise anyio.ClosedResourceError
        case "truncate":
            await say.begin(200, [_JSON, ("content-length", str(len(text)))])
            await say.data(text[: len(text) // 2])
            raise _Killed
        case "drip":
            await say.begin(200, [_JSON, ("content-length", str(len(text)))])
            await say.data(text[:1])
        case "hang":
            pass
        case other:
            raise ValueError(other)
    return False


async def _events(say: _Say, fault: Fault, answer: dict[str, Any]) -> bool:
    """The same for a stream of events."""
    progress = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "x"}}
    await say.begin(200, [("content-type", "text/event-stream")])
    if fault.kind == "events-cut":
        await say.data(b": nothing yet\n\n")
        raise _Killed
    if fault.kind == "other-event":
        await say.data(_event(answer).replace(b"event: message", b"event: other\x1b[31m"))
        return await say.end()
    if fault.kind != "events-later":
        await say.data(_event(progress))
    if fault.kind == "events-then-cut":
        raise _Killed
    if fault.kind == "events-then-hang":
        return False
    if fault.kind == "events-later":
        assert fault.gate is not None
        await fault.gate.wait()
    await say.data(_event(answer))
    return await say.end()


class _Say:
    """Writes responses."""

    def __init__(self, connection: h11.Connection, stream: anyio.abc.SocketStream) -> None:
        self._connection = connection
        self.stream = stream

    async def begin(self, status: int, headers: Any) -> None:
        data = self._connection.send(h11.Response(status_code=status, headers=list(headers)))
        await self.stream.send(data)

    async def data(self, data: bytes) -> None:
        await self.stream.send(self._connection.send(h11.Data(data=data)))

    async def end(self) -> bool:
        await self.stream.send(self._connection.send(h11.EndOfMessage()))
        return self._connection.our_state is h11.DONE

    async def response(self, status: int, body: bytes, headers: Any = ()) -> bool:
        await self.begin(status, [("content-length", str(len(body))), *headers])
        if body:
            await self.data(body)
        return await self.end()

    async def json(self, status: int, message: dict[str, Any], headers: Any = ()) -> bool:
        return await self.response(status, json.dumps(message).encode(),
                                   [("content-type", "application/json"), *headers])  # fmt: skip

    async def until_gone(self) -> None:
        try:
            while await self.stream.receive():
                pass
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            pass


def _event(message: dict[str, Any]) -> bytes:
    return b"event: message\ndata: " + json.dumps(message).encode() + b"\n\n"


async def _read(connection: h11.Connection, stream: anyio.abc.SocketStream) -> tuple[h11.Request | None, bytes]:
    head, body = None, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            try:
                connection.receive_data(await stream.receive())
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return None, b""
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return head, bytes(body)
        else:
            return None, b""


def _reset(stream: anyio.abc.SocketStream) -> None:
    """Close it so that the other side gets a reset, not an end."""
    raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)  # noqa: S610  # of anyio
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@asynccontextmanager
async def serve_lab(*servers: LabServer) -> AsyncIterator[None]:
    """Let servers run for as long as this context lasts."""
    async with anyio.create_task_group() as tasks:
        for server in servers:
            listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=server.port)
            server.port = listener.extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610  # of anyio
            tasks.start_soon(server.run, listener)
        yield
        tasks.cancel_scope.cancel()


@contextmanager
def running_lab(*servers: LabServer) -> Iterator[anyio.from_thread.BlockingPortal]:
    """The same for clients in other processes: the servers run in the loop of a thread, which the portal reaches."""
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(serve_lab(*servers)),
    ):
        yield portal
