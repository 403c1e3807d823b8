"""The way out of a server's machine: an HTTP proxy in front of which stand the rules and the Approval Cliff.

A program in the machine speaks to a port of its own loopback. Each of its requests is an effect: it is made at once
if a rule lets it, it waits for a person otherwise, and it is on record before it leaves. Of what is encrypted
(CONNECT) the host and the port are all that can be seen, and all that is asked for.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import anyio.abc
import anyio.to_thread

from luminaguard.approvals import Request, State
from luminaguard.effects.outside import SECRET_HEADERS, NetworkRequest
from luminaguard.errors import LuminaGuardError, McpServerFailed, NotExecuted
from luminaguard.runtime.mcp.folders import folder_of
from luminaguard.runtime.rehearsal import PROXY_PORT

if TYPE_CHECKING:
    import h11

    from luminaguard.microvm.relay import RelayedConnection
    from luminaguard.runtime.core import Runtime
    from luminaguard.settings import StdioServer

__all__ = ["Egress", "environment"]

_HEAD_S = 30.0
"""What a program gets to say what it wants."""
_MOST_HEAD = 64 << 10
_MOST_BODY = 4 << 20
_MOST_ANSWER = 64 << 20
_PREVIEW = 16 << 10
_CHUNK = 1 << 16
_HOP = frozenset({"connection", "proxy-connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade",
                  "proxy-authorization", "host", "content-length", "expect"})  # fmt: skip
"""Headers that are between two neighbours (RFC 9110, 7.6.1), and those that are written anew."""


def environment() -> dict[str, str]:
    """How a program in the machine is told of the way out."""
    proxy = f"http://127.0.0.1:{PROXY_PORT}"
    return dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a program wants: the effect, where that is, and the headers and the body that are sent."""

    effect: NetworkRequest
    host: str
    port: int
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


class _Refused(Exception):
    """What a program is told instead of an answer: a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Egress:
    """The way out of one server's machine."""

    def __init__(self, runtime: Runtime, name: str, server: StdioServer) -> None:
        self._runtime = runtime
        self._name = name
        self._server = server

    async def handle(self, connection: RelayedConnection) -> None:
        """Answer one connection, which is one request."""
        import h11

        asked = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD)
        try:
            with anyio.fail_after(_HEAD_S):
                wanted = await _read(asked, connection)
            await self._make(wanted, asked, connection)
        except _Refused as refused:
            await _tell(asked, connection, refused.status, str(refused))
        except h11.RemoteProtocolError as error:
            await _tell(asked, connection, 400, f"This is no request: {error}.")
        except TimeoutError:
            await _tell(asked, connection, 408, "It took too long.")
        except LuminaGuardError as error:
            await _tell(asked, connection, 403, f"{error.message} {error.hint}")

    async def _make(self, wanted: _Wanted, asked: h11.Connection, connection: RelayedConnection) -> None:
        """Make a request that may be made, and carry its answer back; an approval that it takes is used up by it."""
        stack = ExitStack()

        def admit() -> None:
            self._admit(wanted.effect, stack)

        begun = False
        try:
            await anyio.to_thread.run_sync(admit)
            with anyio.fail_after(self._server.timeout_s):
                async with await _connect(wanted.host, wanted.port) as out:
                    begun = True
                    await _carry(wanted, asked, connection, out)
        except BaseException as error:
            told = error
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                told = (McpServerFailed if begun else NotExecuted)(
                    f"{wanted.host} cannot be reached: {error}.", hint="Check the address, and the network."
                )
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(stack.__exit__, type(told), told, told.__traceback__)
            if told is error:
                raise
            raise told from error
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(stack.close)

    def _admit(self, effect: NetworkRequest, stack: ExitStack) -> None:
        """Let it be made, and record that; raises ApprovalNeeded or Forbidden."""
        decisions, folder = self._runtime.decisions, folder_of(self._runtime, self._name, self._server)
        request = Request(f"req-{secrets.token_hex(6)}", str(folder), 0, effect.digest, (self._name, effect.method),
                          0, 0, 0, State.PENDING, effect="request", taint=(f"mcp:{self._name}",))  # fmt: skip
        decisions.clear(request, effect, self._runtime.policy(folder),
                        lambda approved: stack.enter_context(decisions.doing(approved)))  # fmt: skip
        self._runtime.ledger.append("network.requested", server=self._name, method=effect.method,
                                    host=urlsplit(effect.url).netloc, digest=effect.digest)  # fmt: skip


