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
_HEADER = 7  # of a record
_ACK = 11


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
        self._listen()

    def on_frame(self, frame: Frame) -> None:
        """Take a frame of this call."""
        if frame.kind == frames.CREDIT:
            self._credit += frames.number(frame)
            for end in list(self._ends.values()):
                end.acknowledge()
                end.watch()
            self._listen()
        elif frame.kind == frames.DATA:
            # At once: what waits for a program is bounded by the window of its connection.
            self._send(Frame(frames.CREDIT, self.channel, struct.pack(">I", len(frame.payload)), frames.STDIN))
            for record in self._reader.feed(frame.payload):
                self._on_record(record)

    def _on_record(self, record: Record) -> None:
        end = self._ends.get(record.connection)
        if end is None:
            return  # it has gone away meanwhile
        if record.kind == records.DATA:
            end.pending += record.payload
        else:  # what came before is written first
            end.ending, end.closing = True, end.closing or record.kind == records.CLOSE
        end.watch()

    def _listen(self) -> None:
        """Take connections while there is room for one more; others wait where the kernel keeps them."""
        room = len(self._ends) < _MOST_CONNECTIONS and self._credit >= self._reserved + 4 * _HEADER
        self._loop.watch(self._listener.fileno(), select.POLLIN if room else 0, self._on_connection)

    def _on_connection(self, _events: int) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:
            return
        accepted.setblocking(False)
        self._number += 1
        self._ends[self._number] = end = _End(self._number, accepted, self._loop, self)
        self.tell(Record(end.number, records.OPEN))
        end.watch()
        self._listen()

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
    def _reserved(self) -> int:
        """Credit that is kept, so that each connection can always tell its end."""
        return 2 * _HEADER * len(self._ends)

    @property
    def room(self) -> int:
        """How many bytes of a connection can be told of now."""
        return max(0, min(records.MOST, self._credit - self._reserved - _HEADER))

    def tell(self, record: Record) -> None:
        """Send a record to the host."""
        data = records.encode(record)
        self._credit -= len(data)
        self._send(Frame(frames.DATA, self.channel, data, frames.STDOUT))

    def acknowledge(self, number: int, count: int) -> bool:
        """Let the host send so many bytes more of a connection; False if there is no credit to say so now."""
        if self.room < _ACK:
            return False
        self.tell(records.ack(number, count))
        return True

    def close(self, end: _End) -> None:
        """Forget a connection, and what was to be written to it."""
        end.forget()
        self._ends.pop(end.number, None)
        self._listen()


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
        self._taken = 0

    def watch(self) -> None:
        """Wait for what can be done now."""
        events = select.POLLIN if self._open and self._relay.room and not self.closing else 0
        events |= select.POLLOUT if self.pending or self.ending else 0
        self._loop.watch(self._socket.fileno(), events, self._on_ready)

    def forget(self) -> None:
        """Close it."""
        self._loop.watch(self._socket.fileno(), 0, None)
        self._socket.close()

    def acknowledge(self) -> None:
        """Tell the host what the program has taken."""
        if self._taken and self._relay.acknowledge(self.number, self._taken):
            self._taken = 0

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
            self._taken += count
            self.acknowledge()
        if self.ending and not self.pending:
            self.ending = False
            self._socket.shutdown(socket.SHUT_WR)
