"""A guest that lies: takes the place of the supervisor's class in a test image, and runs as PID 1.

``exec NAME`` chooses the lie; anything else is answered truly. Never part of an image that the
product builds.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from typing import Any

from luminaguard.guest import frames
from luminaguard.guest.frames import Frame
from luminaguard.guest.supervisor import Supervisor

__all__ = ["LIES", "Liar"]

_CHANGES = (
    "path-up", "path-absolute", "path-nul", "path-of-a-link", "device", "huge-size", "long-record", "short-content",
    "wrong-count", "negative-size", "twice", "no-json", "silent-changes", "deep-json", "child-of-nothing",
)  # fmt: skip
_EXEC = (
    "never-answers", "garbage", "unknown-call", "floods-output", "output-after-end", "second-hello", "long-frame",
    "too-much-credit", "answer-no-object", "exit-is-text", "exit-is-huge", "answer-twice", "dies",
)  # fmt: skip
LIES = (*_EXEC, *_CHANGES)


class Liar(Supervisor):
    """Honest until it is asked for one of :data:`LIES`."""

    _lie = ""

    def _exec(self, channel: int, params: dict[str, Any]) -> None:
        name = params["argv"][0]
        if name in _EXEC:
            self._say(channel, name)
            return
        if name in _CHANGES:
            self._lie = name
            params = {**params, "argv": ["true"]}
        super()._exec(channel, params)

    def _raw(self, *parts: bytes) -> None:
        self._out += b"".join(parts)
        self._port.flush(self._out)

    def _say(self, channel: int, lie: str) -> None:
        result = Frame(frames.RESULT, channel, b'{"exit": 0, "out_of_memory": false}')
        ends = [frames.encode(Frame(frames.EOF, channel, stream=s)) for s in (frames.STDOUT, frames.STDERR)]
        full = frames.encode(Frame(frames.DATA, channel, b"x" * frames.MAX_PAYLOAD, frames.STDOUT))
        answers: dict[str, Callable[[], object]] = {
            "never-answers": lambda: None,
            "garbage": lambda: self._raw(os.urandom(64) + b"\xff" * 64),
            "unknown-call": lambda: self._send(Frame(frames.RESULT, channel + 1, b"{}")),
            "floods-output": lambda: self._flood(full),
            "output-after-end": lambda: self._raw(*ends, full),
            "second-hello": self._on_connected,
            "long-frame": lambda: self._raw(struct.pack(">BBHI", frames.DATA, frames.STDOUT, channel, 1 << 31)),
            "too-much-credit": lambda: self._send(
                Frame(frames.CREDIT, channel, b"\xff\xff\xff\xff", frames.STDIN)),
            "answer-no-object": lambda: self._send(Frame(frames.RESULT, channel, b"[1]")),
            "exit-is-text": lambda: self._raw(*ends, frames.encode(Frame(frames.RESULT, channel, b'{"exit": "0"}'))),
            "exit-is-huge": lambda: self._raw(
                *ends, frames.encode(Frame(frames.RESULT, channel, b'{"exit": 1%s}' % (b"0" * 60)))),
            "answer-twice": lambda: self._raw(*ends, *[frames.encode(result)] * 2),
            "dies": lambda: os._exit(3),
        }  # fmt: skip
        answers[lie]()

    def _flood(self, frame: bytes) -> None:
        """Never mind how much the host has asked for."""
        while True:
            self._raw(frame)

    def _start_changes(self, channel: int) -> None:
        if not self._lie:
            super()._start_changes(channel)
            return
        records = _records(self._lie)
        if records is None:
            return
        data, count = records
        for start in range(0, len(data), frames.MAX_PAYLOAD):
            self._send(Frame(frames.DATA, channel, data[start : start + frames.MAX_PAYLOAD], frames.CHANGES))
        self._send(Frame(frames.EOF, channel, stream=frames.CHANGES))
        self._answer(channel, frames.RESULT, {"entries": count, "mode": 0o755})


def _record(content: bytes = b"", **fields: object) -> bytes:
    entry = json.dumps({"p": "x", "t": "file", "m": 0o644, "s": len(content), "l": "", "o": False, **fields}).encode()
    return struct.pack(">I", len(entry)) + entry + content


def _records(lie: str) -> tuple[bytes, object] | None:
    """A change stream and how many entries it is said to have; None for silence."""
    one = {
        "path-up": _record(b"evil", p="../evil"),
        "path-absolute": _record(b"evil", p="/evil"),
        "path-nul": _record(b"evil", p="a\0b"),
        "device": _record(t="other"),
        "huge-size": _record(s=1 << 62),
        "long-record": struct.pack(">I", 1 << 30),
        "short-content": _record(s=100) + b"x",
        "wrong-count": _record(b"x"),
        "negative-size": _record(s=-1),
        "no-json": struct.pack(">I", 4) + b"\xff\xff\xff\xff",
        "deep-json": struct.pack(">I", 30000) + b"[" * 30000,
        "child-of-nothing": _record(b"x", p="nowhere/to/x"),
    }
    match lie:
        case "silent-changes":
            time.sleep(3600)
            return None
        case "twice":
            return _record(b"1") + _record(b"2"), 2
        case "path-of-a-link":
            return _record(p="way", t="symlink", l="/etc") + _record(b"evil", p="way/evil"), 2
        case "wrong-count":
            return one[lie], "many"
        case _:
            return one[lie], 1
