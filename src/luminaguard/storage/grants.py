"""Grants and tasks: what answers again, what a task has read, and whether it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, insert, select, update

from luminaguard.actions.model import Action
from luminaguard.approvals.grants import Grant, Limits, Scope
from luminaguard.approvals.model import Judged
from luminaguard.approvals.signing import Keys, verify_grant
from luminaguard.effects.text import visible
from luminaguard.errors import ApprovalError, RequestNotFound, StorageError
from luminaguard.storage import database as tables
from luminaguard.storage.approvals import Approvals

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
            rows = t.connection.execute(select(tables.grants).order_by(tables.grants.c.created_ns)).all()
        return [_standing(row) for row in rows]

    def revoke(self, grant_id: str) -> None:
        """End a grant.

        Raises:
            RequestNotFound: there is none of this id.
            ApprovalError: it was revoked before.
        """
        with self._approvals.transaction() as t:
            row = t.connection.execute(select(tables.grants).where(tables.grants.c.id == grant_id)).first()
            if row is None:
                raise RequestNotFound(
                    f"There is no grant '{visible(grant_id[:64])}'.", hint="'luminaguard grants list'."
                )
            if row.revoked_ns is not None:
                raise ApprovalError(f"{grant_id} was revoked before.", hint="There is nothing to do.")
            t.connection.execute(update(tables.grants).where(tables.grants.c.id == grant_id).values(revoked_ns=t.now))
            t.record("grant.revoked", grant=grant_id)

    def use(
        self, action: Action, judged: Judged, request_id: str, keys: Keys
    ) -> tuple[Standing | None, tuple[str, ...]]:
        """Count one use of the first grant that answers for an action.

        Returns:
            The grant as it stands after this use, or None; and why the others did not answer.
        """
        reasons = []
        with self._approvals.transaction() as t:
            query = select(tables.grants).where(tables.grants.c.revoked_ns.is_(None))
            for row in t.connection.execute(query.order_by(tables.grants.c.created_ns)).all():
                standing = _standing(row)
                why = standing.grant.problem(action, judged, now_ns=t.now, uses=standing.uses)
                if not why:
                    try:
                        verify_grant(standing.grant, keys)
                    except ApprovalError as error:
                        why = error.message
                        t.record("grant.refused", grant=row.id, request=request_id, why=why)
                if why:
                    reasons.append(f"{row.id}: {why}")
                    continue
                t.connection.execute(update(tables.grants).where(tables.grants.c.id == row.id)
                                     .values(uses=tables.grants.c.uses + 1))  # fmt: skip
                t.record("grant.used", grant=row.id, request=request_id, made_from=row.made_from,
                         use=standing.uses + 1, of=row.max_uses, scope=standing.grant.scope.to_json())  # fmt: skip
                return Standing(standing.grant, standing.uses + 1, None), tuple(reasons)
        return None, tuple(reasons)


class Tasks:
    """What is known of tasks beyond one action."""

    def __init__(self, approvals: Approvals) -> None:
        self._approvals = approvals

    def add_labels(self, task: str, found: Iterable[tuple[str, str]]) -> frozenset[str]:
        """Add labels, each with where it came from; return all that the task carries."""
        with self._approvals.transaction() as t:
            have = self._labels(t.connection, task)
            for label, origin in found:
                if label in have:
                    continue
                have.add(label)
                t.connection.execute(
                    insert(tables.labels).values(task=task, label=label, origin=origin, since_ns=t.now)
                )
                t.record("task.tainted", task=task, label=label, origin=visible(origin))
        return frozenset(have)

    def labels(self, task: str) -> frozenset[str]:
        """The labels that a task carries."""
        with self._approvals.transaction() as t:
            return frozenset(self._labels(t.connection, task))

    def stopped(self, task: str) -> str | None:
        """Why a person stopped a task; None if nobody did."""
        with self._approvals.transaction() as t:
            query = select(tables.stopped_tasks.c.reason).where(tables.stopped_tasks.c.task == task)
            return t.connection.execute(query).scalar()

    @staticmethod
    def _labels(connection: Any, task: str) -> set[str]:
        query = select(tables.labels.c.label).where(tables.labels.c.task == task)
        return set(connection.execute(query).scalars())


def _standing(row: Row[Any]) -> Standing:
    try:
        grant = Grant(
            id=row.id, made_from=row.made_from, scope=Scope.from_json(json.loads(row.scope)),
            limits=Limits(row.expires_ns, row.max_uses), created_ns=row.created_ns, nonce=row.nonce,
            approver=row.approver, person=row.person, signature=row.signature,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"The grant {visible(str(row.id)[:64])} in the database cannot be read ({error}).",
            hint="The database was damaged or edited: restore it from a backup.",
            kept="Nothing was deleted.",
        ) from error
    return Standing(grant, row.uses, row.revoked_ns)
