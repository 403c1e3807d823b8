"""What may be sent again: decided for each request by what is known of what became of it.

The protocol says that whatever was lost is to be asked for again, and has no key that would make that safe
(revision 2026-07-28, "Streamable HTTP"). So what may have been executed, and is not known to be harmless twice,
is not repeated: whoever asked is told that it may have been.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Call", "Fate", "Verdict", "verdict"]

_REPEATABLE = frozenset(
    [
        "server/discover",
        "initialize",
        "ping",
        "tools/list",
        "prompts/list",
        "resources/list",
        "resources/templates/list",
        "resources/read",
        "prompts/get",
        "completion/complete",
    ]
)


@dataclass(frozen=True, slots=True)
class Call:
    """One request or notification.

    Attributes:
        method: of JSON-RPC.
        name: of the tool that is called; empty for other methods.
        harmless: for a tool: a person, or a server that a person trusts, says that doing it twice does no harm.
        read_only: for a tool: it changes nothing.
        session: the legacy session that it belongs to; empty for none.
        is_request: whether an answer is due.
    """

    method: str
    name: str = ""
    harmless: bool = False
    read_only: bool = False
    session: str = ""
    is_request: bool = True

    @property
    def repeatable(self) -> bool:
        """Whether doing it twice is as good as once."""
        return self.harmless if self.method == "tools/call" else self.method in _REPEATABLE or not self.is_request

    @property
    def leaves_traces(self) -> bool:
        """Whether it matters to a person that it may have been done."""
        return not (self.read_only if self.method == "tools/call" else self.repeatable)


class Fate(enum.Enum):
    """What became of one attempt."""

    ANSWERED = "answered"
    NOT_SENT = "not sent"
    """No byte of it left: refused, no such host, no TLS, no time."""
    BUSY = "busy"
    """429 or 503: the server says that it did not do it."""
    LOST = "lost"
    """It was sent, and no whole answer came."""
    REFUSED = "refused"
    """A redirect to elsewhere: it was not done here, and would not be at another time."""
    BROKEN = "broken"
    """500, 502, 504, or an answer that is none."""


class Verdict(enum.Enum):
    """What to do after an attempt."""

    DELIVER = "deliver"
    AGAIN = "again"
    NOT_EXECUTED = "not executed"
    MAYBE_EXECUTED = "maybe executed"


def verdict(call: Call, fate: Fate, *, attempts_left: int, busy_is_not_done: bool = True) -> Verdict:
    """What to do after an attempt at a call.

    Args:
        call: what was tried.
        fate: what became of it.
        attempts_left: how often it may still be tried.
        busy_is_not_done: whether 429 and 503 are believed to mean that nothing was done.
    """
    if fate is Fate.ANSWERED:
        return Verdict.DELIVER
    if fate is Fate.BUSY and not busy_is_not_done:
        fate = Fate.LOST
    if fate in {Fate.NOT_SENT, Fate.BUSY}:
        return Verdict.AGAIN if attempts_left > 0 else Verdict.NOT_EXECUTED
    if fate is Fate.REFUSED:
        return Verdict.NOT_EXECUTED
    # An answer of 500 is one: the same request would most likely get it again.
    if call.repeatable and fate is Fate.LOST and attempts_left > 0:
        return Verdict.AGAIN
    return Verdict.MAYBE_EXECUTED if call.leaves_traces else Verdict.NOT_EXECUTED
