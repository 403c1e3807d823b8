"""Messages of the stdio transport: one JSON object a line, bounded."""

from __future__ import annotations

from luminaguard.errors import McpServerFailed

__all__ = ["MOST_LINE", "Lines"]

MOST_LINE = 8 << 20
"""Bytes of one message."""


class Lines:
    """Splits what comes into lines.

    Args:
        most: bytes that a line may have.
    """

    def __init__(self, most: int = MOST_LINE) -> None:
        self._most = most
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, without their ends.

        Raises:
            McpServerFailed: a line is longer than it may be; nothing more is taken.
        """
        self._rest += data
        whole: list[bytes] = []
        if b"\n" in data:  # else a long line would be copied with each of its pieces
            *whole, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
        if max(map(len, (*whole, self._rest))) > self._most:
            self._rest.clear()
            raise McpServerFailed(
                f"A message is longer than {self._most >> 20} MiB.", hint="The server must send less at once."
            )
        return whole
