"""Each kind of role may do what it is for, and nothing else: every call is made as each of them, with the rights that are
printed, and with each single one of these taken away."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, LiteralString, TypeVar

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from queue_service import App
from queue_service.db import grants
from queue_service.db.grants import Kind, Right
from queue_service.db.query import Query, Rows
from queue_service.db.statements import Statements
from queue_service.errors import DatabaseRefused
from queue_service.testing import databases
from tests.roles.calls import CALLS, Call, World
from tests.roles.conftest import Make, execute, grant, roles
from tests.support import quick_app

T = TypeVar("T")

# What no call of an App or of a worker sends: these are about the server, or go out by themselves.
ELSEWHERE = {"belongings", "notify", "notify_alone", "place", "unlike"}
ELSEWHERE |= {"server_settings", "server_place", "server_standbys", "server_empty_slots", "server_unvacuumed"}
# What goes out where there is row security, or was: tests/row_security has it.
ELSEWHERE |= {"are_keys_shared", "store_reserved"}
OF_THE_OWNER = {"inherit_policies"}
# Here no policy calls it.
UNDER_ROW_SECURITY = {(Kind.OBSERVER, Right("function", "organization", "execute"))}


@pytest.fixture(scope="module")
def granting(server: str, template: str) -> Iterator[tuple[str, dict[Kind, str]]]:
    """A database where nobody has a right that was not granted, and a role of each kind."""
    with roles(server) as make, databases.made(server, template) as conninfo:
        execute(conninfo, "revoke execute on all functions in schema queue_service from public")
        made = {kind: make(kind) for kind in Kind}
        for kind, role in made.items():
            grant(conninfo, role, kind.value)
        yield conninfo, made


@asynccontextmanager
async def world(conninfo: str, role: str) -> AsyncIterator[World]:
    as_role = make_conninfo(conninfo, user=role)
    async with quick_app(conninfo) as owner, quick_app(as_role) as app:
        owner.task(name="noop")(lambda: None)
        yield World(owner, app, as_role)


async def made(call: Call, world: World) -> None:
    async with asyncio.timeout(60):
        await call.act(world)


def test_every_public_call_of_an_app_is_made() -> None:
    app = App("postgresql://nowhere")
    parts = {"app": app, **{name: part for name, part in vars(app).items() if not name.startswith("_")}}
    public = {f"{name}.{method}" for name, part in parts.items() for method in awaitables(part)}
    assert {"app.enqueue", "turns.commit_reply", "events.follow", "queues.limit", "schedules.put"} <= public
    assert public - {call.name.partition(",")[0] for call in CALLS} == {"app.close"}


def awaitables(part: object) -> list[str]:
    found = inspect.getmembers(type(part), lambda m: inspect.iscoroutinefunction(m) or inspect.isasyncgenfunction(m))
    return [name for name, _ in found if not name.startswith("_")]


async def test_every_statement_is_sent_by_some_call(
    granting: tuple[str, dict[Kind, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a right which a new statement needs is missed."""
    sent: set[tuple[str, str]] = set()
    seen: dict[str, Statements] = {}
    query = Statements.query

    def noted(self: Statements, name: str, decode: Callable[[Rows], T], /, **params: Any) -> Query[T]:
        package = str(sorted(self.texts))
        seen[package] = self
        sent.add((package, name))
        return query(self, name, decode, **params)

    monkeypatch.setattr(Statements, "query", noted)
    async with quick_app(granting[0]) as owner, quick_app(granting[0]) as app:
        owner.task(name="noop")(lambda: None)
        for call in CALLS:
            await made(call, World(owner, app, granting[0]))
    there = {(key, name) for key, statements in seen.items() for name in statements.texts}
    assert {name for _, name in there - sent} <= ELSEWHERE


@pytest.mark.parametrize("kind", Kind)
async def test_a_role_does_all_that_it_is_for_and_nothing_else(
    kind: Kind, granting: tuple[str, dict[Kind, str]]
) -> None:
    conninfo, names = granting
    async with world(conninfo, names[kind]) as w:
        for call in CALLS:
            if kind in call.kinds:
                await made(call, w)
                continue
            with pytest.raises(DatabaseRefused) as refused:
                await made(call, w)
            # Which right is missing, and where to get it.
            assert "permission denied for" in str(refused.value), call.name
            assert "db grants --role" in str(refused.value), call.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
async def test_without_any_single_right_something_is_refused(kind: Kind, granting: tuple[str, dict[Kind, str]]) -> None:
    conninfo, names = granting
    needless: list[Right] = []
    with psycopg.connect(conninfo, autocommit=True) as admin:
        async with world(conninfo, names[kind]) as w:
            calls = [call for call in CALLS if kind in call.kinds]
            for right in grants.needed({kind}):
                if (kind, right) in UNDER_ROW_SECURITY:
                    continue
                admin.execute(statement("revoke {} from {}", right, names[kind]))
                refused = await first_refused(calls, w)
                admin.execute(statement("grant {} to {}", right, names[kind]))
                if refused is None:
                    needless.append(right)
                else:
                    # It is likely to need the next right, too.
                    calls.remove(refused)
                    calls.insert(0, refused)
    assert needless == []


async def first_refused(calls: list[Call], w: World) -> Call | None:
    for call in calls:
        try:
            await made(call, w)
        except DatabaseRefused:
            return call
    return None


def statement(words: LiteralString, right: Right, role: str) -> sql.Composed:
    column = sql.SQL("") if right.column is None else sql.SQL("({})").format(sql.Identifier(right.column))
    thing = sql.SQL(right.object), sql.Identifier("queue_service", right.name)
    about = sql.SQL("{} {} on {} {}").format(sql.SQL(right.action), column, *thing)
    return sql.SQL(words).format(about, sql.Identifier(role))


def test_no_table_sequence_or_function_is_forgotten(direct: str) -> None:
    with psycopg.connect(direct, autocommit=True) as conn:
        ours = "relnamespace = 'queue_service'::regnamespace and not relispartition"
        tables = conn.execute(f"select relname from pg_class where {ours} and relkind in ('r', 'p')").fetchall()
        functions = conn.execute(
            "select proname, prorettype = 'trigger'::regtype from pg_proc "
            "where pronamespace = 'queue_service'::regnamespace"
        ).fetchall()
    assert {name for (name,) in tables} == set(grants.TABLES)
    assert {name for name, is_of_trigger in functions if not is_of_trigger} - OF_THE_OWNER == set(grants.FUNCTIONS)


async def test_a_role_of_two_kinds_has_the_rights_of_both(granting: tuple[str, dict[Kind, str]], role: Make) -> None:
    conninfo, _ = granting
    both = role("both")
    await asyncio.to_thread(grant, conninfo, both, "gateway", "observer")
    async with world(conninfo, both) as w:
        for call in CALLS:
            if call.kinds & {"gateway", "observer"}:
                await made(call, w)


async def test_what_was_granted_before_is_taken_back(granting: tuple[str, dict[Kind, str]], role: Make) -> None:
    conninfo, _ = granting
    name = role("once")
    before = (
        "grant all on all tables in schema queue_service to {0}; grant all on all sequences in schema queue_service to "
    )
    execute(conninfo, before + "{0}; grant all on all functions in schema queue_service to {0}", name)
    await asyncio.to_thread(grant, conninfo, name, "observer")
    async with world(conninfo, name) as w:
        for call in CALLS:
            if "observer" not in call.kinds:
                with pytest.raises(DatabaseRefused):
                    await made(call, w)
