"""The database: SQLite by default, with full synchronisation; each change is one transaction.

The schema has a version. A newer one than this code knows is refused, never guessed at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError
from sqlalchemy.schema import CreateColumn

from luminaguard.errors import LuminaGuardError, StorageError

__all__ = ["Database", "checkpoints", "decisions", "grants", "ledger", "messages", "outputs", "requests", "tasks"]

SCHEMA_VERSION = 4
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT")
_metadata = MetaData()

_schema = Table("schema_version", _metadata, Column("version", Integer, primary_key=True))
requests = Table(
    "requests",
    _metadata,
    Column("id", String(32), primary_key=True),
    Column("workspace", Text, nullable=False),
    Column("inode", BigInteger, nullable=False),
    Column("digest", String(80), nullable=False),
    Column("command", Text, nullable=False),
    Column("exit_code", Integer, nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("expires_ns", BigInteger, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("body", Text, nullable=False),
    Column("outcome", Text, nullable=False, default=""),
    Column("effect", String(16), nullable=False, server_default="changeset"),
    Column("task", Text, nullable=False, server_default=""),
    Column("taint", Text, nullable=False, server_default="[]"),
    # What the policy said when the request was last shown.
    Column("risk", String(16), nullable=False, server_default="RED"),
    Column("severity", String(16), nullable=False, server_default="medium"),
    Column("reason", Text, nullable=False, server_default=""),
    Column("rule", Text, nullable=False, server_default=""),
    Column("policy", String(80), nullable=False, server_default=""),
    Column("people", Integer, nullable=False, server_default="1"),
)
decisions = Table(
    "decisions",
    _metadata,
    # One decision a request and approver: the primary key makes a second one impossible.
    Column("request_id", String(32), ForeignKey("requests.id"), primary_key=True),
    Column("digest", String(80), nullable=False),
    Column("workspace", Text, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("means", Text, nullable=False),
    Column("decided_ns", BigInteger, nullable=False),
    Column("expires_ns", BigInteger, nullable=False),
    Column("nonce", String(64), nullable=False, unique=True),
    Column("approver", String(32), primary_key=True),
    Column("signature", LargeBinary, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("part", Text, nullable=False, server_default="null"),
    Column("policy", String(80), nullable=False, server_default=""),
    Column("person", Text, nullable=False, server_default=""),
    Column("format", Integer, nullable=False, server_default="1"),
)
grants = Table(
    "grants",
    _metadata,
    Column("id", String(32), primary_key=True),
    Column("made_from", String(32), ForeignKey("requests.id"), nullable=False),
    Column("scope", Text, nullable=False),
    Column("expires_ns", BigInteger, nullable=False),
    Column("max_uses", Integer, nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("nonce", String(64), nullable=False, unique=True),
    Column("approver", String(32), nullable=False),
    Column("person", Text, nullable=False),
    # How often it was used, and whether it was revoked, is in the ledger alone.
    Column("signature", LargeBinary, nullable=False),
)
ledger = Table(
    "ledger",
    _metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("time_ns", BigInteger, nullable=False),
    Column("kind", String(64), nullable=False, index=True),
    Column("body", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)
tasks = Table(
    "tasks",
    _metadata,
    Column("id", String(32), primary_key=True),
    Column("workspace", Text, nullable=False),
    Column("status", String(16), nullable=False, index=True),
    # How many steps are saved: who saves the next one compares it.
    Column("step", Integer, nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("updated_ns", BigInteger, nullable=False),
    Column("body", Text, nullable=False),
)
messages = Table(
    "messages",
    _metadata,
    Column("task", String(32), ForeignKey("tasks.id"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
)
outputs = Table(
    "outputs",
    _metadata,
    Column("task", String(32), ForeignKey("tasks.id"), primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("text", Text, nullable=False),
)
checkpoints = Table(
    "checkpoints",
    _metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("hash", String(64), nullable=False),
    Column("signature", LargeBinary, nullable=False),
)


class Database:
    """An open database; made by :meth:`open`."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Database:
        """Open the database, creating it with mode 0600 if there is none.

        Raises:
            StorageError: it is damaged, of a newer version, or cannot be created.
        """
        try:
            # Created here, so that the mode is right from the first byte; SQLite gives its
            # journal files the mode of the database.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StorageError(
                f"{path} cannot be opened: {error.strerror}.",
                hint="Check the owner and mode of the state folder.",
            ) from error
        engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30.0})
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
        database = cls(engine, path)
        try:
            database._check_schema()
        except BaseException:
            database.close()
            raise
        return database

    def _check_schema(self) -> None:
        with self.write() as connection:
            _schema.create(connection, checkfirst=True)
            version = connection.execute(select(_schema.c.version)).scalar()
            if version == SCHEMA_VERSION:
                return
            if version is None:
                _metadata.create_all(connection)
                connection.execute(insert(_schema).values(version=SCHEMA_VERSION))
            elif version in {1, 2, 3}:
                _upgrade(connection, version)
            else:
                raise StorageError(
                    f"{self.path} has schema version {version}; this LuminaGuard knows {SCHEMA_VERSION}.",
                    hint="Use the newer LuminaGuard that wrote it.",
                )

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction; commits at the end, rolls back on any exception.

        Raises:
            StorageError: the database is locked for long, full, or damaged.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except LuminaGuardError:
            raise
        except IntegrityError:
            raise
        except (OperationalError, DatabaseError) as error:
            raise self._storage_error(error) from error

    read = write

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _storage_error(self, error: DatabaseError) -> StorageError:
        said = str(error.orig)
        name = str(getattr(error.orig, "sqlite_errorname", ""))
        if name in _DAMAGED:
            hint = (
                f"Restore {self.path} from a backup, or move it away together with its -wal and -shm files and "
                "ledger-head.json to start a new one; what waits for a decision is lost with it."
            )
        elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            hint = "Another LuminaGuard command is writing; run the command again."
        elif name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            hint = (
                f"Check that the disk of {self.path.parent} has free space, works, and may be written to; "
                "then run the command again."
            )
        else:
            hint = "Run the command again; 'luminaguard doctor' checks the database."
        return StorageError(f"The database {self.path} cannot be used: {said}.", hint=hint,
                            kept="The transaction was rolled back; nothing is half written.")  # fmt: skip


