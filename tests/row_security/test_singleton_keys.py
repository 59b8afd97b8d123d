"""A singleton key is one of an organization, also while the index of before is there: revision 0025 has both, 0026 one."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg

from queue_service import App
from queue_service.db import schema
from queue_service.db.execute import Connection, fetch
from queue_service.errors import DatabaseRefused, DuplicateRun
from queue_service.runs import queries
from queue_service.runs.model import NewRun
from tests.row_security.conftest import Roles
from tests.support import eventually, one, quick_app, rows

OLD_INDEX = "create unique index runs_singleton_idx on queue_service.runs (queue, singleton_key) where singleton_key is not null"
SHARED = "is that of another organization's live run.* from revision 0026 on: migrate"


@pytest.fixture
async def app(direct: str) -> Any:
    async with quick_app(direct) as app:
        yield app


@pytest.fixture
async def both_indexes(owner: Connection) -> None:
    """As revision 0025 is."""
    await owner.execute(OLD_INDEX.encode())


async def test_two_organizations_have_a_run_each_under_one_key_and_each_policy_finds_its_own(app: App) -> None:
    ids = {}
    for organization in ("acme", "other", None):
        ids[organization] = await app.enqueue("noop", {}, singleton_key="k", organization_id=organization)
    assert len(set(ids.values())) == 3
    for organization, run_id in ids.items():
        same: dict[str, Any] = {"singleton_key": "k", "organization_id": organization}
        assert await app.enqueue("noop", {}, **same) == run_id
        assert await app.enqueue("noop", {"n": 2}, on_conflict="replace", **same) == run_id
        with pytest.raises(DuplicateRun) as refused:
            await app.enqueue("noop", {}, on_conflict="raise", **same)
        assert refused.value.run_id == run_id
    await app.cancel(ids["acme"])
    again = await app.enqueue("noop", {}, singleton_key="k", organization_id="acme")
    with pytest.raises(DuplicateRun) as refused:
        await app.retry(ids["acme"])
    assert refused.value.run_id == again
    await app.cancel(again)
    assert await app.retry(ids["acme"])


async def test_two_tenants_enqueue_under_one_key_though_neither_sees_the_others_run(
    acme: App, other: App, owner: Connection
) -> None:
    calls = [
        app.enqueue("noop", {"n": n}, singleton_key="k", on_conflict=policy)
        for n in range(10)
        for app in (acme, other)
        for policy in ("return", "replace")
    ]
    found = await asyncio.gather(*calls)
    assert len(set(found)) == 2
    assert await rows(owner, "select organization_id, count(*) from queue_service.runs group by 1 order by 1") == [
        ("acme", 1), ("other", 1),
    ]  # fmt: skip


async def test_two_sessions_that_race_for_a_key_in_two_organizations_wait_for_nobody(roles: Roles, direct: str) -> None:
    def keyed(organization: str) -> NewRun:
        return NewRun("noop", "default", "{}", singleton_key="k", organization_id=organization)

    async with App(direct) as first, App(direct) as second:
        async with first.pool.connection() as a, second.pool.connection() as b, a.transaction():
            mine = await fetch(a, queries.enqueue(keyed("acme")))
            theirs = await fetch(b, queries.enqueue(keyed("other")))
            assert mine is not None
            assert theirs is not None
            assert await fetch(b, queries.replace(keyed("other"))) == theirs
        assert mine != theirs


async def test_a_replacement_that_meets_one_which_is_stored_at_this_moment_replaces_it(
    app: App, direct: str, owner: Connection
) -> None:
    async with await psycopg.AsyncConnection.connect(direct) as conn:
        options: dict[str, Any] = {"singleton_key": "k", "on_conflict": "replace"}
        first = await app.enqueue("noop", {"n": 1}, conn=conn, **options)
        second = asyncio.create_task(app.enqueue("noop", {"n": 2}, **options))
        waits = "select exists (select from pg_locks where not granted and locktype = 'transactionid')"
        await eventually(lambda: one(owner, waits))
    assert await second == first
    assert await rows(owner, "select payload from queue_service.runs") == [({"n": 2},)]


@pytest.mark.usefixtures("both_indexes")
class TestWithBothIndexes:
    @pytest.mark.parametrize("policy", ["return", "replace", "raise"])
    async def test_a_key_of_another_organization_is_refused_with_a_sentence_and_its_run_stays(
        self, policy: Any, acme: App, other: App, owner: Connection
    ) -> None:
        run_id = await acme.enqueue("noop", {"of": "acme"}, singleton_key="k")
        with pytest.raises(DatabaseRefused, match=SHARED):
            await other.enqueue("noop", {}, singleton_key="k", on_conflict=policy)
        assert await rows(owner, "select id, payload from queue_service.runs") == [(run_id, {"of": "acme"})]
        assert await acme.enqueue("noop", {"n": 2}, singleton_key="k", on_conflict="replace") == run_id

    async def test_a_run_of_history_is_not_queued_again_under_such_a_key(self, acme: App, other: App) -> None:
        ended = await other.enqueue("noop", {}, singleton_key="k")
        await other.cancel(ended)
        await acme.enqueue("noop", {}, singleton_key="k")
        with pytest.raises(DatabaseRefused, match=SHARED):
            await other.retry(ended)
        assert await other.retry_many(state="cancelled") == (0, 1)

    @pytest.mark.parametrize("policy", ["return", "replace", "raise"])
    async def test_the_transaction_of_a_caller_goes_on(
        self, policy: Any, app: App, direct: str, owner: Connection
    ) -> None:
        await app.enqueue("noop", {}, singleton_key="k", organization_id="acme")
        same: dict[str, Any] = {"singleton_key": "k", "organization_id": "other", "on_conflict": policy}
        async with await psycopg.AsyncConnection.connect(direct) as conn:
            with pytest.raises(DatabaseRefused, match=SHARED):
                await app.enqueue("noop", {}, conn=conn, **same)
            await app.enqueue("noop", {"later": 1}, conn=conn)
        assert await one(owner, "select count(*) from queue_service.runs") == 2

    async def test_one_organization_has_its_policies_as_ever(self, app: App) -> None:
        same: dict[str, Any] = {"singleton_key": "k", "organization_id": "acme"}
        run_id = await app.enqueue("noop", {}, **same)
        assert await app.enqueue("noop", {}, **same) == run_id
        assert await app.enqueue("noop", {}, on_conflict="replace", **same) == run_id
        with pytest.raises(DuplicateRun):
            await app.enqueue("noop", {}, on_conflict="raise", **same)

    async def test_statements_of_the_version_before_find_their_index(self, owner: Connection) -> None:
        before = """insert into queue_service.runs (queue, task, payload, singleton_key) values ('default', 'noop', '{}', 'k')
            on conflict (queue, singleton_key) where singleton_key is not null do nothing returning id"""
        assert len(await rows(owner, before)) == 1
        assert await rows(owner, before) == []


async def test_the_index_of_before_goes_with_the_contract_and_is_there_until_then(empty_database: str) -> None:
    indexes = "select indexname from pg_indexes where tablename = 'runs' and indexname like '%singleton%' order by 1"
    found = {}
    for revision in ("0021", "0025", "0026"):
        schema.upgrade(empty_database, revision)
        with psycopg.connect(empty_database) as conn:
            found[revision] = [name for (name,) in conn.execute(indexes)]
    assert found == {
        "0021": ["runs_singleton_idx"],
        "0025": ["runs_singleton_idx", "runs_singleton_key_idx"],
        "0026": ["runs_singleton_key_idx"],
    }


async def test_what_was_stored_before_keeps_its_keys_and_belongs_to_nobody_where_nobody_said_whose_it_is(
    empty_database: str,
) -> None:
    schema.upgrade(empty_database, "0021")
    with psycopg.connect(empty_database) as conn:
        conn.execute(
            "insert into queue_service.runs (queue, task, payload, singleton_key, organization_id) "
            "values ('q', 't', '{}', 'a', 'acme'), ('q', 't', '{}', 'n', null)"
        )
        conn.execute("insert into queue_service.streams (stream, head) values ('old', 1)")
        conn.execute("insert into queue_service.events (stream, seq, kind, body) values ('old', 1, 'k', '1')")
    schema.upgrade(empty_database)
    async with quick_app(empty_database) as app:
        assert await app.enqueue("t", {}, queue="q", singleton_key="a", organization_id="acme") == 1
        assert await app.enqueue("t", {}, queue="q", singleton_key="n") == 2
        assert await app.enqueue("t", {}, queue="q", singleton_key="a") not in {1, 2}
        run_id = await app.enqueue("t", {}, queue="q", organization_id="acme")
        # A stream of nobody is the organization's of whoever writes to it first; what was in it stays nobody's.
        await app.events.append_of("old", [("k", 2, (run_id, 1))])
    with psycopg.connect(empty_database) as conn:
        assert conn.execute("select organization_id from queue_service.streams").fetchall() == [("acme",)]
        owners = conn.execute("select organization_id from queue_service.events order by seq").fetchall()
        assert owners == [(None,), ("acme",)]


async def test_a_key_that_two_organizations_have_stands_against_going_back(direct: str, app: App) -> None:
    ids = [
        await app.enqueue("noop", {}, queue="a%s'b", singleton_key="k%s", organization_id=organization)
        for organization in ("acme", "other")
    ]
    with pytest.raises(DatabaseRefused, match=rf"{ids[0]} and {ids[1]}, have the singleton key 'k%s' in .* Cancel"):
        await asyncio.to_thread(schema.downgrade, direct, "0025")
    await app.cancel(ids[0])
    await app.close()
    schema.downgrade(direct, "0025")


async def test_ids_that_are_in_use_are_passed_over_and_if_they_are_too_many_it_is_said(
    app: App, owner: Connection
) -> None:
    await app.enqueue_many("noop", [{}] * 30)
    await owner.execute("select setval('queue_service.runs_id_seq', 20)")
    assert await app.enqueue("noop", {}) == 31
    await owner.execute("select setval('queue_service.runs_id_seq', 1)")
    with pytest.raises(DatabaseRefused, match=r"sequence queue_service\.runs_id_seq is behind"):
        await app.enqueue("noop", {})


def test_a_run_that_is_stored_by_hand_twice_is_still_refused(direct: str) -> None:
    with psycopg.connect(direct) as conn:
        insert = "insert into queue_service.runs (queue, task, payload, singleton_key) values ('q', 't', '{}', 'k')"
        conn.execute(insert)
        # Also where neither has an organization.
        with pytest.raises(pg.UniqueViolation):
            conn.execute(insert)
