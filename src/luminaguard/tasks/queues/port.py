"""The port of queues."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from sqlalchemy import Connection

from luminaguard.storage.tasks import Due

__all__ = ["Handler", "Later", "Queue"]


class Later(Exception):
    """A handler cannot do a step now.

    Attributes:
        after_s: seconds until it is tried again.
        elsewhere: whether any other host may try it.
    """

    def __init__(self, after_s: float, *, elsewhere: bool = True) -> None:
        super().__init__(f"again in {after_s:.1f} s")
        self.after_s, self.elsewhere = after_s, elsewhere


Handler = Callable[[Due, int], Awaitable[None]]
"""Does a step, given how often it was tried before; raises Later. It is cancelled when the queue ends."""


class Queue(Protocol):
    """Says which steps can be done."""

    def enqueue(self, connection: Connection, due: Due) -> None:
        """A step can be done once the caller's transaction is committed. Safe to repeat."""

    async def run(self, handle: Handler) -> None:
        """Let steps be done, each by one host at a time, until cancelled; outlives what its database does.

        Raises:
            TaskError: somebody else does the work of this host.
        """
