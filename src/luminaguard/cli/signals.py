"""What signals do to this process.

One that asks it to end raises :class:`Interrupted` in the main thread. Inside :func:`held` it is kept
instead, for whoever can take it there: no import and no publish is left in the middle, and what was
done is told. Once the outcome has been told, :func:`over`, signals change nothing any more.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

__all__ = ["ENDING", "PASSED", "Held", "Interrupted", "held", "install", "interruptible", "over", "tell"]

T = TypeVar("T")

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PASSED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
"""For a command in a machine only; without one they do what they do to any process."""


class Interrupted(BaseException):
    """A signal asked this process to end; ``exit_code`` is what a shell would say of it.

    Not a KeyboardInterrupt: Typer would end the process on one without a word.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class Held:
    """Signals that came and were not taken yet."""

    def __init__(self) -> None:
        self._kept: deque[int] = deque()
        self._wakes, self._waker = socket.socketpair()
        for end in (self._wakes, self._waker):
            end.setblocking(False)
        self._raising = False
        self.told = False
        """Whether a signal that asks to end ever came."""

    async def next(self) -> int:
        """Wait for a signal and take it; one task at a time."""
        import anyio

        while not self._kept:
            await anyio.wait_readable(self._wakes)
            self._wakes.recv(4096)
        return self._kept.popleft()

    async def ending(self) -> int:
        """Wait for a signal that asks to end, and take it; others that come meanwhile are nobody's."""
        while (number := await self.next()) not in ENDING:
            pass
        return number

    def waits(self) -> bool:
        """Whether one that asks to end was kept and not taken yet."""
        return any(number in ENDING for number in self._kept)

    def take(self) -> int:
        """Take the first that asks to end; 0 if there is none."""
        kept, self._kept = self._kept, deque()
        return next((number for number in kept if number in ENDING), 0)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let go of them for what may be interrupted in the middle."""
        self._raising = True
        try:
            if number := self.take():
                raise Interrupted(number)
            yield
        finally:
            self._raising = False

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Keep those for a command, too."""
        saved = {number: signal.signal(number, _on_signal) for number in PASSED}
        try:
            yield
        finally:
            for number, handler in saved.items():
                signal.signal(number, handler)

    def keep(self, number: int) -> None:
        """Called by the handler."""
        if self._raising and number in ENDING:
            raise Interrupted(number)
        self.told = self.told or number in ENDING
        self._kept.append(number)

    def open(self) -> None:
        """Let the kernel wake whoever waits in :meth:`next`."""
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        """The opposite."""
        signal.set_wakeup_fd(-1)
        self._wakes.close()
        self._waker.close()


_holder: list[Held] = []
_deferred: list[int] = []
_SOON_S = 0.002
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_WITH_VALUE = frozenset({"-w", "--workspace", "--publish", "--timeout", "--memory", "--profile", "--task", "--taint"})


def install() -> None:
    """Take over the signals that ask to end, but not those that the caller had ignored (nohup, a job of sh)."""
    # A command in a machine may be sent the last two; whoever sends them must not end us when there is none.
    for number in (*ENDING, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


@contextmanager
def held() -> Iterator[Held]:
    """Keep signals; one that nobody has taken by the end is raised there. Inside another one, it is that one."""
    if _holder:
        yield _holder[0]
        return
    holder = Held()
    _holder.append(holder)
    holder.open()
    try:
        yield holder
    finally:
        holder.close()
        _holder.clear()
    if number := holder.take():
        raise Interrupted(number)


def interruptible(holder: Held, work: Callable[[], Awaitable[T]]) -> T:
    """Run something to its end in a loop of its own; a signal that asks to end does, and is raised."""
    import anyio

    from luminaguard.errors import first_of

    async def run() -> T:
        async with anyio.create_task_group() as tasks:

            async def until_signal() -> None:
                raise Interrupted(await holder.ending())

            tasks.start_soon(until_signal)
            result = await work()
            tasks.cancel_scope.cancel()
        return result

    try:
        return anyio.run(run)
    except BaseExceptionGroup as group:
        raise first_of(group) from None


def over() -> None:
    """From here on nothing is interrupted: it was told how it ended. Python puts other handlers back at its end."""
    for number in (*ENDING, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    _deferred.clear()


def stop_here() -> None:
    """Stop this process as Ctrl-Z does; returns when it is continued."""
    os.kill(os.getpid(), signal.SIGSTOP)


def tell(interrupted: Interrupted) -> None:
    """Say on the way out that nothing came of the command."""
    over()
    if "--json" in _own_flags(sys.argv[1:]):
        import json

        words = {"type": "Interrupted", "message": "The command was interrupted."}
        print(json.dumps({"status": "refused", "exit_code": interrupted.exit_code, "error": words}), flush=True)
    else:
        print("interrupted", file=sys.stderr)


def _own_flags(words: list[str]) -> list[str]:
    """Flags of ours on a command line that may not have been read yet: none of the command that it names."""
    if words[:1] != ["exec"]:
        return words
    flags, rest = [], iter(words[1:])
    for word in rest:
        if word == "--" or not word.startswith("-"):
            break
        flags.append(word)
        if word in _WITH_VALUE:
            next(rest, None)
    return flags


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _holder:
        _holder[0].keep(number)
    elif number not in ENDING:
        return
    elif _not_here(frame):
        # Raised there, it would leave half a module behind, or be lost in the callback of a weak reference.
        _deferred[:] = [number]
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.setitimer(signal.ITIMER_REAL, _SOON_S)
    else:
        raise Interrupted(number)


def _on_alarm(_number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if _deferred:
        _on_signal(_deferred.pop(), frame)


def _not_here(frame: FrameType | None) -> bool:
    """Whether a module is being loaded, the command line still read, or this module at work itself."""
    begun = False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib") or name == __file__:
            return True
        if name.startswith(_PACKAGE):
            if not begun and (os.path.basename(name), frame.f_code.co_name) == ("app.py", "run"):
                return True
            begun = True
        frame = frame.f_back
    return False
