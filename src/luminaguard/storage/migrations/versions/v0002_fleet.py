"""For fleets: whose folder it is, what waits for what, contents that hosts share, hosts, and the queue's own tables."""

import json
import secrets

from alembic import op
from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, String, Table, Text, select, update

revision = "0002"
down_revision = "0001"

QUEUE = "3.10.0"
"""The release of procrastinate whose tables these are; a later one brings a revision of its own."""


def upgrade() -> None:
    """Add them."""
    op.add_column("requests", Column("home", String(64), nullable=False, server_default=""))
    for name, length in (("waits_for", 32), ("home", 64), ("needs", 16)):
        op.add_column("tasks", Column(name, String(length), nullable=False, server_default=""))
    op.create_table(
        "contents",
        Column("owner", String(64), primary_key=True),
        Column("name", String(80), primary_key=True),
        Column("part", Integer, primary_key=True, autoincrement=False),
        Column("step", Integer, nullable=False),
        Column("data", LargeBinary, nullable=False),
    )
    op.create_table(
        "hosts",
        Column("name", String(64), primary_key=True),
        Column("token", String(32), nullable=False),
        Column("beat_ns", BigInteger, nullable=False),
        Column("lease_ns", BigInteger, nullable=False),
        Column("slots", Integer, nullable=False),
        Column("busy", Integer, nullable=False),
        Column("alive", Integer, nullable=False),
        Column("folder", String(32), nullable=False, server_default=""),
    )
    about = op.create_table("about", Column("id", String(32), primary_key=True))
    op.bulk_insert(about, [{"id": secrets.token_hex(16)}])
    op.create_table(
        "host_workers",
        Column("worker_id", BigInteger, primary_key=True, autoincrement=False),
        Column("token", String(32), nullable=False),
    )
    _what_waits()
    if op.get_bind().dialect.name == "postgresql":
        _queue()


def _what_waits() -> None:
    """What tasks wait for was told in their bodies alone."""
    tasks = Table("tasks", MetaData(), Column("id", String), Column("body", Text), Column("waits_for", String))
    connection = op.get_bind()
    for row in connection.execute(select(tasks.c.id, tasks.c.body)).all():
        try:
            request = json.loads(row.body)["request"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # it cannot be read, which whoever asks for it is told
        if isinstance(request, str) and request:
            connection.execute(update(tasks).where(tasks.c.id == row.id).values(waits_for=request[:32]))


def _queue() -> None:
    import procrastinate  # noqa: PLC0415  # of PostgreSQL alone
    from procrastinate.schema import SchemaManager  # noqa: PLC0415  # as above

    if procrastinate.__version__ != QUEUE:
        raise RuntimeError(f"procrastinate is {procrastinate.__version__}, and these are the tables of {QUEUE}")
    # One string of many statements, with functions in it: not one that placeholders are looked for in.
    raw = op.get_bind().connection.driver_connection
    assert raw is not None
    raw.execute(SchemaManager.get_schema())
