"""A server that speaks the wire protocols of OpenAI and Anthropic as a test tells it to, faults included.

It is no model: it plays a list of behaviours, one a request, and keeps what it was asked. It listens on a free
port of the loopback interface, answers streamed requests as server-sent events, and ends with its context.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.abc
import h11

__all__ = ["Answer", "Behaviour", "Cut", "Hang", "ModelServer", "Raw", "Status", "serve_models"]

_MAX_REQUEST = 32 << 20


@dataclass(frozen=True)
class Answer:
    """Text and tool calls; a call is (name, arguments as the JSON text that is sent, in pieces)."""

    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    usage: tuple[int, int] = (100, 20)
    finish: str = ""


@dataclass(frozen=True)
class Status:
    """An HTTP error."""

    code: int
    headers: tuple[tuple[str, str], ...] = ()
    body: str = '{"error": {"message": "told to", "type": "error"}}'


@dataclass(frozen=True)
class Cut:
    """An answer whose connection is closed after so many events."""

    answer: Answer
    after: int


@dataclass(frozen=True)
class Hang:
    """Nothing comes, or nothing more after so many events, until the client goes."""

    answer: Answer = Answer("never")
    after: int = 0


@dataclass(frozen=True)
class Raw:
    """These bytes are the body of a streamed answer, in these pieces, with so many seconds between them."""

    pieces: tuple[bytes, ...]
    every_s: float = 0.0


Behaviour = Answer | Status | Cut | Hang | Raw


@dataclass
class ModelServer:
    """A running server.

    Attributes:
        behaviours: what the next requests get, in their order; the last one is what all others get.
        requests: (path, headers, body) of each that came.
    """

    port: int
    behaviours: list[Behaviour]
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)

    @property
    def openai(self) -> str:
        """The base address for OpenAI's protocol."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def anthropic(self) -> str:
        """The base address for Anthropic's protocol."""
        return f"http://127.0.0.1:{self.port}"

    def next(self) -> Behaviour:
        """What the request that just came gets."""
        return self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]


@asynccontextmanager
async def serve_models(behaviours: Sequence[Behaviour]) -> AsyncIterator[ModelServer]:
    """Serve, for as long as this context lasts."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    async with listener, anyio.create_task_group() as tasks:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610  # of anyio, not of a database
        server = ModelServer(port, list(behaviours))
        tasks.start_soon(listener.serve, lambda stream: _connection(server, stream))
        yield server
        tasks.cancel_scope.cancel()


async def _connection(server: ModelServer, stream: anyio.abc.SocketStream) -> None:
    async with stream:
        http = h11.Connection(h11.SERVER)
        try:
            while http.our_state is h11.IDLE:
                request, body = await _read(http, stream)
                if request is None:
                    return
                headers = {name.decode(): value.decode() for name, value in request.headers}
                path = request.target.decode().partition("?")[0]
                server.requests.append((path, headers, json.loads(body or b"{}")))
                if not await _answer(server.next(), path, http, stream):
                    return
                http.start_next_cycle()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, h11.ProtocolError):
            return  # the client went away, which is its right


async def _read(http: h11.Connection, stream: anyio.abc.SocketStream) -> tuple[h11.Request | None, bytes]:
    request, body = None, bytearray()
    while True:
        event = http.next_event()
        match event:
            case h11.NEED_DATA:
                try:
                    http.receive_data(await stream.receive())
                except anyio.EndOfStream:
                    http.receive_data(b"")
            case h11.Request():
                request = event
            case h11.Data():
                body += event.data
                if len(body) > _MAX_REQUEST:
                    raise h11.RemoteProtocolError("too large")
            case h11.EndOfMessage():
                return request, bytes(body)
            case _:
                return None, b""


async def _answer(behaviour: Behaviour, path: str, http: h11.Connection, stream: anyio.abc.SocketStream) -> bool:
    """Answer one request; False if the connection is over with it."""

    async def send(event: h11.Event) -> None:
        data = http.send(event)
        if data:
            await stream.send(data)

    if isinstance(behaviour, Status):
        headers = [("content-type", "application/json"), ("content-length", str(len(behaviour.body.encode()))),
                   *behaviour.headers]  # fmt: skip
        await send(h11.Response(status_code=behaviour.code, headers=headers))
        await send(h11.Data(data=behaviour.body.encode()))
        await send(h11.EndOfMessage())
        return True
    await send(h11.Response(status_code=200, headers=[("content-type", "text/event-stream")]))
    if isinstance(behaviour, Raw):
        for piece in behaviour.pieces:
            await send(h11.Data(data=piece))
            await anyio.sleep(behaviour.every_s)
    else:
        answer = behaviour if isinstance(behaviour, Answer) else behaviour.answer
        events = _anthropic(answer) if path.endswith("/messages") else _openai(answer)
        for number, event in enumerate(events):
            if isinstance(behaviour, Cut) and number == behaviour.after:
                return False
            if isinstance(behaviour, Hang) and number == behaviour.after:
                await anyio.sleep_forever()
            await send(h11.Data(data=event))
    await send(h11.EndOfMessage())
    return True


def _pieces(text: str) -> list[str]:
    """A text in pieces, as models send it: of a few characters, and never more than a few hundred of them."""
    size = max(7, len(text) // 200)
    return [text[at : at + size] for at in range(0, len(text), size)]


def _openai(answer: Answer) -> list[bytes]:
    def chunk(delta: dict[str, Any], finish: str | None = None, usage: Any = None) -> bytes:
        body = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "test-model",
                "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}  # fmt: skip
        if usage is not None:
            body |= {"choices": [], "usage": usage}
        return f"data: {json.dumps(body)}\n\n".encode()

    events = [chunk({"role": "assistant", "content": ""})]
    events += [chunk({"content": piece}) for piece in _pieces(answer.text)]
    for index, (name, arguments) in enumerate(answer.calls):
        start = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
        events.append(chunk({"tool_calls": [start]}))
        events += [chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
                   for piece in _pieces(arguments)]  # fmt: skip
    events.append(chunk({}, answer.finish or ("tool_calls" if answer.calls else "stop")))
    total = {"prompt_tokens": answer.usage[0], "completion_tokens": answer.usage[1], "total_tokens": sum(answer.usage)}
    return [*events, chunk({}, usage=total), b"data: [DONE]\n\n"]


def _anthropic(answer: Answer) -> list[bytes]:
    def event(kind: str, **body: Any) -> bytes:
        return f"event: {kind}\ndata: {json.dumps({'type': kind} | body)}\n\n".encode()

    usage = {"input_tokens": answer.usage[0], "output_tokens": 1}
    message: dict[str, Any] = {"id": "m1", "type": "message", "role": "assistant", "model": "test-model", "content": [],
               "stop_reason": None, "stop_sequence": None, "usage": usage}  # fmt: skip
    events = [event("message_start", message=message)]
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if answer.text:
        deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(answer.text)]
        blocks.append(({"type": "text", "text": ""}, deltas))
    for index, (name, arguments) in enumerate(answer.calls):
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in _pieces(arguments)]
        blocks.append(({"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": {}}, deltas))
    for index, (start, deltas) in enumerate(blocks):
        events.append(event("content_block_start", index=index, content_block=start))
        events += [event("content_block_delta", index=index, delta=delta) for delta in deltas]
        events.append(event("content_block_stop", index=index))
    stop = answer.finish or ("tool_use" if answer.calls else "end_turn")
    events.append(event("message_delta", delta={"stop_reason": stop, "stop_sequence": None},
                        usage={"output_tokens": answer.usage[1]}))  # fmt: skip
    return [*events, event("message_stop")]
