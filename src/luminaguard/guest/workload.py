"""One running command: its three streams (or its terminal), its end, and what is left of it."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import termios
import time
from collections.abc import Callable

from luminaguard.guest import frames
from luminaguard.guest.frames import Frame
from luminaguard.guest.launcher import Launcher
from luminaguard.guest.loop import Loop

TYPE_CHECKING = False  # typing takes 70 ms of an emulated boot
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Workload", "set_size"]

_READ_SIZE = 1 << 15


class Workload:
    """Moves bytes between the command and the host, as credit allows, until nothing is left to move.

    Args:
        channel: number of the call.
        launcher: what has become the command.
        pty: PID 1's end of the command's terminal, or -1.
        loop: where descriptors are watched.
        send: sends a frame to the host.
    """

    def __init__(self, channel: int, launcher: Launcher, pty: int, loop: Loop, send: Callable[[Frame], None]) -> None:
        self.channel = channel
        self.pid = launcher.pid
        self._group = launcher.group
        self._launcher = launcher
        self._trouble = ""
        self._starting = True
        self._pty = pty
        self._loop = loop
        self._send = send
        self._stdin = pty if pty >= 0 else launcher.stdin  # -1 when closed
        self._outputs = {frames.STDOUT: pty} if pty >= 0 else {
            frames.STDOUT: launcher.stdout, frames.STDERR: launcher.stderr}  # fmt: skip
        self._credit = dict.fromkeys(self._outputs, frames.WINDOW)
        self._pending = bytearray()  # received for stdin, not written yet
        self._stdin_eof = False
        self._own_keys = 0
        self._status: int | None = None
        if pty >= 0:
            launcher.close_pipes()
        loop.watch(launcher.said, select.POLLIN, self._on_said)
        for stream in self._outputs:
            self._watch_output(stream)

    # -- what the host sends ------------------------------------------------------------------

    def on_frame(self, frame: Frame) -> None:
        """Take a frame of this call."""
        if frame.kind == frames.DATA:
            self._pending += frame.payload
            self._watch_stdin()
        elif frame.kind == frames.EOF:
            self._stdin_eof = True
            self._watch_stdin()
        elif frame.kind == frames.CREDIT and frame.stream in self._credit:
            self._credit[frame.stream] += frames.number(frame)
            self._watch_output(frame.stream)
        elif frame.kind == frames.SIGNAL and frame.payload:
            self._signal(frame.payload[0])
        elif frame.kind == frames.RESIZE and self._pty >= 0 and len(frame.payload) == 4:
            rows, columns = struct.unpack(">HH", frame.payload)
            set_size(self._pty, rows, columns)

    def _signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self._group.kill()
        elif self._status is None and 0 < number < 32:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                pass  # it has just ended

    # -- what the command does ------------------------------------------------------------------

    def on_exit(self, status: int) -> None:
        """The command has ended: what it left running ends with it."""
        self._status = status
        if self._group.populated:
            self._group.kill()
        self._close_stdin()

    def never_started(self, trouble: str) -> None:
        """There is no child any more that could become the command."""
        self._end_of_start(trouble)
        self._status = 127 << 8
        self._close_stdin()

    def _on_said(self, _events: int) -> None:
        self._loop.watch(self._launcher.said, 0, None)
        self._end_of_start(self._launcher.verdict())

    def _end_of_start(self, trouble: str) -> None:
        self._starting, self._trouble = False, trouble

    def result(self) -> dict[str, Any] | None:
        """The call's result once all output is sent and nothing of the command is left, else None.

        One with a ``code`` says why the command could not be started.
        """
        # A terminal's output ends with EIO once all is read.
        if self._status is None or self._outputs or self._starting:
            return None
        if self._pty >= 0:
            self._loop.watch(self._pty, 0, None)
            os.close(self._pty)
        self._reap()
        if self._trouble:
            code, _, message = self._trouble.partition(":")
            return {"code": code, "message": message}
        if os.WIFSIGNALED(self._status):
            return {"signal": os.WTERMSIG(self._status), "out_of_memory": self._group.ran_out_of_memory}
        return {"exit": os.WEXITSTATUS(self._status), "out_of_memory": False}

    def _reap(self) -> None:
        """Wait until nothing of the workload is left: only then do its files stand still."""
        while self._group.populated:
            self._group.kill()
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pass
            time.sleep(0.001)

    def _watch_output(self, stream: int) -> None:
        fd = self._outputs.get(stream)
        if fd is None:
            return
        if self._pty >= 0:
            self._watch_pty()
        elif self._credit[stream] > 0:
            self._loop.watch(fd, select.POLLIN, self._on_error if stream == frames.STDERR else self._on_output)
        else:
            self._loop.watch(fd, 0, None)

    def _on_output(self, _events: int) -> None:
        self._forward(frames.STDOUT)

    def _on_error(self, _events: int) -> None:
        self._forward(frames.STDERR)

    def _forward(self, stream: int) -> None:
        fd = self._outputs[stream]
        try:
            data = os.read(fd, min(_READ_SIZE, self._credit[stream]))
        except BlockingIOError:
            return
        except OSError:  # EIO: the last process on the terminal has closed it
            data = b""
        if data:
            self._credit[stream] -= len(data)
            self._send(Frame(frames.DATA, self.channel, data, stream))
            if self._credit[stream] <= 0:
                self._watch_output(stream)
            return
        self._loop.watch(fd, 0, None)
        del self._outputs[stream]
        if fd != self._pty:
            os.close(fd)
        self._send(Frame(frames.EOF, self.channel, stream=stream))

    def _watch_stdin(self) -> None:
        if self._stdin < 0:
            self._pending.clear()
        elif self._pty >= 0:
            if self._stdin_eof and not self._pending:
                self._stdin_eof = False
                self._pending += b"\x04"  # a terminal has no end of file, only the key for it
                self._own_keys = 1
            self._watch_pty()
        elif self._pending:
            self._loop.watch(self._stdin, select.POLLOUT, self._on_stdin)
        else:
            self._loop.watch(self._stdin, 0, None)
            if self._stdin_eof:
                self._close_stdin()

    def _on_stdin(self, _events: int) -> None:
        try:
            count = os.write(self._stdin, self._pending[:_READ_SIZE])
        except BlockingIOError:
            return
        except OSError:  # nobody reads it any more
            count = len(self._pending)
            self._close_stdin()
        del self._pending[:count]
        if not self._pending:  # no credit was used for a key that did not come from the host
            count, self._own_keys = count - self._own_keys, 0
        if count:
            self._send(Frame(frames.CREDIT, self.channel, struct.pack(">I", count), frames.STDIN))
        self._watch_stdin()

    def _watch_pty(self) -> None:
        """A terminal is one descriptor for both directions."""
        events = select.POLLOUT if self._pending else 0
        if frames.STDOUT in self._outputs and self._credit[frames.STDOUT] > 0:
            events |= select.POLLIN
        self._loop.watch(self._pty, events, self._on_pty)

    def _on_pty(self, events: int) -> None:
        if events & (select.POLLIN | select.POLLHUP | select.POLLERR) and frames.STDOUT in self._outputs:
            self._forward(frames.STDOUT)
        if events & select.POLLOUT and self._stdin >= 0 and self._pending:
            self._on_stdin(events)

    def _close_stdin(self) -> None:
        if self._pty < 0 and self._stdin >= 0:
            self._loop.watch(self._stdin, 0, None)
            os.close(self._stdin)
            self._stdin = -1


def set_size(fd: int, rows: int, columns: int) -> None:
    """Tell a terminal its size in characters."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
