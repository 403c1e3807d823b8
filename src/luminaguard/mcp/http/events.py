"""Server-sent events of a response, as far as it must be known whether the answer was among them."""

from __future__ import annotations

import json
from typing import Any

from luminaguard.errors import McpServerFailed

__all__ = ["Events", "answer_in"]

_MOST_MESSAGES = 10_000
_BOM = b"\xef\xbb\xbf"


class Events:
    """Reads events as their bytes come (HTML Living Standard, section 9.2), and gives on those that are messages.

    Attributes:
        answered: whether the answer to the request was seen.
        resumable: whether an event had an id, after which the stream may be asked for again.
        told: whether any message carried data.
    """

    def __init__(self, request_id: Any, most: int) -> None:
        self._id = request_id
        self._most = most
        self._rest = bytearray()
        self._begun = self._held = False
        self._messages = 0
        self._lines: list[bytes] = []
        self._size = 0
        self.answered = False
        self.resumable = False
        self.told = False

    def feed(self, data: bytes) -> bytes:
        """More of the stream; the messages that are whole by now, without comments and with plain line ends.

        Raises:
            McpServerFailed: an event is larger than it may be.
        """
        self._rest += data
        if not self._begun:
            if len(self._rest) < 3 and _BOM.startswith(bytes(self._rest)):
                return b""
            self._begun = True
            self._rest = self._rest.removeprefix(_BOM)
        lines: list[bytes] = []
        if b"\n" in data or b"\r" in data or self._held:  # else a long line would be copied with each of its pieces
            self._held = self._rest.endswith(b"\r")  # its line feed may be on its way
            text = bytes(self._rest[:-1] if self._held else self._rest).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            *lines, rest = text.split(b"\n")
            self._rest = bytearray(rest + b"\r" if self._held else rest)
        whole = b"".join(map(self._take, lines))
        if self._size + len(self._rest) > self._most:
            raise McpServerFailed(
                f"An event is longer than {self._most >> 20} MiB.", hint="The server must send less at once."
            )
        if self._messages > _MOST_MESSAGES:
            raise McpServerFailed(
                f"It sent more than {_MOST_MESSAGES} messages beside its answer.", hint="The server must send less."
            )
        return whole

    def _take(self, line: bytes) -> bytes:
        if line:
            if not line.startswith(b":"):  # a comment
                self._lines.append(line)
                self._size += len(line) + 1
            return b""
        lines, self._lines, self._size = self._lines, [], 0
        fields = [_field(one) for one in lines]
        kind = next((value for name, value in reversed(fields) if name == b"event"), b"message")
        if not lines or kind not in {b"", b"message"}:
            return b""
        self.resumable |= any(name == b"id" and value for name, value in fields)
        data = b"\n".join(value for name, value in fields if name == b"data")
        if data:
            self.told = True
            self._messages += 1
            self.answered = self.answered or answer_in(data, self._id) is not None
        return b"\n".join(lines) + b"\n\n"


def _field(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name, value.removeprefix(b" ")


def answer_in(data: bytes, request_id: Any) -> dict[str, Any] | None:
    """The message in some bytes, if it is the response to a request."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict) or "method" in message or not ("result" in message or "error" in message):
        return None
    error = message.get("error")
    if "error" in message and not (isinstance(error, dict) and isinstance(error.get("code"), int)):
        return None  # such as an answer of OAuth
    # A server that could not read the request answers with no id (JSON-RPC 2.0, section 5).
    mine = message.get("id") == request_id or (message.get("id") is None and "error" in message)
    return message if mine else None
