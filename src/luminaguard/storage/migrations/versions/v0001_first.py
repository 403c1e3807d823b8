"""The tables of the first release that Alembic knows."""

from alembic import op
from sqlalchemy import BigInteger, Column, ForeignKey, Integer, LargeBinary, MetaData, String, Table, Text

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create them."""
    first_tables().create_all(op.get_bind(), checkfirst=False)


def first_tables() -> MetaData:
    """As they were; what :mod:`luminaguard.storage.schema` says may be newer."""
    metadata = MetaData()
    Table(
        "requests",
        metadata,
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
    Table(
        "decisions",
        metadata,
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
    Table(
        "grants",
        metadata,
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
    Table(
        "ledger",
        metadata,
        Column("seq", Integer, primary_key=True, autoincrement=False),
        Column("time_ns", BigInteger, nullable=False),
        Column("kind", String(64), nullable=False, index=True),
        Column("body", Text, nullable=False),
        Column("previous", String(64), nullable=False),
        Column("hash", String(64), nullable=False),
    )
    Table(
        "tasks",
        metadata,
        Column("id", String(32), primary_key=True),
        Column("workspace", Text, nullable=False),
        Column("status", String(16), nullable=False, index=True),
        # How many steps are saved: who saves the next one compares it.
        Column("step", Integer, nullable=False),
        Column("created_ns", BigInteger, nullable=False),
        Column("updated_ns", BigInteger, nullable=False),
        Column("body", Text, nullable=False),
    )
    Table(
        "messages",
        metadata,
        Column("task", String(32), ForeignKey("tasks.id"), primary_key=True),
        Column("seq", Integer, primary_key=True, autoincrement=False),
        Column("body", Text, nullable=False),
    )
    Table(
        "outputs",
        metadata,
        Column("task", String(32), ForeignKey("tasks.id"), primary_key=True),
        Column("name", String(32), primary_key=True),
        Column("text", Text, nullable=False),
    )
    Table(
        "checkpoints",
        metadata,
        Column("seq", Integer, primary_key=True, autoincrement=False),
        Column("hash", String(64), nullable=False),
        Column("signature", LargeBinary, nullable=False),
    )
    return metadata
