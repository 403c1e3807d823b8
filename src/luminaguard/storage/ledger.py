"""The ledger's repository: every append extends the chain in one transaction and signs its new end."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import Connection, func, insert, select

from luminaguard.effects.text import visible
from luminaguard.errors import LedgerError, SettingsError, StorageError
from luminaguard.ledger.chain import (
    Checkpoint,
    Entry,
    next_entry,
    sign_checkpoint,
    verify_chain,
    verify_checkpoint,
    verify_entry,
)
from luminaguard.storage import schema as tables
from luminaguard.storage.database import Database

__all__ = ["Ledger"]

Clock = Callable[[], int]
_PAGE = 1000
_CHECKPOINTS = 16
_MAX_HEAD = 4096


class Ledger:
    """Append and verify; every append extends the chain and signs its new end."""

    def __init__(
        self, database: Database, key: Ed25519PrivateKey, head: Path, clock: Clock = time.time_ns, host: str = "",
        guard: Callable[[Connection], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._host, self._guard = host, guard
        self.database = database
        self._key = key
        self._head = head
        self._clock = clock

    def append(self, kind: str, **body: Any) -> Entry:
        """Write one entry in a transaction of its own."""
        with self.database.write() as connection:
            self._guard(connection)
            entry = self.append_in(connection, kind, body)
        self.publish_head(entry)
        return entry

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
        last = last or self.last(connection)
        if last is not None and self.database.shared and not self._head.exists():
            last = self._join(connection, last)
        else:
            self._check_head(connection, last)
        return self._extend(connection, last, kind, body)

    def bodies_in(self, connection: Connection, kind: str) -> Iterator[tuple[Entry, dict[str, Any]]]:
        """All entries of a kind, oldest first, each as it was written.

        Raises:
            LedgerError: one was changed since.
        """
        query = select(tables.ledger).where(tables.ledger.c.kind == kind).order_by(tables.ledger.c.seq)
        for row in connection.execute(query).all():
            entry = Entry(**row._mapping)  # noqa: SLF001  # SQLAlchemy's documented name
            verify_entry(entry)
            yield entry, json.loads(entry.body)

    def last_of(self, connection: Connection, kind: str) -> int:
        """The number of the last entry of a kind; 0 if there is none."""
        query = select(func.max(tables.ledger.c.seq)).where(tables.ledger.c.kind == kind)
        return connection.execute(query).scalar() or 0

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
            entry = self._extend(connection, last, "ledger.resumed", {"found": visible(why), "reason": visible(reason)})
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
        return self._extend(connection, last, "ledger.joined", {"host": self._host})

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
            found = connection.execute(select(tables.ledger.c.hash).where(tables.ledger.c.seq == head.seq)).scalar()
        if found != head.hash:
            raise _cut_off(f"entry {head.seq} is another one than when it was the end")
        verify_checkpoint(head, self.public_key)

    def _extend(self, connection: Connection, last: Entry | None, kind: str, body: dict[str, Any]) -> Entry:
        entry = next_entry(last, self.now(last), kind, body)
        connection.execute(insert(tables.ledger).values(**dataclasses.asdict(entry)))
        checkpoint = sign_checkpoint(entry, self._key)
        connection.execute(insert(tables.checkpoints).values(**dataclasses.asdict(checkpoint)))
        if entry.seq % _CHECKPOINTS == 0:  # some are kept, and looking for older ones takes its time
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
        checkpoint = sign_checkpoint(entry, self._key)
        text = json.dumps({"seq": checkpoint.seq, "hash": checkpoint.hash,
                           "signature": base64.b64encode(checkpoint.signature).decode()})  # fmt: skip
        temporary = self._head.with_name(f".{self._head.name}-{os.getpid()}-{threading.get_ident()}")
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
            with self._head.open(encoding="ascii") as file:
                raw = json.loads(file.read(_MAX_HEAD))
            return Checkpoint(int(raw["seq"]), str(raw["hash"]), base64.b64decode(raw["signature"], validate=True))
        except FileNotFoundError:
            if self.database.shared or self.last(connection) is None:
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
    def last(connection: Connection) -> Entry | None:
        """The end of the chain."""
        row = connection.execute(select(tables.ledger).order_by(tables.ledger.c.seq.desc()).limit(1)).first()
        return Entry(**row._mapping) if row else None  # noqa: SLF001  # as above


def _cut_off(how: str) -> LedgerError:
    return LedgerError(
        f"The ledger was cut off or exchanged: {how}.",
        hint="Find out who restored or edited the database; 'luminaguard ledger verify' says more. "
        "Then 'luminaguard ledger resume' goes on, and records that.",
        kept="Nothing was written to it.",
    )
