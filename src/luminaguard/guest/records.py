"""Records of a relay: many connections on the two streams of one call. Pure; both ends use it.

::

    | connection | kind | length  | payload ...
      u32 BE       u8     u16 BE (<= 32768)

DATA has a payload of at least a byte, ACK one of four bytes (u32 BE), others have none.
"""

from __future__ import annotations

import struct

__all__ = ["ACK", "CLOSE", "DATA", "END", "MOST", "OPEN", "WINDOW", "Record", "RecordError", "RecordReader", "ack",
           "acknowledged", "encode"]  # fmt: skip

OPEN, DATA, END, CLOSE, ACK = range(1, 6)
"""A connection begins; its bytes; no more of them will come; it is over, both ways; so many bytes were taken."""
MOST = 1 << 15
WINDOW = 1 << 16
"""Of one connection, bytes that the host sends before the guest has acknowledged some: a program that does not read
holds up itself alone."""
_HEADER = struct.Struct(">IBH")
_ACK_SIZE = 4


class RecordError(Exception):
    """The bytes are not records of this form."""


class Record:
    """One record."""

    __slots__ = ("connection", "kind", "payload")

    def __init__(self, connection: int, kind: int, payload: bytes = b"") -> None:
        self.connection = connection
        self.kind = kind
        self.payload = payload

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return _HEADER.size + len(self.payload)


def encode(record: Record) -> bytes:
    """The bytes of a record; raises RecordError if its payload is longer than :data:`MOST`."""
    if len(record.payload) > MOST:
        raise RecordError(f"payload of {len(record.payload)} bytes")
    return _HEADER.pack(record.connection, record.kind, len(record.payload)) + record.payload


def ack(connection: int, count: int) -> Record:
    """Says that so many bytes of a connection were taken."""
    return Record(connection, ACK, count.to_bytes(_ACK_SIZE, "big"))


def acknowledged(record: Record) -> int:
    """How many bytes an ACK is about."""
    return int.from_bytes(record.payload, "big")


class RecordReader:
    """Turns any split of the stream back into records; holds at most a part of one."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Record]:
        """Take bytes, return the records that are whole now; raises RecordError."""
        self._buffer += data
        found = []
        offset = 0
        while len(self._buffer) - offset >= _HEADER.size:
            connection, kind, length = _HEADER.unpack_from(self._buffer, offset)
            fits = {DATA: 1 <= length <= MOST, ACK: length == _ACK_SIZE}.get(kind, length == 0)
            if not OPEN <= kind <= ACK or not fits:
                raise RecordError(f"header {bytes(self._buffer[offset : offset + _HEADER.size]).hex()}")
            start = offset + _HEADER.size
            if len(self._buffer) < start + length:
                break
            found.append(Record(connection, kind, bytes(self._buffer[start : start + length])))
            offset = start + length
        del self._buffer[:offset]
        return found
