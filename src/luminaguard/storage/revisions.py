"""Brings tables from any earlier revision to this one; Alembic is loaded for that alone."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert

from luminaguard.effects.text import visible
from luminaguard.errors import StorageError
from luminaguard.storage import schema

__all__ = ["newer", "stamp", "upgrade"]


def stamp(connection: Connection, revision: str = schema.REVISIONS[-1]) -> None:
    """Say that the tables are what a revision makes of them."""
    connection.execute(insert(schema.revision).values(version_num=revision))


def upgrade(connection: Connection, name: str, *, before_alembic: bool = False) -> None:
    """Bring the tables to the newest revision, inside the caller's transaction; what waits goes on waiting.

    Raises:
        StorageError: they are of a version that this code does not know.
    """
    from alembic import command  # noqa: PLC0415  # rarely needed
    from alembic.config import Config  # noqa: PLC0415  # as above

    if before_alembic:
        from luminaguard.storage.migrations.before import to_first_revision  # noqa: PLC0415  # as above

        to_first_revision(connection, name)
        schema.revision.create(connection)
        stamp(connection, schema.REVISIONS[0])
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", "luminaguard.storage:migrations")
    command.upgrade(config, schema.REVISIONS[-1])


def newer(name: str, found: Any) -> StorageError:
    """A version that this code does not know."""
    return StorageError(
        f"{name} has schema version {visible(str(found))[:64]}; this LuminaGuard knows {schema.REVISIONS[-1]}.",
        hint="Use the newer LuminaGuard that wrote it.",
    )
