"""Row security: policies by which a role sees the rows of one organization, or those of all where it is exempt.

Who reads what is decided by the database, whatever a statement asks for. A session says whose it is by the setting
`queue_service.organization_id`; one that says nothing sees nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy
from psycopg import sql

from queue_service.db.migration import Migration, Tell, changed
from queue_service.db.revision import HEAD
from queue_service.errors import ConfigError, SchemaMismatch

# The names of our policies; those of others stay as they are.
OWN, EXEMPT = "queue_service_own", "queue_service_exempt"
# What the policies need is there from this revision on.
SINCE = "0025"

# As a subquery, it is computed once for each statement.
_COLUMN = "organization_id = (select queue_service.organization())"
# Of these, the policies of other tables say what is visible. Were it asked by `exists`, all of them could be read for it.
_RUN = """coalesce((select true from queue_service.runs where runs.id = steps.run_id limit 1),
                   (select true from queue_service.finished_runs where finished_runs.id = steps.run_id limit 1), false)"""
_TURN = """coalesce((select true from queue_service.turn_outcomes as o
                     where o.deployment = renderings.deployment and o.message_id = renderings.message_id), false)"""

# What each table shows to a role that is not exempt. The tables that are not here have nothing that is one organization's:
# queues, schedules, lanes, leases, and which processes are at work.
VISIBLE = {
    "runs": _COLUMN,
    "finished_runs": _COLUMN,
    "steps": _RUN,
    "streams": _COLUMN,
    "events": _COLUMN,
    "turn_markers": _COLUMN,
    "turn_outcomes": _COLUMN,
    "receipts": _COLUMN,
    "renderings": _TURN,
}

# Of our tables and the partitions, whether row security is on, and our policies: their names and roles.
_STATE = """
select c.relname, c.relrowsecurity,
       array(select p.polname || ' ' || coalesce((select string_agg(r.rolname, ' ' order by r.rolname) from pg_roles as r
                                                   where r.oid = any(p.polroles)), '')
               from pg_policy as p where p.polrelid = c.oid and p.polname = any(%(policies)s::text[]) order by p.polname)
  from pg_class as c
 where c.relnamespace = 'queue_service'::regnamespace
   and (c.relname = any(%(tables)s::text[])
        or c.oid in (select inhrelid from pg_inherits where inhparent = 'queue_service.finished_runs'::regclass))
 order by c.relispartition, c.relname
"""
_EXEMPT = """
select r.rolname from pg_policy as p join pg_roles as r on r.oid = any(p.polroles)
 where p.polrelid = 'queue_service.runs'::regclass and p.polname = %(policy)s order by r.rolname
"""
_UNKNOWN = """
select name from unnest(%(roles)s::text[]) as asked (name)
 where not exists (select from pg_roles where rolname = asked.name) order by name
"""

# Of the workers that are connected, the roles from which runs would be hidden. Each has a session of this name, which keeps
# its leases; of a gateway's sessions, none can be told from those of a tenant's program.
_BLIND = """
select distinct r.rolname
  from pg_stat_activity as a join pg_roles as r on r.oid = a.usesysid
 where a.datname = current_database() and a.application_name = 'queue_service keeper'
   and not (r.rolsuper or r.rolbypassrls
            or pg_has_role(r.oid, (select relowner from pg_class where oid = 'queue_service.runs'::regclass), 'usage')
            or exists (select from unnest(%(exempt)s::text[]) as exempt (name)
                        where pg_has_role(r.oid, exempt.name, 'usage')))
 order by r.rolname
"""


class Table(NamedTuple):
    """Whether row security is on, and which of our policies it has, each with its roles."""

    is_enabled: bool
    policies: tuple[str, ...]


class Secured(NamedTuple):
    """The roles that are exempt, and the tables and partitions that were changed."""

    exempt: list[str]
    changed: list[str]


def enable(conninfo: str, exempt: Sequence[str], *, tell: Tell | None = None) -> Secured:
    """Put the policies on, or bring them up to date, in one transaction. These roles are exempt, and those that were so
    before. Raises ConfigError for a role that is not there, and where a worker is connected whose role is not exempt;
    SchemaMismatch, and what `migration.changed` raises. Nothing has changed then."""

    def change(migration: Migration) -> Secured:
        connection = _begin(migration)
        if unknown := connection.exec_driver_sql(_UNKNOWN, {"roles": list(exempt)}).scalars().all():
            raise ConfigError(f"There is no role {unknown[0]!r}, so nothing was changed. Create it first.")
        before = _state(connection)
        roles = sorted({*exempt, *_exempt(connection)})
        if blind := connection.exec_driver_sql(_BLIND, {"exempt": roles}).scalars().all():
            raise ConfigError(
                f"Workers are connected as {', '.join(map(repr, blind))}, from which runs would be hidden: they would take "
                "what they have at work for gone, and drop how it ends. Nothing was changed. Exempt the role, too "
                f"(--exempt {shlex.quote(blind[0])}), or stop its workers first."
            )
        for table, visible in VISIBLE.items():
            for statement in _secured(table, visible, roles):
                connection.exec_driver_sql(statement)
        for partition in before.keys() - VISIBLE.keys():
            name = sql.Identifier("queue_service", partition).as_string(None)
            connection.exec_driver_sql("select queue_service.inherit_policies(%(name)s::regclass)", {"name": name})
        return Secured(roles, _differing(before, _state(connection)))

    return changed(conninfo, change, tell=tell)


def disable(conninfo: str, *, tell: Tell | None = None) -> Secured:
    """Take the policies back: then everybody sees what the grants of the tables say. Raises as `enable`."""

    def change(migration: Migration) -> Secured:
        connection = _begin(migration)
        before = _state(connection)
        for table in before:
            name = sql.Identifier("queue_service", table).as_string(None)
            for policy in (OWN, EXEMPT):
                connection.exec_driver_sql(f"drop policy if exists {policy} on {name}")
            connection.exec_driver_sql(f"alter table {name} disable row level security")
        return Secured([], _differing(before, _state(connection)))

    return changed(conninfo, change, tell=tell)


def _begin(migration: Migration) -> sqlalchemy.Connection:
    migration.exclude_others()
    have = migration.revision()
    if have is None or not SINCE <= have <= HEAD:
        raise SchemaMismatch(have, HEAD, newer=have is not None and have > HEAD)
    migration.take_tables()
    return migration.connection


def _secured(table: str, visible: str, exempt: Sequence[str]) -> list[str]:
    # What may be read may be written: without a check of its own, a policy's condition is that, too.
    name = f"queue_service.{table}"
    statements = [
        f"drop policy if exists {OWN} on {name}",
        f"create policy {OWN} on {name} using ({visible})",
        f"drop policy if exists {EXEMPT} on {name}",
    ]
    if exempt:
        roles = ", ".join(sql.Identifier(role).as_string(None) for role in exempt)
        statements.append(f"create policy {EXEMPT} on {name} to {roles} using (true)")
    return [*statements, f"alter table {name} enable row level security"]


def _state(connection: sqlalchemy.Connection) -> dict[str, Table]:
    found = connection.exec_driver_sql(_STATE, {"tables": list(VISIBLE), "policies": [OWN, EXEMPT]}).all()
    return {name: Table(is_enabled, tuple(policies)) for name, is_enabled, policies in found}


def _exempt(connection: sqlalchemy.Connection) -> list[str]:
    return list(connection.exec_driver_sql(_EXEMPT, {"policy": EXEMPT}).scalars().all())


def _differing(before: dict[str, Table], after: dict[str, Table]) -> list[str]:
    return [name for name, table in after.items() if before.get(name) != table]
