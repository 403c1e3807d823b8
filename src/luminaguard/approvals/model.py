"""The approval state machine.

    PENDING ──approve──> APPROVED ──claim──> CLAIMED ──> PUBLISHED or DONE
       │                  │    │                ├──────> REFUSED   (nothing was written)
       ├──deny──> DENIED <┘    └──expire──┐     └──────> UNKNOWN ──closed by a person──> REFUSED
       ├──ask for changes──> RETURNED     │     (also from APPROVED: an approval that was not used can be taken back)
       ├──stop the task────> STOPPED      │
       └──expire─────────────────────> EXPIRED

A request is bound to one effect by its digest, and to one folder. A decision is bound to one request
and to the digest of what it lets through: all of it, or a part of a changeset. It is signed, expires,
and is used up by its claim: an effect happens at most once. Nobody's answer is a denial at expiry.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from luminaguard.actions.model import EffectKind, Risk, Severity

__all__ = ["Decision", "Judged", "Request", "State", "Verdict", "may_become"]


class State(Enum):
    """Where a request stands; the value is what people and programs see."""

    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    RETURNED = "returned"
    STOPPED = "stopped"
    EXPIRED = "expired"
    CLAIMED = "claimed"
    PUBLISHED = "published"
    DONE = "done"
    REFUSED = "refused"
    UNKNOWN = "unknown"


class Verdict(Enum):
    """What a decision says; all but the first let nothing through."""

    APPROVE = "approve"
    DENY = "deny"
    RETURN = "ask for changes"
    STOP = "stop the task"

    @property
    def state(self) -> State:
        """Where it leads a pending request."""
        return {Verdict.APPROVE: State.APPROVED, Verdict.DENY: State.DENIED, Verdict.RETURN: State.RETURNED,
                Verdict.STOP: State.STOPPED}[self]  # fmt: skip


_NEXT = {
    State.PENDING: {State.APPROVED, State.DENIED, State.RETURNED, State.STOPPED, State.EXPIRED},
    State.APPROVED: {State.CLAIMED, State.EXPIRED, State.DENIED, State.RETURNED, State.STOPPED},
    State.CLAIMED: {State.PUBLISHED, State.DONE, State.REFUSED, State.UNKNOWN},
    State.UNKNOWN: {State.PUBLISHED, State.DONE, State.REFUSED},
}


def may_become(old: State, new: State) -> bool:
    """Whether the state machine has an arrow from ``old`` to ``new``."""
    return new in _NEXT.get(old, set())


@dataclass(frozen=True, slots=True)
class Judged:
    """What the policy said of a request when it was last shown.

    Attributes:
        policy: digest of the rules that judged; a decision under other rules is not taken.
        people: how many different people must approve.
    """

    risk: Risk = Risk.RED
    severity: Severity = Severity.MEDIUM
    reason: str = "No rule speaks of this."
    rule: str = "no rule"
    policy: str = ""
    people: int = 1

    @property
    def strictness(self) -> tuple[Risk, int, Severity]:
        """What says more of two judgements; the larger one is the stricter."""
        return self.risk, self.people, self.severity


@dataclass(frozen=True, slots=True)
class Request:
    """An approval asked for.

    Attributes:
        workspace: absolute path of the folder; empty where the effect concerns none.
        inode: identity of that folder when the request was made, beside its path.
        digest: of the effect, ``sha256:...``.
        command: the command line, or the tool, that asks.
        created_ns, expires_ns: nanoseconds since the epoch.
        taint: labels of untrusted input that the task had read.
        home: the host that has the folder; empty where there is one host only.
    """

    id: str
    workspace: str
    inode: int
    digest: str
    command: tuple[str, ...]
    exit_code: int
    created_ns: int
    expires_ns: int
    state: State
    effect: EffectKind = "changeset"
    task: str = ""
    taint: tuple[str, ...] = ()
    judged: Judged = Judged()
    home: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer.

    Attributes:
        digest: of what it is about; with ``part``, of the part that is approved.
        means: how it came to be, such as ``terminal`` or ``flag --publish always``.
        reason: what the agent gets to read.
        part: the paths of a changeset that are approved; None is all of it.
        policy: digest of the rules under which the request was shown.
        person: the name of the approver, as this installation knows it.
        format: of the signed encoding; 1 had none of the fields from ``reason`` on.
    """

    request_id: str
    digest: str
    workspace: str
    verdict: Verdict
    means: str
    decided_ns: int
    expires_ns: int
    nonce: str
    approver: str
    signature: bytes = b""
    reason: str = ""
    part: tuple[str, ...] | None = None
    policy: str = ""
    person: str = ""
    format: int = 2
