"""A QMP client for a handful of commands over an inherited socket.

QMP is JSON, one object a line (QEMU's docs/interop/qmp-spec). QEMU is the program that the guest
attacks first, so its answers are bounded as well.
"""

from __future__ import annotations

import itertools
import json
import socket
from typing import Any

import anyio
import anyio.lowlevel

from luminaguard.errors import MachineError

__all__ = ["Qmp"]

_MAX_LINE = 1 << 20
_MAX_MESSAGES = 1000
ANSWER_TIMEOUT_S = 10.0
"""QEMU answers in milliseconds; one that takes so long is stuck, stopped, or not QEMU any more."""


class Qmp:
    """One connection; commands are sent one after another."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._one_at_a_time = anyio.Lock()
        self._numbers = itertools.count(1)

    async def handshake(self) -> None:
        """Read the greeting and leave negotiation mode."""
        greeting = await self._message()
        if "QMP" not in greeting:
            raise _broken(f"no greeting but {str(greeting)[:200]}")
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it returned.

        Raises:
            MachineError: QEMU refused, closed the connection, sent nonsense, or did not answer in time.
        """
        return (await self.execute_all((command, arguments)))[0]

    async def execute_all(self, *commands: tuple[str, dict[str, Any]], fd: int = -1) -> list[Any]:
        """Run commands in order, sent as one message; a descriptor goes to the first, such as ``add-fd``.

        Raises:
            MachineError: as for :meth:`execute`; commands after the one that was refused have been run.
        """
        async with self._one_at_a_time:
            numbers = [next(self._numbers) for _ in commands]
            lines = (_line(number, *command) for number, command in zip(numbers, commands, strict=True))
            await self._send(b"".join(lines), fd)
            return [await self._answer(number, command) for number, (command, _) in zip(numbers, commands, strict=True)]

    async def _answer(self, number: int, command: str) -> Any:
        with anyio.move_on_after(ANSWER_TIMEOUT_S):
            return await self._wait_for_answer(number, command)
        raise _broken(f"{command}: no answer within {ANSWER_TIMEOUT_S:g} s")

    async def _wait_for_answer(self, number: int, command: str) -> Any:
        for _ in range(_MAX_MESSAGES):
            message = await self._message()
            if message.get("id") != number:
                continue  # an event, or the answer to a command whose caller went away
            if "error" in message:
                raise _broken(f"{command}: {str(message['error'])[:300]}")
            if "return" in message:
                return message["return"]
        raise _broken(f"{command}: {_MAX_MESSAGES} messages and no answer")

    async def _send(self, data: bytes, fd: int) -> None:
        view, fds = memoryview(data), [fd] if fd >= 0 else []
        while view:
            try:
                view, fds = view[socket.send_fds(self._socket, [view], fds) :], []
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError as error:
                raise _broken(f"the connection broke: {error}") from error

    async def _message(self) -> dict[str, Any]:
        # Even when there is always more to read, others must get their turn, and deadlines theirs.
        await anyio.lowlevel.checkpoint()
        while b"\n" not in self._buffer:
            if len(self._buffer) > _MAX_LINE:
                raise _broken("a message is too long")
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
                continue
            except OSError as error:
                raise _broken(f"the connection broke: {error}") from error
            if not data:
                raise _broken("QEMU closed the connection")
            self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _broken(f"not JSON: {line[:200]!r}") from error
        if not isinstance(message, dict):
            raise _broken(f"not an object: {line[:200]!r}")
        return message


def _line(number: int, command: str, arguments: dict[str, Any]) -> bytes:
    return (
        json.dumps({"execute": command, "id": number, **({"arguments": arguments} if arguments else {})}).encode()
        + b"\n"
    )


def _broken(why: str) -> MachineError:
    return MachineError(
        f"QEMU's control channel failed: {why}.",
        hint="Run the command again; 'luminaguard doctor' checks QEMU.",
        kept="The machine was destroyed; the workspace was not touched.",
    )
