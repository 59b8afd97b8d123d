"""`db rls`: what it makes, what it takes back, and who works under it."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql

from queue_service import App, Worker
from queue_service.cli import cli
from queue_service.db import row_security, schema
from queue_service.db.execute import Connection, fetch
from queue_service.db.row_security import VISIBLE
from queue_service.db.session import connect
from queue_service.errors import ConfigError, DatabaseRefused, SchemaMismatch
from queue_service.gateway import Gateway
from queue_service.runs import queries
from queue_service.services.partitions import Partitions
from tests.every_part import use_all
from tests.row_security.conftest import Roles
from tests.support import claimed, eventually, lapse, one, quick_app, rows, working

POLICIES = """
select c.relname::text, c.relrowsecurity, array(
           select p.polname::text from pg_policy as p where p.polrelid = c.oid order by p.polname)
  from pg_class as c where c.relnamespace = 'queue_service'::regnamespace and c.relkind in ('r', 'p') order by 1
"""
BOTH = ["queue_service_exempt", "queue_service_own"]


def rls(database: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["db", "rls", *arguments, "--database-url", database], prog_name="queue-service")


async def secured_tables(conn: Connection) -> dict[str, list[str]]:
    return {name: policies for name, is_enabled, policies in await rows(conn, POLICIES) if is_enabled or policies}


async def test_it_is_enabled_twice_with_other_roles_and_disabled(roles: Roles, owner: Connection) -> None:
    first = rls(roles.owner, "enable", "--exempt", roles.worker_name)
    assert first.exit_code == 0, first.output
    assert f"exempt roles: {roles.worker_name}" in first.stdout
    assert "runs: row security on" in first.stdout
    tables = await secured_tables(owner)
    assert tables == dict.fromkeys(sorted({*VISIBLE, "finished_runs_default"}), BOTH)

    again = json.loads(rls(roles.owner, "enable", "--json").stdout)
    assert again == {"is_enabled": True, "exempt": [roles.worker_name], "changed": []}
    more = json.loads(rls(roles.owner, "enable", "--json", "--exempt", roles.blind_name).stdout)
    assert more["exempt"] == sorted([roles.worker_name, roles.blind_name])
    assert set(more["changed"]) == tables.keys()
    assert "nothing has changed" in rls(roles.owner, "enable").stdout

    off = json.loads(rls(roles.owner, "disable", "--json").stdout)
    assert off == {"is_enabled": False, "exempt": [], "changed": more["changed"]}
    assert await secured_tables(owner) == {}
    assert "nothing has changed" in rls(roles.owner, "disable").stdout
    async with App(roles.blind) as app:
        assert await app.get(await app.enqueue("noop", {})) is not None


async def test_a_role_that_is_not_there_is_named_and_nothing_changes(roles: Roles, owner: Connection) -> None:
    refused = rls(roles.owner, "enable", "--exempt", "no such role")
    assert refused.exit_code == ConfigError.exit_code
    assert "no role 'no such role'" in refused.stderr
    assert await secured_tables(owner) == {}


def test_who_does_not_own_the_schema_may_not(roles: Roles) -> None:
    for verb in ("enable", "disable"):
        refused = rls(roles.worker, verb)
        assert refused.exit_code == DatabaseRefused.exit_code
        assert "does not allow it" in refused.stderr


def test_a_schema_that_is_too_old_is_named(empty_database: str) -> None:
    schema.upgrade(empty_database, "0021")
    with pytest.raises(SchemaMismatch):
        row_security.enable(empty_database, [])


def test_the_database_is_checked_and_migrated_all_the_same(secured: Roles) -> None:
    schema.check(secured.owner)
    schema.downgrade(secured.owner, "0025")
    schema.upgrade(secured.owner)
    schema.check(secured.owner)


def test_a_revision_that_knows_no_organizations_is_not_gone_back_to_while_it_is_on(secured: Roles) -> None:
    with pytest.raises(DatabaseRefused, match=r"row security is on.*queue-service db rls disable.*Nothing was changed"):
        schema.downgrade(secured.owner, "0021")
    row_security.disable(secured.owner)
    schema.downgrade(secured.owner, "0021")
    schema.upgrade(secured.owner)
    schema.check(secured.owner)


async def test_a_new_partition_has_the_policies_and_so_has_one_of_what_failed(
    secured: Roles, acme: App, owner: Connection
) -> None:
    async with App(secured.owner) as app:
        made = (
            await Partitions(app.pool, retention=timedelta(days=7), retention_failed=timedelta(days=30)).make_and_drop()
        ).made
        assert made
        tables = await secured_tables(owner)
        assert {name: tables.get(name) for name in made} == dict.fromkeys(made, BOTH)
        run_id = await acme.enqueue("noop", {})
        await acme.cancel(run_id)
        (part,) = await rows(owner, "select tableoid::regclass::text from queue_service.finished_runs")
        seen = {}
        for role in ("acme", "other", "worker"):
            grant = sql.SQL("grant select on all tables in schema queue_service to {}")
            who = psycopg.conninfo.conninfo_to_dict(getattr(secured, role))["user"]
            await owner.execute(grant.format(sql.Identifier(str(who))))
            conn = await connect(getattr(secured, role))
            seen[role] = await one(conn, f"select count(*) from {part[0]}")
            await conn.close()
        assert seen == {"acme": 1, "other": 0, "worker": 1}


async def test_what_failed_of_a_day_keeps_the_policies(secured: Roles, owner: Connection) -> None:
    async with App(secured.owner) as app:
        partitions = Partitions(app.pool, retention=timedelta(days=1), retention_failed=timedelta(days=30))
        await owner.execute(
            "insert into queue_service.finished_runs (id, finished_at, run_at, created_at, attempt, failures, losses, priority,"
            " state, queue, task, payload) select n, now() - n * interval '1 day', now(), now(), 1, 1, 0, 0, 'failed', 'q', 't',"
            " '{}' from generate_series(1, 5) as n"
        )
        await partitions.make_and_drop()
        await partitions.make_and_drop()
        thinned = await partitions.thin()
        assert thinned
        tables = await secured_tables(owner)
        assert all(tables[f"{name}_failed"] == BOTH for name in thinned)


async def test_a_worker_that_is_exempt_works_serves_and_ends_turns(secured: Roles) -> None:
    used = await use_all(secured.worker)
    assert used == {"states": {"succeeded"}, "outcome": "reply", "event": "delta"}


async def test_a_worker_works_for_every_tenant(secured: Roles, acme: App, other: App) -> None:
    worker = quick_app(secured.worker)

    @worker.task
    async def answer(n: int) -> int:
        await worker.events.append(f"of {n}", "k", n)
        return n

    ids = [await acme.enqueue("answer", {"n": 1}), await other.enqueue("answer", {"n": 2})]
    async with worker:
        await Worker(worker).run(once=True)
    assert [(await app.wait(run_id, timeout=60)).result for app, run_id in zip((acme, other), ids, strict=True)] == [
        1,
        2,
    ]
    assert await acme.get(ids[1]) is None


@pytest.mark.parametrize("kind", ["worker", "gateway"])
async def test_who_works_for_all_does_not_start_where_runs_are_hidden_from_its_role(kind: str, secured: Roles) -> None:
    app = quick_app(secured.blind)
    with pytest.raises(ConfigError, match=f"hides runs from the role '{secured.blind_name}'.*db rls enable --exempt"):
        await (Worker(app).run(once=True) if kind == "worker" else Gateway(app, authorize=lambda _: None).__aenter__())


async def test_it_is_not_enabled_under_a_worker_that_would_not_see_its_runs_any_more(
    roles: Roles, owner: Connection
) -> None:
    app = quick_app(roles.blind)
    begun, may_end = asyncio.Event(), asyncio.Event()

    @app.task
    async def noop() -> str:
        begun.set()
        await may_end.wait()
        return "well"

    async with app, working(app):
        run_id = await app.enqueue("noop", {}, organization_id="acme")
        await asyncio.wait_for(begun.wait(), 30)
        with pytest.raises(ConfigError, match=f"connected as '{roles.blind_name}'.*--exempt '{roles.blind_name}'"):
            await asyncio.to_thread(row_security.enable, roles.owner, [roles.worker_name])
        assert await secured_tables(owner) == {}
        await asyncio.to_thread(row_security.enable, roles.owner, [roles.blind_name])
        may_end.set()
        assert (await app.wait(run_id, timeout=30)).result == "well"
    # Nobody works as that role any more; the owner, who does, is exempt.
    keepers = "select count(*) = 0 from pg_stat_activity where datname = current_database() and application_name = %s"
    await eventually(lambda: one(owner, keepers, "queue_service keeper"))
    row_security.disable(roles.owner)
    async with quick_app(roles.owner) as worker, working(worker):
        await asyncio.to_thread(row_security.enable, roles.owner, [])


async def test_members_of_an_exempt_role_and_the_owner_are_exempt(secured: Roles, server: str) -> None:
    with psycopg.connect(server, autocommit=True) as admin:
        for statement in ("grant {} to {}", "revoke {} from {}"):
            admin.execute(
                sql.SQL(statement).format(sql.Identifier(secured.worker_name), sql.Identifier(secured.blind_name))
            )
            hidden = {}
            for role in ("owner", "worker", "blind", "acme"):
                conn = await connect(getattr(secured, role))
                hidden[role] = await fetch(conn, queries.hidden_from()) is not None
                await conn.close()
            assert hidden == {"owner": False, "worker": False, "blind": not statement.startswith("grant"), "acme": True}


async def test_a_sweep_by_a_role_from_which_runs_are_hidden_takes_no_lease(
    secured: Roles, acme: App, owner: Connection
) -> None:
    await acme.enqueue("noop", {})
    ((run, _),) = await claimed(owner)
    await lapse(owner)
    conn = await connect(secured.other)
    assert await fetch(conn, queries.sweep(limit=10, max_losses=3)) == []
    await conn.close()
    assert await one(owner, "select count(*) from queue_service.leases") == 1
    conn = await connect(secured.worker)
    assert [each.run_id for each in await fetch(conn, queries.sweep(limit=10, max_losses=3))] == [run.id]
    await conn.close()


@pytest.mark.parametrize("role", ["acme", "worker", "owner"])
async def test_a_thousand_are_enqueued_at_once_all_or_none(role: str, secured: Roles, owner: Connection) -> None:
    async with App(getattr(secured, role)) as app:
        options: dict[str, Any] = {
            "queue": "q\t", "priority": 3, "delay": 60, "expires_in": 3600, "max_attempts": 2, "retry_delay": 5,
            "timeout": 7, "metadata": {"m": [1]}, "ordering_key": "o", "organization_id": "acme",
        }  # fmt: skip
        ids = await app.enqueue_many("noop", [{"n": n, "text": "a\tb\\c\nü"} for n in range(1_000)], **options)
        assert ids == sorted(set(ids))
        run = await app.get(ids[7])
        assert run is not None
        assert (run.queue, run.priority, run.payload, run.organization_id) == (
            "q\t", 3, {"n": 7, "text": "a\tb\\c\nü"}, "acme",
        )  # fmt: skip
        assert (run.max_attempts, run.timeout, run.metadata, run.ordering_key) == (
            2,
            timedelta(seconds=7),
            {"m": [1]},
            "o",
        )
        assert run.expires_at is not None
        assert run.expires_at - run.run_at == timedelta(hours=1)
        await owner.execute(
            "alter table queue_service.runs add constraint refused check (payload -> 'n' is distinct from '1999') not valid"
        )
        with pytest.raises(psycopg.errors.CheckViolation):
            await app.enqueue_many("noop", [{"n": n} for n in range(1_000, 2_000)], organization_id="acme")
    assert await one(owner, "select count(*) from queue_service.runs") == 1_000


async def test_many_are_enqueued_in_the_transaction_of_a_caller_who_says_whose_they_are(
    secured: Roles, owner: Connection
) -> None:
    async with App(secured.blind) as app, await psycopg.AsyncConnection.connect(secured.blind) as conn:
        for organization in ("acme", "other"):
            async with conn.transaction():
                await conn.execute("select set_config('queue_service.organization_id', %s, true)", [organization])
                await app.enqueue_many("noop", [{}] * 10, conn=conn)
                mine = await app.enqueue("noop", {}, conn=conn)
                assert await app.get(mine, conn=conn) is not None
        async with conn.transaction():
            assert await app.get(mine, conn=conn) is None
    counted = "select organization_id, count(*) from queue_service.runs group by 1 order by 1"
    assert await rows(owner, counted) == [("acme", 11), ("other", 11)]


async def test_two_who_enable_it_at_once_both_succeed(roles: Roles, owner: Connection) -> None:
    done = await asyncio.gather(
        *(asyncio.to_thread(row_security.enable, roles.owner, [name]) for name in (roles.worker_name, roles.blind_name))
    )
    assert max((each.exempt for each in done), key=len) == sorted([roles.worker_name, roles.blind_name])
    assert set(await secured_tables(owner)) >= set(VISIBLE)
