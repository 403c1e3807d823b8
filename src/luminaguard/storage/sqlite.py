"""SQLite: one file, with full synchronisation."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, inspect, select
from sqlalchemy.exc import DBAPIError

from luminaguard.errors import StorageError
from luminaguard.storage import schema
from luminaguard.storage.revisions import newer, stamp, upgrade

__all__ = ["check_schema", "connect", "explain"]

_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT")


def connect(path: Path) -> Engine:
    """An engine of a file; raises StorageError if it can be neither opened nor created."""
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
    return engine


def check_schema(connection: Connection, name: str) -> None:
    """Create the tables, or bring them to what this code knows; raises StorageError if they are newer."""
    if not inspect(connection).has_table("alembic_version"):
        if inspect(connection).has_table("schema_version"):  # from before Alembic kept the revisions
            upgrade(connection, name, before_alembic=True)
        else:
            schema.metadata.create_all(connection)
            connection.execute(insert(schema.about).values(id=secrets.token_hex(16)))
            stamp(connection)
        return
    found = connection.execute(select(schema.revision.c.version_num)).scalar()
    if found not in schema.REVISIONS:
        raise newer(name, found)
    if found != schema.REVISIONS[-1]:
        upgrade(connection, name)


def explain(path: Path, error: DBAPIError) -> StorageError:
    """What happened, and what to do."""
    said = str(error.orig)
    name = str(getattr(error.orig, "sqlite_errorname", ""))
    if name in _DAMAGED:
        hint = (
            f"Restore {path} from a backup, or move it away together with its -wal and -shm files and "
            "ledger-head.json to start a new one; what waits for a decision is lost with it."
        )
    elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        hint = "Another LuminaGuard command is writing; run the command again."
    elif name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        hint = (
            f"Check that the disk of {path.parent} has free space, works, and may be written to; "
            "then run the command again."
        )
    else:
        hint = "Run the command again; 'luminaguard doctor' checks the database."
    return StorageError(f"The database {path} cannot be used: {said}.", hint=hint,
                        kept="The transaction was rolled back; nothing is half written.")  # fmt: skip


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event starts transactions, see below
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    # IMMEDIATE: two processes that both mean to write must not both have read first. Whoever only reads sees the state
    # at its first look, and waits for nobody (WAL).
    reads = connection.get_execution_options().get("reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
