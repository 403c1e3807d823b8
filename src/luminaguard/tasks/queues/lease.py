"""The lease of a worker, renewed beside everything else, and what happens when that fails.

Two threads, because nothing may stand in the way of the second one: the first asks the database, which may be slow,
gone or frozen; the second only looks at the clock. What was not confirmed for half of the lease is taken for lost:
by the time that others may do this host's work, its machines are dead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from luminaguard import log
from luminaguard.errors import LuminaGuardError
from luminaguard.storage.hosts import Hosts

__all__ = ["Lease"]


class Lease:
    """A lease that was just taken.

    Args:
        hosts: whose lease it is.
        lease_s: how long it holds without being renewed.
        busy: how many machines run, for others to see.
        on_loss: called once, in a thread of its own, when it is lost.
    """

    def __init__(self, hosts: Hosts, lease_s: float, busy: Callable[[], int], on_loss: Callable[[], None]) -> None:
        self._hosts, self._lease_s, self._busy, self._on_loss = hosts, lease_s, busy, on_loss
        self._confirmed = self._now()
        self._ended = threading.Event()
        self.lost = False
        self._threads = [threading.Thread(target=one, name=f"lease-{one.__name__}", daemon=True)
                         for one in (self._renew, self._watch)]  # fmt: skip

    def __enter__(self) -> Self:
        self._confirmed = self._now()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=1)  # one that waits for a database that does not answer ends by itself

    @staticmethod
    def _now() -> float:
        """Seconds that a suspended machine counts, too."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def _renew(self) -> None:
        while not self._ended.wait(self._lease_s / 8):
            asked = self._now()
            try:
                holds = self._hosts.beat(self._busy())
            except LuminaGuardError as error:
                log.event("lease.not_renewed", error=error.message)
                continue
            if not holds:
                self._lose("another host ended it")
                return
            self._confirmed = asked  # it holds from when it was asked for, at least

    def _watch(self) -> None:
        while not self._ended.wait(self._lease_s / 32):
            if self._now() - self._confirmed > self._lease_s / 2:
                self._lose("it was not confirmed in time")
                return

    def _lose(self, why: str) -> None:
        if self.lost or self._ended.is_set():
            return
        self.lost = True
        log.event("lease.lost", host=self._hosts.name, why=why)
        self._on_loss()
