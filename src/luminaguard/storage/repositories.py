"""Repositories: requests and decisions, and the ledger. The only code that writes the tables.

Each method is one transaction, and each change of a request's state is written together with its
ledger entry: there is no state without its record.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from luminaguard.approvals.model import Decision, Request, State, Verdict, may_become
from luminaguard.approvals.signing import verify
from luminaguard.effects.changes import Changeset
from luminaguard.effects.text import visible
from luminaguard.errors import ApprovalError, LedgerError, RequestNotFound, StorageError
from luminaguard.ledger.chain import Checkpoint, Entry, next_entry, sign_checkpoint, verify_chain, verify_checkpoint
from luminaguard.storage import database as tables
from luminaguard.storage.database import Database

__all__ = ["Approvals", "Ledger"]

Clock = Callable[[], int]
_PAGE = 1000
_MAX_HEAD = 4096


class Ledger:
    """Append and verify; every append extends the chain and signs its new end."""

    def __init__(self, database: Database, key: Ed25519PrivateKey, head: Path, clock: Clock = time.time_ns) -> None:
        self._database = database
        self._key = key
        self._head = head
        self._clock = clock

    def append(self, kind: str, **body: Any) -> Entry:
        """Write one entry in a transaction of its own."""
        with self._database.write() as connection:
            entry = self.append_in(connection, kind, body)
        self.publish_head(entry)
        return entry

    def append_in(self, connection: Connection, kind: str, body: dict[str, Any]) -> Entry:
        """Write one entry inside the caller's transaction; the caller publishes the head after it.

        Raises:
            LedgerError: the end that was published last is not in the chain any more: going on would hide it.
        """
        last = self._last(connection)
        self._check_head(connection, last)
        return self._extend(connection, last, kind, body)

    def resume(self, reason: str) -> Entry:
        """Go on after a break that a person has looked at; the chain says so for ever.

        Raises:
            LedgerError: nothing is broken.
        """
        with self._database.write() as connection:
            last = self._last(connection)
            try:
                self._check_head(connection, last)
            except LedgerError as error:
                why = error.message
            else:
                raise LedgerError("The ledger has no break.", hint="There is nothing to resume.")
            entry = self._extend(connection, last, "ledger.resumed", {"found": visible(why), "reason": visible(reason)})
        self.publish_head(entry)
        return entry

    def _check_head(self, connection: Connection, last: Entry | None) -> None:
        """The head may be behind the chain, after a crash; never ahead of it, beside it, or gone."""
        if last is not None and last.seq == 1 and not self._head.exists():
            return  # a crash may have come between the first entry and its head
        head = self._read_head(connection)
        if head is None:
            return
        if head.seq > (last.seq if last else 0):
            raise _cut_off(f"its end was entry {head.seq}, and now it is {last.seq if last else 0}")
        found = connection.execute(select(tables.ledger.c.hash).where(tables.ledger.c.seq == head.seq)).scalar()
        if found != head.hash:
            raise _cut_off(f"entry {head.seq} is another one than when it was the end")
        verify_checkpoint(head, self.public_key)

    def _extend(self, connection: Connection, last: Entry | None, kind: str, body: dict[str, Any]) -> Entry:
        entry = next_entry(last, self.now(last), kind, body)
        connection.execute(insert(tables.ledger).values(**dataclasses.asdict(entry)))
        checkpoint = sign_checkpoint(entry, self._key)
        connection.execute(insert(tables.checkpoints).values(**dataclasses.asdict(checkpoint)))
        connection.execute(tables.checkpoints.delete().where(tables.checkpoints.c.seq < entry.seq - 16))
        return entry

    def now(self, last: Entry | None) -> int:
        """The time, never before the last entry: setting the clock back revives no expired decision."""
        return max(self._clock(), last.time_ns if last else 0)

    def time(self, connection: Connection) -> int:
        """:meth:`now` against the chain's present end."""
        return self.now(self._last(connection))

    def current_time(self) -> int:
        """:meth:`time` in a transaction of its own: nanoseconds since the epoch that never go back."""
        with self._database.read() as connection:
            return self.time(connection)

    def publish_head(self, entry: Entry) -> None:
        """Keep the newest checkpoint outside of the database, so that a cut-off end is noticed."""
        checkpoint = sign_checkpoint(entry, self._key)
        text = json.dumps({"seq": checkpoint.seq, "hash": checkpoint.hash,
                           "signature": base64.b64encode(checkpoint.signature).decode()})  # fmt: skip
        temporary = self._head.with_name(f".{self._head.name}-{os.getpid()}")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(text)
            temporary.replace(self._head)
        except OSError as error:
            raise StorageError(
                f"The ledger's head {self._head} cannot be written: {error.strerror}.",
                hint="Check that the state folder has free space and is yours.",
                kept="The entry itself is in the ledger.",
            ) from error

    def entries(self) -> Iterator[Entry]:
        """All entries in order, read in pages."""
        after = 0
        while True:
            query = select(tables.ledger).where(tables.ledger.c.seq > after).order_by(tables.ledger.c.seq)
            with self._database.read() as connection:
                rows = connection.execute(query.limit(_PAGE)).all()
            for row in rows:
                yield Entry(**row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name
            if len(rows) < _PAGE:
                return
            after = rows[-1].seq

    def verify(self) -> int:
        """Verify the whole chain, the stored checkpoints and the head outside of the database.

        Raises:
            LedgerError: it says which entry is wrong.
        """
        with self._database.read() as connection:
            rows = connection.execute(select(tables.checkpoints)).all()
        checkpoints = [Checkpoint(**row._mapping) for row in rows]  # noqa: SLF001  # as above
        with self._database.read() as connection:
            head = self._read_head(connection)
        if head is not None:
            checkpoints.append(head)
        return verify_chain(self.entries(), checkpoints, self.public_key)

    @property
    def public_key(self) -> Ed25519PublicKey:
        """The key that verifies the checkpoints."""
        return self._key.public_key()

    def _read_head(self, connection: Connection) -> Checkpoint | None:
        try:
            with self._head.open(encoding="ascii") as file:
                raw = json.loads(file.read(_MAX_HEAD))
            return Checkpoint(int(raw["seq"]), str(raw["hash"]), base64.b64decode(raw["signature"], validate=True))
        except FileNotFoundError:
            if self._last(connection) is None:
                return None
            why = "is missing"
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"cannot be read ({error})"
        raise LedgerError(
            f"The ledger does not verify: its head file {self._head} {why}.",
            hint="Without it nobody can tell whether the end of the ledger was cut off. Find out who removed it; "
            "then 'luminaguard ledger resume' goes on, and records that.",
            kept="Nothing was deleted.",
        )

    @staticmethod
    def _last(connection: Connection) -> Entry | None:
        row = connection.execute(select(tables.ledger).order_by(tables.ledger.c.seq.desc()).limit(1)).first()
        return Entry(**row._mapping) if row else None  # noqa: SLF001  # as above


class Approvals:
    """Requests and their decisions."""

    def __init__(self, database: Database, ledger: Ledger) -> None:
        self._database = database
        self._ledger = ledger

    def create(self, request: Request, changeset: Changeset) -> None:
        """Store a new, pending request with its changeset."""
        values = dataclasses.asdict(request) | {
            "command": json.dumps(request.command), "state": request.state.value,
            "changeset": json.dumps(changeset.to_json()), "outcome": "",
        }  # fmt: skip
        body = {
            "request": request.id,
            "workspace": request.workspace,
            "digest": request.digest,
            "changes": len(changeset),
        }
        with self._database.write() as connection:
            connection.execute(insert(tables.requests).values(**values))
            entry = self._ledger.append_in(connection, "request.created", body)
        self._ledger.publish_head(entry)

    def get(self, request_id: str) -> Request:
        """One request, expired if its time is over. Raises RequestNotFound."""
        with self._database.write() as connection:
            self._expire(connection)
            return _request(self._row(connection, request_id))

    def changeset(self, request_id: str) -> Changeset:
        """The changeset of a request, checked against the digest that the request is bound to.

        Raises:
            ApprovalError: the stored changeset is not the one that was asked for.
        """
        with self._database.read() as connection:
            row = self._row(connection, request_id)
        try:
            changeset = Changeset.from_json(json.loads(row.changeset))
        except ValueError as error:
            raise StorageError(
                f"The changes of {request_id} in the database cannot be read ({error}).",
                hint="The database was damaged or edited: restore it from a backup, or deny the request.",
                kept="Nothing was deleted.",
            ) from error
        if changeset.digest != row.digest:
            raise ApprovalError(
                f"The stored changes of {request_id} are not the ones that approval was asked for.",
                hint="The database was damaged or edited. Run the command again.",
            )
        return changeset

    def list(self, *, everything: bool = False) -> list[Request]:
        """Requests, newest last: those that wait, or all."""
        waiting = (
            State.PENDING.value,
            State.APPROVED.value,
            State.CLAIMED.value,
            State.UNKNOWN.value,
        )
        query = select(tables.requests).order_by(tables.requests.c.created_ns)
        if not everything:
            query = query.where(tables.requests.c.state.in_(waiting))
        with self._database.write() as connection:
            self._expire(connection)
            return [_request(row) for row in connection.execute(query)]

    def decide(self, decision: Decision, key: Ed25519PublicKey) -> None:
        """Store a signed decision about a pending request.

        Raises:
            ApprovalError: it is not validly signed, is about another digest or folder, or the
                request is not pending any more.
        """
        verify(decision, key)
        state = State.APPROVED if decision.verdict is Verdict.APPROVE else State.DENIED
        with self._database.write() as connection:
            self._expire(connection)
            request = _request(self._row(connection, decision.request_id))
            if (decision.digest, decision.workspace) != (request.digest, request.workspace):
                raise ApprovalError(
                    f"The decision about {request.id} is for other changes.",
                    hint="Look at the request again.",
                )
            self._move(connection, request, state)
            try:
                values = dataclasses.asdict(decision) | {"verdict": decision.verdict.value}
                connection.execute(insert(tables.decisions).values(**values))
            except IntegrityError:
                raise ApprovalError(
                    f"{request.id} has been decided already.",
                    hint="Look at it with 'luminaguard approvals show'.",
                ) from None
            body = {"request": request.id, "digest": decision.digest, "verdict": decision.verdict.value,
                    "means": decision.means, "approver": decision.approver}  # fmt: skip
            entry = self._ledger.append_in(connection, "request.decided", body)
        self._ledger.publish_head(entry)

    def revoke(self, request_id: str) -> None:
        """Deny what was approved and has not been published.

        Raises:
            ApprovalError: it is not approved any more.
        """
        with self._database.write() as connection:
            self._expire(connection)
            request = _request(self._row(connection, request_id))
            if request.state is not State.APPROVED:
                raise _not_now(request, State.DENIED)
            self._move(connection, request, State.DENIED)
            body = {"request": request_id, "digest": request.digest}
            entry = self._ledger.append_in(connection, "request.revoked", body)
        self._ledger.publish_head(entry)

    def claim(self, request_id: str, digest: str, key: Ed25519PublicKey) -> Request:
        """Use up the decision, before anything is written to the workspace.

        Args:
            request_id: which request.
            digest: of the changeset that is about to be published, computed from its bytes.
            key: the approver's public key.

        Raises:
            ApprovalError: there is no matching, unexpired, unused, validly signed approval.
        """
        with self._database.write() as connection:
            self._expire(connection)
            request = _request(self._row(connection, request_id))
            row = connection.execute(
                select(tables.decisions).where(tables.decisions.c.request_id == request_id)
            ).first()
            if row is None:
                raise ApprovalError(
                    f"{request_id} is {request.state.value}: nobody has approved it.",
                    hint=f"Decide with 'luminaguard approvals approve {request_id}'.",
                )
            decision = Decision(**{**row._mapping, "verdict": Verdict(row.verdict)})  # noqa: SLF001  # as above
            verify(decision, key)
            now = self._ledger.time(connection)
            if decision.verdict is not Verdict.APPROVE or decision.expires_ns <= now:
                raise ApprovalError(f"The approval of {request_id} does not hold.", hint="Run the command again.")
            if (decision.digest, decision.workspace) != (digest, request.workspace):
                raise ApprovalError(
                    f"What is about to be published for {request_id} is not what was approved.",
                    hint="Stored contents were damaged or edited. Run the command again.",
                )
            self._move(connection, request, State.CLAIMED)
            body = {"request": request_id, "digest": digest}
            entry = self._ledger.append_in(connection, "request.claimed", body)
        self._ledger.publish_head(entry)
        return dataclasses.replace(request, state=State.CLAIMED)

    def finish(self, request_id: str, state: State, outcome: str) -> None:
        """Record how a claimed request ended."""
        with self._database.write() as connection:
            request = _request(self._row(connection, request_id))
            self._move(connection, request, state)
            connection.execute(
                update(tables.requests).where(tables.requests.c.id == request_id).values(outcome=outcome)
            )
            body = {
                "request": request_id,
                "digest": request.digest,
                "state": state.value,
                "outcome": visible(outcome),
            }
            entry = self._ledger.append_in(connection, "request.finished", body)
        self._ledger.publish_head(entry)

    def _move(self, connection: Connection, request: Request, state: State) -> None:
        if not may_become(request.state, state):
            raise _not_now(request, state)
        done = connection.execute(
            update(tables.requests)
            .where(tables.requests.c.id == request.id, tables.requests.c.state == request.state.value)
            .values(state=state.value)
        )
        if done.rowcount != 1:
            raise ApprovalError(f"{request.id} was decided elsewhere just now.", hint="Look at it again.")

    def _expire(self, connection: Connection) -> None:
        now = self._ledger.time(connection)
        open_states = (State.PENDING.value, State.APPROVED.value)
        connection.execute(
            update(tables.requests)
            .where(tables.requests.c.expires_ns <= now, tables.requests.c.state.in_(open_states))
            .values(state=State.EXPIRED.value)
        )

    @staticmethod
    def _row(connection: Connection, request_id: str) -> Row[Any]:
        row = connection.execute(select(tables.requests).where(tables.requests.c.id == request_id)).first()
        if row is None:
            raise RequestNotFound(
                f"There is no request '{visible(request_id[:64])}'.",
                hint="List them with 'luminaguard approvals list --all'.",
            )
        return row


def _not_now(request: Request, state: State) -> ApprovalError:
    return ApprovalError(
        f"{request.id} is {request.state.value} and cannot become {state.value}.",
        hint="Look at it with 'luminaguard approvals show'; run the command again if it is still wanted.",
    )


def _cut_off(how: str) -> LedgerError:
    return LedgerError(
        f"The ledger was cut off or exchanged: {how}.",
        hint="Find out who restored or edited the database; 'luminaguard ledger verify' says more. "
        "Then 'luminaguard ledger resume' goes on, and records that.",
        kept="Nothing was written to it.",
    )


def _request(row: Row[Any]) -> Request:
    try:
        return _parse_request(row)
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"The request {visible(str(row.id)[:64])} in the database cannot be read ({error}).",
            hint="The database was damaged or edited: restore it from a backup.",
            kept="Nothing was deleted.",
        ) from error


def _parse_request(row: Row[Any]) -> Request:
    return Request(
        id=row.id, workspace=row.workspace, inode=row.inode, digest=row.digest,
        command=tuple(json.loads(row.command)), exit_code=row.exit_code, created_ns=row.created_ns,
        expires_ns=row.expires_ns, state=State(row.state),
    )  # fmt: skip
