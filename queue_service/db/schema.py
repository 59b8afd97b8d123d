"""Migrating: how a database gets from one revision of the schema to another."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psycopg import errors as pg

from queue_service.db.pool import options
from queue_service.db.revision import HEAD
from queue_service.errors import ConfigError, DatabaseUnavailable, SchemaMismatch

if TYPE_CHECKING:
    # It is imported where it is used, since most commands migrate nothing.
    import sqlalchemy

# Alembic keeps its context in globals of the process; across processes the lock in the database decides.
_ALEMBIC = threading.Lock()
_PACKAGED = Path(__file__).parent / "_alembic"
_REPOSITORY = Path(__file__).parent.parent.parent / "alembic"


def upgrade(conninfo: str, revision: str = "head") -> None:
    """Migrate to `revision`. Any number of processes may call this at once: one works, the others find it done."""
    _run(conninfo, "upgrade", revision)


def downgrade(where: str | sqlalchemy.Connection, revision: str) -> None:
    """Migrate back to `revision`, which drops what came after it; on a connection that is given, in its transaction."""
    _run(where, "downgrade", revision)


def check(conninfo: str) -> None:
    """Raise alembic's CommandError where the database and `db/tables.py` disagree."""
    _run(conninfo, "check")


def sql() -> None:
    """Print the statements of every migration, for those who apply them by other means."""
    from alembic import command

    command.upgrade(_config(None), "head", sql=True)


@contextmanager
def translated() -> Iterator[None]:
    """What SQLAlchemy raises around our migrations, as ours."""
    import sqlalchemy

    try:
        yield
    except sqlalchemy.exc.ProgrammingError as refused:
        raise (refused.orig if isinstance(refused.orig, pg.InsufficientPrivilege) else refused) from None
    except sqlalchemy.exc.OperationalError as lost:
        raise DatabaseUnavailable(f"The migration stopped: {str(lost.orig).strip()}. Run it again.") from lost


def _run(where: str | sqlalchemy.Connection, verb: str, *arguments: str) -> None:
    from alembic.util import CommandError

    from alembic import command

    try:
        with translated(), _ALEMBIC:
            getattr(command, verb)(_config(where), *arguments)
    except CommandError as refused:
        # The database names a revision that is not among ours.
        unknown = re.search(r"Can't locate revision identified by '([^']*)'", str(refused))
        if unknown is None:
            raise
        if unknown[1] in arguments:
            raise ConfigError(f"There is no revision {unknown[1]!r}. This version goes up to {HEAD}.") from None
        raise SchemaMismatch(unknown[1], HEAD, newer=True) from None


def _config(where: str | sqlalchemy.Connection | None) -> Any:
    from alembic.config import Config

    config = Config()
    scripts = _PACKAGED if _PACKAGED.is_dir() else _REPOSITORY
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    if isinstance(where, str):
        config.attributes["conninfo"] = options(where, "queue_service migrate")
    elif where is not None:
        config.attributes["connection"] = where
    return config
