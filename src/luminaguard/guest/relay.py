"""A port on the machine's own loopback whose connections lead to the host: the only way out there can be.

PID 1 moves bytes and understands none of them. What a connection may reach, the host decides.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable

from luminaguard.guest import frames, records
from luminaguard.guest.frames import Frame
from luminaguard.guest.loop import Loop
from luminaguard.guest.records import Record, RecordReader

__all__ = ["Relay"]

_MOST_CONNECTIONS = 64
_ROOM = 64  # of credit, below which nothing is read


class Relay:
    """Listens, and moves bytes as credit allows.

    Args:
        channel: number of the call.
        port: on 127.0.0.1.
        loop: where descriptors are watched.
        send: sends a frame to the host.
    """

    def __init__(self, channel: int, port: int, loop: Loop, send: Callable[[Frame], None]) -> None:
        self.channel = channel
        self._loop = loop
        self._send = send
        self._credit = frames.WINDOW
        self._reader = RecordReader()
        self._ends: dict[int, _End] = {}
        self._number = 0
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(_MOST_CONNECTIONS)
        self._listener.setblocking(False)
        loop.watch(self._listener.fileno(), select.POLLIN, self._on_connection)

    def on_frame(self, frame: Frame) -> None:
        """Take a frame of this call."""
        if frame.kind == frames.CREDIT:
            self._credit += frames.number(frame)
            for end in list(self._ends.values()):
                end.watch()
        elif frame.kind == frames.DATA:
            for record in self._reader.feed(frame.payload):
                self._on_record(record)

    def _on_record(self, record: Record) -> None:
        end = self._ends.get(record.connection)
        self.took(record.size - len(record.payload))
        if end is None:  # it has gone away meanwhile
            self.took(len(record.payload))
        elif record.kind == records.DATA:
            end.pending += record.payload
            end.watch()
        else:  # what came before is written first
            end.ending, end.closing = True, end.closing or record.kind == records.CLOSE
            end.watch()

    def _on_connection(self, _events: int) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return
        if len(self._ends) >= _MOST_CONNECTIONS or self._credit < _ROOM:
            accepted.close()
            return
        accepted.setblocking(False)
        self._number += 1
        self._ends[self._number] = end = _End(self._number, accepted, self._loop, self)
        self.tell(Record(end.number, records.OPEN))
        end.watch()

    @property
    def open(self) -> tuple[int, ...]:
        """Numbers of the connections that there are."""
        return tuple(self._ends)

    def end(self) -> None:
        """Close all."""
        for end in list(self._ends.values()):
            self.close(end)
        self._loop.watch(self._listener.fileno(), 0, None)
        self._listener.close()

    @property
    def room(self) -> int:
        """How many bytes of a connection can be told of now."""
        return max(0, min(records.MOST, self._credit - _ROOM))

    def tell(self, record: Record) -> None:
        """Send a record to the host."""
        data = records.encode(record)
        self._credit -= len(data)
        self._send(Frame(frames.DATA, self.channel, data, frames.STDOUT))

    def took(self, count: int) -> None:
        """Let the host send so many bytes more."""
        if count:
            self._send(Frame(frames.CREDIT, self.channel, struct.pack(">I", count), frames.STDIN))

    def close(self, end: _End) -> None:
        """Forget a connection, and what was to be written to it."""
        self.took(len(end.pending))
        end.forget()
        self._ends.pop(end.number, None)


class _End:
    """The machine's end of one connection."""

    def __init__(self, number: int, connection: socket.socket, loop: Loop, relay: Relay) -> None:
        self.number = number
        self.pending = bytearray()
        self.ending = self.closing = False
        self._socket = connection
        self._loop = loop
        self._relay = relay
        self._open = True

    def watch(self) -> None:
        """Wait for what can be done now."""
        events = select.POLLIN if self._open and self._relay.room and not self.closing else 0
        events |= select.POLLOUT if self.pending or self.ending else 0
        self._loop.watch(self._socket.fileno(), events, self._on_ready)

    def forget(self) -> None:
        """Close it."""
        self._loop.watch(self._socket.fileno(), 0, None)
        self._socket.close()

    def _on_ready(self, events: int) -> None:
        try:
            if events & select.POLLOUT:
                self._write()
            if self.closing and not self.pending:
                self._relay.close(self)
                return
            if events & ~select.POLLOUT and self._open and (room := self._relay.room):
                self._read(room)
        except BlockingIOError:
            pass
        except OSError:
            self._relay.tell(Record(self.number, records.CLOSE))
            self._relay.close(self)
            return
        self.watch()

    def _read(self, room: int) -> None:
        data = self._socket.recv(room)
        if data:
            self._relay.tell(Record(self.number, records.DATA, data))
        else:
            self._open = False
            self._relay.tell(Record(self.number, records.END))

    def _write(self) -> None:
        if self.pending:
            count = self._socket.send(self.pending)
            del self.pending[:count]
            self._relay.took(count)
        if self.ending and not self.pending:
            self.ending = False
            self._socket.shutdown(socket.SHUT_WR)
