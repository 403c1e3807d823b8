"""Carries lines between the SDK and a server that somebody else runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter
from pydantic import ValidationError

from luminaguard import log
from luminaguard.errors import LuminaGuardError, McpServerFailed
from luminaguard.mcp.lines import Lines

__all__ = ["Pipe"]


class Pipe:
    """Carries lines between the SDK and a server that somebody else runs."""

    def __init__(self) -> None:
        self._lines = Lines()
        self.to_server, self._from_sdk = anyio.create_memory_object_stream[SessionMessage](0)
        self._to_sdk, self.from_server = anyio.create_memory_object_stream[SessionMessage | Exception](64)
        self.failure: LuminaGuardError | None = None
        self._is_over = False

    @asynccontextmanager
    async def transport(self) -> AsyncIterator[Any]:
        """Both ends, for the SDK."""
        yield self.from_server, self.to_server

    @property
    def gone(self) -> bool:
        """Whether the server has ended."""
        return self._is_over

    def explain(self, _error: object) -> LuminaGuardError | None:
        """Why nothing is to be had of the server any more."""
        return self.failure

    async def take(self, data: bytes) -> None:
        """What the server printed; what is no message of the protocol is left out, as the protocol says."""
        try:
            lines = self._lines.feed(data)
        except McpServerFailed as error:
            self.ended(error)
            return
        for line in lines:
            try:
                message = SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
            except (ValidationError, RecursionError):
                log.event("mcp.not_a_message", bytes=len(line))
                continue
            try:
                await self._to_sdk.send(message)
            except (anyio.ClosedResourceError, anyio.BrokenResourceError):
                return

    async def given(self) -> AsyncIterator[bytes]:
        """What is to be written to the server."""
        async with self._from_sdk:
            async for message in self._from_sdk:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                yield text.encode() + b"\n"

    def ended(self, failure: LuminaGuardError | None = None) -> None:
        """The server is gone; whoever waits for it is told."""
        self.failure = self.failure or failure
        self._is_over = True
        self._to_sdk.close()

    def close(self) -> None:
        """Nobody talks any more."""
        for stream in (self.to_server, self._from_sdk, self._to_sdk, self.from_server):
            stream.close()
