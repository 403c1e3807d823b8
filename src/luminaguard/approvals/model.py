"""The approval state machine.

    PENDING ──approve──> APPROVED ──claim──> CLAIMED ──> PUBLISHED
       │                  │    │                ├──────> REFUSED   (nothing was written)
       ├──deny──> DENIED <┘    └──expire──┐     └──────> UNKNOWN ──closed by a person──> REFUSED
       └──expire─────────────────────> EXPIRED

A request is bound to one changeset digest and one folder. A decision is bound to one request and
its digest, is signed, expires, and is used up by its claim: publishing happens at most once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Decision", "Request", "State", "Verdict", "may_become"]


class State(Enum):
    """Where a request stands; the value is what people and programs see."""

    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "expired"
    CLAIMED = "claimed"
    PUBLISHED = "published"
    REFUSED = "refused"
    UNKNOWN = "unknown"


class Verdict(Enum):
    """What a decision says."""

    APPROVE = "approve"
    DENY = "deny"


_NEXT = {
    State.PENDING: {State.APPROVED, State.DENIED, State.EXPIRED},
    State.APPROVED: {State.CLAIMED, State.EXPIRED, State.DENIED},
    State.CLAIMED: {State.PUBLISHED, State.REFUSED, State.UNKNOWN},
    State.UNKNOWN: {State.PUBLISHED, State.REFUSED},
}


def may_become(old: State, new: State) -> bool:
    """Whether the state machine has an arrow from ``old`` to ``new``."""
    return new in _NEXT.get(old, set())


@dataclass(frozen=True, slots=True)
class Request:
    """An approval asked for.

    Attributes:
        workspace: absolute path of the folder.
        inode: identity of that folder when the request was made, beside its path.
        digest: of the changeset, ``sha256:...``.
        created_ns, expires_ns: nanoseconds since the epoch.
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


@dataclass(frozen=True, slots=True)
class Decision:
    """An answer. ``means`` says how it came to be, such as ``terminal`` or ``flag --publish always``."""

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