async def _read(asked: h11.Connection, connection: RelayedConnection) -> _Wanted:
    import h11

    request = await _event(asked, connection)
    if not isinstance(request, h11.Request):
        raise _Refused(400, "This is no request.")
    body = bytearray()
    if asked.they_are_waiting_for_100_continue:
        await connection.send(asked.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
    while isinstance(event := await _event(asked, connection), h11.Data):
        body += event.data
        if len(body) > _MOST_BODY:
            raise _Refused(413, f"A request may carry {_MOST_BODY >> 20} MiB.")
    method, target = request.method.decode("ascii").upper(), request.target.decode("ascii")
    url = f"https://{target}/" if method == "CONNECT" else target
    split = urlsplit("")
    host, port = "", 0
    try:
        split = urlsplit(url)
        host, port = split.hostname or "", split.port or (443 if method == "CONNECT" else 80)
    except ValueError:
        host = ""
    if not host or split.scheme != ("https" if method == "CONNECT" else "http") or split.username is not None:
        raise _Refused(400, "The address is none that a proxy is asked for.")
    headers = tuple((name, value) for name, value in request.headers if name.decode("ascii").lower() not in _HOP)
    shown = tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in headers
                  if name.decode("ascii").lower() not in SECRET_HEADERS)  # fmt: skip
    data = bytes(body)
    effect = NetworkRequest(
        method, url, () if method == "CONNECT" else shown, len(data),
        hashlib.sha256(data).hexdigest() if data else "", data[:_PREVIEW].decode("utf-8", "replace"),
    )  # fmt: skip
    return _Wanted(effect, host, port, headers, data)


async def _event(asked: h11.Connection, connection: RelayedConnection) -> object:
    import h11

    while (event := asked.next_event()) is h11.NEED_DATA:
        asked.receive_data(await connection.receive())
    return event


async def _connect(host: str, port: int) -> anyio.abc.SocketStream:
    """Connect to a host that the rules have let through, at an address that is what its name says."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = sorted({str(one[4][0]) for one in found}, key=lambda one: ":" in one)
    for address in addresses:
        if not _is_what_it_says(host, address):
            raise NotExecuted(
                f"The name {host!a} leads to {address}, which is of this machine or its own network.",
                hint="The rules were asked for a name that does not say so. Use the address itself if you mean it.",
            )
    failure: OSError = OSError("it has no address")
    for address in addresses:
        try:
            return await anyio.connect_tcp(address, port)
        except OSError as error:
            failure = error
    raise failure


def _is_what_it_says(host: str, address: str) -> bool:
    """Whether rules that judged the host's name knew that it is of this machine or its own network."""
    if ipaddress.ip_address(address.partition("%")[0]).is_global:
        return True
    name = host.casefold().removesuffix(".")
    return name in {address.casefold(), "localhost"}


async def _carry(
    wanted: _Wanted, asked: h11.Connection, connection: RelayedConnection, out: anyio.abc.SocketStream
) -> None:
    """Send the request, or open the tunnel, and bring back what comes."""
    import h11

    if wanted.effect.method == "CONNECT":
        await connection.send(asked.send(h11.Response(status_code=200, headers=[])) or b"")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_send_on, connection, out, asked.trailing_data[0])
            await _bring_back(connection, out)
            tasks.cancel_scope.cancel()
        return
    split = urlsplit(wanted.effect.url)
    target = (split.path or "/") + (f"?{split.query}" if split.query else "")
    sent = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD)
    length = [(b"Content-Length", str(len(wanted.body)).encode())] if wanted.body else []
    head = [(b"Host", split.netloc.encode("ascii")), (b"Connection", b"close"), *length, *wanted.headers]
    await out.send(sent.send(h11.Request(method=wanted.effect.method, target=target, headers=head)) or b"")
    if wanted.body:
        await out.send(sent.send(h11.Data(data=wanted.body)) or b"")
    sent.send(h11.EndOfMessage())
    await _bring_back(connection, out, sent)


async def _send_on(connection: RelayedConnection, out: anyio.abc.SocketStream, first: bytes) -> None:
    try:
        if first:
            await out.send(first)
        while data := await connection.receive():
            await out.send(data)
        await out.send_eof()
    except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
        return  # the other direction says so


async def _bring_back(
    connection: RelayedConnection, out: anyio.abc.SocketStream, answer: h11.Connection | None = None
) -> None:
    """Copy to the program what comes: all of it, or one whole answer."""
    import h11

    size = 0
    while True:
        try:
            data = await out.receive(_CHUNK)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            break
        size += len(data)
        if size > _MOST_ANSWER:
            raise McpServerFailed(f"More than {_MOST_ANSWER >> 20} MiB came.", hint="Ask for less.")
        await connection.send(data)
        if answer is not None:
            answer.receive_data(data)
            try:
                while isinstance(event := answer.next_event(), h11.Event) and not isinstance(event, h11.EndOfMessage):
                    pass
            except h11.RemoteProtocolError:
                break
            if event is not h11.NEED_DATA:
                break
    await connection.end()


async def _tell(asked: h11.Connection, connection: RelayedConnection, status: int, sentence: str) -> None:
    import h11

    if asked.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
        return  # an answer has begun: it just ends
    text = f"LuminaGuard: {sentence}\n".encode()
    head = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text))), ("Connection", "close")]
    answer = asked.send(h11.Response(status_code=status, headers=head)) or b""
    await connection.send(answer + (asked.send(h11.Data(data=text)) or b""))
    await connection.end()
