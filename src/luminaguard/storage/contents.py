"""What hosts of a fleet must have of each other: workspace images and file contents, in parts of the database.

Each is put in one transaction, so that it is there whole or not at all. What is read is compared with the
SHA-256 that it was asked for by; the database is not believed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, delete, exists, func, select, update
from sqlalchemy.dialects.postgresql import insert

from luminaguard.errors import StorageError
from luminaguard.storage import schema as tables
from luminaguard.storage.database import Database

__all__ = ["Contents"]

_PART = 1 << 20


class Contents:
    """The contents that a database shares between hosts.

    Args:
        database: a PostgreSQL one.
        guard: called in each transaction that writes, before anything else; what it raises ends it.
    """

    def __init__(self, database: Database, guard: Callable[[Connection], None] = lambda _: None) -> None:
        self._database, self._guard = database, guard

    def put(self, owner: str, name: str, fd: int, *, step: int = 0) -> None:
        """Share the whole of an open file, unless it is there.

        Args:
            owner: whose it is: a task or a request.
            name: what it is called, such as its SHA-256.
            fd: a descriptor; its position does not matter.
            step: the step of the task that puts it; see :meth:`collect`.
        """
        row = tables.contents.c
        with self._database.write(alone=False) as connection:
            self._guard(connection)
            where = (row.owner == owner) & (row.name == name)
            again = update(tables.contents).where(where).values(step=func.greatest(row.step, step))
            if connection.execute(again).rowcount:
                return
            at = 0
            while True:
                data = os.pread(fd, _PART, at)
                if not data and at:
                    return
                values = {"owner": owner, "name": name, "part": at // _PART, "step": step, "data": data}
                # Another process may put the same; it is the same.
                connection.execute(insert(tables.contents).values(**values).on_conflict_do_nothing())
                at += len(data)
                if len(data) < _PART:
                    return

    def fetch(self, owner: str, name: str, path: Path, sha256: str = "") -> bool:
        """Bring a content here, to a file of mode 0600; whether there was one.

        Raises:
            StorageError: it is not what its SHA-256 says.
        """
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        digest, row, parts = hashlib.sha256(), tables.contents.c, 0
        try:
            with os.fdopen(fd, "wb") as file:
                while True:
                    where = (row.owner == owner) & (row.name == name) & (row.part == parts)
                    with self._database.read() as connection:
                        data = connection.execute(select(row.data).where(where)).scalar()
                    if data is None:
                        break
                    digest.update(data)
                    file.write(data)
                    parts += 1
                file.flush()
                os.fsync(file.fileno())
            if not parts:
                return False
            if sha256 and digest.hexdigest() != sha256:
                raise StorageError(
                    "A shared file content is not what it was.",
                    hint="The database was damaged or edited; begin the task again.",
                    kept="Nothing was taken over.",
                )
            temporary.replace(path)
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def collect(self, owner: str, keep: frozenset[str], step: int) -> None:
        """Forget contents that a task needs no more, but none that was put at this step or later.

        A host that was frozen between its step and this must not delete what the next step of another one put.
        """
        row = tables.contents.c
        where = (row.owner == owner) & row.name.not_in(sorted(keep)) & (row.step < step)
        with self._database.write(alone=False) as connection:
            self._guard(connection)
            connection.execute(delete(tables.contents).where(where))

    def forget(self, owner: str) -> None:
        """Forget all of an owner's."""
        with self._database.write(alone=False) as connection:
            self._guard(connection)
            connection.execute(delete(tables.contents).where(tables.contents.c.owner == owner))

    def has(self, owner: str, name: str) -> bool:
        """Whether a content is shared."""
        row = tables.contents.c
        with self._database.read() as connection:
            return bool(connection.execute(select(exists().where((row.owner == owner) & (row.name == name)))).scalar())
