"""Requests, decisions and grants: the only code that writes their tables.

Each method is one transaction, and each change of a state is written together with its ledger entry:
there is no state without its record. What is refused is recorded, too, after the rollback.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from luminaguard.actions.model import Risk, Severity
from luminaguard.approvals.model import Decision, Judged, Request, State, Verdict, may_become
from luminaguard.approvals.signing import Keys, verify
from luminaguard.effects.changes import Changeset
from luminaguard.effects.outside import Outside, outside_from_json
from luminaguard.effects.text import visible
from luminaguard.errors import (
    ActionInvalid,
    ApprovalError,
    ChangesetRefused,
    LeaseLost,
    LedgerError,
    LuminaGuardError,
    RequestNotFound,
    StorageError,
    TaskStopped,
)
from luminaguard.ledger.chain import Entry
from luminaguard.storage import schema as tables
from luminaguard.storage.database import Database
from luminaguard.storage.ledger import Ledger

__all__ = ["Approvals", "Transaction", "stopped"]

T = TypeVar("T")
Guard = Callable[[Connection], None]
_OPEN = (State.PENDING.value, State.APPROVED.value)
_WAITING = (*_OPEN, State.CLAIMED.value, State.UNKNOWN.value)


def stopped(recorded: Iterable[dict[str, Any]], task: str) -> str | None:
    """Why a person stopped a task, by the entries of that kind; None if nobody did."""
    return next((body["reason"] for body in recorded if body["task"] == task), None)


class Transaction:
    """One transaction and what it appends to the ledger."""

    def __init__(self, connection: Connection, ledger: Ledger) -> None:
        self.connection = connection
        self._end = ledger.last(connection)
        self.now = ledger.now(self._end)
        self.last: Entry | None = None
        self._ledger = ledger

    def record(self, kind: str, **body: Any) -> None:
        """Append an entry."""
        self.last = self._end = self._ledger.append_in(self.connection, kind, body, self._end)

    def recorded(self, kind: str) -> Iterator[dict[str, Any]]:
        """What the ledger has of a kind, oldest first."""
        return (body for _, body in self._ledger.bodies_in(self.connection, kind))

    def stopped(self, task: str) -> str | None:
        """Why a person stopped a task; None if nobody did."""
        return stopped(self.recorded("task.stopped"), task)

    def refuse_stopped(self, task: str) -> None:
        """Raise TaskStopped if a person stopped the task."""
        if task and (why := self.stopped(task)) is not None:
            raise TaskStopped(task, why)


class Approvals:
    """Requests and their decisions.

    Args:
        database, ledger: where they are kept.
        host: the name of this one in a fleet; what lies on another one is not claimed here.
        guard: called in each transaction before anything else; what it raises ends it.
    """

    def __init__(self, database: Database, ledger: Ledger, guard: Guard | None = None, host: str = "") -> None:
        self._database = database
        self._ledger = ledger
        self._guard = guard
        self.host = host

    @contextmanager
    def transaction(self, refusals_of: str = "") -> Iterator[Transaction]:
        """A transaction whose records are published at its end; with a request's id, refusals are recorded, too."""
        try:
            with self._database.write() as connection:
                if self._guard is not None:
                    self._guard(connection)
                transaction = Transaction(connection, self._ledger)
                yield transaction
        except LuminaGuardError as error:
            self.refused(refusals_of, error)
            raise
        if transaction.last is not None:
            self._ledger.publish_head(transaction.last)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction for whoever only looks."""
        with self._database.read() as connection:
            yield connection

    def recorded(self, connection: Connection, kind: str) -> Iterator[dict[str, Any]]:
        """What the ledger has of a kind, oldest first."""
        return (body for _, body in self._ledger.bodies_in(connection, kind))

    def last_recorded(self, connection: Connection, kind: str) -> str:
        """The hash of the ledger's last entry of a kind; empty if there is none."""
        return self._ledger.last_of(connection, kind)

    def refused(self, request_id: str, error: LuminaGuardError) -> None:
        """Record that something was refused about a request; nothing of what there is no request for."""
        if request_id and not isinstance(error, RequestNotFound | LedgerError | LeaseLost | StorageError):
            self._ledger.append("request.refused", request=request_id, why=visible(error.message))

    # -- asking and looking ---------------------------------------------------------------------------

    def create(self, request: Request, effect: Changeset | Outside) -> None:
        """Store a new, pending request with its effect."""
        judged = request.judged
        values = {
            "id": request.id, "workspace": request.workspace, "inode": request.inode, "digest": request.digest,
            "command": json.dumps(request.command), "exit_code": request.exit_code, "created_ns": request.created_ns,
            "expires_ns": request.expires_ns, "state": request.state.value, "body": json.dumps(effect.to_json()),
            "outcome": "", "home": request.home, "effect": request.effect, "task": request.task,
            "taint": json.dumps(request.taint), **_judged_values(judged),
        }  # fmt: skip
        with self.transaction() as t:
            t.refuse_stopped(request.task)
            t.connection.execute(insert(tables.requests).values(**values))
            t.record("request.created", request=request.id, workspace=request.workspace, digest=request.digest,
                     effect=request.effect, task=request.task, taint=list(request.taint), home=request.home,
                     changes=len(effect) if isinstance(effect, Changeset) else 1, **_told(judged))  # fmt: skip

    def get(self, request_id: str) -> Request:
        """One request, expired if its time is over. Raises RequestNotFound."""
        self._expire()
        with self._database.read() as connection:
            return _request(self._row(connection, request_id))

    def list(self, *, everything: bool = False, task: str | None = None, readable: bool = False) -> list[Request]:
        """Requests, newest last: those that wait, or all; of one task, if one is given.

        Args:
            everything: those that ended, too.
            task: of which task.
            readable: leave out what cannot be read, for whoever works on the others.
        """
        query = select(tables.requests).order_by(tables.requests.c.created_ns)
        if task is not None:
            query = query.where(tables.requests.c.task == task)
        if not everything:
            query = query.where(tables.requests.c.state.in_(_WAITING))
        self._expire()
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        found = []
        for row in rows:
            try:
                found.append(_request(row))
            except StorageError:
                if not readable:
                    raise
        return found

    def outcome(self, request_id: str) -> str:
        """How a request ended, in words; empty while it has not. Raises RequestNotFound."""
        with self._database.read() as connection:
            return str(self._row(connection, request_id).outcome)

    def effect(self, request_id: str) -> Changeset | Outside:
        """The effect of a request, checked against the digest that the request is bound to.

        Raises:
            ApprovalError: what is stored is not what was asked for.
        """
        with self._database.read() as connection:
            row = self._row(connection, request_id)
        try:
            raw = json.loads(row.body)
            effect = Changeset.from_json(raw) if row.effect == "changeset" else outside_from_json(row.effect, raw)
        except (ValueError, TypeError, RecursionError, ChangesetRefused, ActionInvalid) as error:
            raise StorageError(
                f"The effect of {request_id} in the database cannot be read ({error}).",
                hint="The database was damaged or edited: restore it from a backup, or deny the request.",
                kept="Nothing was deleted.",
            ) from error
        if effect.digest != row.digest:
            raise ApprovalError(
                f"What is stored for {request_id} is not what approval was asked for.",
                hint="The database was damaged or edited. Run the command again.",
            )
        return effect

    def changeset(self, request_id: str) -> Changeset:
        """The changeset of a request; see :meth:`effect`.

        Raises:
            ApprovalError: its effect is another one.
        """
        effect = self.effect(request_id)
        if not isinstance(effect, Changeset):
            raise ApprovalError(
                f"{request_id} is not about files.", hint="Look at it with 'luminaguard approvals show'."
            )
        return effect

    def decisions(self, request_id: str) -> tuple[Decision, ...]:
        """What was decided about a request, oldest first; not verified."""
        query = select(tables.decisions).where(tables.decisions.c.request_id == request_id)
        with self._database.read() as connection:
            return tuple(map(_decision, connection.execute(query.order_by(tables.decisions.c.decided_ns))))

    def history(self) -> Iterator[tuple[Request, Decision | None]]:
        """Every request that ended, with its last decision."""
        ended = [request for request in self.list(everything=True) if request.state.value not in _WAITING]
        for request in ended:
            decisions = self.decisions(request.id)
            yield request, decisions[-1] if decisions else None

    # -- deciding ---------------------------------------------------------------------------------------

    def judge_again(self, request_id: str, judged: Judged) -> Request:
        """Record what changed rules say of a pending request; FORBIDDEN ends it.

        Raises:
            ApprovalError: it does not wait any more.
        """
        self._expire()
        with self.transaction(request_id) as t:
            request = _request(self._row(t.connection, request_id))
            if request.state is not State.PENDING:
                raise _not_now(request, State.PENDING)
            where = tables.requests.c.id == request_id
            # Decisions that were made under other rules were about another question.
            t.connection.execute(tables.decisions.delete().where(tables.decisions.c.request_id == request_id))
            t.connection.execute(update(tables.requests).where(where).values(**_judged_values(judged)))
            t.record("request.judged", request=request_id, digest=request.digest, **_told(judged))
            if judged.risk is Risk.FORBIDDEN:
                self._move(t.connection, request, State.DENIED, f"forbidden: {judged.reason}")
        return self.get(request_id)

    def decide(self, decision: Decision, keys: Keys) -> Request:
        """Store a signed decision about a pending request; return the request as it then stands.

        Raises:
            ApprovalError: it is not validly signed, is about another digest, folder or policy, or the
                request is not pending any more.
        """
        self._expire()
        try:
            expected = self._digest_of(decision)
        except LuminaGuardError as error:
            self.refused(decision.request_id, error)
            raise
        with self.transaction(decision.request_id) as t:
            verify(decision, keys)
            request = _request(self._row(t.connection, decision.request_id))
            if request.state is not State.PENDING:
                raise _not_now(request, decision.verdict.state)
            if decision.verdict is Verdict.APPROVE:
                t.refuse_stopped(request.task)
                _check_asked(t, request)
            if decision.expires_ns <= t.now:
                raise ApprovalError(f"The decision about {request.id} has expired.", hint="Look at the request again.")
            _check_subject(decision, request, expected)
            try:
                t.connection.execute(insert(tables.decisions).values(**_decision_values(decision)))
            except IntegrityError:
                raise ApprovalError(
                    f"{request.id} has been decided already by {decision.person or 'this approver'}.",
                    hint="Look at it with 'luminaguard approvals show'; where two must approve, another person must.",
                ) from None
            self._settle(t, request, decision, keys)
            t.record("request.decided", request=request.id, digest=decision.digest, verdict=decision.verdict.value,
                     means=decision.means, approver=decision.approver, person=decision.person,
                     reason=visible(decision.reason), part=decision.part, policy=decision.policy)  # fmt: skip
        return self.get(decision.request_id)

    def _digest_of(self, decision: Decision) -> str:
        """The digest that a decision must be about: of the request's effect, or of the part that it names."""
        if decision.part is None:
            return self.get(decision.request_id).digest
        if decision.verdict is not Verdict.APPROVE:
            raise ApprovalError("Only an approval can be about a part.", hint="Deny all of it.")
        return self.changeset(decision.request_id).part(decision.part).digest

    def _settle(self, t: Transaction, request: Request, decision: Decision, keys: Keys) -> None:
        """Move the request, unless it waits for another person's approval."""
        if decision.verdict is Verdict.APPROVE and request.judged.people > 1:
            query = select(tables.decisions).where(tables.decisions.c.request_id == request.id)
            approvals = [_decision(row) for row in t.connection.execute(query)]
            if len({approval.digest for approval in approvals}) > 1:
                raise ApprovalError(
                    f"Another person approved another part of {request.id}.",
                    hint="Both must approve the same: look at it with 'luminaguard approvals show'.",
                )
            if len({approval.approver for approval in approvals} & keys.keys()) < request.judged.people:
                return
        self._move(t.connection, request, decision.verdict.state, decision.reason)
        if decision.verdict is Verdict.STOP and request.task:
            self._stop_task(t, request.task, decision.reason)

    def stop_task(self, task: str, reason: str) -> None:
        """Let nothing more be asked, approved or done for a task; what waits ends. Safe to repeat."""
        with self.transaction() as t:
            self._stop_task(t, task, reason)

    def _stop_task(self, t: Transaction, task: str, reason: str) -> None:
        if t.stopped(task) is None:
            t.record("task.stopped", task=task, reason=visible(reason))
        where = (tables.requests.c.task == task) & tables.requests.c.state.in_(_OPEN)
        for row in t.connection.execute(select(tables.requests).where(where)).all():
            self._move(t.connection, _request(row), State.STOPPED, "its task was stopped")
            t.record("request.stopped", request=row.id, digest=row.digest, task=task)

    def take_back(self, decision: Decision, keys: Keys) -> Request:
        """Take back an approval that was not used, by a signed decision; ``STOP`` stops the task, too.

        The decision is kept in the ledger: in the table stands the approval that it ends.

        Raises:
            ApprovalError: it is not validly signed or about another request, or nothing is approved any more.
        """
        self._expire()
        with self.transaction(decision.request_id) as t:
            verify(decision, keys)
            request = _request(self._row(t.connection, decision.request_id))
            if request.state is not State.APPROVED or decision.verdict is Verdict.APPROVE:
                raise _not_now(request, decision.verdict.state)
            if (decision.digest, decision.workspace) != (request.digest, request.workspace):
                raise _other_changes(request)
            self._move(t.connection, request, decision.verdict.state, decision.reason)
            told = _decision_values(decision) | {"signature": decision.signature.hex(), "part": None}
            t.record("request.revoked", request=request.id, **told)
            if decision.verdict is Verdict.STOP and request.task:
                self._stop_task(t, request.task, decision.reason)
        return self.get(decision.request_id)

    def void(self, request_id: str, why: str) -> None:
        """End an approval that was not used, because rules forbid by now what it is for.

        Raises:
            ApprovalError: it is not approved any more.
        """
        self._expire()
        with self.transaction(request_id) as t:
            request = _request(self._row(t.connection, request_id))
            if request.state is not State.APPROVED:
                raise _not_now(request, State.DENIED)
            self._move(t.connection, request, State.DENIED, why)
            t.record("request.voided", request=request_id, digest=request.digest, why=visible(why))

    def claim(self, request_id: str, digest: str, keys: Keys, *, people: int = 1, hand_over: bool = False) -> Request:
        """Use up the decision, before anything is done.

        Args:
            request_id: which request.
            digest: of what is about to be done, computed from its bytes.
            keys: the approvers' public keys.
            people: how many must have approved by the rules that hold now, whatever is stored.
            hand_over: whoever asked does it, and it ends here.

        Raises:
            ApprovalError: there is no matching, unexpired, unused, validly signed approval.
        """
        self._expire()
        with self.transaction(request_id) as t:
            request = _request(self._row(t.connection, request_id))
            query = select(tables.decisions).where(tables.decisions.c.request_id == request_id)
            decisions = [_decision(row) for row in t.connection.execute(query)]
            if not decisions:
                raise ApprovalError(
                    f"{request_id} is {request.state.value}: nobody has approved it.",
                    hint=f"Decide with 'luminaguard approvals approve {request_id}'.",
                )
            t.refuse_stopped(request.task)
            _check_asked(t, request)
            if request.effect == "changeset" and request.home != self.host:
                raise ApprovalError(
                    f"The folder of {request_id} lies on another host: {visible(request.home) or 'one of no fleet'}.",
                    hint="That host publishes what was approved.",
                )
            if any(body["request"] == request_id for body in t.recorded("request.claimed")):
                raise ApprovalError(f"The approval of {request_id} was used before.", hint="Ask again.")
            for decision in decisions:
                verify(decision, keys)
                if decision.verdict is not Verdict.APPROVE or decision.expires_ns <= t.now:
                    raise ApprovalError(f"The approval of {request_id} does not hold.", hint="Run the command again.")
                if (decision.digest, decision.workspace) != (digest, request.workspace):
                    raise ApprovalError(
                        f"What is about to be published for {request_id} is not what was approved.",
                        hint="Stored contents were damaged or edited. Run the command again.",
                    )
            people = max(people, request.judged.people)
            if len({decision.approver for decision in decisions}) < people:
                raise ApprovalError(
                    f"{request_id} needs the approval of {people} different people.",
                    hint="Let another person approve it: 'luminaguard approvals approve --as NAME'.",
                )
            self._move(t.connection, request, State.CLAIMED)
            t.record("request.claimed", request=request_id, digest=digest)
            claimed = dataclasses.replace(request, state=State.CLAIMED)
            if hand_over:
                self._end(t, claimed, State.DONE, "handed over to whoever asked")
        return claimed

    def finish(self, request_id: str, state: State, outcome: str) -> None:
        """Record how a claimed request ended."""
        with self.transaction(request_id) as t:
            self._end(t, _request(self._row(t.connection, request_id)), state, outcome)

    def _end(self, t: Transaction, request: Request, state: State, outcome: str) -> None:
        self._move(t.connection, request, state, outcome)
        t.record("request.finished", request=request.id, digest=request.digest, state=state.value,
                 outcome=visible(outcome))  # fmt: skip

    # -- helpers ------------------------------------------------------------------------------------------

    def _move(self, connection: Connection, request: Request, state: State, outcome: str | None = None) -> None:
        if not may_become(request.state, state):
            raise _not_now(request, state)
        values = {"state": state.value} | ({} if outcome is None else {"outcome": outcome})
        done = connection.execute(
            update(tables.requests)
            .where(tables.requests.c.id == request.id, tables.requests.c.state == request.state.value)
            .values(**values)
        )
        if done.rowcount != 1:
            raise ApprovalError(f"{request.id} was decided elsewhere just now.", hint="Look at it again.")

    def _expire(self) -> None:
        """End what nobody answered in time, each with its record."""
        with self.transaction() as t:
            where = (tables.requests.c.expires_ns <= t.now) & tables.requests.c.state.in_(_OPEN)
            over = t.connection.execute(select(tables.requests.c.id, tables.requests.c.digest).where(where)).all()
            for row in over:
                t.record("request.expired", request=row.id, digest=row.digest)
            if over:
                t.connection.execute(update(tables.requests).where(where).values(state=State.EXPIRED.value))

    @staticmethod
    def _row(connection: Connection, request_id: str) -> Row[Any]:
        row = None
        if request_id.isascii():
            row = connection.execute(select(tables.requests).where(tables.requests.c.id == request_id)).first()
        if row is None:
            raise RequestNotFound(
                f"There is no request '{visible(request_id[:64])}'.",
                hint="List them with 'luminaguard approvals list --all'.",
            )
        return row


