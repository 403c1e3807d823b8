"""Run by Alembic: the caller's connection and transaction are used."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
