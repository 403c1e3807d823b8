"""Grants and tasks: what answers again, what a task has read, and whether it was stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Row, insert, select

from luminaguard.actions.model import Action
from luminaguard.approvals.grants import Grant, Limits, Scope
from luminaguard.approvals.model import Judged
from luminaguard.approvals.signing import Keys, verify_grant
from luminaguard.effects.text import visible
from luminaguard.errors import ApprovalError, RequestNotFound, StorageError
from luminaguard.storage import schema as tables
from luminaguard.storage.approvals import Approvals, Transaction, stopped

__all__ = ["Grants", "Standing", "Tasks"]


@dataclass(frozen=True, slots=True)
class Standing:
    """A grant and how it stands."""

    grant: Grant
    uses: int
    revoked_ns: int | None

    def state(self, now_ns: int) -> str:
        """``active``, ``used up``, ``expired`` or ``revoked``."""
        if self.revoked_ns is not None:
            return "revoked"
        if now_ns >= self.grant.limits.expires_ns:
            return "expired"
        return "used up" if self.uses >= self.grant.limits.uses else "active"


class Grants:
    """Stores grants and uses them."""

    def __init__(self, approvals: Approvals) -> None:
        self._approvals = approvals

    def create(self, grant: Grant, keys: Keys) -> None:
        """Store a signed grant; raises ApprovalError when it is not validly signed."""
        verify_grant(grant, keys)
        with self._approvals.transaction(grant.made_from) as t:
            t.connection.execute(insert(tables.grants).values(
                id=grant.id, made_from=grant.made_from, scope=json.dumps(grant.scope.to_json()),
                expires_ns=grant.limits.expires_ns, max_uses=grant.limits.uses, created_ns=grant.created_ns,
                nonce=grant.nonce, approver=grant.approver, person=grant.person, signature=grant.signature,
            ))  # fmt: skip
            t.record("grant.created", grant=grant.id, request=grant.made_from, scope=grant.scope.to_json(),
                     expires_ns=grant.limits.expires_ns, uses=grant.limits.uses, approver=grant.approver)  # fmt: skip

    def list(self) -> list[Standing]:
        """All grants, oldest first."""
        with self._approvals.transaction() as t:
            return [*self._standing(t)]

    def revoke(self, grant_id: str) -> None:
        """End a grant.

        Raises:
            RequestNotFound: there is none of this id.
            ApprovalError: it was revoked before.
        """
        with self._approvals.transaction() as t:
            found = next((one for one in self._standing(t) if one.grant.id == grant_id), None)
            if found is None:
                raise RequestNotFound(f"There is no grant '{visible(grant_id[:64])}'.", hint="See 'grants list'.")
            if found.revoked_ns is not None:
                raise ApprovalError(f"{grant_id} was revoked before.", hint="There is nothing to do.")
            t.record("grant.revoked", grant=grant_id, time_ns=t.now)

    def use(
        self, action: Action, judged: Judged, request_id: str, keys: Keys
    ) -> tuple[Standing | None, tuple[str, ...]]:
        """Count one use of the first grant that answers for an action.

        Returns:
            The grant as it stands after this use, or None; and why the others did not answer.
        """
        reasons = []
        with self._approvals.transaction() as t:
            for standing in self._standing(t):
                grant = standing.grant
                why = "it was revoked" if standing.revoked_ns is not None else grant.problem(
                    action, judged, now_ns=t.now, uses=standing.uses)  # fmt: skip
                if not why:
                    try:
                        verify_grant(grant, keys)
                    except ApprovalError as error:
                        why = error.message
                        t.record("grant.refused", grant=grant.id, request=request_id, why=why)
                if why:
                    reasons.append(f"{grant.id}: {why}")
                    continue
                t.record("grant.used", grant=grant.id, request=request_id, made_from=grant.made_from,
                         use=standing.uses + 1, of=grant.limits.uses, scope=grant.scope.to_json())  # fmt: skip
                return Standing(grant, standing.uses + 1, None), tuple(reasons)
        return None, tuple(reasons)

    @staticmethod
    def _standing(t: Transaction) -> tuple[Standing, ...]:
        """The grants, each with what the ledger says of its uses and its end."""
        rows = t.connection.execute(select(tables.grants).order_by(tables.grants.c.created_ns)).all()
        if not rows:
            return ()
        uses = Counter(body["grant"] for body in t.recorded("grant.used"))
        revoked = {body["grant"]: body["time_ns"] for body in t.recorded("grant.revoked")}
        return tuple(Standing(_grant(row), uses[row.id], revoked.get(row.id)) for row in rows)


class Tasks:
    """What is known of tasks beyond one action; the ledger alone knows it."""

    def __init__(self, approvals: Approvals) -> None:
        self._approvals = approvals

    def add_labels(self, task: str, found: Iterable[tuple[str, str]]) -> frozenset[str]:
        """Add labels, each with where it came from; return all that the task carries."""
        with self._approvals.transaction() as t:
            have = self._labels(t.recorded("task.tainted"), task)
            for label, origin in found:
                if label not in have:
                    have.add(label)
                    t.record("task.tainted", task=task, label=label, origin=visible(origin))
        return frozenset(have)

    def labels(self, task: str) -> frozenset[str]:
        """The labels that a task carries."""
        with self._approvals.reading() as connection:
            return frozenset(self._labels(self._approvals.recorded(connection, "task.tainted"), task))

    def standing(self, task: str) -> tuple[str | None, frozenset[str]]:
        """Both at once: :meth:`stopped` and :meth:`labels`."""
        with self._approvals.reading() as connection:
            recorded = partial(self._approvals.recorded, connection)
            why = stopped(recorded("task.stopped"), task)
            return why, frozenset(self._labels(recorded("task.tainted"), task))

    def first_state(self, task: str) -> str:
        """The digest of the state that a task began with; raises StorageError if none was recorded."""
        with self._approvals.reading() as connection:
            for body in self._approvals.recorded(connection, "task.created"):
                if body["task"] == task and body.get("first"):
                    return str(body["first"])
        raise StorageError(
            f"What {task} began with was not recorded.",
            hint="It was begun without a fleet: begin it again in this one.",
        )

    def stopped(self, task: str) -> str | None:
        """Why a person stopped a task; None if nobody did."""
        with self._approvals.reading() as connection:
            return stopped(self._approvals.recorded(connection, "task.stopped"), task)

    @staticmethod
    def _labels(tainted: Iterable[dict[str, Any]], task: str) -> set[str]:
        return {body["label"] for body in tainted if body["task"] == task}


def _grant(row: Row[Any]) -> Grant:
    try:
        grant = Grant(
            id=row.id, made_from=row.made_from, scope=Scope.from_json(json.loads(row.scope)),
            limits=Limits(int(row.expires_ns), int(row.max_uses)), created_ns=int(row.created_ns), nonce=row.nonce,
            approver=row.approver, person=row.person, signature=bytes(row.signature),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"The grant {visible(str(row.id)[:64])} in the database cannot be read ({error}).",
            hint="The database was damaged or edited: restore it from a backup.",
            kept="Nothing was deleted.",
        ) from error
    return grant
