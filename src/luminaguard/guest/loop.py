"""The readiness loop of PID 1: ``poll`` and a dictionary.

Not :mod:`selectors`: under emulation a clone pays for every new path through the interpreter and
the kernel, and registering with ``poll`` is no system call.
"""

from __future__ import annotations

import select
from collections.abc import Callable

__all__ = ["Loop"]


class Loop:
    """Calls back when a descriptor is ready (``POLL*`` bits)."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._callbacks: dict[int, Callable[[int], None]] = {}

    def watch(self, fd: int, events: int, callback: Callable[[int], None] | None) -> None:
        """Watch a descriptor for ``events``; none ends it."""
        if events and callback is not None:
            self._poll.register(fd, events)
            self._callbacks[fd] = callback
        elif self._callbacks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def wait(self) -> None:
        """Wait for anything to be ready and call back for each."""
        for fd, events in self._poll.poll():
            callback = self._callbacks.get(fd)
            if callback is not None:  # one callback may end the watch of another
                callback(events)