def _check_asked(t: Transaction, request: Request) -> None:
    """What is stored now must be what the ledger says was asked for."""
    asked = next((body for body in t.recorded("request.created") if body["request"] == request.id), None)
    stored = (request.digest, request.workspace, request.home)
    if asked is None or (asked["digest"], asked["workspace"], asked.get("home", "")) != stored:
        raise ApprovalError(
            f"{request.id} is not what was asked for by the ledger's record.",
            hint="The database was edited. Deny the request and run the command again.",
        )


def _check_subject(decision: Decision, request: Request, expected: str) -> None:
    if (decision.digest, decision.workspace) != (expected, request.workspace):
        raise _other_changes(request)
    if decision.policy != request.judged.policy:
        raise ApprovalError(
            f"The decision about {request.id} was made under other rules.", hint="Look at the request again."
        )


def _other_changes(request: Request) -> ApprovalError:
    return ApprovalError(f"The decision about {request.id} is for other changes.", hint="Look at the request again.")


def _not_now(request: Request, state: State) -> ApprovalError:
    return ApprovalError(
        f"{request.id} is {request.state.value} and cannot become {state.value}.",
        hint="Look at it with 'luminaguard approvals show'; run the command again if it is still wanted.",
    )


def _judged_values(judged: Judged) -> dict[str, Any]:
    return dataclasses.asdict(judged) | {"risk": judged.risk.value, "severity": judged.severity.value}


