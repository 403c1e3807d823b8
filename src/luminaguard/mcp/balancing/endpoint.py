"""One endpoint: what is known of it, its circuit breaker, and how much of its share it gets."""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass, field

__all__ = ["Attempt", "Endpoint", "Health", "Tuning"]


_KEEP = 0.7
"""Of the latency before, when another one is measured."""
_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0
"""Of an endpoint that says that it has too much to do, and not for how long."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How patient a balancer is. Times in seconds.

    Attributes:
        failures: so many failures one after another take an endpoint out.
        window: of so many last requests the rate of failures is taken,
        rate: and a rate of this takes an endpoint out, too, if the others are better.
        out_s, longest_out_s: how long it is out the first time, and at most; it doubles each time.
        slow_start_s: until it has its whole share again after that.
        memory_s: how fast old latencies are forgotten.
        alike: latencies within this factor of the best count as equal to it.
        longest_wait_s: what a Retry-After is believed at most.
        patience_s: how long a request waits for endpoints that are out to come back.
        attempts: how often one request is sent at most.
        retries, spare: retries for each request, and how many beside that at once.
        hedges: second attempts for each request, at most.
    """

    failures: int = 5
    window: int = 20
    rate: float = 0.5
    out_s: float = 1.0
    longest_out_s: float = 60.0
    slow_start_s: float = 10.0
    memory_s: float = 10.0
    alike: float = 2.0
    longest_wait_s: float = 60.0
    patience_s: float = 5.0
    attempts: int = 6
    retries: float = 0.5
    spare: float = 20.0
    hedges: float = 0.1


class Health(enum.Enum):
    """Whether an endpoint is given requests."""

    WELL = "well"
    OUT = "out"
    TRIAL = "trial"
    """One request at a time, until one has succeeded."""
    BUSY = "busy"
    """It asked for a pause."""
    LEAVING = "leaving"
    """What runs there ends; nothing new begins."""
    DIFFERENT = "different"
    """Its tools are not those of the others."""


