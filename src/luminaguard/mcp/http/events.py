"""Server-sent events of a response, as far as it must be known whether the answer was among them."""

from __future__ import annotations

import json
from typing import Any

from luminaguard.errors import McpServerFailed

__all__ = ["Events"]


class Events:
    """Reads events as their bytes come (HTML Living Standard, section 9.2).

    Attributes:
        answered: whether the answer to the request was seen.
        resumable: whether an event had an id, after which the stream may be asked for again.
        told: whether any event carried data.
    """

    def __init__(self, request_id: Any, most: int) -> None:
        self._id = request_id
        self._most = most
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self.answered = False
        self.resumable = False
        self.told = False

    def feed(self, data: bytes) -> None:
        """More of the stream.

        Raises:
            McpServerFailed: an event is larger than it may be.
        """
        self._line += data
        *lines, rest = self._line.replace(b"\r\n", b"\n").split(b"\n")
        self._line = rest
        for line in lines:
            self._take(bytes(line).rstrip(b"\r"))
        if self._size + len(self._line) > self._most:
            raise McpServerFailed(
                f"An event is longer than {self._most >> 20} MiB.", hint="The server must send less at once."
            )

    def _take(self, line: bytes) -> None:
        if not line:
            self._end_event()
        elif line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._size += len(line)
        elif line.startswith(b"id:"):
            self.resumable = True

    def _end_event(self) -> None:
        data = b"\n".join(self._data)
        self._data, self._size = [], 0
        if data:
            self.told = True
            self.answered = self.answered or answer_in(data, self._id) is not None


def answer_in(data: bytes, request_id: Any) -> dict[str, Any] | None:
    """The message in some bytes, if it is the response to a request."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or "method" in message or not ("result" in message or "error" in message):
        return None
    # A server that could not read the request answers with no id (JSON-RPC 2.0, section 5).
    mine = message.get("id") == request_id or (message.get("id") is None and "error" in message)
    return message if mine else None
