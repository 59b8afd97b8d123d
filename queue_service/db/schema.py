"""Migrating: how a database gets from one revision of the schema to another."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from queue_service.db.migration import Migration, Tell, changed
from queue_service.db.revision import HEAD
from queue_service.errors import ConfigError, SchemaMismatch

if TYPE_CHECKING:
    # It is imported where it is used, since most commands migrate nothing.
    import sqlalchemy

# Alembic keeps its context in globals of the process; across processes the lock in the database decides.
_ALEMBIC = threading.Lock()
_PACKAGED = Path(__file__).parent / "_alembic"
_REPOSITORY = Path(__file__).parent.parent.parent / "alembic"


def upgrade(conninfo: str, revision: str = "head", *, tell: Tell | None = None) -> None:
    """Migrate to `revision`, in one transaction. Any number of processes may call this at once: one works, the others find
    it done. `tell` is given a sentence, now and then, about whom it waits for; without it that is logged.

    Raises SchemaMismatch where the schema is newer than this version, ConfigError for a revision that is not there, and
    what `migration.changed` raises.
    """
    wanted = _known(revision)

    def change(migration: Migration) -> None:
        if _is_done(migration.revision(), wanted):
            return
        migration.exclude_others()
        if _is_done(migration.revision(), wanted):
            return
        migration.take_tables()
        migration.make_schema()
        _run(migration.connection, "upgrade", revision)

    changed(conninfo, change, tell=tell)


def downgrade(where: str | sqlalchemy.Connection, revision: str) -> None:
    """Migrate back to `revision`, which drops what came after it; on a connection that is given, in its transaction."""

    def change(migration: Migration) -> None:
        migration.exclude_others()
        migration.take_tables()
        _run(migration.connection, "downgrade", revision)

    if isinstance(where, str):
        changed(where, change)
    else:
        _run(where, "downgrade", revision)


def check(conninfo: str) -> None:
    """Raise alembic's CommandError where the database and `db/tables.py` disagree."""
    changed(conninfo, lambda migration: _run(migration.connection, "check"), commit=False)


def sql() -> None:
    """Print the statements of every migration, for those who apply them by other means."""
    from alembic import command

    command.upgrade(_config(None), "head", sql=True)


def _is_done(have: str | None, wanted: str | None) -> bool:
    if have is not None and have > HEAD:
        raise SchemaMismatch(have, HEAD, newer=True)
    return wanted is None or (have is not None and have >= wanted)


def _known(revision: str) -> str | None:
    """Its number; None for that of no schema. Raises ConfigError where there is no such revision."""
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    try:
        script = ScriptDirectory.from_config(_config(None)).get_revision(revision)
    except CommandError:
        raise ConfigError(f"There is no revision {revision!r}. This version goes up to {HEAD}.") from None
    return None if script is None else str(script.revision)


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

    config = Config()
    scripts = _PACKAGED if _PACKAGED.is_dir() else _REPOSITORY
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    if connection is not None:
        config.attributes["connection"] = connection
    return config