@dataclass(slots=True)
class Endpoint:
    """What is known of one endpoint.

    Attributes:
        name: its address, unique.
        weight: its share relative to the others.
        running: requests that are there now.
        latency_s: an average of the last ones; 0 while there is none.
        different: what is not the same as at the others; empty if nothing.
    """

    name: str
    weight: float = 1.0
    running: int = 0
    served: int = 0
    failed: int = 0
    latency_s: float = 0.0
    different: str = ""
    leaving: bool = False
    last_chosen: float = -math.inf
    credit: float = 0.0
    """Of what takes turns."""
    _in_a_row: int = 0
    _recent: deque[bool] = field(default_factory=deque)
    _out_until: float = -math.inf
    _outs: int = 0
    _on_trial: bool = False
    _trying: Attempt | None = None
    busy_in_a_row: int = 0
    _pause_until: float = -math.inf
    _whole_since: float = -math.inf
    _measured_at: float = -math.inf

    def health(self, now: float) -> Health:
        """Its health at a time."""
        if self.leaving:
            return Health.LEAVING
        if self.different:
            return Health.DIFFERENT
        if self._on_trial:
            return Health.OUT if now < self._out_until else Health.TRIAL
        return Health.BUSY if now < self._pause_until else Health.WELL

    def opens_at(self, now: float) -> float:
        """When it may be given a request again; infinity if nobody knows, such as while it is tried."""
        match self.health(now):
            case Health.OUT:
                return self._out_until
            case Health.BUSY:
                return self._pause_until
            case Health.WELL:
                return now
            case _:
                return math.inf

    def takes(self, now: float) -> bool:
        """Whether it takes a request now; on trial it takes one at a time."""
        health = self.health(now)
        return health is Health.WELL or (health is Health.TRIAL and self._trying is None)

    def share(self, now: float, tuning: Tuning) -> float:
        """Its weight, less while it starts slowly."""
        risen = (now - self._whole_since) / tuning.slow_start_s if tuning.slow_start_s else 1.0
        return self.weight * min(1.0, max(0.1, risen))

    @property
    def failure_rate(self) -> float:
        """Of the last requests."""
        return self._recent.count(False) / len(self._recent) if self._recent else 0.0

    # -- facts ----------------------------------------------------------------------------------------------

    def begin(self, now: float) -> Attempt:
        """A request goes there."""
        self.running += 1
        self.last_chosen = now
        trial = self.health(now) is Health.TRIAL and self._trying is None
        attempt = Attempt(self, now, trial=trial)
        if trial:
            self._trying = attempt
        return attempt

    def _end(self, attempt: Attempt) -> bool:
        """Whether its return to service depends on this one, still."""
        self.running -= 1
        mine = self._trying is attempt
        if mine:
            self._trying = None
        return mine

    def latency(self, now: float, tuning: Tuning) -> float:
        """What is to be expected: what was long ago says little, and whoever is never asked again never shows it."""
        return self.latency_s * math.exp(-max(0.0, now - self._measured_at) / tuning.memory_s)

    def succeeded(self, attempt: Attempt, now: float, tuning: Tuning) -> None:
        """A request that was there was answered, whatever the answer says."""
        trial = self._end(attempt)
        self.served += 1
        self._in_a_row = self.busy_in_a_row = 0
        self._remember(True, tuning)
        latency_s = now - attempt.begun
        before_s = self.latency(now, tuning)
        # Faster to believe that it is slow than that it is fast again.
        keep = 0.0 if latency_s > tuning.alike * before_s else _KEEP
        self.latency_s = before_s * keep + latency_s * (1 - keep)
        self._measured_at = now
        if trial:
            self.return_to_service(now)
        elif now - self._whole_since > tuning.longest_out_s:
            self._outs = 0

    def return_to_service(self, now: float) -> None:
        """It has shown that it is well."""
        if self._on_trial:
            self._on_trial = False
            self._trying = None
            self._whole_since = now
            self._recent.clear()

    def asked_for_a_pause(self, attempt: Attempt, now: float, pause_s: float, tuning: Tuning) -> None:
        """It is there, and has too much to do: 429, 503. It is no failure."""
        trial = self._end(attempt)
        self.failed += 1
        self._in_a_row = 0
        self.busy_in_a_row += 1
        if pause_s <= 0 and self.busy_in_a_row > 1:  # it does not say for how long; more, the more often it says so
            pause_s = min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0 ** min(self.busy_in_a_row - 2, 20))
        until = now + min(max(0.0, pause_s), tuning.longest_wait_s)
        self._pause_until = max(self._pause_until, until)
        if trial:  # it lives; it is tried again after the pause
            self._out_until = max(self._out_until, until, now + _PAUSE_S)

    def came_to_nothing(self, attempt: Attempt, now: float, tuning: Tuning, jitter: float) -> bool:
        """A request failed; whether that takes it out by itself. ``jitter`` is between 0 and 1."""
        trial = self._end(attempt)
        self.failed += 1
        if self._on_trial and not trial:
            return False  # of before it went out, or of a session that has no other place
        self._in_a_row += 1
        self._remember(False, tuning)
        if trial or self._in_a_row >= tuning.failures:
            self.take_out(now, tuning, jitter)
            return True
        return False

    def gave_up(self, attempt: Attempt) -> None:
        """Whoever asked went away: that says nothing about it."""
        self._end(attempt)

    def take_out(self, now: float, tuning: Tuning, jitter: float) -> None:
        """Give it nothing for a while."""
        for_s = min(tuning.longest_out_s, tuning.out_s * 2.0 ** min(self._outs, 30))
        self._outs += 1
        self._on_trial = True
        self._trying = None
        self._out_until = now + for_s * (0.8 + 0.4 * jitter)
        self._in_a_row = 0
        self._recent.clear()

    def start_slowly(self, now: float) -> None:
        """It is new beside others."""
        self._whole_since = now

    def _remember(self, good: bool, tuning: Tuning) -> None:
        self._recent.append(good)
        while len(self._recent) > tuning.window:
            self._recent.popleft()

    def is_outlier(self, others: list[Endpoint], tuning: Tuning) -> bool:
        """Whether it fails much more often than the others do."""
        if len(self._recent) < tuning.window or self.failure_rate < tuning.rate:
            return False
        return bool(others) and sum(other.failure_rate for other in others) / len(others) < tuning.rate / 2


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """One request at one endpoint, which ends in one way.

    Attributes:
        begun: when.
        trial: whether the endpoint's return depends on it.
    """

    endpoint: Endpoint
    begun: float
    trial: bool
