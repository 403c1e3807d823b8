"""The ledger's repository: every append extends the chain in one transaction and signs its new end."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import Connection, bindparam, insert, select

from luminaguard.effects.text import visible
from luminaguard.errors import LedgerError, SettingsError
from luminaguard.ledger.chain import (
    Checkpoint,
    Entry,
    body_text,
    next_entry,
    sign_checkpoint,
    verify_chain,
    verify_checkpoint,
    verify_entry,
)
from luminaguard.storage import schema as tables
from luminaguard.storage.database import Database
from luminaguard.storage.head import Head

__all__ = ["Ledger"]

Clock = Callable[[], int]
_PAGE = 1000
_CHECKPOINTS = 16
# Made once: making a statement takes longer than most of them take.
_LAST = select(tables.ledger).order_by(tables.ledger.c.seq.desc()).limit(1)
_HASH_OF = select(tables.ledger.c.hash).where(tables.ledger.c.seq == bindparam("number"))
_ALL_OF = select(tables.ledger).where(tables.ledger.c.kind == bindparam("of")).order_by(tables.ledger.c.seq)
_LAST_OF = (
    select(tables.ledger.c.hash).where(tables.ledger.c.kind == bindparam("of")).order_by(tables.ledger.c.seq.desc())
    .limit(1)
)  # fmt: skip
_INSERT_ENTRY, _INSERT_CHECKPOINT = insert(tables.ledger), insert(tables.checkpoints)


@dataclass(slots=True, eq=False)
class _Waiting:
    """An entry that is about to be written, and what became of it."""

    kind: str
    body: str
    entry: Entry | None = None
    failure: BaseException | None = None

    @property
    def over(self) -> bool:
        return self.entry is not None or self.failure is not None


class Ledger:
    """Append and verify; every append extends the chain and signs its new end."""

    def __init__(
        self, database: Database, key: Ed25519PrivateKey, head: Path, clock: Clock = time.time_ns, host: str = "",
        guard: Callable[[Connection], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._host, self._guard = host, guard
        self.database = database
        self._key = key
        self._head = Head(head)
        self._clock = clock
        self._waiting: deque[_Waiting] = deque()
        self._turn = threading.Lock()
        self._since_forgotten = _CHECKPOINTS
        self._signed: Checkpoint | None = None
        self._verified: Checkpoint | None = None

    def append(self, kind: str, **body: Any) -> Entry:
        """Write one entry, in one transaction with those that other threads wait to write.

        Raises:
            StorageError: it could not be written, or the head could not; that says which.
            LedgerError: the chain has a break; nothing was written.
            TypeError, ValueError: the body is no JSON.
        """
        mine = _Waiting(kind, body_text(body))
        if threading.current_thread() is threading.main_thread():
            # Here signals interrupt what is being done, which must be nobody else's.
            with self._turn:
                self._write([mine])
        else:
            self._waiting.append(mine)
            with self._turn:  # who comes first writes for all: a disk takes many as fast as one
                if not mine.over:
                    self._write([self._waiting.popleft() for _ in range(len(self._waiting))])
        if mine.failure is not None:
            raise mine.failure
        assert mine.entry is not None
        return mine.entry

    def _write(self, batch: Sequence[_Waiting]) -> None:
        """Write all of them or none; how it ended is told to each. What fails is not tried again: it may be there."""
        try:
            with self.database.write() as connection:
                self._guard(connection)
                last, entries = self._checked(connection, self.last(connection)), []
                for one in batch:
                    last = self._extend(connection, last, one.kind, one.body, signed=one is batch[-1])
                    entries.append(last)
            self.publish_head(entries[-1])
        except BaseException as failure:
            for one in batch:
                one.failure = failure
            if not isinstance(failure, Exception):
                raise
            return
        for one, entry in zip(batch, entries, strict=True):
            one.entry = entry

    def append_in(self, connection: Connection, kind: str, body: dict[str, Any], last: Entry | None = None) -> Entry:
        """Write one entry inside the caller's transaction; the caller publishes the head after it.

        Args:
            connection: in a transaction that lets nobody else write.
            kind: what happened, such as ``request.created``.
            body: what is told of it.
            last: the end of the chain, if the caller has read it in this transaction.

        Raises:
            LedgerError: the end that was published last is not in the chain any more: going on would hide it.
        """
        end = self._checked(connection, last or self.last(connection))
        return self._extend(connection, end, kind, body_text(body))

    def _checked(self, connection: Connection, last: Entry | None) -> Entry | None:
        """The end of the chain, which is the one that was published last or follows it; raises LedgerError."""
        if last is not None and self.database.shared and not self._head.exists():
            return self._join(connection, last)
        self._check_head(connection, last)
        return last

    def bodies_in(self, connection: Connection, kind: str) -> Iterator[tuple[Entry, dict[str, Any]]]:
        """All entries of a kind, oldest first, each as it was written.

        Raises:
            LedgerError: one was changed since.
        """
        for row in connection.execute(_ALL_OF, {"of": kind}).all():
            entry = Entry(**row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name
            verify_entry(entry)
            yield entry, json.loads(entry.body)

    def last_of(self, connection: Connection, kind: str) -> str:
        """The hash of the last entry of a kind, and so of all before it; empty if there is none."""
        return connection.execute(_LAST_OF, {"of": kind}).scalar() or ""

    def resume(self, reason: str) -> Entry:
        """Go on after a break that a person has looked at; the chain says so for ever.

        Raises:
            LedgerError: nothing is broken.
        """
        with self.database.write() as connection:
            last = self.last(connection)
            try:
                self._check_head(connection, last)
            except LedgerError as error:
                why = error.message
            else:
                raise LedgerError("The ledger has no break.", hint="There is nothing to resume.")
            body = body_text({"found": visible(why), "reason": visible(reason)})
            entry = self._extend(connection, last, "ledger.resumed", body)
        self.publish_head(entry)
        return entry

    def refuse_other_key(self, keys: Path) -> None:
        """Refuse to work with a ledger that this installation's key did not sign; raises SettingsError.

        Args:
            keys: the folder of this installation's keys, for the message.
        """
        with self.database.read() as connection:
            query = select(tables.checkpoints).order_by(tables.checkpoints.c.seq.desc()).limit(1)
            row = connection.execute(query).first()
        if row is None:
            return
        try:
            verify_checkpoint(Checkpoint(**row._mapping), self.public_key)  # noqa: SLF001  # SQLAlchemy's documented name
        except LedgerError:
            raise SettingsError(
                f"This host's keys in {keys} are not those of the fleet {self.database.name}.",
                hint="Copy ledger.key, approver.key and the folder approvers from a host of the fleet, mode 0600. "
                "If they are the same, somebody changed the database: find out who could.",
                kept="Nothing was written.",
            ) from None

    def _join(self, connection: Connection, last: Entry) -> Entry:
        """Begin to watch a chain that other hosts have begun; who removes the head that a host had leaves this trace.

        Raises:
            LedgerError: its end is not signed.
        """
        query = select(tables.checkpoints).where(tables.checkpoints.c.seq == last.seq)
        row = connection.execute(query).first()
        if row is None or row.hash != last.hash:
            raise _cut_off(f"there is no signature of its end, entry {last.seq}")
        verify_checkpoint(Checkpoint(**row._mapping), self.public_key)  # noqa: SLF001  # SQLAlchemy's documented name
        return self._extend(connection, last, "ledger.joined", body_text({"host": self._host}))

    def _check_head(self, connection: Connection, last: Entry | None) -> None:
        """The head may be behind the chain, after a crash; never ahead of it, beside it, or gone."""
        if last is not None and last.seq == 1 and not self._head.exists():
            return  # a crash may have come between the first entry and its head
        head = self._read_head(connection)
        if head is None:
            return
        if head.seq > (last.seq if last else 0):
            raise _cut_off(f"its end was entry {head.seq}, and now it is {last.seq if last else 0}")
        if last is not None and last.seq == head.seq:
            found: str | None = last.hash
        else:
            found = connection.execute(_HASH_OF, {"number": head.seq}).scalar()
        if found != head.hash:
            raise _cut_off(f"entry {head.seq} is another one than when it was the end")
        if head != self._verified:
            verify_checkpoint(head, self.public_key)
            self._verified = head

    def _extend(
        self, connection: Connection, last: Entry | None, kind: str, body: str, *, signed: bool = True
    ) -> Entry:
        entry = next_entry(last, self.now(last), kind, body)
        connection.execute(_INSERT_ENTRY, dataclasses.asdict(entry))
        self._since_forgotten += 1
        if not signed:
            return entry
        self._signed = sign_checkpoint(entry, self._key)
        connection.execute(_INSERT_CHECKPOINT, dataclasses.asdict(self._signed))
        if self._since_forgotten >= _CHECKPOINTS:  # some are kept, and looking for older ones takes its time
            self._since_forgotten = 0
            connection.execute(tables.checkpoints.delete().where(tables.checkpoints.c.seq < entry.seq - _CHECKPOINTS))
        return entry

    def now(self, last: Entry | None) -> int:
        """The time, never before the last entry: setting the clock back revives no expired decision."""
        return max(self._clock(), last.time_ns if last else 0)

    def time(self, connection: Connection) -> int:
        """:meth:`now` against the chain's present end."""
        return self.now(self.last(connection))

    def current_time(self) -> int:
        """:meth:`time` in a transaction of its own: nanoseconds since the epoch that never go back."""
        with self.database.read() as connection:
            return self.time(connection)

    def publish_head(self, entry: Entry) -> None:
        """Keep the newest checkpoint outside of the database, so that a cut-off end is noticed."""
        checkpoint = self._signed
        if checkpoint is None or (checkpoint.seq, checkpoint.hash) != (entry.seq, entry.hash):
            checkpoint = sign_checkpoint(entry, self._key)
        self._head.write(checkpoint)
        self._verified = checkpoint

    def entries(self) -> Iterator[Entry]:
        """All entries in order, read in pages."""
        after = 0
        while True:
            query = select(tables.ledger).where(tables.ledger.c.seq > after).order_by(tables.ledger.c.seq)
            with self.database.read() as connection:
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
        with self.database.read() as connection:
            rows = connection.execute(select(tables.checkpoints)).all()
        checkpoints = [Checkpoint(**row._mapping) for row in rows]  # noqa: SLF001  # as above
        with self.database.read() as connection:
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
            return self._head.read()
        except FileNotFoundError:
            if self.database.shared or self.last(connection) is None:
                return None
            why = "is missing"
        except (OSError, ValueError) as error:
            why = f"cannot be read ({error})"
        raise LedgerError(
            f"The ledger does not verify: its head file {self._head.path} {why}.",
            hint="Without it nobody can tell whether the end of the ledger was cut off. Find out who removed it; "
            "then 'luminaguard ledger resume' goes on, and records that.",
            kept="Nothing was deleted.",
        )

    @staticmethod
    def last(connection: Connection) -> Entry | None:
        """The end of the chain."""
        row = connection.execute(_LAST).first()
        return Entry(**row._mapping) if row else None  # noqa: SLF001  # as above


def _cut_off(how: str) -> LedgerError:
    return LedgerError(
        f"The ledger was cut off or exchanged: {how}.",
        hint="Find out who restored or edited the database; 'luminaguard ledger verify' says more. "
        "Then 'luminaguard ledger resume' goes on, and records that.",
        kept="Nothing was written to it.",
    )
