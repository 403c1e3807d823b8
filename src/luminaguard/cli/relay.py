"""Between the user's terminal and the command in the machine: standard input, signals, window size."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import struct
import sys
import termios
import tty
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from luminaguard.cli.signals import ENDING, stop_here
from luminaguard.errors import MachineError

if TYPE_CHECKING:
    from luminaguard.microvm.channel import Call
    from luminaguard.microvm.machine import Terminal

__all__ = ["Relay", "terminal_size"]

_SIZE = 1 << 16


def terminal_size() -> Terminal | None:
    """The size of the terminal on standard input, if standard input and output are one."""
    from luminaguard.microvm.machine import Terminal

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))
    return Terminal(rows or 24, columns or 80)


class _Keys:
    """The terminal on standard input: raw while keys go through as they are, as it was before at all other times."""

    def __init__(self) -> None:
        self._saved: list[Any] | None = None

    def pass_through(self) -> None:
        with suppress(termios.error):  # it is gone: a hang-up will tell
            self._saved = termios.tcgetattr(0)
            tty.setraw(0)

    def restore(self) -> None:
        if self._saved is not None:
            with suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, self._saved)
            self._saved = None


class Relay:
    """Feeds one command. Signals go to it; a second one that asks to end ends the machine.

    With a terminal, keys go through as they are while the command runs, and only then: before and
    after it, Ctrl-C interrupts LuminaGuard itself.
    """

    def __init__(self, *, terminal: bool) -> None:
        self._terminal = terminal
        self._keys = _Keys()
        self._call: Call | None = None
        self._asked = 0

    async def feed(self, call: Call) -> None:
        """Copy standard input until it ends; runs until cancelled."""
        self._call = call
        self._take_keys()
        try:
            await self._copy(call)
            await anyio.sleep_forever()
        finally:
            self._call = None
            self._keys.restore()

    def _take_keys(self) -> None:
        if self._terminal and self._call is not None:
            self._keys.pass_through()

    async def hang_up(self) -> None:
        """Nobody reads the command's output any more: tell it as a pipe would."""
        if self._call is not None:
            await self._call.signal(signal.SIGPIPE)

    async def signal(self, number: int) -> bool:
        """Pass a signal on; False when it asks to end and there is no command to take it, or it was the second."""
        if number == signal.SIGTSTP:
            # Nobody in the machine could continue what stops itself there, so its kernel would ignore Ctrl-Z.
            await self._pass(signal.SIGSTOP)
            self._keys.restore()
            stop_here()
            self._take_keys()
        elif number == signal.SIGWINCH:
            size = terminal_size() if self._terminal else None
            if self._call is not None and size is not None:
                await self._call.resize(size.rows, size.columns)
        elif number not in ENDING:
            await self._pass(number)
        else:
            self._asked += 1
            return self._asked == 1 and await self._pass(number)
        return True

    async def _pass(self, number: int) -> bool:
        if self._call is None:
            return False
        try:
            await self._call.signal(number)
        except MachineError:
            return False  # there is no command any more that could take it
        return True

    async def _copy(self, call: Call) -> None:
        try:
            is_file = stat.S_ISREG(os.fstat(0).st_mode)
        except OSError:  # standard input is closed
            await call.write_eof()
            return
        while True:
            if is_file:  # the event loop cannot wait for a regular file, which never blocks for long
                data = await anyio.to_thread.run_sync(os.read, 0, _SIZE)
            else:
                try:
                    await anyio.wait_readable(0)
                except OSError:  # such as /dev/null, which epoll refuses: reading it does not block
                    is_file = True
                    continue
                data = _read()
            if not data:
                if self._terminal:  # keys that go through as they are have no end: the terminal is gone
                    await self._pass(signal.SIGHUP)
                await call.write_eof()
                return
            await call.write(data)


def _read() -> bytes:
    try:
        return os.read(0, _SIZE)
    except OSError as error:
        if error.errno == errno.EIO:  # the terminal is gone, as at its end of file; a hang-up will tell of it
            return b""
        raise
