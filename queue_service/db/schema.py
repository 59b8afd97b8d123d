"""Migrating: how a database gets from one revision of the schema to another."""

from __future__ import annotations

import io
import re
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from queue_service.db import phases, revision
from queue_service.db.migration import Migration, Tell, changed
from queue_service.db.phases import Caution, Plan
from queue_service.db.revision import HEAD
from queue_service.errors import ConfigError, SchemaMismatch

if TYPE_CHECKING:
    # It is imported where it is used, since most commands migrate nothing.
    import sqlalchemy
    from alembic.script import ScriptDirectory

# Alembic keeps its context in globals of the process; across processes the lock in the database decides.
_ALEMBIC = threading.Lock()
# Of whoever says nothing else.
CAUTION = Caution()
_PACKAGED = Path(__file__).parent / "_alembic"
_REPOSITORY = Path(__file__).parent.parent.parent / "alembic"


class Upgraded(NamedTuple):
    """The revision that the schema has now, and why it went no further; `works` is whether this code works on it."""

    revision: str | None
    held: str | None
    works: bool


def upgrade(conninfo: str, to: str | None = None, *, caution: Caution = CAUTION, tell: Tell | None = None) -> Upgraded:
    """Migrate to revision `to`; without it, to the newest that leaves everybody at work. In one transaction. Any number of
    processes may call this at once: one works, the others find it done. `tell` is given a sentence, now and then, about
    whom it waits for; without it that is logged.

    Raises SchemaMismatch where the schema is newer than this version, and not one to work on; ConfigError for a revision
    that is not there, and where somebody who is at work stands against `to`; and what `migration.changed` raises.
    """
    wanted = None if to is None else known(to)
    migrations = phases.steps(_scripts())

    def planned(migration: Migration) -> tuple[revision.Schema, Plan]:
        found = _found(migration)
        if found.revision is not None and found.revision > HEAD:
            if to not in {None, "head"} or not found.works:
                raise SchemaMismatch(found.revision, HEAD, newer=True, oldest_code=found.oldest_code)
            return found, Plan(found.revision)
        if to is not None and wanted is None:
            return found, Plan(found.revision)
        look = phases.Look(migration.connection, caution, time.monotonic() - migration.began_at)
        return found, phases.plan(look, migrations, found.revision, wanted)

    def change(migration: Migration) -> Upgraded:
        # Nobody is held up before there is something to do. Who stands against it is looked for again when nobody can enter
        # the roster any more.
        found, plan = planned(migration)
        if plan.to != found.revision:
            migration.exclude_others()
            found, plan = planned(migration)
        if plan.to != found.revision:
            migration.take_tables()
            found, plan = planned(migration)
        if plan.to is not None and plan.to != found.revision:
            migration.make_schema()
            _run(migration.connection, "upgrade", plan.to)
            found = _found(migration)
        return Upgraded(found.revision, plan.held, found.works)

    return changed(conninfo, change, tell=tell)


def _found(migration: Migration) -> revision.Schema:
    if migration.revision() is None:
        return revision.Schema()
    return revision.SCHEMA.decode(migration.connection.exec_driver_sql(revision.SCHEMA.text).all())


def downgrade(where: str | sqlalchemy.Connection, to: str) -> None:
    """Migrate back to revision `to`, which drops what came after it; on a connection that is given, in its transaction."""

    def change(migration: Migration) -> None:
        migration.exclude_others()
        migration.take_tables()
        _run(migration.connection, "downgrade", to)

    if isinstance(where, str):
        changed(where, change)
    else:
        _run(where, "downgrade", to)


def check(conninfo: str) -> None:
    """Raise alembic's CommandError where the database and `db/tables/` disagree, and SchemaMismatch where it is at another
    revision, which has other tables."""

    def compare(migration: Migration) -> None:
        found = _found(migration)
        if found.revision != HEAD:
            raise SchemaMismatch(found.revision, HEAD, newer=found.revision is not None and found.revision > HEAD)
        _run(migration.connection, "check")

    changed(conninfo, compare, commit=False)


def sql() -> None:
    """Print the statements of every migration, for those who apply them by other means."""
    from alembic import command

    command.upgrade(_config(None), "head", sql=True)


def known(to: str) -> str | None:
    """Its number; None for `base`, that of no schema. Raises ConfigError where there is no such revision."""
    if to in {"base", "head"}:
        return None if to == "base" else HEAD
    # Alembic would also take a part of a number, which may be a misspelt one.
    if to not in {step.revision for step in phases.steps(_scripts())}:
        raise ConfigError(
            f"There is no revision {to!r}. This version knows 0001 to {HEAD}, head, and base (no schema)."
        )
    return to


def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config(None))


def _run(connection: sqlalchemy.Connection, verb: str, *arguments: str) -> None:
    from alembic.util import CommandError

    from alembic import command

    try:
        with _ALEMBIC:
            getattr(command, verb)(_config(connection), *arguments)
    except CommandError as refused:
        # The database names a revision that is not among ours.
        unknown = re.search(r"Can't locate revision identified by '([^']*)'", str(refused))
        if unknown is None:
            raise
        raise SchemaMismatch(unknown[1], HEAD, newer=True) from None


def _config(connection: sqlalchemy.Connection | None) -> Any:
    from alembic.config import Config

    # What it says itself is for nobody: it would stand before the JSON of a command. What it prints offline is asked for.
    config = Config(stdout=io.StringIO(), output_buffer=sys.stdout)
    scripts = _PACKAGED if _PACKAGED.is_dir() else _REPOSITORY
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    if connection is not None:
        config.attributes["connection"] = connection
    return config
