"""Chooses among endpoints: power of two choices by load and latency, or one after another."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from luminaguard.mcp.balancing.budget import Budget
from luminaguard.mcp.balancing.endpoint import Attempt, Endpoint, Health, Tuning

__all__ = ["Balancer", "Chance", "Chosen", "Nobody", "Strategy", "Waits"]

Strategy = Literal["two-choices", "round-robin"]
_LATENCIES = 200
_FEW = 20


class Chance(Protocol):
    """Where chance comes from, such as :class:`random.Random`."""

    def random(self) -> float:
        """At least 0, less than 1."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Send it there."""

    name: str


@dataclass(frozen=True, slots=True)
class Waits:
    """Nobody takes it now; somebody may at this time, or when what is under way ends."""

    until: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Nobody:
    """There is nobody, and none is to be expected."""

    why: str


@dataclass(slots=True)
class Balancer:
    """The endpoints of one server."""

    chance: Chance
    tuning: Tuning = field(default_factory=Tuning)
    strategy: Strategy = "two-choices"
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    retries: Budget = field(init=False)
    hedges: Budget = field(init=False)
    _latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))

    def __post_init__(self) -> None:
        self.retries = Budget(self.tuning.retries, self.tuning.spare)
        self.hedges = Budget(self.tuning.hedges, max(1.0, self.tuning.spare * self.tuning.hedges))

    # -- who there is ---------------------------------------------------------------------------------------

    def set_endpoints(self, weights: Mapping[str, float], now: float) -> None:
        """These are the endpoints from now on; one that is none any more ends what it has, and gets nothing new.

        One that comes beside others starts slowly.
        """
        for name, weight in weights.items():
            found = self.endpoints.get(name)
            if found is None:
                found = self.endpoints[name] = Endpoint(name, weight)
                if any(one.served for one in self.endpoints.values()):
                    found.start_slowly(now)
            found.weight, found.leaving = weight, False
        for name in self.endpoints.keys() - weights.keys():
            self.endpoints[name].leaving = True
        self._forget_gone()

    def _forget_gone(self) -> None:
        for name in [name for name, one in self.endpoints.items() if one.leaving and not one.running]:
            del self.endpoints[name]

    # -- what is chosen -------------------------------------------------------------------------------------

    def choose(
        self, now: float, *, tried: Collection[str] = (), trial: bool = False, waited_s: float = 0.0
    ) -> Chosen | Waits | Nobody:
        """Who gets the next attempt at a request.

        Args:
            now: the time.
            tried: who had it before: others are preferred.
            trial: whether it may go to one that failed and may be well again. What must not be done twice should
                not, while others are well.
            waited_s: how long it has waited for an endpoint.
        """
        taking = [one for one in self.endpoints.values() if one.takes(now)]
        on_trial = [one for one in taking if one.health(now) is Health.TRIAL and one.name not in tried]
        well = [one for one in taking if one.health(now) is Health.WELL]
        on_trial = on_trial or ([] if well else taking)
        if on_trial and (trial or not well):
            return Chosen(min(on_trial, key=lambda one: one.last_chosen).name)
        if well:
            return Chosen(self._best([one for one in well if one.name not in tried] or well, now).name)
        health = {one.health(now) for one in self.endpoints.values()}
        opens = min((one.opens_at(now) for one in self.endpoints.values()), default=math.inf)
        if Health.BUSY in health:
            return Waits(opens, "all ask for a longer pause")
        if health & {Health.OUT, Health.TRIAL} and waited_s < self.tuning.patience_s:
            return Waits(min(opens, now + self.tuning.patience_s - waited_s), "no endpoint answers")
        return Nobody(self._why_nobody())

    def _why_nobody(self) -> str:
        told = [f"{one.name} differs: {one.different}" for one in self.endpoints.values() if one.different]
        return "; ".join(told) or ("no endpoint answers" if self.endpoints else "there is no endpoint")

    def _best(self, found: list[Endpoint], now: float) -> Endpoint:
        if self.strategy == "round-robin":
            return self._next(found, now)
        # One that starts slowly is there for some requests only; where it is, it is one like any other.
        found = [one for one in found if self.chance.random() * one.weight < one.share(now, self.tuning)] or found
        first = self._drawn(found)
        if len(found) == 1:
            return first
        second = self._drawn([one for one in found if one is not first])
        best = min((one.latency(now, self.tuning) for one in found), default=0.0)
        # Of equals the one that was drawn first: so idle endpoints share by their weights.
        return min((first, second), key=lambda one: (self._load(one, best, now), one.busy_in_a_row))

    def _next(self, found: list[Endpoint], now: float) -> Endpoint:
        """Turns by share, evenly spread: each earns its share, and who has most pays for all."""
        shares = {one.name: one.share(now, self.tuning) for one in found}
        for one in found:
            one.credit += shares[one.name]
        best = max(found, key=lambda one: one.credit)
        best.credit -= sum(shares.values())
        return best

    def _drawn(self, found: list[Endpoint]) -> Endpoint:
        at = self.chance.random() * sum(one.weight for one in found)
        for one in found:
            at -= one.weight
            if at < 0:
                return one
        return found[-1]

    def _load(self, one: Endpoint, best_s: float, now: float) -> float:
        """What it has to do beside its share; one that is much slower counts as if it had more."""
        latency_s = one.latency(now, self.tuning)
        slower = latency_s / best_s if best_s and latency_s > self.tuning.alike * best_s else 1.0
        return (one.running + slower - 1) / one.weight

    def slow_after(self) -> float:
        """Seconds after which a request takes longer than 95 of 100 do; infinity while too few are known."""
        if len(self._latencies) < _FEW:
            return math.inf
        return sorted(self._latencies)[int(len(self._latencies) * 0.95)]

    # -- what happens ---------------------------------------------------------------------------------------

    def begin(self, name: str, now: float) -> Attempt:
        """An attempt goes to an endpoint; it ends by exactly one of the following."""
        return self.endpoints[name].begin(now)

    def succeeded(self, attempt: Attempt, now: float) -> None:
        """It was answered."""
        attempt.endpoint.succeeded(attempt, now, self.tuning)
        self._latencies.append(now - attempt.begun)
        self._forget_gone()

    def busy(self, attempt: Attempt, now: float, pause_s: float = 0.0) -> None:
        """The endpoint asked for a pause, in seconds; 0 for none in particular."""
        attempt.endpoint.asked_for_a_pause(attempt, now, pause_s, self.tuning)
        self._forget_gone()

    def failed(self, attempt: Attempt, now: float) -> bool:
        """It came to nothing; whether that takes the endpoint out."""
        one = attempt.endpoint
        out = one.came_to_nothing(attempt, now, self.tuning, self.chance.random())
        others = [other for other in self.endpoints.values() if other is not one and other.takes(now)]
        if not out and one.health(now) is Health.WELL and one.is_outlier(others, self.tuning):
            one.take_out(now, self.tuning, self.chance.random())
            out = True
        self._forget_gone()
        return out

    def gave_up(self, attempt: Attempt) -> None:
        """Whoever asked does not want it any more."""
        attempt.endpoint.gave_up(attempt)
        self._forget_gone()

    def checked(self, name: str, now: float, *, well: bool, different: str = "") -> None:
        """What a check of its own found at an endpoint: one that answers is given requests again."""
        one = self.endpoints.get(name)
        if one is None:
            return
        if well:
            one.different = different
            one.return_to_service(now)
        elif one.health(now) is not Health.OUT:
            one.take_out(now, self.tuning, self.chance.random())

    def table(self, now: float) -> list[dict[str, Any]]:
        """What people see of each endpoint."""
        return [
            {"endpoint": one.name, "health": one.health(now).value, "weight": one.weight, "running": one.running,
             "served": one.served, "failed": one.failed, "latency_ms": round(one.latency_s * 1e3, 2),
             "different": one.different}
            for one in self.endpoints.values()
        ]  # fmt: skip
