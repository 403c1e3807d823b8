"""Messages on two descriptors of this process, a line each; unlike the SDK's, reading them can be cancelled."""

from __future__ import annotations

import os
import select
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter
from pydantic import ValidationError

from luminaguard import log
from luminaguard.errors import McpServerFailed
from luminaguard.mcp.lines import Lines

__all__ = ["stdio_streams"]

_CHUNK = 1 << 16


@asynccontextmanager
async def stdio_streams(reads: int = 0, writes: int = 1) -> AsyncIterator[tuple[Any, Any]]:
    """What the SDK's server reads from and writes to, for as long as this context lasts.

    Args:
        reads: a descriptor; its end is the end of the client.
        writes: a descriptor; a client that reads it no more has gone.
    """
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage | Exception](64)
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage](64)

    async def listen() -> None:
        lines = Lines()
        async with to_server:
            while data := await _read(reads):
                try:
                    whole = lines.feed(data)
                except McpServerFailed as error:  # nothing of what comes can be understood any more
                    log.event("gateway.client_failed", why=error.message)
                    return
                for line in whole:
                    try:
                        message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                    except (ValidationError, RecursionError):
                        log.event("mcp.not_a_message", bytes=len(line))
                        continue
                    await to_server.send(SessionMessage(message))

    async def speak() -> None:
        async with from_server:
            async for message in from_server:
                text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                try:
                    await _write(writes, text.encode() + b"\n")
                except OSError as error:
                    log.event("gateway.client_gone", why=str(error))
                    return

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listen)
        tasks.start_soon(speak)
        yield from_client, to_client
        tasks.cancel_scope.cancel()


async def _read(fd: int) -> bytes:
    try:
        await anyio.wait_readable(fd)
    except OSError:  # such as a file, which epoll refuses: reading it does not block
        pass
    return os.read(fd, _CHUNK)


async def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            await anyio.wait_writable(fd)
            most = select.PIPE_BUF  # so much a ready pipe takes without blocking
        except OSError:
            most = len(view)
        view = view[os.write(fd, view[:most]) :]
