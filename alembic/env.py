"""Runs revisions in the transaction of `queue_service.db.migration`, or prints them."""

import os

import sqlalchemy

from alembic import context
from queue_service import settings
from queue_service.db import migration, phases, tables, url
from queue_service.db.migration import SCHEMA


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
        on_version_apply=phases.note_oldest_code,
        **how,
    )


def conninfo() -> str:
    """For `alembic` at a prompt."""
    target = url.choose(None, os.environ, settings.load(os.environ).data_dir)
    if isinstance(target, url.EmbeddedCluster):
        from queue_service.db import embedded

        return embedded.cluster(target.path).use()
    return target.conninfo


def online() -> None:
    given = context.config.attributes.get("connection")
    if given is not None:
        # Whoever gave it commits, or rolls back.
        migrate(given)
        return
    migration.changed(conninfo(), at_a_prompt)


def at_a_prompt(ours: migration.Migration) -> None:
    ours.exclude_others()
    ours.make_schema()
    migrate(ours.connection)


def migrate(connection: sqlalchemy.Connection) -> None:
    configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()


def offline() -> None:
    configure(dialect_name="postgresql", literal_binds=True)
    with context.begin_transaction():
        context.execute("set transaction isolation level read committed, read write")
        context.execute(migration.SETTINGS)
        context.execute(f"create schema if not exists {SCHEMA}")
        context.run_migrations()


if context.is_offline_mode():
    offline()
else:
    online()
