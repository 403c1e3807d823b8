"""The way to the host: a virtio-serial port where there is one, otherwise a vsock listener.

Both hand bytes to the supervisor and take bytes from it. A serial port is connected once and for
all. A vsock connection is lost when the machine is saved (the device resets it), so there the
listener is what lasts: the next connection finds the supervisor as the last one left it.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable

from luminaguard.guest.loop import Loop

__all__ = ["VSOCK_PORT", "SerialPort", "VsockPort"]

VSOCK_PORT = 1024
_HOST_CID = 2
_READ_SIZE, _WRITE_SIZE = 1 << 15, 1 << 17


class SerialPort:
    """A virtio-serial port, already open and non-blocking."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def start(self, loop: Loop, connected: Callable[[], None], received: Callable[[bytes], None],
              lost: Callable[[], None]) -> None:  # fmt: skip
        """Watch the port; it never gets lost."""
        del lost
        self._loop, self._received = loop, received
        loop.watch(self._fd, select.POLLIN, self._on_ready)
        connected()

    def flush(self, out: bytearray) -> None:
        """Write what the host takes now, and go on when it takes more."""
        full = _write(self._fd, out)
        self._loop.watch(self._fd, select.POLLIN | (select.POLLOUT if full else 0), self._on_ready)

    def _on_ready(self, events: int) -> None:
        if not events & (select.POLLIN | select.POLLHUP):
            return
        try:
            data = os.read(self._fd, _READ_SIZE)
        except BlockingIOError:
            return
        if data:
            self._received(data)
        else:
            time.sleep(0.005)  # virtio-serial reads nothing while the host side is not connected


class VsockPort:
    """A listener for one connection of the host at a time (vsock(7))."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        self._listener.bind((socket.VMADDR_CID_ANY, VSOCK_PORT))
        self._listener.listen(1)
        self._listener.setblocking(False)
        self._connection: socket.socket | None = None

    def start(self, loop: Loop, connected: Callable[[], None], received: Callable[[bytes], None],
              lost: Callable[[], None]) -> None:  # fmt: skip
        """Wait for connections."""
        self._loop, self._connected, self._received, self._lost = loop, connected, received, lost
        loop.watch(self._listener.fileno(), select.POLLIN, self._on_connection)

    def flush(self, out: bytearray) -> None:
        """Write what the host takes now; without a host, nobody misses it."""
        if self._connection is None:
            out.clear()
            return
        try:
            full = _write(self._connection.fileno(), out)
        except OSError:
            self._end()
            return
        events = select.POLLIN | (select.POLLOUT if full else 0)
        self._loop.watch(self._connection.fileno(), events, self._on_ready)

    def _on_connection(self, _events: int) -> None:
        try:
            connection, (cid, _) = self._listener.accept()
        except OSError as error:
            if error.errno in {errno.EAGAIN, errno.ECONNABORTED, errno.ECONNRESET}:
                return
            raise
        if cid != _HOST_CID:
            connection.close()
            return
        connection.setblocking(False)
        self._connection = connection
        self._loop.watch(self._listener.fileno(), 0, None)
        self._loop.watch(connection.fileno(), select.POLLIN, self._on_ready)
        self._connected()

    def _on_ready(self, events: int) -> None:
        if self._connection is None or not events & ~select.POLLOUT:
            return
        try:
            data = self._connection.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # reset: the host is gone, or the machine was saved
            data = b""
        if data:
            self._received(data)
        else:
            self._end()

    def _end(self) -> None:
        assert self._connection is not None
        self._loop.watch(self._connection.fileno(), 0, None)
        self._connection.close()
        self._connection = None
        self._lost()
        self._loop.watch(self._listener.fileno(), select.POLLIN, self._on_connection)


def _write(fd: int, out: bytearray) -> bool:
    """Write and remove bytes until there are none (False) or the other side takes no more (True)."""
    while out:
        try:
            del out[: os.write(fd, out[:_WRITE_SIZE])]
        except BlockingIOError:
            return True
    return False
