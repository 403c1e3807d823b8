"""The guest protocol's frames: one byte stream, many calls, credit on every data stream.

A frame is an 8-byte header and a payload::

    0      1      2          4              8
    | kind | strm | channel  | length       | payload ...
      u8     u8     u16 BE     u32 BE (<= 65536)

``docs/guest-protocol.md`` is the specification. This module is pure: bytes in, frames out. Both
ends use it; both treat a malformed frame as the end of the connection.
"""

from __future__ import annotations

import struct

__all__ = [
    "CALL",
    "CHANGES",
    "CREDIT",
    "DATA",
    "EOF",
    "FAIL",
    "HELLO",
    "MAX_PAYLOAD",
    "PROTOCOL",
    "RESIZE",
    "RESULT",
    "SIGNAL",
    "STDERR",
    "STDIN",
    "STDOUT",
    "WINDOW",
    "Frame",
    "FrameError",
    "FrameReader",
    "encode",
    "number",
]

PROTOCOL = 1
MAX_PAYLOAD = 1 << 16
WINDOW = 1 << 18
"""Bytes that a sender may have under way on one stream before the receiver grants more."""

# Kinds of frames.
HELLO, CALL, RESULT, FAIL, DATA, EOF, CREDIT, SIGNAL, RESIZE = range(1, 10)
# Streams of a call.
STDIN, STDOUT, STDERR, CHANGES = range(4)

_HEADER = struct.Struct(">BBHI")
_KINDS = range(HELLO, RESIZE + 1)
_STREAMS = range(STDIN, CHANGES + 1)


class FrameError(Exception):
    """The bytes are not frames of this protocol."""


class Frame:
    """One frame: ``kind``, ``stream``, ``channel`` and ``payload``."""

    __slots__ = ("channel", "kind", "payload", "stream")

    def __init__(self, kind: int, channel: int = 0, payload: bytes = b"", stream: int = 0) -> None:
        self.kind = kind
        self.stream = stream
        self.channel = channel
        self.payload = payload

    def __repr__(self) -> str:
        return f"Frame({self.kind}, channel={self.channel}, stream={self.stream}, {self.payload[:32]!r})"


def encode(frame: Frame) -> bytes:
    """The bytes of a frame.

    Raises:
        FrameError: the payload is longer than :data:`MAX_PAYLOAD`.
    """
    if len(frame.payload) > MAX_PAYLOAD:
        raise FrameError(f"payload of {len(frame.payload)} bytes")
    return _HEADER.pack(frame.kind, frame.stream, frame.channel, len(frame.payload)) + frame.payload


def number(frame: Frame) -> int:
    """The u32 that is a frame's payload.

    Raises:
        FrameError: it is anything else.
    """
    if len(frame.payload) != 4:
        raise FrameError(f"{len(frame.payload)} bytes where a number of 4 belongs")
    return int.from_bytes(frame.payload, "big")


class FrameReader:
    """Turns any split of the byte stream back into frames; holds at most one partial frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def pending(self) -> bool:
        """Whether part of a frame has come."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Take bytes, return the frames that are whole now.

        Raises:
            FrameError: a header names an unknown kind or stream, or too long a payload.
        """
        self._buffer += data
        frames = []
        offset = 0
        while len(self._buffer) - offset >= _HEADER.size:
            kind, stream, channel, length = _HEADER.unpack_from(self._buffer, offset)
            if kind not in _KINDS or stream not in _STREAMS or length > MAX_PAYLOAD:
                raise FrameError(f"header {bytes(self._buffer[offset : offset + 8]).hex()}")
            start = offset + _HEADER.size
            if len(self._buffer) < start + length:
                break
            frames.append(Frame(kind, channel, bytes(self._buffer[start : start + length]), stream))
            offset = start + length
        del self._buffer[:offset]
        return frames
