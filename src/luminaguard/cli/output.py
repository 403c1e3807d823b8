"""What people see: cards, errors and progress on standard error; results on standard output."""

from __future__ import annotations

import io
import json
import operator
import os
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from luminaguard.effects.text import visible
from luminaguard.errors import EXIT_INTERNAL, LuminaGuardError

if TYPE_CHECKING:
    from luminaguard.effects.render import Line

__all__ = [
    "Progress",
    "error_fields",
    "open_streams",
    "print_error",
    "print_json",
    "print_lines",
    "print_outcome",
    "stop_writing",
    "tell_recovered",
]

_COLOURS = {
    "title": "\x1b[1m", "loud": "\x1b[1;33m", "path": "\x1b[1m", "dim": "\x1b[2m", "plus": "\x1b[32m",
    "minus": "\x1b[31m", "hunk": "\x1b[36m", "plain": "",
}  # fmt: skip
_RESET = "\x1b[0m"
_CONTINUED = "  ↪ "
_EVERY_S = 2.0


def open_streams() -> None:
    """Give a process that was started without standard streams some, before anything else gets their numbers."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # the lowest free number is this one
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
    told = io.BufferedWriter(_Told(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(told, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True)


class _Told(io.FileIO):
    """Standard error that has gone away (a closed pipe or terminal, a full disk) changes nothing of what is done."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def stop_writing() -> None:
    """Nobody reads standard output any more: what is still buffered must not fail once more on the way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def colours(stream: Any) -> bool:
    """Whether to colour: a terminal, and NO_COLOR (no-color.org) unset."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_lines(lines: Iterable[Line], stream: Any = None) -> None:
    """Print styled lines; the text alone says everything.

    On a terminal, what does not fit into a row goes on behind a mark: left to the terminal, the
    rest of a long name would look like a line of its own.
    """
    stream = stream or sys.stderr
    coloured = colours(stream)
    width = shutil.get_terminal_size().columns if stream.isatty() else 0
    for style, text in lines:
        code = _COLOURS[style] if coloured else ""
        for row in _rows(text, width):
            stream.write(f"{code}{row}{_RESET if code else ''}\n")
    stream.flush()


def _rows(text: str, width: int) -> Iterator[str]:
    """Cut a line into rows of at most ``width`` columns; 0 leaves it whole."""
    room, row = max(width, 20), ""
    used = 0
    for character in text.expandtabs(8) if width else "":
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + columns > room:
            yield row
            row, used = _CONTINUED, len(_CONTINUED)
        row += character
        used += columns
    yield row if width else text


def print_json(value: Any) -> None:
    """Print one JSON object on standard output.

    Raises:
        BrokenPipeError: nobody reads it any more.
        SystemExit: it cannot be written for another reason, such as a full disk, which was said on standard error.
    """
    try:
        sys.stdout.write(json.dumps(value, ensure_ascii=True) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        stop_writing()
        sys.stderr.write(
            f"error: the result cannot be written to standard output: {error.strerror}\n"
            "  kept: what was done stays done; 'luminaguard ledger export' and 'approvals list' tell it\n"
            "  hint: free some space, or send standard output elsewhere\n"
        )
        raise SystemExit(EXIT_INTERNAL) from error


def print_outcome(value: Any) -> None:
    """Like :func:`print_json`, of what is done and stays done: that nobody reads it makes it no failure."""
    try:
        print_json(value)
    except BrokenPipeError:
        stop_writing()


def error_fields(error: LuminaGuardError) -> dict[str, str]:
    """An error as JSON shows it."""
    return {"type": type(error).__name__, "message": error.message, "kept": error.kept, "hint": error.hint}


def print_error(error: LuminaGuardError, *, as_json: bool) -> None:
    """Say what happened, what was kept, and what to do."""
    if as_json:
        print_json({"status": "refused", "exit_code": error.exit_code, "error": error_fields(error)})
        return
    head = "\x1b[1;31merror:\x1b[0m" if colours(sys.stderr) else "error:"
    message, kept, hint = visible(error.message), visible(error.kept), visible(error.hint)
    sys.stderr.write(f"{head} {message}\n  kept: {kept}\n  hint: {hint}\n")
    for note in getattr(error, "__notes__", []):
        sys.stderr.write(f"  note: {ascii(note)[1:-1][:1000]}\n")
    sys.stderr.flush()


def tell_recovered(sentences: Iterable[str]) -> None:
    """Say on standard error what was found of publishes that a crash had interrupted."""
    for sentence in sentences:
        sys.stderr.write(f"recovered: {visible(sentence)}\n")


class Progress:
    """Says what is being done while something takes long.

    On a terminal a spinner with the step and the seconds, which leaves nothing behind; elsewhere a
    line for a step, at most one in two seconds.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._display: Any = None
        self._task: Any = None
        self._start = time.monotonic()
        self._last = -_EVERY_S

    def __call__(self, message: str) -> None:
        """Show a step."""
        if self._quiet:
            return
        if self._live:
            self._show(message)
            return
        seconds = time.monotonic() - self._start
        if seconds - self._last >= _EVERY_S:
            self._last = seconds
            sys.stderr.write(f"{seconds:5.1f} s  {message}\n")
            sys.stderr.flush()

    @contextmanager
    def slowly(self, message: str) -> Iterator[Callable[[str], None]]:
        """Show a step only once it has taken two seconds; takes what it is at, step by step."""
        at = [""]
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_EVERY_S):
                self(f"{message}: {at[0]}" if at[0] else message)

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        if not self._quiet:
            watcher.start()
        try:
            yield partial(operator.setitem, at, 0)
        finally:
            over.set()
            if watcher.ident is not None:
                watcher.join()
            self.clear()

    def clear(self) -> None:
        """Take the spinner away before something else is printed."""
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _show(self, message: str) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress as Display
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        if self._display is None:
            columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._display = Display(*columns, console=Console(stderr=True), transient=True)
            self._task = self._display.add_task("")
            self._display.start()
        self._display.update(self._task, description=escape(visible(message)[:100]))
