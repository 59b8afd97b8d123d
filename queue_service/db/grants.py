"""What roles need in the schema, kind by kind: one table, which `db grants` prints, and which tests hold against every
call. And behind a pooler of transactions, the settings that no session of ours can bring along there.

Everything is printed, and nothing is granted from here: whoever runs queue_service need not be who may grant. What is
printed first takes back what the role had, so that it has these rights and no others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from enum import StrEnum
from itertools import groupby
from typing import Any, LiteralString, NamedTuple

import psycopg
from psycopg import sql

from queue_service.db.query import scalar
from queue_service.db.session import SET, SETTINGS, Limits
from queue_service.db.statements import Statements

_statements = Statements("queue_service.db")

# What every session of ours has, and what a role has to have where ours cannot set it.
OF_A_ROLE = {**SETTINGS, **Limits().settings()}


class Kind(StrEnum):
    """What a role is for."""

    ENQUEUER = "enqueuer"
    APP = "app"
    WORKER = "worker"
    GATEWAY = "gateway"
    OBSERVER = "observer"


_ENQUEUE = frozenset({Kind.ENQUEUER, Kind.APP, Kind.WORKER, Kind.GATEWAY})
_CHANGE = frozenset({Kind.APP, Kind.WORKER})
_SWEEP = frozenset({Kind.APP, Kind.WORKER, Kind.GATEWAY})

_ACTIONS: dict[str, LiteralString] = {"r": "select", "a": "insert", "w": "update", "d": "delete"}
# For each kind, in their order, what it may do: r(ead), a(dd), w(rite), d(elete). Whoever waits or serves sweeps, too, for
# all. Nobody needs a right on a partition of `finished_runs`: it is read and written by its parent, and made by its owner.
TABLES: dict[str, tuple[str, str, str, str, str]] = {
    "alembic_version": ("r", "r", "r", "r", "r"),
    "connections": ("", "r", "rawd", "r", ""),
    "deployments": ("", "", "rawd", "", ""),
    "events": ("", "rad", "rad", "ra", "r"),
    "finished_runs": ("", "rawd", "rawd", "ra", "r"),
    "gateway_requests": ("", "", "", "rawd", ""),
    "gateways": ("", "", "r", "rawd", "r"),
    "lanes": ("", "raw", "raw", "raw", "r"),
    "leases": ("", "rwd", "rawd", "rwd", "r"),
    "queues": ("", "raw", "raw", "r", "r"),
    "receipts": ("", "ra", "rad", "ra", "r"),
    "renderings": ("", "", "rawd", "", ""),
    "runs": ("", "rawd", "rawd", "rawd", "r"),
    "schedule_slots": ("", "rd", "rad", "", "r"),
    "schedules": ("", "rawd", "rawd", "", "r"),
    "steps": ("", "rd", "rawd", "", "r"),
    "streams": ("", "raw", "raw", "raw", "r"),
    "turn_markers": ("", "rawd", "rawd", "rawd", "r"),
    "turn_outcomes": ("", "raw", "rawd", "raw", "r"),
    "workers": ("", "", "rawd", "", "r"),
}
# An enqueuer reads nobody's payload, and gives a run nothing that only a worker gives it.
COLUMNS: dict[Kind, dict[str, dict[str, tuple[str, ...]]]] = {
    Kind.ENQUEUER: {
        "runs": {
            "r": ("id", "queue", "singleton_key", "organization_id", "state"),
            "a": (
                "id", "queue", "task", "payload", "priority", "run_at", "expires_at", "singleton_key", "ordering_key",
                "max_attempts", "retry_delay", "timeout", "metadata", "organization_id",
            ),
        },
    },
}  # fmt: skip
SEQUENCES: dict[str, frozenset[Kind]] = {"runs_id_seq": _ENQUEUE}
# Those that statements call, and those that these call. One of a trigger is called for whoever writes to its table.
FUNCTIONS: dict[str, frozenset[Kind]] = {
    "arm_slot": _CHANGE,
    "end_turns": _SWEEP,
    "leave_lanes": _SWEEP,
    "may_retire": _SWEEP,
    # A statement that stores calls it, and where there is row security the policies do, for whoever reads.
    "organization": frozenset(Kind),
    "retire_runs": _SWEEP,
    "sees_all_runs": _SWEEP,
    "sentence_of": _SWEEP,
    "store_endings": _SWEEP,
    "tend_lanes": _SWEEP,
    "turn_of_slot": _CHANGE,
    # It acts as its owner: what scales workers needs this right alone.
    "wanted_workers": frozenset({Kind.OBSERVER}),
    "why_unanswered": _SWEEP,
}


class Right(NamedTuple):
    """To do one thing with a table, with one column of it, with a sequence or a function."""

    object: LiteralString
    name: str
    action: LiteralString
    column: str | None = None


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


class Belonging(NamedTuple):
    """The schema or something in it, as `alter` names it, and whose it is."""

    what: str
    owner: str


async def place(conn: psycopg.AsyncConnection[Any]) -> Place:
    cursor = await conn.execute(_statements.query("place", scalar).text.encode())
    row = await cursor.fetchone()
    assert row is not None, "the schema was looked for before"
    return Place(*row)


async def belongings(conn: psycopg.AsyncConnection[Any]) -> list[Belonging]:
    """The schema first, then what is in it."""
    cursor = await conn.execute(_statements.query("belongings", scalar).text.encode(), {})
    return [Belonging(*row) for row in await cursor.fetchall()]


def needed(kinds: Collection[Kind]) -> list[Right]:
    """All that a role of these kinds needs in the schema, and nothing else; what is about one thing stands together."""
    whole = {
        Right("table", table, action)
        for table, by_kind in TABLES.items()
        for kind, letters in zip(Kind, by_kind, strict=True)
        for letter, action in _ACTIONS.items()
        if kind in kinds and letter in letters
    }
    columns = {
        Right("table", table, _ACTIONS[letter], column)
        for kind, tables in COLUMNS.items()
        for table, by_letter in tables.items()
        for letter, names in by_letter.items()
        for column in names
        if kind in kinds and Right("table", table, _ACTIONS[letter]) not in whole
    }
    others = [Right("sequence", name, "usage") for name, of in SEQUENCES.items() if of.intersection(kinds)]
    others += [Right("function", name, "execute") for name, of in FUNCTIONS.items() if of.intersection(kinds)]
    return sorted(whole) + sorted(columns) + sorted(others)


def granted(rights: Sequence[Right], role: str) -> Iterator[str]:
    """One statement for each thing that these rights are about."""
    for (kind, name), about in groupby(rights, lambda right: (right.object, right.name)):
        what = sql.SQL(", ").join(
            _action(action, list(each)) for action, each in groupby(about, lambda each: each.action)
        )
        yield _text("grant {} on {} {} to {};", what, sql.SQL(kind), sql.Identifier("queue_service", name), _name(role))


def _action(action: LiteralString, rights: Sequence[Right]) -> sql.Composable:
    columns = [sql.Identifier(right.column) for right in rights if right.column is not None]
    return sql.SQL("{} ({})").format(sql.SQL(action), sql.SQL(", ").join(columns)) if columns else sql.SQL(action)


def rights(role: str, kinds: Collection[Kind], where: Place) -> Iterator[str]:
    """The statements after which the role has the rights of these kinds and no others, for the owner of the schema to
    execute."""
    if role == where.owner:
        yield _text("-- {} owns the schema, and needs no rights on what is in it.", _name(role))
        return
    for line in _REVOKED:
        yield _text(line, role=_name(role), owner=_name(where.owner))
    yield _text("grant connect on database {} to {};", _name(where.database), _name(role))
    yield _text("grant usage on schema queue_service to {};", _name(role))
    yield from granted(needed(kinds), role)
    yield "commit;"


def ownership(role: str, found: Sequence[Belonging], where: Place) -> Iterator[str]:
    """The statements after which the schema and all that is in it belong to the role."""
    others = [each for each in found if each.owner != role]
    if not others:
        yield _text("-- {} owns the schema, and all that is in it.", _name(role))
        return
    yield from _ABOUT_OWNERSHIP
    yield "begin;"
    yield _text("grant connect on database {} to {};", _name(where.database), _name(role))
    for each in others:
        yield f"alter {each.what} owner to {_name(role).as_string(None)};"
    yield "commit;"


def settings(role: str, where: Place) -> Iterator[str]:
    """The statements that give the role's sessions in this database what sessions of ours begin with."""
    yield from _ABOUT_SETTINGS
    for name, value in OF_A_ROLE.items():
        yield _text(
            "alter role {} in database {} set {} = {};",
            _name(role),
            _name(where.database),
            _name(name),
            sql.Literal(value),
        )


