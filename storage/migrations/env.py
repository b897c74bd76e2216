"""Alembic's environment: the connection comes from `storage.database`, in a transaction that is already begun."""

from alembic import context

from storage.schema import Base

connection = context.config.attributes["connection"]
# SQLite's DDL is transactional because storage.database begins the transaction itself
context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