def _upgrade(connection: Connection, version: int) -> None:
    """Bring an older database to this version, inside the caller's transaction; what waits goes on waiting."""
    if version < 3:
        _upgrade_to_3(connection, version)
    _metadata.create_all(connection)
    connection.execute(update(_schema).values(version=SCHEMA_VERSION))


def _upgrade_to_3(connection: Connection, version: int) -> None:
    if version == 1:
        connection.exec_driver_sql("ALTER TABLE requests DROP COLUMN device")
    connection.exec_driver_sql("ALTER TABLE requests RENAME COLUMN changeset TO body")
    for column in ("effect", "task", "taint", "risk", "severity", "reason", "rule", "policy", "people"):
        definition = str(CreateColumn(requests.c[column]).compile(dialect=connection.dialect))
        connection.exec_driver_sql(f"ALTER TABLE requests ADD COLUMN {definition}")
    connection.exec_driver_sql("ALTER TABLE decisions RENAME TO decisions_2")
    _metadata.create_all(connection)
    kept = "request_id, digest, workspace, verdict, means, decided_ns, expires_ns, nonce, approver, signature"
    connection.exec_driver_sql(f"INSERT INTO decisions ({kept}) SELECT {kept} FROM decisions_2")  # noqa: S608
    connection.exec_driver_sql("DROP TABLE decisions_2")
    connection.exec_driver_sql("CREATE INDEX IF NOT EXISTS ix_ledger_kind ON ledger (kind)")


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event starts transactions, see below
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    # IMMEDIATE: two processes that both mean to write must not both have read first.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
