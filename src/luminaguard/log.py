"""Diagnostics: what the machinery did, as JSON lines in a bounded private file.

The ledger says what happened to effects and must be complete; this says how the parts behaved and
may be deleted at any time. It gets names, numbers and reasons: no output of commands, no contents
of files, no secrets. With ``--debug`` the lines go to standard error as well.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["configure", "detail", "event"]

_MAX_BYTES = 4 << 20
_MAX_VALUE = 2000
_target: Path | None = None
_debug = False
_logger: Any = None


def configure(folder: Path | None, *, debug: bool = False) -> None:
    """Choose the folder of ``luminaguard.jsonl`` (None: no file); nothing is opened before the first event."""
    global _target, _debug, _logger  # noqa: PLW0603  # one log a process
    _target = folder / "luminaguard.jsonl" if folder else None
    _debug, _logger = debug, None


def event(name: str, **fields: Any) -> None:
    """Record an event such as ``machine.ended``; never raises for want of a log."""
    global _logger  # noqa: PLW0603  # made when first needed: structlog takes 120 ms to import
    if _target is None and not _debug:
        return
    if _logger is None:
        _logger = _make_logger()
    try:
        _logger.info(name, **{key: _bounded(value) for key, value in fields.items()})
    except OSError:
        pass  # a full disk must not turn a finished action into a failed one


def detail(name: str, **fields: Any) -> None:
    """Like :func:`event`, with ``--debug`` only: for what happens in every action."""
    if _debug:
        event(name, **fields)


def _make_logger() -> Any:
    import structlog

    return structlog.wrap_logger(
        _Lines(_target, echo=_debug),
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.add_log_level,
            structlog.processors.JSONRenderer(),
        ],
        context_class=dict,
        pid=os.getpid(),
    )


class _Lines:
    """Appends each line with one write, so lines of several processes do not mix."""

    def __init__(self, path: Path | None, *, echo: bool) -> None:
        self._path = path
        self._echo = echo
        self._fd = -1

    def info(self, line: str) -> None:
        if self._echo:
            sys.stderr.write(f"{line}\n")
        if self._path is None:
            return
        if self._fd < 0:
            self._fd = self._open(self._path)
        os.write(self._fd, line.encode() + b"\n")

    @staticmethod
    def _open(path: Path) -> int:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        if os.fstat(fd).st_size > _MAX_BYTES:
            os.close(fd)
            path.replace(path.with_suffix(".old.jsonl"))
            fd = os.open(path, flags, 0o600)
        return fd


def _bounded(value: Any) -> Any:
    return value if isinstance(value, int | float | bool | None) else str(value)[:_MAX_VALUE]