async def lacking(conn: psycopg.AsyncConnection[Any]) -> list[Lacking]:
    """Which of these settings the sessions of this role do not begin with. Changes nothing: what is set to be compared, in
    the way that the server writes it, is rolled back."""
    names, values = list(OF_A_ROLE), list(OF_A_ROLE.values())
    async with conn.transaction(force_rollback=True):
        await conn.execute(SET.encode(), {"names": names, "values": values, "local": True})
        cursor = await conn.execute(_statements.query("unlike", scalar).text.encode(), {"names": names})
        return [Lacking(name, have, OF_A_ROLE.get(name, want)) for name, have, want in await cursor.fetchall()]


def _name(name: str) -> sql.Identifier:
    return sql.Identifier(name)


def _text(line: LiteralString, *args: sql.Composable, **kwargs: sql.Composable) -> str:
    return sql.SQL(line).format(*args, **kwargs).as_string(None)


_REVOKED: tuple[LiteralString, ...] = (
    "-- These rights and no others, in this version's schema, for its owner to give: again after each migration.",
    "begin;",
    "revoke all on all tables in schema queue_service from {role};",
    "revoke all on all sequences in schema queue_service from {role};",
    "revoke all on all functions in schema queue_service from {role};",
    "revoke all on schema queue_service from {role};",
    "alter default privileges for role {owner} in schema queue_service revoke all on tables from {role};",
    "alter default privileges for role {owner} in schema queue_service revoke all on sequences from {role};",
    "alter default privileges for role {owner} in schema queue_service revoke all on functions from {role};",
)
_ABOUT_OWNERSHIP = (
    "-- For a superuser to execute; or for whoever owns all of it, is a member of the new owner, and may create schemas.",
)
_ABOUT_SETTINGS = (
    "-- Only behind a pooler of transactions: the settings that our sessions set themselves elsewhere. They hold for new",
    "-- connections of the role to this database: have the pooler open new ones (pgbouncer: RECONNECT).",
)
