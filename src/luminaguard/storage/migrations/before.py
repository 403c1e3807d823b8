"""Databases from before Alembic: their versions 1 to 4, of which the last became the first revision."""

from sqlalchemy import Column, Connection, Integer, MetaData, Table, select, update
from sqlalchemy.schema import CreateColumn

from luminaguard.storage.migrations.versions.v0001_first import first_tables
from luminaguard.storage.revisions import newer

__all__ = ["to_first_revision"]

_LAST = 4
_version = Table("schema_version", MetaData(), Column("version", Integer, primary_key=True))


def to_first_revision(connection: Connection, name: str) -> None:
    """Bring such a database to the first revision; raises StorageError if its version is none of these."""
    found = connection.execute(select(_version.c.version)).scalar()
    if found is None or not 1 <= found <= _LAST:
        raise newer(name, found)
    if found < 3:
        _to_3(connection, found)
    first_tables().create_all(connection)
    # Those who know no Alembic read this, and see that it is newer than they are.
    connection.execute(update(_version).values(version=_LAST + 1))


def _to_3(connection: Connection, version: int) -> None:
    metadata = first_tables()
    requests = metadata.tables["requests"]
    if version == 1:
        connection.exec_driver_sql("ALTER TABLE requests DROP COLUMN device")
    connection.exec_driver_sql("ALTER TABLE requests RENAME COLUMN changeset TO body")
    for column in ("effect", "task", "taint", "risk", "severity", "reason", "rule", "policy", "people"):
        definition = str(CreateColumn(requests.c[column]).compile(dialect=connection.dialect))
        connection.exec_driver_sql(f"ALTER TABLE requests ADD COLUMN {definition}")
    connection.exec_driver_sql("ALTER TABLE decisions RENAME TO decisions_2")
    metadata.create_all(connection)
    kept = "request_id, digest, workspace, verdict, means, decided_ns, expires_ns, nonce, approver, signature"
    connection.exec_driver_sql(f"INSERT INTO decisions ({kept}) SELECT {kept} FROM decisions_2")  # noqa: S608
    connection.exec_driver_sql("DROP TABLE decisions_2")
    connection.exec_driver_sql("CREATE INDEX IF NOT EXISTS ix_ledger_kind ON ledger (kind)")
