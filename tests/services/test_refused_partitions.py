"""A partition that cannot be made or dropped holds up nothing else, and everything may be published."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from queue_service import App, Worker
from queue_service.db.execute import Connection
from queue_service.errors import DatabaseRefused
from queue_service.services.partitions import DAYS_AHEAD, Changed, Partitions
from queue_service.services.pruner import Pruner
from tests.roles.conftest import grant
from tests.support import eventually, one, rows, service, working

DAYS = "select count(*) from pg_inherits where inhparent = 'queue_service.finished_runs'::regclass"


def partitions(app: App) -> Partitions:
    return Partitions(app.pool, retention=timedelta(days=14), retention_failed=timedelta(0))


@pytest.fixture
def tomorrow() -> str:
    """The name of its partition."""
    return f"finished_runs_{datetime.now(UTC).date() + timedelta(days=1):%Y%m%d}"


@pytest.fixture
async def taken(conn: Connection, tomorrow: str) -> str:
    """Somebody has detached tomorrow's partition, and its name is there still."""
    await conn.execute(f"create table queue_service.{tomorrow} (like queue_service.finished_runs)".encode())
    return tomorrow


async def test_one_whose_name_is_taken_leaves_the_others(app: App, conn: Connection, taken: str) -> None:
    with pytest.raises(DatabaseRefused, match=rf"cannot make queue_service\.{taken}.*attach it, or rename it"):
        await partitions(app).make_and_drop()
    # Those of today and of the days after, and the default one.
    assert await one(conn, DAYS) == DAYS_AHEAD + 1
    await conn.execute(f"alter table queue_service.{taken} rename to elsewhere".encode())
    assert (await partitions(app).make_and_drop()).made == [taken]


async def test_a_worker_works_and_says_so_meanwhile(
    app: App, conn: Connection, taken: str, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task
    async def noop() -> str:
        return "well"

    async with working(app) as worker:
        assert (await app.wait(await app.enqueue("noop", {}), timeout=10)).result == "well"
        assert worker._parts is not None
        pruner = service(worker._parts.services, "pruner")
        await eventually(lambda: not pruner.condition.is_well)
    said = [record for record in caplog.records if getattr(record, "service", None) == "pruner"]
    assert len(said) == 1
    assert "attach it, or rename it" in said[0].why  # type: ignore[attr-defined]


async def test_pruning_goes_on_past_it(app: App, conn: Connection, taken: str) -> None:
    await app.events.append("s", "delta", {})
    await conn.execute("update queue_service.events set created_at = clock_timestamp() - interval '30 days'")
    with pytest.raises(DatabaseRefused):
        await Pruner(app.pool, retention=timedelta(days=14)).once()
    assert await app.events.read("s") == []


async def test_where_everything_is_published_everything_works(app: App, conn: Connection) -> None:
    await conn.execute("create publication everything for all tables")

    @app.task
    async def fail() -> None:
        raise RuntimeError("on purpose")

    @app.task
    async def noop() -> str:
        return "well"

    async with working(app):
        run_id = await app.enqueue("fail", {}, max_attempts=1)
        await app.wait(run_id, timeout=10)
        assert await app.retry(run_id)
        await app.wait(run_id, timeout=10)
        assert await app.delete(run_id)
        assert (await app.wait(await app.enqueue("noop", {}, ordering_key="k"), timeout=10)).result == "well"
    without = (
        "select relname from pg_class where relname like 'finished_runs%' and relkind = 'r' and relreplident <> 'f'"
    )
    assert await rows(conn, without) == []


async def test_partitions_of_before_are_identified(app: App, conn: Connection, tomorrow: str) -> None:
    await partitions(app).make_and_drop()
    await conn.execute(f"alter table queue_service.{tomorrow} replica identity default".encode())
    await partitions(app).make_and_drop()
    assert await one(conn, "select relreplident from pg_class where relname = %s", tomorrow) == "f"


@pytest.mark.direct("pgbouncer refuses options in the start-up packet")
async def test_a_role_that_owns_nothing_can_work(database: str, conn: Connection) -> None:
    name = await one(conn, "select 'worker_' || current_database()")
    await conn.execute(f'create role "{name}"'.encode())
    try:
        await asyncio.to_thread(grant, database, name, "worker")
        async with App(f"{database} options='-c role={name}'") as app:

            @app.task
            async def noop() -> str:
                return "well"

            run_id = await app.enqueue("noop", {})
            async with asyncio.timeout(20):
                await Worker(app).run(once=True)
            assert (await app.wait(run_id, timeout=5)).result == "well"
            assert await partitions(app).make_and_drop() == Changed([], [])
    finally:
        await conn.execute(f'drop owned by "{name}"'.encode())
        await conn.execute(f'drop role "{name}"'.encode())
