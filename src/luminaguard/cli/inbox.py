"""``luminaguard approve``: the full-screen inbox where the terminal can show it, else how to go on without."""

from __future__ import annotations

from luminaguard.runtime import Runtime

__all__ = ["open_inbox"]


def open_inbox(runtime: Runtime) -> None:
    """Open the inbox; returns when the person leaves it."""
    raise NotImplementedError
