"""What a role that does not own the schema needs: rights on what is in it, and behind a pooler of transactions the settings
that no session of ours can bring along there.

Everything is printed, and nothing is granted from here: whoever runs queue_service need not be who may grant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, LiteralString, NamedTuple

import psycopg
from psycopg import sql

from queue_service.db.query import scalar
from queue_service.db.session import SET, SETTINGS, Limits
from queue_service.db.statements import Statements

_statements = Statements("queue_service.db")

# What every session of ours has, and what a role has to have where ours cannot set it.
OF_A_ROLE = {**SETTINGS, **Limits().settings()}


class Lacking(NamedTuple):
    """A setting with which sessions of this role begin, and what it should be."""

    name: str
    have: str
    want: str


class Place(NamedTuple):
    """Whose the schema is, in which database, and who looks."""

    owner: str
    database: str
    user: str


async def place(conn: psycopg.AsyncConnection[Any]) -> Place:
    cursor = await conn.execute(_statements.query("place", scalar).text.encode())
    row = await cursor.fetchone()
    assert row is not None, "the schema was looked for before"
    return Place(*row)


def rights(role: str, where: Place) -> Iterator[str]:
    """The statements that let the role work, serve and read, for the owner of the schema to execute."""
    names = {"role": role, "owner": where.owner, "database": where.database}
    quoted = {name: sql.Identifier(value) for name, value in names.items()}
    for line in _RIGHTS:
        yield sql.SQL(line).format(**quoted).as_string(None)


def settings(role: str, where: Place) -> Iterator[str]:
    """The statements that give the role's sessions in this database what sessions of ours begin with."""
    yield from _ABOUT_SETTINGS
    for name, value in OF_A_ROLE.items():
        yield (
            sql.SQL("alter role {} in database {} set {} = {};")
            .format(sql.Identifier(role), sql.Identifier(where.database), sql.Identifier(name), sql.Literal(value))
            .as_string(None)
        )


async def lacking(conn: psycopg.AsyncConnection[Any]) -> list[Lacking]:
    """Which of these settings the sessions of this role do not begin with. Changes nothing: what is set to be compared, in
    the way that the server writes it, is rolled back."""
    names, values = list(OF_A_ROLE), list(OF_A_ROLE.values())
    async with conn.transaction(force_rollback=True):
        await conn.execute(SET.encode(), {"names": names, "values": values, "local": True})
        cursor = await conn.execute(_statements.query("unlike", scalar).text.encode(), {"names": names})
        return [Lacking(name, have, OF_A_ROLE.get(name, want)) for name, have, want in await cursor.fetchall()]


_RIGHTS: tuple[LiteralString, ...] = (
    "-- Rights on what this version has in the schema, for its owner to give.",
    "grant connect on database {database} to {role};",
    "grant usage on schema queue_service to {role};",
    "grant select, insert, update, delete on all tables in schema queue_service to {role};",
    "revoke insert, update, delete on queue_service.alembic_version from {role};",
    "grant usage, select on all sequences in schema queue_service to {role};",
    "grant execute on all functions in schema queue_service to {role};",
    "-- And on what later migrations of this owner add.",
    "alter default privileges for role {owner} in schema queue_service",
    "    grant select, insert, update, delete on tables to {role};",
    "alter default privileges for role {owner} in schema queue_service grant usage, select on sequences to {role};",
    "alter default privileges for role {owner} in schema queue_service grant execute on functions to {role};",
    "-- The daily partitions of finished_runs are made and dropped by the owner of that table, and by no one with fewer",
    "-- rights. Let at least one worker connect as the owner. Or make the role a member of the owner, and it may then",
    "-- change and drop all that the owner has.",
)
_ABOUT_SETTINGS = (
    "-- Only behind a pooler of transactions: the settings that our sessions set themselves elsewhere. They hold for new",
    "-- connections of the role to this database: have the pooler open new ones (pgbouncer: RECONNECT).",
)
