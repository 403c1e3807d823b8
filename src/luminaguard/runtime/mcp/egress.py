"""The way out of a server's machine: an HTTP proxy in front of which stand the rules and the Approval Cliff.

A program in the machine speaks to a port of its own loopback. Each of its requests is an effect: it is made at once
if a rule lets it, it waits for a person otherwise, and it is on record before it leaves. Of what is encrypted
(CONNECT) the host and the port are all that can be seen, and all that is asked for.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import anyio.abc
import anyio.to_thread

from luminaguard.actions.model import Risk, Severity
from luminaguard.approvals import Request, State
from luminaguard.effects.outside import SECRET_HEADERS, NetworkRequest
from luminaguard.errors import Forbidden, LuminaGuardError, McpServerFailed, NotExecuted, first_of
from luminaguard.runtime.mcp.folders import folders_of
from luminaguard.runtime.policy import action_of, judge
from luminaguard.runtime.rehearsal import PROXY_PORT
from luminaguard.storage.keys import load_secret

if TYPE_CHECKING:
    from pathlib import Path

    import h11

    from luminaguard.microvm.relay import RelayedConnection
    from luminaguard.runtime.core import Runtime
    from luminaguard.settings import StdioServer

__all__ = ["Egress", "environment"]

_HEAD_S = 30.0
"""What a program gets to say what it wants."""
_TELL_S = 5.0
"""What it gets to read that it was refused."""
_MOST_WAITING = 20
"""Requests of one server that wait for a person."""
_MOST_HEAD = 64 << 10
_MOST_BODY = 4 << 20
_MOST_ANSWER = 64 << 20
_PREVIEW = 16 << 10
_CHUNK = 1 << 16
_HTTPS = 443
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(:(?P<port>[0-9]{1,5}))?")
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")))
"""IPv6 addresses that stand for IPv4 ones (RFC 6052, RFC 8215, RFC 4291)."""
_HOP = frozenset({"connection", "proxy-connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade",
                  "proxy-authorization", "host", "content-length", "expect"})  # fmt: skip
"""Headers that are between two neighbours (RFC 9110, 7.6.1), and those that are written anew."""


def environment() -> dict[str, str]:
    """How a program in the machine is told of the way out."""
    proxy = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), f"http://127.0.0.1:{PROXY_PORT}")
    return proxy | dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1,::1")  # which are the machine's own


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a program wants: the effect, where that is, and the headers and the body that are sent."""

    effect: NetworkRequest
    host: str
    port: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class _Refused(Exception):
    """What a program is told instead of an answer: a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class _Program:
    """A program's end of its connection; knows whether an answer to it has begun."""

    def __init__(self, connection: RelayedConnection) -> None:
        self._connection = connection
        self.answered = False

    async def receive(self) -> bytes:
        return await self._connection.receive()

    async def send(self, data: bytes) -> None:
        self.answered = True
        await self._connection.send(data)

    async def end(self) -> None:
        await self._connection.end()


