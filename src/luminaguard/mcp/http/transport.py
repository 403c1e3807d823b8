"""Sends each request where the balancer says, again where that is safe, and never raises into the SDK.

The SDK ends a whole session when one request fails on the way. Here what cannot be answered becomes an error of
that request, within one deadline for connecting, sending, waiting and reading; it says whether the request may
have been executed.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import httpx2

from luminaguard import log
from luminaguard.mcp.balancing import Attempt, Balancer, Call, Chosen, Fate, Health, Nobody, Verdict, Waits, verdict
from luminaguard.mcp.http.authorized import Authorized
from luminaguard.mcp.http.exchange import SESSION, Exchange, Outcome, Post, Target, Times
from luminaguard.mcp.http.sending import Sending

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BalancedTransport", "Failure", "Trust"]

_FAILED_CODE = -32099
"""Of the errors that are made here (JSON-RPC 2.0 leaves -32000 to -32099 to implementations)."""
_MOST_CONNECTIONS = 1024
_KEEP_S = 3.0
_DISCOVERIES = 2
_BACK_OFF_S = 0.05
_LISTEN_S = 1.0
"""Between two streams of what a server says by itself."""
_NOTICE_S = 2.0
"""For what needs no answer: the SDK sends nothing else meanwhile."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What is known of a tool, and not from its server alone.

    Attributes:
        harmless: doing it twice does no harm.
        read_only: it changes nothing.
    """

    harmless: bool = False
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no answer.

    Attributes:
        kind: ``not executed``, ``maybe executed``, or ``session lost``, which is not executed either.
    """

    kind: str
    endpoint: str
    why: str


@dataclass(slots=True)
class _Session:
    """A session of the older era: which endpoint has it, and what it is called there."""

    endpoint: str
    id: str
    opening: Post
    lock: anyio.Lock = field(default_factory=anyio.Lock)
    version: int = 0


