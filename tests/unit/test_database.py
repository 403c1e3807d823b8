"""Schemas: what revisions make of older tables is what new ones are, in both databases; what waits goes on waiting."""

import json
import sqlite3

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect

from luminaguard.errors import SettingsError, StorageError
from luminaguard.storage import schema
from luminaguard.storage.database import Database
from luminaguard.storage.migrations.versions.v0001_first import first_tables
from luminaguard.storage.postgres import parse_url


def differences(database):
    def ours(_object, name, kind, _reflected, _other):
        return not (kind == "table" and name.startswith(("procrastinate_", "schema_version")))

    with database.write() as connection:
        context = MigrationContext.configure(
            connection, opts={"include_object": ours, "compare_server_default": database.shared}
        )
        return compare_metadata(context, schema.metadata)


def first_database(path, *, before_alembic):
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        first_tables().create_all(connection)
        if before_alembic:
            connection.exec_driver_sql("CREATE TABLE schema_version (version INTEGER NOT NULL PRIMARY KEY)")
            connection.exec_driver_sql("INSERT INTO schema_version VALUES (4)")
        else:
            schema.revision.create(connection)
            connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('0001')")
        for name, body in (("task-1", json.dumps({"request": "req-1"})), ("task-2", "garbage"), ("task-3", "{}")):
            connection.exec_driver_sql("INSERT INTO tasks VALUES (?, '/w', 'waiting', 3, 1, 1, ?)", (name, body))
    engine.dispose()


def test_new_tables_are_what_the_schema_says(place):
    database = Database.open(place)
    assert differences(database) == []
    database.close()


@pytest.mark.parametrize("before_alembic", [True, False])
def test_older_tables_become_the_same_and_keep_what_they_had(tmp_path, before_alembic):
    first_database(tmp_path / "db", before_alembic=before_alembic)
    for _ in range(2):
        database = Database.open(tmp_path / "db")
        assert differences(database) == []
        with database.read() as connection:
            rows = connection.exec_driver_sql("SELECT id, step, waits_for, home FROM tasks ORDER BY id").all()
        assert rows == [("task-1", 3, "req-1", ""), ("task-2", 3, "", ""), ("task-3", 3, "", "")]
        database.close()
    if before_alembic:  # those who know no Alembic see that it is newer than they are
        with sqlite3.connect(tmp_path / "db") as raw:
            assert raw.execute("SELECT version FROM schema_version").fetchall() == [(5,)]
        raw.close()


def test_an_upgrade_that_fails_leaves_what_was(tmp_path, monkeypatch):
    first_database(tmp_path / "db", before_alembic=True)

    def fails(*_args, **_more):
        raise StorageError("It failed.", hint="Look.")

    monkeypatch.setattr("luminaguard.storage.migrations.versions.v0002_fleet._what_waits", fails, raising=True)
    monkeypatch.setattr("alembic.command.upgrade", fails)
    with pytest.raises(StorageError, match="It failed"):
        Database.open(tmp_path / "db")
    monkeypatch.undo()
    engine = create_engine(f"sqlite:///{tmp_path / 'db'}")
    assert not inspect(engine).has_table("alembic_version")
    engine.dispose()
    Database.open(tmp_path / "db").close()


@pytest.mark.parametrize("version", [0, 5, 99])
def test_what_no_revision_is_known_of_is_refused(tmp_path, version):
    with sqlite3.connect(tmp_path / "db") as raw:
        raw.execute("CREATE TABLE schema_version (version INTEGER NOT NULL PRIMARY KEY)")
        raw.execute("INSERT INTO schema_version VALUES (?)", (version,))
    raw.close()
    with pytest.raises(StorageError, match=str(version)):
        Database.open(tmp_path / "db")


@pytest.mark.parametrize("url", [
    "x", "sqlite:///x", "postgresql://h", "mysql://h/x", "postgresql://db.example/x",
    "postgresql://db.example/x?sslmode=require", "postgresql:///x?host=db.example", "postgresql://127.0.0.2/x",
    "postgresql:///x?host=/tmp&host=db.example", "postgresql+psycopg2://localhost/x",
])  # fmt: skip
def test_a_url_that_is_none_or_unprotected_is_refused(url):
    with pytest.raises(SettingsError):
        parse_url(url)


@pytest.mark.parametrize("url", [
    "postgresql://u@localhost/x", "postgres:///x", "postgresql:///x?host=/run/postgresql",
    "postgresql://db.example/x?sslmode=verify-full", "postgresql://[::1]:5433/x",
])  # fmt: skip
def test_a_url_that_stays_here_or_is_protected_is_taken(url):
    assert parse_url(url).database == "x"
