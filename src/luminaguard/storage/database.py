"""The database: SQLite by default, PostgreSQL for a fleet; each change is one transaction.

Whoever writes is alone: what is read in a transaction still holds when it commits, and the ledger's chain has
one end. The schema has a revision. A newer one than this code knows is refused, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from luminaguard.errors import LuminaGuardError, StorageError
from luminaguard.storage import postgres, schema, sqlite

__all__ = ["Database"]


class Database:
    """An open database; made by :meth:`open`.

    Attributes:
        shared: whether other hosts use it, too.
        name: what people call it; no password is in it.
    """

    def __init__(self, engine: Engine, name: str, explain: Callable[[DBAPIError], StorageError]) -> None:
        self._engine = engine
        self._explain = explain
        self.name = name
        self.shared = engine.dialect.name == "postgresql"

    @classmethod
    def open(cls, place: Path | str) -> Database:
        """Open a database.

        Args:
            place: a file, created with mode 0600 if there is none; or the URL of a PostgreSQL database, which
                :meth:`upgrade` has prepared.

        Raises:
            StorageError: it is damaged, of a newer version, cannot be reached or created.
            SettingsError: the URL cannot be used.
        """
        return cls._open(place, upgrade=False)

    @classmethod
    def upgrade(cls, url: str, *, role: str = "", closed: bool = True) -> Database:
        """Open a PostgreSQL database as its owner, and bring its tables to what this code knows.

        Args:
            url: with the right to create tables.
            role: a role that gets the rights that workers need, and no others.
            closed: let no other role connect to it.

        Raises:
            StorageError, SettingsError: as :meth:`open`.
        """
        database = cls._open(url, upgrade=True)
        try:
            with database.write() as connection:
                postgres.grant(connection, role, closed=closed)
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def _open(cls, place: Path | str, *, upgrade: bool) -> Database:
        if isinstance(place, Path):
            database = cls(sqlite.connect(place), str(place), lambda error: sqlite.explain(place, error))
        else:
            engine, name = postgres.connect(place)
            database = cls(engine, name, lambda error: postgres.explain(name, error))
        try:
            with database.write(alone=upgrade or not database.shared) as connection:
                if database.shared:
                    postgres.check_schema(connection, name=database.name, upgrade=upgrade)
                else:
                    sqlite.check_schema(connection, database.name)
        except BaseException:
            database.close()
            raise
        return database

    @contextmanager
    def write(self, *, alone: bool = True) -> Iterator[Connection]:
        """One transaction; commits at the end, rolls back on any exception.

        Args:
            alone: let nobody else write meanwhile. What concerns nobody else, such as large contents, needs it not.

        Raises:
            StorageError: the database is locked for long, full, damaged, or cannot be reached.
        """
        with self._transaction(alone=alone, reads=False) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """:meth:`write` for whoever only looks: it sees one state of all, and waits for no writer."""
        with self._transaction(alone=False, reads=True) as connection:
            yield connection

    @contextmanager
    def _transaction(self, *, alone: bool, reads: bool) -> Iterator[Connection]:
        try:
            with (
                self._engine.connect().execution_options(alone=alone, reads=reads) as connection,
                connection.begin(),
            ):  # fmt: skip
                yield connection
        except (LuminaGuardError, IntegrityError):
            raise
        except DBAPIError as error:
            raise self._explain(error) from error
        except UnicodeEncodeError as error:  # half a surrogate pair
            raise StorageError("This text cannot be stored: it is no Unicode.", hint="Change it.") from error

    @cached_property
    def id(self) -> str:
        """What tells this database from others; hex digits."""
        with self.read() as connection:
            found = connection.execute(select(schema.about.c.id)).scalar()
        if not found or not found.isalnum() or len(found) > 32:
            raise StorageError(f"The database {self.name} has lost its id.", hint="Restore it from a backup.")
        return str(found)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()
