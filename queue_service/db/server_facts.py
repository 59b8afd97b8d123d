"""What a server says of itself: the settings on which our promises rest, and what else is attached to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

from queue_service.db import grants, revision
from queue_service.db.execute import fetch
from queue_service.db.query import Query, column
from queue_service.db.session import Session
from queue_service.db.statements import Statements

_statements = Statements("queue_service.db")

# Patroni gives the server all of these on its command line, and hardly anybody else does.
OF_PATRONI = (
    "cluster_name",
    "max_worker_processes",
    "max_prepared_transactions",
    "track_commit_timestamp",
    "wal_log_hints",
)
_NAMES = (
    "autovacuum",
    "data_checksums",
    "default_transaction_read_only",
    "fsync",
    "full_page_writes",
    "max_connections",
    "reserved_connections",
    "superuser_reserved_connections",
    "synchronous_commit",
    "synchronous_standby_names",
    "track_counts",
    *OF_PATRONI,
)


class Setting(NamedTuple):
    name: str
    value: str
    is_of_the_command_line: bool


class Place(NamedTuple):
    """Who looks where. A limit of connections is None where the server's is the only one that matters."""

    is_standby: bool
    limit_of_role: int | None
    limit_of_database: int | None
    is_superuser: bool
    login: str
    role: str
    database: str
    may_see_roster: bool


class Standby(NamedTuple):
    """The last two are None where the role may not see them."""

    name: str
    state: str | None
    sync_state: str | None


class Processes(NamedTuple):
    """Those that are at work now."""

    workers: int
    gateways: int


class Facts(NamedTuple):
    """`processes` is None where the role may not see them; `pool_size` is how many connections an App has at most."""

    schema: revision.Schema
    is_pooled: bool
    settings: Mapping[str, Setting]
    place: Place
    standbys: Sequence[Standby]
    empty_slots: Sequence[str]
    unvacuumed: Sequence[str]
    processes: Processes | None
    lacking: Sequence[grants.Lacking]
    pool_size: int

    def value(self, name: str) -> str:
        """As sessions of this role begin with it; empty where this version of Postgres has no such setting."""
        return self.settings[name].value if name in self.settings else ""

    def number(self, name: str) -> int:
        return int(self.value(name) or 0)


def processes_at_work(silence: timedelta) -> Query[Processes]:
    return _statements.query("server_processes", lambda rows: Processes(*rows[0]), silence=silence)


async def look(conn: Session, *, silence: timedelta, pool_size: int) -> Facts:
    """Workers that were not seen for `silence` are not counted."""
    settings = await fetch(
        conn, _statements.query("server_settings", lambda rows: [Setting(*row) for row in rows], names=list(_NAMES))
    )
    place = await fetch(conn, _statements.query("server_place", lambda rows: Place(*rows[0])))
    processes = None
    if place.may_see_roster and not place.is_standby:
        # (The gateways' table is unlogged, and cannot be read on a standby.)
        processes = await fetch(conn, processes_at_work(silence))
    return Facts(
        await revision.look(conn),
        conn.is_pooled,
        {each.name: each for each in settings},
        place,
        await fetch(conn, _statements.query("server_standbys", lambda rows: [Standby(*row) for row in rows])),
        await fetch(conn, _statements.query("server_empty_slots", column)),
        await fetch(conn, _statements.query("server_unvacuumed", column)),
        processes,
        # Elsewhere sessions have ours, whatever the role has.
        await grants.lacking(conn) if conn.is_pooled else [],
        pool_size,
    )