class BalancedTransport(httpx2.AsyncBaseTransport):
    """The transport for one server.

    Args:
        url: what the SDK asks for.
        balancer: chooses.
        targets: where its endpoints are, by name.
        times: how long is waited.
        trust: what is known of a tool.
        stateless: a session of the older era may be opened anew elsewhere.
        hedge: a call that only reads is sent a second time when it takes long.
        busy_is_not_done: whether 429 and 503 are believed.
        auth: shows a server who asks.
        inner: sends one request to one address.
        clock, sleep: for tests.
    """

    def __init__(
        self,
        url: str,
        balancer: Balancer,
        targets: Mapping[str, Target],
        times: Times,
        *,
        trust: Callable[[str], Trust] = lambda _: Trust(),
        stateless: bool = False,
        hedge: bool = False,
        busy_is_not_done: bool = True,
        auth: httpx2.Auth | None = None,
        inner: httpx2.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self.balancer = balancer
        self.targets = dict(targets)
        self._url = httpx2.URL(url)
        self._times = times
        self._trust = trust
        self._stateless, self._hedge, self._busy_is_not_done = stateless, hedge, busy_is_not_done
        self._inner = Authorized(inner or Sending(_MOST_CONNECTIONS, _KEEP_S), auth, times.call_s)
        self._exchange = Exchange(self._inner, times, clock, self._failed)
        self._clock, self._sleep = clock, sleep
        self._mark = secrets.token_hex(16)
        self._sessions: dict[str, _Session] = {}
        self._changed = anyio.Event()
        self._listened_at = -math.inf
        self._last_failure = ""

    async def aclose(self) -> None:
        """Close all connections."""
        await self._inner.aclose()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send it; see the class. It raises nothing but cancellation."""
        if request.method == "POST":
            return await self._post(self._understood(request, json.loads(await request.aread())))
        known = request.headers.get(SESSION, "")
        session = self._sessions.get(known)
        name = session.endpoint if session else next(iter(self.balancer.endpoints), "")
        if name not in self.targets:
            return httpx2.Response(405, request=request)
        if request.method == "DELETE":
            self._sessions.pop(known, None)
            return await self._exchange.end(request, self.targets[name], session.id if session else "")
        since_s, self._listened_at = self._clock() - self._listened_at, self._clock()
        if since_s < _LISTEN_S:  # one that ends at once is not asked for again at once
            await self._sleep(_LISTEN_S - since_s)
        return await self._exchange.listen(request, self.targets[name], session.id if session else "")

    # -- what is told of a failure ------------------------------------------------------------------------------

    def failure(self, data: Any) -> Failure | None:
        """What the data of an error says that was made here; None for one that a server made."""
        said = str(data.get("luminaguard", "")) if isinstance(data, dict) else ""
        if not secrets.compare_digest(said.encode("utf-8", "replace"), self._mark.encode()):
            return None
        return Failure(data["kind"], data["endpoint"], data["why"])

    def _failed(self, post: Post, kind: str, endpoint: str, why: str) -> httpx2.Response:
        log.event("mcp.request_failed", method=post.call.method, kind=kind, endpoint=endpoint, why=why)
        if not post.call.is_request:
            return httpx2.Response(202, request=post.raw)
        # The mark is a secret of this process: no server can say that it did not execute what it did.
        data = {"luminaguard": self._mark, "kind": kind, "endpoint": endpoint, "why": why}
        error = {"code": _FAILED_CODE, "message": why, "data": data}
        return httpx2.Response(200, json={"jsonrpc": "2.0", "id": post.body["id"], "error": error}, request=post.raw)

    # -- one request, all its attempts --------------------------------------------------------------------------

    def _understood(self, raw: httpx2.Request, body: dict[str, Any]) -> Post:
        method = str(body.get("method", ""))
        name = str((body.get("params") or {}).get("name", "")) if method == "tools/call" else ""
        trust = self._trust(name) if name else Trust()
        call = Call(method, name, trust.harmless, trust.read_only, raw.headers.get(SESSION, ""), "id" in body and
                    "method" in body)  # fmt: skip
        limit_s = self._times.call_s
        if method == "server/discover":
            limit_s = min(limit_s, self._times.discover_s)
        elif not call.is_request:
            limit_s = min(limit_s, _NOTICE_S)
        return Post(raw, body, call, self._clock() + limit_s, endless=method == "subscriptions/listen")

    async def _post(self, post: Post) -> httpx2.Response:
        self.balancer.retries.earn()
        left, tried, waited_s = self.balancer.tuning.attempts, list[str](), 0.0
        if post.call.method == "server/discover":  # without an answer to it, a session begins in the older way
            left = min(left, _DISCOVERIES)
        why, maybe = "there was no time", False
        while True:
            chosen = self._choose(post, tried, waited_s)
            at = tried[-1] if tried else str(self._url)
            if isinstance(chosen, Nobody):
                told = f"{why}; {chosen.why}" if tried else self._with_last(chosen.why)
                return self._failed(post, _told(maybe=maybe), at, told)
            if isinstance(chosen, Waits):
                if chosen.until > post.deadline and not self._is_busy():
                    return self._failed(post, _told(maybe=maybe), at, why if tried else self._with_last(chosen.why))
                waited_s += await self._wait(min(chosen.until, post.deadline))
                if self._clock() >= post.deadline:
                    return self._failed(post, _told(maybe=maybe), at, why)
                continue
            session = self._sessions.get(post.call.session)
            version = session.version if session else 0
            outcome = await self._hedged(post, chosen.name)
            left, why = left - 1, outcome.why
            tried.append(chosen.name)
            if self._clock() >= post.deadline or not post.call.is_request:
                left = 0
            maybe = maybe or (outcome.fate in {Fate.LOST, Fate.BROKEN} and post.call.leaves_traces)
            if outcome.session_unknown:
                if self._stateless and left > 0 and await self._reopen(post, chosen.name, version):
                    continue
                return self._failed(post, "maybe executed" if maybe else "session lost", chosen.name, why)
            what = verdict(post.call, outcome.fate, attempts_left=left, busy_is_not_done=self._busy_is_not_done)
            if what is Verdict.DELIVER and outcome.response is not None:
                return outcome.response
            if what is Verdict.AGAIN and self.balancer.retries.spend():
                if post.call.session and outcome.fate is Fate.NOT_SENT:  # its endpoint is gone, and the session with it
                    if not (self._stateless and await self._reopen(post, chosen.name, version)):
                        return self._failed(post, "maybe executed" if maybe else "session lost", chosen.name, why)
                else:
                    await self._back_off(tried)
                continue
            return self._failed(post, _told(maybe=maybe or what is Verdict.MAYBE_EXECUTED), chosen.name, why)

    def _choose(self, post: Post, tried: list[str], waited_s: float) -> Chosen | Waits | Nobody:
        session = self._sessions.get(post.call.session)
        if session is not None:
            bound = self.balancer.endpoints.get(session.endpoint)
            if bound is None:
                return Nobody("the endpoint of the session is gone")
            now = self._clock()
            return Waits(bound.opens_at(now)) if bound.health(now) is Health.BUSY else Chosen(session.endpoint)
        return self.balancer.choose(self._clock(), tried=tried, trial=post.call.repeatable, waited_s=waited_s)

    def _with_last(self, why: str) -> str:
        return f"{why}; the last time: {self._last_failure}" if self._last_failure else why

    def _is_busy(self) -> bool:
        return any(one.running for one in self.balancer.endpoints.values())

    async def _wait(self, until: float) -> float:
        """Until a time, or until what is under way somewhere has ended; the seconds that it took."""
        began, changed = self._clock(), self._changed
        async with anyio.create_task_group() as tasks:

            async def sleep() -> None:
                await self._sleep(max(0.0, until - began))
                tasks.cancel_scope.cancel()

            tasks.start_soon(sleep)
            await changed.wait()
            tasks.cancel_scope.cancel()
        return self._clock() - began

    async def _back_off(self, tried: list[str]) -> None:
        """Not at once to one that just said no, if there is no other."""
        if self.balancer.endpoints.keys() <= set(tried):
            times = tried.count(tried[-1])
            await self._sleep(_BACK_OFF_S * 2.0 ** min(times - 1, 4) * (0.5 + self.balancer.chance.random()))

    # -- one attempt ----------------------------------------------------------------------------------------------

    async def _hedged(self, post: Post, name: str) -> Outcome:
        """An attempt; where that is allowed and it takes long, a second one elsewhere, and the first answer counts."""
        after_s, call = self.balancer.slow_after(), post.call
        may = self._hedge and call.read_only and call.harmless and not call.session
        if not may or after_s >= post.deadline - self._clock():
            return await self._attempt(post, name)
        self.balancer.hedges.earn()
        outcomes: list[Outcome] = []
        done, begun = anyio.Event(), 1

        async def attempt(at: str) -> None:
            outcome = await self._attempt(post, at)
            if done.is_set():
                await outcome.close()
                return
            outcomes.append(outcome)
            if outcome.fate is Fate.ANSWERED or len(outcomes) == begun:
                done.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(attempt, name)
            with anyio.move_on_after(after_s):
                await done.wait()
            if not done.is_set():
                other = self.balancer.choose(self._clock(), tried=(name,))
                if isinstance(other, Chosen) and other.name != name and self.balancer.hedges.spend():
                    begun = 2
                    tasks.start_soon(attempt, other.name)
                await done.wait()
            tasks.cancel_scope.cancel()
        return next((one for one in outcomes if one.fate is Fate.ANSWERED), outcomes[0])

    async def _attempt(self, post: Post, name: str) -> Outcome:
        session = self._sessions.get(post.call.session)
        with self._counted(name) as ended:
            outcome = await self._exchange.post(post, self.targets[name], session.id if session else "")
            ended(outcome)
        found = outcome.response.headers.get(SESSION) if outcome.response else None
        if found and post.call.method == "initialize" and outcome.fate is Fate.ANSWERED:
            self._sessions[found] = _Session(name, found, post)
        return outcome

    @contextmanager
    def _counted(self, name: str) -> Iterator[Callable[[Outcome], None]]:
        """Tell the balancer how an attempt ends."""
        attempt, told = self.balancer.begin(name, self._clock()), list[Outcome]()
        try:
            yield told.append
        finally:
            if told:
                self._record(attempt, told[0])
            else:
                self.balancer.gave_up(attempt)
            self._changed.set()
            self._changed = anyio.Event()

    def _record(self, attempt: Attempt, outcome: Outcome) -> None:
        now = self._clock()
        if outcome.fate in {Fate.ANSWERED, Fate.REFUSED}:
            self.balancer.succeeded(attempt, now)
        elif outcome.fate is Fate.BUSY:
            self.balancer.busy(attempt, now, outcome.pause_s)
        else:
            self._last_failure = outcome.why
            if not self.balancer.failed(attempt, now):
                return
            log.event("mcp.endpoint_out", endpoint=attempt.endpoint.name, why=outcome.why)

    # -- sessions of the older era --------------------------------------------------------------------------------

    async def _reopen(self, post: Post, lost_at: str, version: int) -> bool:
        """Open a session anew where the balancer says, under the name that the SDK knows; whether it is open.

        Args:
            post: what met the loss.
            lost_at: where.
            version: of the session, when that was sent.
        """
        session = self._sessions.get(post.call.session)
        if session is None:
            return False
        async with session.lock:
            if session.version != version:
                return True  # somebody else did
            tried = [lost_at]
            while len(tried) <= 3:
                chosen = self.balancer.choose(self._clock(), tried=tried, trial=True)
                if not isinstance(chosen, Chosen):
                    return False
                tried.append(chosen.name)
                opening = Post(session.opening.raw, session.opening.body, Call("initialize"), post.deadline)
                outcome = await self._attempt(opening, chosen.name)
                opened = outcome.response.headers.get(SESSION) if outcome.response else None
                if outcome.fate is Fate.ANSWERED and opened:
                    if opened != post.call.session:
                        self._sessions.pop(opened, None)
                    session.endpoint, session.id = chosen.name, opened
                    session.version += 1
                    await self._say_initialized(post)
                    log.event("mcp.session_reopened", endpoint=chosen.name, lost_at=lost_at)
                    return True
        return False

    async def _say_initialized(self, post: Post) -> None:
        session = self._sessions.get(post.call.session)
        if session is None:  # it was ended meanwhile
            return
        said = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        headers = [(key, value) for key, value in post.raw.headers.raw if key.lower() != b"content-length"]
        raw = httpx2.Request("POST", self._url, headers=headers, json=said)
        call = Call("notifications/initialized", session=post.call.session, is_request=False)
        await self._attempt(Post(raw, said, call, post.deadline), session.endpoint)


def _told(*, maybe: bool) -> str:
    return "maybe executed" if maybe else "not executed"
