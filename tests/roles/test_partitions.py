"""Partitions of history and tables of migrations belong to the owner of the schema, whoever makes them; and a role that may
make none works all the same."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from queue_service import Worker
from queue_service.db import schema
from queue_service.errors import DatabaseRefused
from queue_service.services.partitions import DAYS_AHEAD, DAYS_AHEAD_BY_HAND, Partitions
from queue_service.services.pruner import Pruner
from tests.roles.conftest import Make, asked, call, execute, grant
from tests.support import eventually, quick_app, service, working

OWNERS = """
select distinct pg_get_userbyid(relowner)::text from pg_class where relnamespace = 'queue_service'::regnamespace
"""
MEMBERS = ("plain", "without inheriting")


def days(conninfo: str) -> list[str]:
    found = asked(
        conninfo,
        "select relname from pg_class where relispartition and relkind = 'r' and relname ~ '[0-9]{8}' order by relname",
    )
    return [str(name) for (name,) in found]


def name(days_ahead: int) -> str:
    return f"finished_runs_{datetime.now(UTC).date() + timedelta(days=days_ahead):%Y%m%d}"


def belongs_to(admin: str, owner: str) -> None:
    assert asked(admin, OWNERS) == [(owner,)]


@pytest.fixture
def worker(owned: str, role: Make) -> str:
    """The database as a role that works."""
    made = role("worker")
    grant(owned, made, "worker")
    return make_conninfo(owned, user=made)


@pytest.fixture(params=MEMBERS)
def member(request: pytest.FixtureRequest, server: str, owned: str, owner_role: str, role: Make) -> Iterator[str]:
    """The database as a role that works, and may act as the owner."""
    made = role("member")
    grant(owned, made, "worker")
    if request.param != "plain":
        # Since Postgres 16 it is of each membership, which takes it from the role as it is then.
        execute(server, "alter role {} noinherit", made)
    execute(server, "grant {} to {}", owner_role, made)
    yield make_conninfo(owned, user=made)
    execute(server, "revoke {} from {}", owner_role, made)


async def test_a_worker_without_ownership_works_on_at_its_first_partition_and_says_once_what_to_do(
    owned: str, worker: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert days(owned) == []
    async with quick_app(worker) as app:

        @app.task
        async def noop() -> str:
            return "well"

        async with working(app) as at_work:
            assert (await app.wait(await app.enqueue("noop", {}), timeout=30)).result == "well"
            assert at_work._parts is not None
            pruner = service(at_work._parts.services, "pruner")
            before = pruner.well_at
            await at_work._parts._maintenance._pruner.once()
            await eventually(lambda: pruner.well_at >= before and pruner.condition.is_well)
    said = [record for record in caplog.records if "may not make or drop" in record.getMessage()]
    assert len(said) == 1
    assert "db migrate" in said[0].getMessage()
    assert days(owned) == []
    assert asked(owned, "select count(*) from queue_service.finished_runs_default") == [(1,)]


async def test_what_a_member_of_the_owner_makes_is_the_owners_who_can_migrate_afterwards(
    owned: str, admin: str, member: str, owner_role: str
) -> None:
    async with quick_app(member) as app:

        @app.task
        async def noop() -> str:
            return "well"

        run_id = await app.enqueue("noop", {})
        async with asyncio.timeout(60):
            await Worker(app).run(once=True)
        assert (await app.wait(run_id, timeout=30)).result == "well"
        made = days(owned)
        assert len(made) == DAYS_AHEAD + 1
        # The role of the session is its own again.
        async with app.pool.connection() as conn:
            cursor = await conn.execute("select current_user = session_user")
            assert await cursor.fetchone() == (True,)
    belongs_to(admin, owner_role)
    schema.downgrade(owned, "0022")
    schema.upgrade(owned)
    execute(owned, f"drop table queue_service.{made[0]}")


@pytest.mark.parametrize("member", ["plain"], indirect=True)
async def test_old_days_are_thinned_and_dropped_in_the_owners_name(
    owned: str, admin: str, member: str, owner_role: str
) -> None:
    made = [
        f"create table queue_service.{name(-ago)} partition of queue_service.finished_runs for values from "
        f"('{datetime.now(UTC).date() - timedelta(days=ago)}Z') to ('{datetime.now(UTC).date() - timedelta(days=ago - 1)}Z')"
        for ago in (1, 20, 40)
    ]
    execute(owned, ";".join(made))
    async with quick_app(member) as app:
        partitions = Partitions(app.pool, retention=timedelta(days=14), retention_failed=timedelta(days=30))
        changed = await partitions.make_and_drop()
        assert changed.dropped == [name(-40)]
        assert await partitions.thin() == [name(-20)]
    belongs_to(admin, owner_role)


@pytest.mark.parametrize("member", ["plain"], indirect=True)
async def test_what_it_made_in_its_own_name_is_handed_over(
    owned: str, admin: str, member: str, owner_role: str
) -> None:
    """As a version before did."""
    async with quick_app(member) as app:
        partitions = Partitions(app.pool, retention=timedelta(days=14), retention_failed=timedelta(days=14))
        await partitions.make_and_drop()
        belongs_to(admin, owner_role)
        (made, *_) = days(owned)
        user = str(asked(member, "select current_user::text")[0][0])
        execute(admin, "alter table {} owner to {}".replace("{}", f"queue_service.{made}", 1), user)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            execute(owned, f"alter table queue_service.{made} add check (true)")
        await partitions.make_and_drop()
    belongs_to(admin, owner_role)


@pytest.mark.parametrize("member", ["plain"], indirect=True)
async def test_what_is_somebody_elses_hurts_that_day_alone_and_says_what_to_do(
    owned: str, admin: str, member: str, role: Make
) -> None:
    stranger = role("stranger")
    old = f"finished_runs_{datetime.now(UTC).date() - timedelta(days=40):%Y%m%d}"
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    for day in (yesterday, yesterday - timedelta(days=39)):
        execute(
            admin,
            f"create table queue_service.finished_runs_{day:%Y%m%d} partition of queue_service.finished_runs "
            f"for values from ('{day}Z') to ('{day + timedelta(days=1)}Z')",
        )
    execute(admin, f"alter table queue_service.{old} owner to {{}}", stranger)
    async with quick_app(member) as app:
        with pytest.raises(DatabaseRefused, match="db grants --role owner"):
            await Pruner(app.pool, retention=timedelta(days=14)).once()
    assert name(DAYS_AHEAD) in days(owned)


def test_migrating_makes_partitions_a_week_ahead_each_time(owned: str, worker: str) -> None:
    for _ in range(2):
        migrated = call(owned, "db", "migrate")
        assert migrated.exit_code == 0, migrated.output
        assert days(owned) == [name(ahead) for ahead in range(DAYS_AHEAD_BY_HAND + 1)]
        execute(owned, f"drop table queue_service.{name(3)}")
    # Whoever may not is told so, and that is no failure where there is nothing to migrate.
    assert call(worker, "db", "migrate").exit_code == 0


async def test_a_worker_that_finds_its_partitions_says_nothing(
    owned: str, worker: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await asyncio.to_thread(call, owned, "db", "migrate")).exit_code == 0
    async with quick_app(worker) as app:
        pruned = await Pruner(app.pool, retention=timedelta(days=14)).once()
    assert pruned.made == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_member_that_migrates_does_it_in_the_owners_name(
    owned: str, admin: str, member: str, owner_role: str
) -> None:
    schema.downgrade(owned, "0006")
    migrated = call(member, "db", "migrate")
    assert migrated.exit_code == 0, migrated.output
    belongs_to(admin, owner_role)
    assert asked(admin, "select distinct pg_get_userbyid(proowner)::text from pg_proc where pronamespace = "
                        "'queue_service'::regnamespace") == [(owner_role,)]  # fmt: skip


def test_a_superuser_that_migrates_does_it_in_the_owners_name(owned: str, admin: str, owner_role: str) -> None:
    schema.downgrade(owned, "0006")
    assert call(admin, "db", "migrate").exit_code == 0
    belongs_to(admin, owner_role)


def test_one_that_may_not_migrate_is_told_who_may(owned: str, worker: str) -> None:
    schema.downgrade(owned, "0022")
    refused = call(worker, "db", "migrate")
    assert refused.exit_code == 1
    assert "connect as that owner or a member of it" in refused.output


def test_an_owner_that_cannot_migrate_what_a_worker_owns_reads_how_to_mend_it(
    owned: str, admin: str, owner_role: str, role: Make
) -> None:
    """As versions before left it."""
    assert call(owned, "db", "migrate").exit_code == 0
    execute(admin, f"alter table queue_service.{name(1)} owner to {{}}", role("worker"))
    refused = call(owned, "db", "migrate", "--to", "0022", "--yes")
    assert refused.exit_code == 1
    assert "--role owner" in refused.output
    execute(admin, call(owned, "db", "grants", "--role", "owner", owner_role).stdout)
    assert call(owned, "db", "migrate", "--to", "0022", "--yes").exit_code == 0
    belongs_to(admin, owner_role)


def test_the_owner_is_changed_by_what_is_printed(owned: str, admin: str, owner_role: str, role: Make) -> None:
    assert call(owned, "db", "migrate").exit_code == 0
    execute(owned, "create sequence queue_service.mine; create view queue_service.seen as select 1 as one")
    new = role("new")
    printed = call(owned, "db", "grants", "--role", "owner", new)
    assert printed.exit_code == 0, printed.output
    execute(admin, printed.stdout)
    belongs_to(admin, new)
    as_new = make_conninfo(owned, user=new)
    # No superuser, either: it migrates and works.
    execute(as_new, "drop view queue_service.seen; drop sequence queue_service.mine")
    schema.downgrade(as_new, "0006")
    schema.upgrade(as_new)
    again = call(as_new, "db", "grants", "--role", "owner")
    assert "owns the schema, and all that is in it" in again.stdout
    assert (
        f'alter table queue_service.runs owner to "{owner_role}";'
        in call(as_new, "db", "grants", "--role", "owner", owner_role).stdout
    )
    assert json.loads(call(as_new, "db", "check", "--json").stdout)["difference"] is None
