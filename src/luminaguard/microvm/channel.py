"""The host's end of the guest protocol.

The guest is hostile. A frame that the protocol does not allow at that moment (an unknown channel,
more bytes than were granted, an answer that is not JSON) ends the connection with
:class:`GuestProtocolError`; silence ends it with :class:`GuestUnresponsive`. What is buffered here
is bounded by the credit that was granted.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio

from luminaguard.errors import CommandTooLong, GuestProtocolError, GuestUnresponsive, MachineError
from luminaguard.guest import frames
from luminaguard.guest.frames import Frame, FrameError, FrameReader

__all__ = ["Call", "CallFailed", "GuestChannel", "open_channel"]

_READ = 1 << 18
_MAX_CHANNEL = 0xFFFF


class CallFailed(Exception):
    """The guest says that a call cannot be done; ``code`` is one of the protocol's words."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class _Inbox:
    """Bytes of one stream that have come and were not taken yet, and the credit still granted."""

    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.granted = frames.WINDOW
        self.taken = 0
        self.eof = False


class Call:
    """One call under way. Its streams are read with :meth:`read`, its end with :meth:`result`."""

    def __init__(self, channel: GuestChannel, number: int, streams: tuple[int, ...]) -> None:
        self._channel = channel
        self.number = number
        self._inboxes = {stream: _Inbox() for stream in streams}
        self._credit = frames.WINDOW  # what we may still send on stdin
        self._outcome: dict[str, Any] | CallFailed | None = None
        self._changed = anyio.Event()

    async def read(self, stream: int) -> bytes:
        """The next bytes of a stream, at most a frame's worth; empty at its end."""
        inbox = self._inboxes[stream]
        while not inbox.chunks:
            if inbox.eof or self._outcome is not None:
                return b""
            await self._wait()
        data = inbox.chunks.popleft()
        inbox.taken += len(data)
        if inbox.taken >= frames.WINDOW // 2 and self._outcome is None and not inbox.eof:
            grant, inbox.taken = inbox.taken, 0
            inbox.granted += grant
            await self._channel.send(Frame(frames.CREDIT, self.number, struct.pack(">I", grant), stream))
        return data

    async def result(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Wait for the call to end.

        Raises:
            CallFailed: the guest answered that it cannot be done.
            GuestUnresponsive: it did not answer within ``timeout_s`` seconds.
        """
        with anyio.move_on_after(timeout_s):
            while self._outcome is None:
                await self._wait()
        if self._outcome is None:
            raise GuestUnresponsive(
                f"The guest did not answer within {timeout_s:g} s.",
                hint="Run the command again, with a larger --memory if it is a big one.",
                kept="The machine was destroyed; the workspace was not touched.",
            )
        if isinstance(self._outcome, CallFailed):
            raise self._outcome
        return self._outcome

    async def write(self, data: bytes) -> None:
        """Send bytes to the command's standard input, as the guest grants room for them."""
        view = memoryview(data)
        while view:
            while self._credit <= 0 and self._outcome is None:
                await self._wait()
            if self._outcome is not None:
                return
            count = min(len(view), self._credit, frames.MAX_PAYLOAD)
            self._credit -= count
            await self._channel.send(Frame(frames.DATA, self.number, bytes(view[:count]), frames.STDIN))
            view = view[count:]

    async def write_eof(self) -> None:
        """End the command's standard input."""
        await self._channel.send(Frame(frames.EOF, self.number, stream=frames.STDIN))

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group; SIGKILL ends all that it started."""
        await self._channel.send(Frame(frames.SIGNAL, self.number, bytes([number])))

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its new size in characters."""
        await self._channel.send(Frame(frames.RESIZE, self.number, struct.pack(">HH", rows, columns)))

    def accept(self, frame: Frame) -> None:
        """Take a frame of this call from the connection. Raises GuestProtocolError."""
        if self._outcome is not None:
            raise _broken("it sent a frame on a call that had ended")
        if frame.kind in {frames.RESULT, frames.FAIL}:
            self._outcome = _outcome(frame)
        elif frame.kind == frames.CREDIT and frame.stream == frames.STDIN:
            self._credit += frames.number(frame)
            if self._credit > frames.WINDOW:
                raise _broken("it granted more credit than was used")
        elif frame.kind in {frames.DATA, frames.EOF} and frame.stream in self._inboxes:
            inbox = self._inboxes[frame.stream]
            inbox.granted -= len(frame.payload)
            if inbox.eof or inbox.granted < 0:
                raise _broken("it sent more than it was granted")
            if frame.kind == frames.EOF:
                inbox.eof = True
            elif frame.payload:
                inbox.chunks.append(frame.payload)
        else:
            raise _broken(f"it sent an unexpected {frame!r}")
        self.wake()

    def wake(self) -> None:
        """Let everyone who waits for this call look again."""
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def _wait(self) -> None:
        if self._channel.failure is None:
            await self._changed.wait()
        if self._channel.failure is not None and self._outcome is None:
            raise self._channel.failure


class GuestChannel:
    """The connection: dispatches frames to calls; made by :func:`open_channel`."""

    def __init__(self, connection: socket.socket, first_call: int = 1) -> None:
        self._socket = connection
        self._reader = FrameReader()
        self._calls: dict[int, Call] = {}
        self._next = first_call
        self._pumping: anyio.CancelScope | None = None
        self._sending = anyio.Lock()
        self._unsent = bytearray()
        self._hello: dict[str, Any] | None = None
        self._begun = False
        self._up = anyio.Event()
        self.failure: MachineError | None = None

    async def hello(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the guest to come up. Raises GuestUnresponsive."""
        with anyio.move_on_after(timeout_s):
            await self._up.wait()
        if self.failure is not None:
            raise self.failure
        if self._hello is None:
            raise GuestUnresponsive(
                f"The guest did not come up within {timeout_s:g} s.",
                hint="Run 'luminaguard doctor'.",
            )
        return self._hello

    async def call(self, method: str, params: dict[str, Any], streams: tuple[int, ...] = ()) -> Call:
        """Start a call whose answer may use the given streams.

        Raises:
            CommandTooLong: the call does not fit into a frame.
            MachineError: the connection has failed.
        """
        if self.failure is not None:
            raise self.failure
        payload = json.dumps({"method": method, "params": params}).encode()
        if len(payload) > frames.MAX_PAYLOAD:
            raise CommandTooLong(
                f"The command line and environment take {len(payload):,} bytes; {frames.MAX_PAYLOAD:,} fit.",
                hint="Put long text into a file in the workspace, or give it on standard input.",
            )
        if self._next > _MAX_CHANNEL:
            raise _broken("all call numbers are used up")
        call = Call(self, self._next, streams)
        self._calls[self._next] = call
        self._next += 1
        await self.send(Frame(frames.CALL, call.number, payload))
        return call

    async def send(self, frame: Frame) -> None:
        """Write one frame whole. Raises MachineError when the guest is gone."""
        async with self._sending:
            # A sender that is cancelled leaves its frame here whole or in part: the next one goes on with it.
            self._unsent += frames.encode(frame)
            while self._unsent:
                try:
                    del self._unsent[: self._socket.send(self._unsent)]
                except BlockingIOError:
                    await anyio.wait_writable(self._socket)
                except OSError as error:
                    raise self.failure or _gone() from error

    def release(self) -> int:
        """Stop reading, for good: another process goes on with the returned number of the next call.

        Raises:
            GuestProtocolError: the guest is in the middle of a frame.
        """
        if self._reader.pending:
            raise _broken("it sent something that nobody had asked for")
        if self._pumping is not None:
            self._pumping.cancel()
        return self._next

    async def pump(self) -> None:
        """Read frames until the connection ends; the failure wakes everyone who waits."""
        with anyio.CancelScope() as self._pumping:
            await self._pump()

    async def _pump(self) -> None:
        try:
            while True:
                await anyio.wait_readable(self._socket)
                try:
                    data = self._socket.recv(_READ)
                except BlockingIOError:
                    continue
                if not data:
                    raise _gone()
                for frame in self._reader.feed(data):
                    self._dispatch(frame)
        except FrameError as error:
            self.failure = _broken(f"its bytes are no frames ({error})")
        except OSError:
            self.failure = _gone()
        except MachineError as error:
            self.failure = error
        self._up.set()
        for call in self._calls.values():
            call.wake()

    def _dispatch(self, frame: Frame) -> None:
        first, self._begun = not self._begun, True
        if frame.kind == frames.HELLO and first and frame.channel == 0:
            self._hello = _json(frame.payload)
            if self._hello.get("protocol") != frames.PROTOCOL:
                raise _broken("it speaks another version of the protocol")
            self._up.set()
            return
        call = self._calls.get(frame.channel)
        if call is None:
            raise _broken(f"it sent {frame!r}, which belongs to no call")
        call.accept(frame)


@asynccontextmanager
async def open_channel(connection: socket.socket, *, first_call: int = 1) -> AsyncIterator[GuestChannel]:
    """A channel over a connected, non-blocking socket, which stays the caller's."""
    channel = GuestChannel(connection, first_call)
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.pump)
        try:
            yield channel
        except Exception as error:  # noqa: BLE001  # raised again below, outside the task group's wrapping
            failure = error
        finally:
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _outcome(frame: Frame) -> dict[str, Any] | CallFailed:
    value = _json(frame.payload)
    if frame.kind == frames.RESULT:
        return value
    return CallFailed(str(value.get("code", ""))[:64], str(value.get("message", ""))[:2000])


def _json(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        raise _broken("it sent an answer that is not JSON") from None
    if not isinstance(value, dict):
        raise _broken("it sent an answer that is not an object")
    return value


def _broken(why: str) -> GuestProtocolError:
    return GuestProtocolError(
        f"The guest broke the protocol: {why}.",
        hint="Treat what ran in it as hostile. The ledger has a record.",
        kept="The machine was destroyed; the workspace was not touched.",
    )


def _gone() -> MachineError:
    return MachineError(
        "The micro-VM ended before it answered.",
        hint="The command may have used more memory than there is: try a larger --memory.",
        kept="The workspace was not touched.",
    )
