"""Carries lines between the SDK and a server that somebody else runs."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import (
    METHOD_NOT_FOUND,
    UNSUPPORTED_PROTOCOL_VERSION,
    ErrorData,
    JSONRPCError,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

from luminaguard import log
from luminaguard.errors import LuminaGuardError, McpServerFailed
from luminaguard.mcp.lines import Lines

__all__ = ["Pipe"]

_DISCOVER_S = 2.0
"""For so long a server may say nothing to the first question of the new era; then it is spoken to as an older one."""


class Pipe:
    """Carries lines between the SDK and a server that somebody else runs."""

    def __init__(self) -> None:
        self._lines = Lines()
        self.to_server, self._from_sdk = anyio.create_memory_object_stream[SessionMessage](0)
        self._to_sdk, self.from_server = anyio.create_memory_object_stream[SessionMessage | Exception](64)
        self.failure: LuminaGuardError | None = None
        self._is_over = False
        self._discover: RequestId | None = None
        self._initialize: RequestId | None = None
        self._given_up = set[RequestId]()

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
            if isinstance(message.message, JSONRPCResponse | JSONRPCError) and message.message.id is not None:
                if message.message.id in self._given_up:
                    await self._was_slow(message.message)
                    continue
                if message.message.id == self._discover:
                    self._discover = None
                if message.message.id == self._initialize:
                    self._initialize = None
            if not await self._tell(message):
                return

    async def given(self) -> AsyncIterator[bytes]:
        """What is to be written to the server."""
        async with self._from_sdk:
            while (message := await self._next()) is not None:
                if isinstance(message.message, JSONRPCRequest) and message.message.method == "server/discover":
                    self._discover = message.message.id
                elif isinstance(message.message, JSONRPCRequest) and message.message.method == "initialize":
                    self._initialize = message.message.id
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                yield text.encode() + b"\n"

    async def _next(self) -> SessionMessage | None:
        """The SDK's next message; None after its last. It says nothing before its first question is answered."""
        while True:
            with anyio.move_on_after(math.inf if self._discover is None else _DISCOVER_S):
                try:
                    return await self._from_sdk.receive()
                except anyio.EndOfStream:
                    return None
            if self._discover is not None:
                await self._answer_for_it(self._discover)

    async def _answer_for_it(self, discover: RequestId) -> None:
        """A server that leaves the question open is an older one; the SDK would wait for ten seconds."""
        self._discover = None
        self._given_up.add(discover)
        unknown = ErrorData(code=METHOD_NOT_FOUND, message="the server says nothing to this")
        await self._tell(SessionMessage(JSONRPCError(jsonrpc="2.0", id=discover, error=unknown)))

    async def _was_slow(self, answer: JSONRPCResponse | JSONRPCError) -> None:
        """It did say something to the first question: if that it is of the new era, the SDK begins anew with it."""
        versions = answer.result.get("supportedVersions") if isinstance(answer, JSONRPCResponse) else None
        if self._initialize is None or not isinstance(versions, list):
            return
        initialize, self._initialize = self._initialize, None
        self._given_up.add(initialize)
        of_the_new = ErrorData(code=UNSUPPORTED_PROTOCOL_VERSION, message="the server is of the new era",
                               data={"supported": versions, "requested": ""})  # fmt: skip
        await self._tell(SessionMessage(JSONRPCError(jsonrpc="2.0", id=initialize, error=of_the_new)))

    async def _tell(self, message: SessionMessage) -> bool:
        """Whether the SDK is still there to be told."""
        try:
            await self._to_sdk.send(message)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            return False
        return True

    def ended(self, failure: LuminaGuardError | None = None) -> None:
        """The server is gone; whoever waits for it is told."""
        self.failure = self.failure or failure
        self._is_over = True
        self._to_sdk.close()

    def close(self) -> None:
        """Nobody talks any more."""
        for stream in (self.to_server, self._from_sdk, self._to_sdk, self.from_server):
            stream.close()