def _told(judged: Judged) -> dict[str, Any]:
    return {"risk": judged.risk.value, "severity": judged.severity.value, "rule": judged.rule, "policy": judged.policy}


def _decision_values(decision: Decision) -> dict[str, Any]:
    fields = {field.name: getattr(decision, field.name) for field in dataclasses.fields(decision)}
    return fields | {"verdict": decision.verdict.value, "part": json.dumps(decision.part)}


def _decision(row: Row[Any]) -> Decision:
    try:
        part = json.loads(row.part)
        for field in dataclasses.fields(Decision):
            _as({"decided_ns": int, "expires_ns": int, "format": int, "signature": bytes}.get(field.name, str),
                getattr(row, field.name))  # fmt: skip
        fields = dict(row._mapping) | {  # noqa: SLF001  # SQLAlchemy's documented name
            "verdict": Verdict(row.verdict), "part": None if part is None else tuple(map(str, part)),
        }  # fmt: skip
        return Decision(**fields)
    except (ValueError, TypeError, RecursionError) as error:
        raise _unreadable(f"A decision about {visible(str(row.request_id)[:64])}", error) from error


def _request(row: Row[Any]) -> Request:
    try:
        return Request(
            id=row.id, workspace=_as(str, row.workspace), inode=_as(int, row.inode), digest=_as(str, row.digest),
            command=tuple(_as(str, word) for word in json.loads(row.command)), exit_code=_as(int, row.exit_code),
            created_ns=_as(int, row.created_ns), expires_ns=_as(int, row.expires_ns), state=State(row.state),
            effect=row.effect, task=_as(str, row.task), taint=tuple(_as(str, one) for one in json.loads(row.taint)),
            judged=Judged(Risk(row.risk), Severity(row.severity), _as(str, row.reason), _as(str, row.rule),
                          _as(str, row.policy), _as(int, row.people)),
            home=_as(str, row.home),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _unreadable(f"The request {visible(str(row.id)[:64])}", error) from error


def _as(kind: type[T], value: Any) -> T:
    """SQLite keeps what it is given: a column of numbers may hold anything."""
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _unreadable(what: str, error: Exception) -> LuminaGuardError:
    return StorageError(
        f"{what} in the database cannot be read ({error}).",
        hint="The database was damaged or edited: restore it from a backup.",
        kept="Nothing was deleted.",
    )
