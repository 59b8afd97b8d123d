"""Runs revisions on one connection, in one transaction, behind one advisory lock."""

import os

import psycopg
import sqlalchemy

from alembic import context
from queue_service import settings
from queue_service.db import tables, url
from queue_service.db.pool import options

SCHEMA = "queue_service"
# Any number; it only has to be the same for all who migrate this schema.
LOCK = 4_718_105_520_114


def ours(name: str | None, kind: str, _parents: object) -> bool:
    """Only our schema, and not the daily partitions, which come and go by themselves."""
    if kind == "schema":
        return name == SCHEMA
    return not (kind == "table" and (name or "").startswith("finished_runs_"))


def configure(**how: object) -> None:
    context.configure(
        target_metadata=tables.metadata,
        version_table_schema=SCHEMA,
        include_schemas=True,
        include_name=ours,
        compare_server_default=False,
        **how,
    )


def conninfo() -> str:
    given = context.config.attributes.get("conninfo")
    if given is not None:
        return given
    target = url.choose(None, os.environ, settings.load(os.environ).data_dir)
    if isinstance(target, url.EmbeddedCluster):
        from queue_service.db import embedded

        return options(embedded.cluster(target.path).use())
    return options(target.conninfo)


def online() -> None:
    given = context.config.attributes.get("connection")
    if given is not None:
        # Whoever gave it commits, or rolls back.
        migrate(given)
        return
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(conninfo()),
        poolclass=sqlalchemy.NullPool,
        isolation_level="READ COMMITTED",
    )
    with engine.connect() as connection:
        migrate(connection)
        connection.commit()


def migrate(connection: sqlalchemy.Connection) -> None:
    # Whoever comes second waits here, and then finds the revisions applied. The lock falls with the transaction.
    connection.exec_driver_sql("select pg_advisory_xact_lock(%s)", (LOCK,))
    # The session's own 10 s would end the wait above; the one below is for tables that a long query holds.
    connection.exec_driver_sql("set local lock_timeout = '10s'")
    # It may be there for somebody who may make none, and only compares.
    if connection.exec_driver_sql(f"select to_regnamespace('{SCHEMA}')").scalar() is None:
        connection.exec_driver_sql(f"create schema {SCHEMA}")
    configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()


def offline() -> None:
    configure(dialect_name="postgresql", literal_binds=True)
    with context.begin_transaction():
        context.execute(f"create schema if not exists {SCHEMA}")
        context.run_migrations()


if context.is_offline_mode():
    offline()
else:
    online()
