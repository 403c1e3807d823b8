"""The stand-in for the ``firecracker`` program: arguments, the API socket, the vsock socket."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import encodings.idna  # noqa: F401  # there is no importing in the chroot any more
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from typing import Any

import h11

from luminaguard.guest.port import VSOCK_PORT
from luminaguard.testing.firecracker.machine import Fatal, Machine, Refused

__all__ = ["main"]

SNAPSHOT_VERSION = "10.0.0"
_MAX_BODY = 51_200
_BAD_SNAPSHOT, _BAD_CONFIG = 1, 152
_CONNECT = re.compile(rb"CONNECT (\d+)\n")
_FIRST_PORT = 1 << 30
_MOST_API_CONNECTIONS = 10
_MOST_VSOCK_CONNECTIONS = 1023
_RESET_S = 0.02
"""After a snapshot the host's connections are not answered until the guest has taken note of the reset."""


def main(arguments: list[str], version: str, *, filtered: bool) -> None:
    """Serve the API until killed."""
    if arguments == ["--version"]:
        print(f"Firecracker v{version}\n")
        return
    if arguments == ["--snapshot-version"]:
        print(f"v{SNAPSHOT_VERSION}")
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--id", required=True)
    parser.add_argument("--api-sock", default="/run/firecracker.socket")
    parser.add_argument("--config-file")
    given = parser.parse_args(arguments)
    machine = Machine(given.id, version)
    if filtered:
        _filter()
    program = Program(machine)
    if given.config_file:
        try:
            with open(given.config_file, encoding="utf-8") as file:
                machine.start_from(json.load(file))
        except (Refused, OSError, ValueError, KeyError) as error:
            print(f"Configuration error: {error!r}", file=sys.stderr)
            raise SystemExit(_BAD_CONFIG) from error
        program.listen_for_guest()
    program.serve(given.api_sock)


class Program:
    """The two sockets."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ports = iter(range(_FIRST_PORT, _FIRST_PORT + 1_000_000))
        self._one_request = threading.Lock()
        self._api: set[socket.socket] = set()
        self._guest: set[socket.socket] = set()
        self._reset_until = 0.0

    def serve(self, path: str) -> None:
        """Answer requests on the API socket, one at a time over ten connections, for ever."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)  # like the real one, it removes nothing that is in the way
            listener.listen(10)
            while True:
                connection, _ = listener.accept()
                if len(self._api) >= _MOST_API_CONNECTIONS:
                    with connection, contextlib.suppress(OSError):
                        connection.sendall(b"HTTP/1.1 503 \r\nContent-Length: 0\r\n\r\n")
                    continue
                self._api.add(connection)
                threading.Thread(target=self._serve_api, args=(connection,), daemon=True).start()

    def _serve_api(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, h11.ProtocolError):
            self._converse(connection)
        self._api.discard(connection)

    def _converse(self, connection: socket.socket) -> None:
        http = h11.Connection(h11.SERVER)
        while True:
            request, body = _request(http, connection)
            if request is None:
                return
            with self._one_request:
                status, value = self._answer(request.method.decode(), request.target.decode(), body)
            payload = json.dumps(value).encode() if value is not None else b""
            headers = [("Server", "Firecracker API"), ("Content-Length", str(len(payload)))]
            out = http.send(h11.Response(status_code=status, headers=headers)) or b""
            if payload:
                out += http.send(h11.Data(data=payload)) or b""
            out += http.send(h11.EndOfMessage()) or b""
            connection.sendall(out)
            http.start_next_cycle()

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any] | None]:
        try:
            if len(body) > _MAX_BODY:
                raise Refused("HTTP request payload is too large")
            value = self._machine.request(method, path, json.loads(body) if body else None)
        except Refused as refused:
            return 400, {"fault_message": str(refused)}
        except Fatal as fatal:
            print(f"{fatal}", file=sys.stderr, flush=True)
            os._exit(_BAD_SNAPSHOT)
        if path == "/snapshot/load":
            self.listen_for_guest()
        elif path == "/snapshot/create":
            self._reset_transport()
        return (204, None) if value is None else (200, value)

    def listen_for_guest(self) -> None:
        """Take connections on the vsock socket in the background."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._machine.vsock)
        listener.listen(16)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=self._connect, args=(connection,), daemon=True).start()

    def _reset_transport(self) -> None:
        """A snapshot ends every connection with the guest, whose listeners stay."""
        self._reset_until = time.monotonic() + _RESET_S
        for connection in tuple(self._guest):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _connect(self, connection: socket.socket) -> None:
        if len(self._guest) >= _MOST_VSOCK_CONNECTIONS:
            connection.close()
            return
        self._guest.add(connection)
        try:
            self._talk(connection)
        finally:
            self._guest.discard(connection)

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            # One read: the real program does not wait for the rest of a line either.
            match = _CONNECT.fullmatch(connection.recv(32))
            if not match or self._machine.guest is None:
                return
            while not self._machine.connectable or self._machine.state != "Running":
                if connection.recv(1) == b"":
                    return
            time.sleep(max(0.0, self._reset_until - time.monotonic()))
            if int(match[1]) == VSOCK_PORT:
                connection.sendall(b"OK %d\n" % next(self._ports))
                self._machine.guest.serve(connection)


def _request(http: h11.Connection, connection: socket.socket) -> tuple[h11.Request | None, bytes]:
    request, body = None, b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(connection.recv(1 << 16))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return request, body
        else:
            return None, b""


def _filter() -> None:
    """A seccomp filter that allows everything, so that the threads look like a release's."""
    program = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
    buffer = ctypes.create_string_buffer(program)
    fprog = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", 1, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_ulong(ctypes.addressof(fprog)), 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
