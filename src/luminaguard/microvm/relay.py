"""The host's end of a machine's relay: each connection that the guest begins, as something to read and write.

The guest is hostile. What one connection may have here unread is bounded, and so is how many there are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.abc

from luminaguard import log
from luminaguard.errors import GuestProtocolError, MachineError, first_of
from luminaguard.guest import frames, records
from luminaguard.guest.records import Record, RecordError, RecordReader
from luminaguard.microvm.channel import Call, CallFailed

__all__ = ["RelayedConnection", "serving"]

_MOST_UNREAD = 1 << 20
_MOST_CONNECTIONS = 64
_END_S = 5.0
"""For the guest to say why its relay has ended."""


class RelayedConnection:
    """A connection of a program in the machine; made by :func:`serving` only."""

    def __init__(self, number: int, write: Callable[[Record], Awaitable[None]]) -> None:
        self._number = number
        self._write = write
        self._unread = bytearray()
        self._under_way = 0
        self._over = False
        self._changed = anyio.Event()

    async def receive(self) -> bytes:
        """The next bytes; none once there will be no more."""
        while not self._unread:
            if self._over:
                return b""
            await self._changed.wait()
        data, self._unread = bytes(self._unread), bytearray()
        return data

    async def send(self, data: bytes) -> None:
        """Write all of it, as fast as the program takes it."""
        for start in range(0, len(data), records.MOST):
            piece = data[start : start + records.MOST]
            while self._under_way + len(piece) > records.WINDOW:
                await self._changed.wait()
            self._under_way += len(piece)
            await self._write(Record(self._number, records.DATA, piece))

    async def end(self) -> None:
        """Say that no more will come."""
        await self._write(Record(self._number, records.END))

    def take(self, record: Record) -> bool:
        """Something has come; False if it cannot be, or is more than may wait here."""
        if record.kind == records.DATA:
            self._unread += record.payload
        elif record.kind == records.ACK:
            self._under_way -= records.acknowledged(record)
        else:
            self._over = True
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
        return len(self._unread) <= _MOST_UNREAD and self._under_way >= 0


class _Relay:
    """What the guest has begun, and the one task that writes.

    Which only the end of all cancels: half a record would spoil those that come after it.
    """

    def __init__(self, call: Call, handle: Callable[[RelayedConnection], Awaitable[None]]) -> None:
        self._call = call
        self._handle = handle
        self._live: dict[int, tuple[RelayedConnection, anyio.CancelScope]] = {}
        self._last = 0
        self._room = anyio.Semaphore(_MOST_CONNECTIONS)
        self.to_write, self.written = anyio.create_memory_object_stream[Record](0)

    async def write(self) -> None:
        """Send what connections give."""
        async for record in self.written:
            await self._call.write(records.encode(record))

    async def listen(self, tasks: anyio.abc.TaskGroup) -> None:
        """Take what the guest sends.

        Raises:
            MachineError: the machine gives no way out, or none any more.
        """
        reader = RecordReader()
        try:
            while data := await self._call.read(frames.STDOUT):
                for record in reader.feed(data):
                    self._take(record, tasks)
        except RecordError as error:
            raise _broken(f"its relay sent what is no record ({error})") from error
        try:
            await self._call.result(_END_S)
        except CallFailed as error:
            raise MachineError(
                f"The machine has no way out ({error.code}): {error.message}", hint="Run it again.",
                kept="The machine was destroyed; the workspace was not touched.",
            ) from error  # fmt: skip
        raise _broken("its relay ended")

    def _take(self, record: Record, tasks: anyio.abc.TaskGroup) -> None:
        number, known = record.connection, self._live.get(record.connection)
        if record.kind == records.OPEN:
            if number <= self._last or len(self._live) >= _MOST_CONNECTIONS:
                raise _broken("it began a connection that it may not")
            self._last = number
            begun = self._live[number] = (RelayedConnection(number, self.to_write.send), anyio.CancelScope())
            tasks.start_soon(self._one, number, *begun)
        elif known is not None:  # else it crossed with our end of it
            is_good = known[0].take(record)
            if record.kind == records.CLOSE:
                del self._live[number]
            if record.kind == records.CLOSE or not is_good:
                known[1].cancel()

    async def _one(self, number: int, connection: RelayedConnection, scope: anyio.CancelScope) -> None:
        with scope:
            async with self._room:  # one that has ended in the machine may still be recorded here
                try:
                    await self._handle(connection)
                except MachineError:
                    raise
                except Exception as error:  # noqa: BLE001  # whatever it met, it is of this connection only
                    log.event("relay.failed", connection=number, error=repr(error))
        if number in self._live:
            await self.to_write.send(Record(number, records.CLOSE))
            self._live.pop(number, None)


@asynccontextmanager
async def serving(call: Call, handle: Callable[[RelayedConnection], Awaitable[None]]) -> AsyncIterator[None]:
    """Answer each connection with ``handle``, in this context; one that raises ends that connection alone.

    Raises:
        GuestProtocolError: the guest sent what is no record, or of no connection.
    """
    relay = _Relay(call, handle)
    try:
        async with relay.to_write, relay.written, anyio.create_task_group() as tasks:
            tasks.start_soon(relay.write)
            tasks.start_soon(relay.listen, tasks)
            yield
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise first_of(group) from None


def _broken(why: str) -> GuestProtocolError:
    return GuestProtocolError(
        f"The guest broke the protocol: {why}.", hint="Treat what ran in it as hostile. The ledger has a record.",
        kept="The machine was destroyed; the workspace was not touched.",
    )  # fmt: skip
