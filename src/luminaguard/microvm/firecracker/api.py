"""Firecracker's API: HTTP/1.1 over a Unix socket, one request at a time.

Firecracker is what the guest attacks first, so its answers are bounded, and the socket is opened by
descriptor: a program that has been taken over cannot put a link to another socket in its place.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import h11

from luminaguard.errors import MachineError, StorageError
from luminaguard.microvm.jail.folders import is_socket, open_inside

__all__ = ["Api", "connect_inside"]

ANSWER_TIMEOUT_S = 30.0
_MAX_BODY = 1 << 18
_MAX_REQUEST = 51_200  # more is refused by Firecracker (--http-api-max-payload-size)
_READ = 1 << 16


class Api:
    """One connection, kept alive; made anew after one that broke or whose caller went away.

    Args:
        root: the jail's root folder.
        name: of the socket in it.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._root, self._name = root, name
        self._socket: socket.socket | None = None
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_READ)
        self._one_at_a_time = anyio.Lock()

    async def open(self, alive: Callable[[], bool], timeout_s: float) -> None:
        """Connect as soon as the socket is there.

        Raises:
            MachineError: the program ended, or made no socket in time.
        """
        with anyio.move_on_after(timeout_s):
            while alive():
                try:
                    self._socket = connect_inside(self._root, self._name)
                    return
                except OSError:
                    await anyio.sleep(0.001)
        raise _failed(f"it opened no API within {timeout_s:g} s" if alive() else "it ended before it opened its API")

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()

    async def get(self, path: str) -> dict[str, Any]:
        """What it answers to a GET; raises MachineError."""
        return await self._request("GET", path, None)

    async def put(self, path: str, body: dict[str, Any]) -> None:
        """PUT an object; raises MachineError."""
        await self._request("PUT", path, body)

    async def patch(self, path: str, body: dict[str, Any]) -> None:
        """PATCH an object; raises MachineError."""
        await self._request("PATCH", path, body)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        async with self._one_at_a_time:
            try:
                with anyio.move_on_after(ANSWER_TIMEOUT_S):
                    return await self._exchange(method, path, body)
            except (OSError, h11.ProtocolError) as error:
                self._hang_up()
                raise _failed(f"{method} {path}: the connection broke ({error})") from error
            except BaseException:  # a caller who was cancelled: the answer must not be taken for the next one's
                self._hang_up()
                raise
            self._hang_up()
            raise _failed(f"{method} {path}: no answer within {ANSWER_TIMEOUT_S:g} s")

    def _hang_up(self) -> None:
        """The next request gets a connection of its own."""
        self.close()
        self._socket = None
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_READ)

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if self._socket is None:
            self._socket = connect_inside(self._root, self._name)
        payload = b"" if body is None else json.dumps(body).encode()
        assert len(payload) <= _MAX_REQUEST
        headers = [("Host", "localhost"), ("Accept", "application/json")]
        if body is not None:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(payload)))]
        out = self._http.send(h11.Request(method=method, target=path, headers=headers)) or b""
        if payload:
            out += self._http.send(h11.Data(data=payload)) or b""
        self._http.send(h11.EndOfMessage())
        await _send(self._socket, out)
        status, answer = await self._answer(self._socket)
        self._http.start_next_cycle()
        if status not in {200, 204}:
            raise _refused(method, path, answer)
        return _object(answer) if answer else {}

    async def _answer(self, connection: socket.socket) -> tuple[int, bytes]:
        status, body = 0, b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await _receive(connection))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
                if len(body) > _MAX_BODY:
                    raise _failed("its answer is too long")
            elif isinstance(event, h11.EndOfMessage):
                return status, body
            elif isinstance(event, h11.ConnectionClosed):
                raise _failed("it closed the connection in the middle of an answer")


def connect_inside(root: Path, name: str) -> socket.socket:
    """A non-blocking connection to a socket in a jail's root folder; raises OSError."""
    fd = open_inside(root, name, os.O_PATH)
    try:
        if not is_socket(fd):
            raise ConnectionRefusedError(f"{name} is no socket")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.connect(f"/proc/self/fd/{fd}")
        except BaseException:  # whatever ends this, the socket must not leak
            connection.close()
            raise
        return connection
    finally:
        os.close(fd)


async def _send(connection: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[connection.send(view) :]
        except BlockingIOError:
            await anyio.wait_writable(connection)


async def _receive(connection: socket.socket) -> bytes:
    while True:
        await anyio.wait_readable(connection)
        try:
            return connection.recv(_READ)
        except BlockingIOError:
            continue


def _object(answer: bytes) -> dict[str, Any]:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise _failed("its answer is not JSON") from error
    if not isinstance(value, dict):
        raise _failed("its answer is not an object")
    return value


def _refused(method: str, path: str, answer: bytes) -> MachineError | StorageError:
    try:
        said = _object(answer)
        why = str(said.get("fault_message") or said.get("error") or said)[:500]
    except MachineError:
        why = ascii(answer[:200])
    if "os error 28" in why:  # ENOSPC as Rust prints it
        return StorageError("The disk is full: the machine could not be saved.", hint="Free some space and try again.")
    return _failed(f"{method} {path} was refused: {why}")


def _failed(why: str) -> MachineError:
    return MachineError(
        f"Firecracker failed: {why}.",
        hint="Run the command again; 'luminaguard doctor' checks Firecracker.",
        kept="The machine was destroyed; the workspace was not touched.",
    )
