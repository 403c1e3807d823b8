"""The tables, the same in SQLite and PostgreSQL. How older ones came to this is in ``migrations/``."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, LargeBinary, MetaData, String, Table, Text

__all__ = [
    "REVISIONS", "about", "checkpoints", "contents", "decisions", "grants", "host_workers", "hosts", "ledger",
    "messages", "metadata", "outputs", "requests", "revision", "tasks",
]  # fmt: skip

REVISIONS = ("0001", "0002")
"""All that this code knows, oldest first; the last one is what the tables here are."""

metadata = MetaData()

revision = Table("alembic_version", metadata, Column("version_num", String(32), primary_key=True))
"""Alembic's own table; looked at without loading Alembic."""
requests = Table(
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
    # The host that has the folder; empty where there is one host only.
    Column("home", String(64), nullable=False, server_default=""),
)
decisions = Table(
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
grants = Table(
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
ledger = Table(
    "ledger",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("time_ns", BigInteger, nullable=False),
    Column("kind", String(64), nullable=False, index=True),
    Column("body", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
)
tasks = Table(
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
    # The request at the cliff that it waits for, and the host that has its folder.
    Column("waits_for", String(32), nullable=False, server_default=""),
    Column("home", String(64), nullable=False, server_default=""),
    # What its next step needs: "turn", "machine" or "folder".
    Column("needs", String(16), nullable=False, server_default=""),
)
messages = Table(
    "messages",
    metadata,
    Column("task", String(32), ForeignKey("tasks.id"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("body", Text, nullable=False),
)
outputs = Table(
    "outputs",
    metadata,
    Column("task", String(32), ForeignKey("tasks.id"), primary_key=True),
    Column("name", String(32), primary_key=True),
    Column("text", Text, nullable=False),
)
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("hash", String(64), nullable=False),
    Column("signature", LargeBinary, nullable=False),
)

# What hosts of a fleet must have of each other: images and contents of files, in parts.
contents = Table(
    "contents",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("name", String(80), primary_key=True),
    Column("part", Integer, primary_key=True, autoincrement=False),
    # The step of the task at which it was put last: whoever collects what an earlier one left keeps it.
    Column("step", Integer, nullable=False),
    Column("data", LargeBinary, nullable=False),
)
hosts = Table(
    "hosts",
    metadata,
    Column("name", String(64), primary_key=True),
    # Of the worker that holds the lease; whoever has another one may write nothing.
    Column("token", String(32), nullable=False),
    Column("beat_ns", BigInteger, nullable=False),
    Column("lease_ns", BigInteger, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("busy", Integer, nullable=False),
    Column("alive", Integer, nullable=False),
    # The id of the state folder that has this name.
    Column("folder", String(32), nullable=False, server_default=""),
)
# One row: the id of this database, by which state folders tell what belongs to it.
about = Table("about", metadata, Column("id", String(32), primary_key=True))
host_workers = Table(
    "host_workers",
    metadata,
    Column("worker_id", BigInteger, primary_key=True, autoincrement=False),
    Column("token", String(32), nullable=False),
)
