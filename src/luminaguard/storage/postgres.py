"""PostgreSQL: one database for all hosts of a fleet.

Whoever writes holds one lock of the database, so that the ledger's chain has one end on all hosts. A connection
that is silent in the middle of a transaction, as a frozen host's is, is ended by the server, and the lock with it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError

from luminaguard.errors import DatabaseUnreachable, SettingsError, StorageError
from luminaguard.storage import schema
from luminaguard.storage.revisions import newer
from luminaguard.storage.revisions import upgrade as bring_up

__all__ = ["check_schema", "connect", "conninfo", "explain", "grant", "parse_url", "refuse_open"]

_LOCK = 0x4C756D696E61
"""The advisory lock of writers; a number that no other program of this database should use."""
_LOCAL = frozenset({"", "localhost", "127.0.0.1", "::1"})
_OPTIONS = {
    "statement_timeout": "60s", "lock_timeout": "30s", "idle_in_transaction_session_timeout": "5s",
    "synchronous_commit": "on", "client_encoding": "UTF8",
}  # fmt: skip
_LIVENESS = {
    "connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3,
    "tcp_user_timeout": 10_000, "application_name": "luminaguard",
}  # fmt: skip
"""How soon a server that does not answer is given up (libpq's connection parameters)."""


def parse_url(text_of: str) -> URL:
    """The URL of a database.

    Raises:
        SettingsError: it is none, or it would send what it carries over a network unprotected.
    """
    try:
        url = make_url(text_of)
    except ArgumentError:
        raise _unusable("it is not of the form postgresql://USER@HOST/NAME") from None
    if url.drivername not in {"postgresql", "postgres"} or not url.database:
        raise _unusable("it is not of the form postgresql://USER@HOST/NAME")
    hosts = url.query.get("host", url.host or "")
    for host in [hosts] if isinstance(hosts, str) else hosts:
        local = host.startswith("/") or host in _LOCAL
        if not local and url.query.get("sslmode") != "verify-full":
            raise _unusable(f"{host} is another machine, and the connection must have sslmode=verify-full")
    return url.set(drivername="postgresql+psycopg")


def conninfo(url: URL) -> dict[str, Any]:
    """The same for libpq."""
    named: dict[str, Any] = {"host": url.host, "port": url.port, "user": url.username, "password": url.password,
                             "dbname": url.database}  # fmt: skip
    options = " ".join(f"-c {name}={value}" for name, value in _OPTIONS.items())
    return {key: value for key, value in named.items() if value is not None} | _LIVENESS | {"options": options} | dict(
        url.query)  # fmt: skip


def connect(text_of: str) -> tuple[Engine, str]:
    """An engine, and what people call the database. Raises SettingsError."""
    url = parse_url(text_of)
    plain = URL.create("postgresql+psycopg")
    engine = create_engine(plain, connect_args=conninfo(url), pool_size=8, max_overflow=24)
    event.listen(engine, "begin", _begin)
    name = url.set(drivername="postgresql", password=None, query={}).render_as_string()
    return engine, name


def _begin(connection: Connection) -> None:
    if connection.get_execution_options().get("alone", True):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def check_schema(connection: Connection, *, name: str, upgrade: bool) -> None:
    """Refuse tables that are not what this code knows, or bring them there; raises StorageError."""
    found = None
    if inspect(connection).has_table("alembic_version"):
        found = connection.execute(select(schema.revision.c.version_num)).scalar()
    if found is not None and found not in schema.REVISIONS:
        raise newer(name, found)
    if found == schema.REVISIONS[-1]:
        return
    if not upgrade:
        what = "has no tables of LuminaGuard" if found is None else f"is of an older version ({found})"
        raise StorageError(
            f"The database {name} {what}.", hint="Run 'luminaguard database upgrade' once, as its owner."
        )
    bring_up(connection, name)


def refuse_open(connection: Connection, name: str) -> None:
    """Refuse a database that any role may connect to: each could end other people's jobs. Raises StorageError."""
    if connection.execute(text("SELECT has_database_privilege('public', current_database(), 'CONNECT')")).scalar():
        raise StorageError(
            f"Every role of its server may connect to the database {name}.",
            hint="Run 'luminaguard database upgrade --role NAME' as its owner, which closes it.",
        )


def grant(connection: Connection, role: str, *, closed: bool) -> None:
    """Give a role what workers need and no right to change tables; let nobody else connect.

    A role that may connect could end other people's jobs, by a forged notification.
    """
    quoted = connection.dialect.identifier_preparer.quote
    database = quoted(str(connection.execute(text("SELECT current_database()")).scalar()))
    if closed:
        connection.execute(text(f"REVOKE CONNECT, TEMPORARY ON DATABASE {database} FROM PUBLIC"))
    if not role:
        return
    who = quoted(role)
    if not connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}).scalar():
        raise StorageError(f"There is no role {role!a} in PostgreSQL.", hint=f"Create it: CREATE ROLE {who} LOGIN.")
    for what in (
        f"CONNECT ON DATABASE {database}", "USAGE ON SCHEMA public",
        "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public",
        "USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public", "EXECUTE ON ALL FUNCTIONS IN SCHEMA public",
    ):  # fmt: skip
        connection.execute(text(f"GRANT {what} TO {who}"))


def explain(name: str, error: DBAPIError) -> StorageError:
    """What happened, and what to do."""
    lines = str(error.orig).strip().splitlines() or [type(error.orig).__name__]
    said = lines[0].rstrip(".")
    state, kind = getattr(error.orig, "sqlstate", None) or "", StorageError
    if state in {"42501", "28000", "28P01"}:
        hint = "Check the role, its password and its rights: 'luminaguard database upgrade --role NAME' gives them."
    elif state.startswith("53"):
        hint = "The server is short of space, memory or connections; see its log."
    elif error.connection_invalidated or not state or state.startswith(("08", "57")):
        kind = DatabaseUnreachable
        hint = (
            "Check that the server runs and can be reached; what was finished is kept, and workers go on by themselves."
        )
    else:
        hint = "Run the command again; see the server's log."
    return kind(f"The database {name} cannot be used: {said}.", hint=hint,
                kept="The transaction was rolled back; nothing is half written.")  # fmt: skip


def _unusable(why: str) -> SettingsError:
    return SettingsError(
        f"The database's URL cannot be used: {why}.",
        hint="For example postgresql://worker@db.example/luminaguard?sslmode=verify-full&sslrootcert=/etc/ca.pem; "
        "passwords belong into PGPASSFILE, not into settings.",
    )
