"""What people see: cards, errors and progress on standard error; results on standard output."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from luminaguard.effects.text import visible
from luminaguard.errors import LuminaGuardError

if TYPE_CHECKING:
    from luminaguard.effects.render import Line

__all__ = ["Progress", "print_error", "print_json", "print_lines"]

_COLOURS = {
    "title": "\x1b[1m", "loud": "\x1b[1;33m", "path": "\x1b[1m", "dim": "\x1b[2m", "plus": "\x1b[32m",
    "minus": "\x1b[31m", "hunk": "\x1b[36m", "plain": "",
}  # fmt: skip
_RESET = "\x1b[0m"


def colours(stream: Any) -> bool:
    """Whether to colour: a terminal, and NO_COLOR (no-color.org) unset."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_lines(lines: Iterable[Line], stream: Any = None) -> None:
    """Print styled lines; the text alone says everything."""
    stream = stream or sys.stderr
    coloured = colours(stream)
    for style, text in lines:
        code = _COLOURS[style] if coloured else ""
        stream.write(f"{code}{text}{_RESET if code else ''}\n")
    stream.flush()


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True) + "\n")
    sys.stdout.flush()


def print_error(error: LuminaGuardError, *, as_json: bool) -> None:
    """Say what happened, what was kept, and what to do."""
    if as_json:
        fields = {
            "type": type(error).__name__,
            "message": error.message,
            "kept": error.kept,
            "hint": error.hint,
        }
        print_json({"status": "refused", "error": fields})
        return
    head = "\x1b[1;31merror:\x1b[0m" if colours(sys.stderr) else "error:"
    message, kept, hint = visible(error.message), visible(error.kept), visible(error.hint)
    sys.stderr.write(f"{head} {message}\n  kept: {kept}\n  hint: {hint}\n")
    for note in getattr(error, "__notes__", []):
        sys.stderr.write(f"  note: {ascii(note)[1:-1][:1000]}\n")
    sys.stderr.flush()


class Progress:
    """One line that says what is being done, on a terminal; a line for each thing elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._shown = False
        self._start = time.monotonic()

    def __call__(self, message: str) -> None:
        """Show a step."""
        if self._quiet:
            return
        seconds = time.monotonic() - self._start
        if self._live:
            sys.stderr.write(f"\r\x1b[K{seconds:5.1f} s  {message[:100]}")
            self._shown = True
        else:
            sys.stderr.write(f"{seconds:5.1f} s  {message}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line away before something else is printed."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