class Egress:
    """The way out of one server's machine.

    Args:
        runtime: the parts.
        name: of the server.
        server: its settings.
    """

    def __init__(self, runtime: Runtime, name: str, server: StdioServer) -> None:
        self._runtime = runtime
        self._name = name
        self._server = server
        self._labels = frozenset({f"mcp:{name}"})

    def follow(self, labels: frozenset[str]) -> None:
        """Remember what the machine has been given: its requests follow that."""
        self._labels |= labels

    def way(self, labels: frozenset[str]) -> Callable[[RelayedConnection], Awaitable[None]]:
        """What answers connections of a machine that has a workspace with these labels."""
        self.follow(labels)
        return self.handle

    async def handle(self, connection: RelayedConnection) -> None:
        """Answer one connection, which is one request."""
        import h11

        asked, program = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_HEAD), _Program(connection)
        try:
            with anyio.fail_after(_HEAD_S):
                wanted = await self._read(asked, program)
            await self._make(wanted, asked, program)
        except _Refused as refused:
            await _tell(asked, program, refused.status, str(refused))
        except (h11.RemoteProtocolError, h11.LocalProtocolError) as error:
            await _tell(asked, program, 400, f"This is no request: {error}.")
        except TimeoutError:
            await _tell(asked, program, 408, "It took too long.")
        except LuminaGuardError as error:
            await _tell(asked, program, 403, f"{error.message} {error.hint}")

    async def _make(self, wanted: _Wanted, asked: h11.Connection, program: _Program) -> None:
        """Make a request that may be made, and carry its answer back; an approval that it takes is used up by it."""
        stack, begun = ExitStack(), False
        try:
            await anyio.to_thread.run_sync(self._admit, wanted.effect, stack)
            with anyio.fail_after(self._server.timeout_s):
                out = await _connect(wanted.host, wanted.port)
            async with out:
                begun = True
                if wanted.effect.method == "CONNECT":
                    await _tunnel(asked, program, out, self._server.timeout_s)
                else:
                    with anyio.fail_after(self._server.timeout_s):
                        await _exchange(wanted, program, out)
        except BaseException as error:
            told = _explained(first_of(error), wanted.host, begun=begun)
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(stack.__exit__, type(told), told, told.__traceback__)
            if told is error:
                raise
            raise told from error
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(stack.close)

    def _admit(self, effect: NetworkRequest, stack: ExitStack) -> None:
        """Let it be made, and record that; raises ApprovalNeeded or Forbidden."""
        permits, command, taint = self._runtime.permits, (self._name, effect.method), tuple(sorted(self._labels))
        asks = Request(f"req-{secrets.token_hex(6)}", "", 0, effect.digest, command, 0, 0, 0, State.PENDING,
                       effect="request", taint=taint)  # fmt: skip

        def strictness(folder: Path) -> tuple[Risk, int, Severity]:
            there = replace(asks, workspace=str(folder))
            return judge(self._runtime.policy(folder), action_of(there, effect))[1].strictness

        folder = max(folders_of(self._runtime, self._name, self._server), key=strictness)
        request = replace(asks, workspace=str(folder))
        waiting = [one for one in self._runtime.approvals.list() if one.effect == "request"
                   and one.command[:1] == (self._name,) and one.state is State.PENDING]  # fmt: skip
        if len(waiting) >= _MOST_WAITING and effect.digest not in {one.digest for one in waiting}:
            raise Forbidden(
                f"{len(waiting)} requests of this server wait for a person already.",
                hint="Let them be answered first: luminaguard inbox", kept="It was not asked for.",
            )  # fmt: skip
        permits.clear(request, effect, self._runtime.policy(folder),
                      lambda approved: stack.enter_context(permits.doing(approved)))  # fmt: skip
        self._runtime.ledger.append("network.requested", server=self._name, method=effect.method,
                                    host=urlsplit(effect.url).netloc, digest=effect.digest)  # fmt: skip

    async def _read(self, asked: h11.Connection, program: _Program) -> _Wanted:
        """What a program wants; raises _Refused, or what h11 raises."""
        import h11

        request = await _event(asked, program)
        if not isinstance(request, h11.Request):
            raise _Refused(400, "This is no request.")
        body = bytearray()
        if asked.they_are_waiting_for_100_continue:
            await program.send(asked.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            program.answered = False
        while isinstance(event := await _event(asked, program), h11.Data):
            body += event.data
            if len(body) > _MOST_BODY:
                raise _Refused(413, f"A request may carry {_MOST_BODY >> 20} MiB.")
        method, target = request.method.decode("ascii").upper(), request.target.decode("ascii")
        url, host, port = _tunnel_to(target) if method == "CONNECT" else _address(target)
        headers = [] if method == "CONNECT" else [
            (name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers
            if name.decode("ascii").lower() not in _HOP
        ]  # fmt: skip
        data = bytes(body)
        effect = NetworkRequest(
            method, url, tuple(one for one in headers if one[0].lower() not in SECRET_HEADERS), len(data),
            hashlib.sha256(data).hexdigest() if data else "", data[:_PREVIEW].decode("utf-8", "replace"),
            tuple((name, len(value), self._sealed(value)) for name, value in headers if name.lower() in SECRET_HEADERS),
            self._name,
        )  # fmt: skip
        return _Wanted(effect, host, port, tuple(headers), data)

    def _sealed(self, value: str) -> str:
        """Says whether a secret is the same again, to whoever has this host's key, and nothing else of it."""
        key = load_secret(self._runtime.folders.state / "keys", "egress")
        return hmac.digest(key, value.encode(), "sha256").hex()


def _explained(error: BaseException, host: str, *, begun: bool) -> BaseException:
    """A failure as an error of ours, which says whether anything was sent."""
    if isinstance(error, TimeoutError) and not begun:
        return NotExecuted(f"{host} cannot be reached: it does not answer.", hint="Check the address, and the network.")
    if isinstance(error, OSError | anyio.BrokenResourceError) and not isinstance(error, TimeoutError):
        kind = McpServerFailed if begun else NotExecuted
        return kind(f"{host} cannot be reached: {error}.", hint="Check the address, and the network.")
    return error


def _tunnel_to(target: str) -> tuple[str, str, int]:
    """Address, host and port of a tunnel: a host and a port, and nothing else (RFC 9110, 9.3.6)."""
    if not (found := _AUTHORITY.fullmatch(target)) or not found["port"]:
        raise _Refused(400, "A tunnel leads to HOST:PORT.")
    port = int(found["port"])
    if not 0 < port < 1 << 16:
        raise _Refused(400, "There is no such port.")
    host = found["host"]
    return f"https://{host}{'' if port == _HTTPS else f':{port}'}/", host.strip("[]"), port


def _address(url: str) -> tuple[str, str, int]:
    """The same of a request that is not encrypted."""
    try:
        split = urlsplit(url)
        port = split.port or 80
    except ValueError:
        raise _Refused(400, "This is no address.") from None
    if split.scheme != "http" or not _AUTHORITY.fullmatch(split.netloc) or not split.hostname:
        raise _Refused(400, "The address is none that a proxy is asked for.")
    return url, split.hostname, port


async def _event(asked: h11.Connection, program: _Program) -> object:
    import h11

    while (event := asked.next_event()) is h11.NEED_DATA:
        asked.receive_data(await program.receive())
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
    return host.casefold() == address.casefold() or _is_everybodys(ipaddress.ip_address(address.partition("%")[0]))


def _is_everybodys(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if inside is None and any(address in network for network in _TRANSLATED):
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.is_site_local or (inside is not None and not _is_everybodys(inside)):
            return False
        if inside is not None:
            return True
    return address.is_global and not (address.is_multicast or address.is_reserved)


async def _exchange(wanted: _Wanted, program: _Program, out: anyio.abc.SocketStream) -> None:
    """Send a request, and bring back its answer."""
    import h11

    split = urlsplit(wanted.effect.url)
    target = (split.path or "/") + (f"?{split.query}" if split.query else "")
    sent = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD)
    length = [("Content-Length", str(len(wanted.body)))] if wanted.body else []
    head = [("Host", split.netloc), ("Connection", "close"), *length, *wanted.headers]
    lines = [(name.encode("ascii"), value.encode("latin-1")) for name, value in head]
    await out.send(sent.send(h11.Request(method=wanted.effect.method, target=target, headers=lines)) or b"")
    if wanted.body:
        await out.send(sent.send(h11.Data(data=wanted.body)) or b"")
    sent.send(h11.EndOfMessage())
    await _bring_back(program, out, sent)


async def _tunnel(asked: h11.Connection, program: _Program, out: anyio.abc.SocketStream, idle_s: float) -> None:
    """Carry bytes both ways until one end has had enough, or nothing has come for a while."""
    import h11

    await program.send(asked.send(h11.Response(status_code=200, headers=[])) or b"")
    with anyio.move_on_after(idle_s) as scope:

        def happened() -> None:
            scope.deadline = anyio.current_time() + idle_s

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_send_on, program, out, asked.trailing_data[0], happened)
            await _bring_back(program, out, happened=happened)
            tasks.cancel_scope.cancel()


async def _send_on(program: _Program, out: anyio.abc.SocketStream, first: bytes, happened: Callable[[], None]) -> None:
    try:
        if first:
            await out.send(first)
        while data := await program.receive():
            happened()
            await out.send(data)
        await out.send_eof()
    except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
        return  # the other direction says so


async def _bring_back(
    program: _Program,
    out: anyio.abc.SocketStream,
    answer: h11.Connection | None = None,
    *,
    happened: Callable[[], None] = lambda: None,
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
        happened()
        await program.send(data)
        if answer is not None:
            answer.receive_data(data)
            try:
                while isinstance(event := answer.next_event(), h11.Event) and not isinstance(event, h11.EndOfMessage):
                    pass
            except h11.RemoteProtocolError:
                break
            if event is not h11.NEED_DATA:
                break
    await program.end()


async def _tell(asked: h11.Connection, program: _Program, status: int, sentence: str) -> None:
    import h11

    if program.answered or asked.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
        return  # an answer has begun: it just ends
    text = f"LuminaGuard: {sentence}\n".encode()
    head = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text))), ("Connection", "close")]
    answer = asked.send(h11.Response(status_code=status, headers=head)) or b""
    with anyio.move_on_after(_TELL_S):  # it may not read
        await program.send(answer + (asked.send(h11.Data(data=text)) or b""))
        await program.end()
