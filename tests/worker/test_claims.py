"""A claim whose answer comes late, or never; scans that wait for a lock; runs without a lease."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from queue_service import App, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.db.pool import Place
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.runs import lost, queries
from queue_service.services.lost_runs import LostRuns
from queue_service.services.sweeper import Sweeper
from queue_service.settings import load
from queue_service.worker.pace import LONGEST_POLLS, SCAN_SHARE, SOON, Pace
from tests.support import claimed, enqueued, eventually, lapse, one, refusing, rows, working

LEFT = "select id, state, attempt, failures, losses from queue_service.runs order by id"
ENDED = "select id, state, error ->> 'reason' from queue_service.finished_runs order by id"


async def test_a_claim_that_was_executed_and_never_answered_makes_no_suspects(
    app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    @app.task
    async def noop(n: int) -> None:
        begun.append(n)

    await app.enqueue_many("noop", [{"n": n} for n in range(300)])
    fetch_ = Place.fetch
    cuts = 0

    async def cut(self: Place, query: Query[Any], **options: Any) -> Any:
        nonlocal cuts
        answer = await fetch_(self, query, **options)
        if "set state = 'running'" in query.text and cuts < 2:
            cuts += 1
            raise DatabaseUnavailable("the connection was cut after the claim")
        return answer

    monkeypatch.setattr(Place, "fetch", cut)
    tally = await Worker(app, {"default": 300}).run(once=True)
    assert (cuts, tally.succeeded, tally.lost) == (2, 300, 0)
    assert sorted(begun) == list(range(300))
    losses = await rows(conn, "select distinct losses, failures from queue_service.finished_runs")
    assert losses == [(0, 0)]
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_what_this_worker_knows_or_another_has_is_not_given_back(conn: Connection) -> None:
    for _ in range(3):
        await enqueued(conn)
    (mine, lease), (unheard, _), (others, _) = [
        (await claimed(conn, limit=1, worker_id=worker))[0] for worker in (7, 7, 8)
    ]
    assert await fetch(conn, lost.release_unheard(7, known=[lease])) == [unheard.id]
    states = {row[0]: row[1] for row in await rows(conn, LEFT)}
    assert states == {mine.id: "running", unheard.id: "queued", others.id: "running"}


async def test_a_claim_that_is_answered_when_its_lease_is_old_goes_back_unbegun(app: App, conn: Connection) -> None:
    """The event loop was blocked meanwhile: others may have what it claimed."""
    begun: list[int] = []

    @app.task
    async def noop(n: int) -> None:
        begun.append(n)

    fetch_ = Place.fetch
    slept = False

    async def slow(self: Place, query: Query[Any], **options: Any) -> Any:
        nonlocal slept
        answer = await fetch_(self, query, **options)
        if "set state = 'running'" in query.text and answer and not slept:
            slept = True
            time.sleep(4.0)  # noqa: ASYNC251 - what blocks the loop
        return answer

    for n in range(20):
        await enqueued(conn, payload=f'{{"n": {n}}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "fetch", slow)
        tally = await Worker(app, {"default": 5}).run(once=True)
    assert slept
    assert sorted(begun) == list(range(20))
    assert tally.succeeded == 20


class TestThePace:
    def test_is_that_of_what_a_scan_costs_the_database(self) -> None:
        pace = Pace(1.0)
        pace.scanned(100.0, cost=0.02)
        pace.scan_soon()
        assert pace.scan_at == pytest.approx(100.0 + 0.02 * SCAN_SHARE)

    def test_leaves_a_moment_to_what_was_just_claimed(self) -> None:
        pace = Pace(1.0)
        pace.scanned(100.0, cost=0.0)
        pace.scan_soon(100.5)
        assert pace.scan_at == 100.5
        pace.scan_soon()
        assert pace.scan_at == pytest.approx(100.0 + SOON)

    def test_has_a_ceiling(self) -> None:
        pace = Pace(1.0)
        pace.scanned(100.0, cost=60.0)
        assert pace.scan_at <= 100.0 + LONGEST_POLLS

    def test_forgets_what_the_last_one_cost_where_notices_were_lost(self) -> None:
        pace = Pace(1.0)
        pace.scanned(100.0, cost=60.0)
        pace.scan_now()
        assert pace.scan_at == 0.0

    async def test_does_not_count_what_was_waited_for(
        self, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        await enqueued(conn)
        other = await session()
        async with other.transaction():
            await other.execute("lock table queue_service.runs")
            looking = asyncio.create_task(fetch(conn, queries.scan(["default"], ["noop"])))
            await eventually(lambda: one(other, "select count(*) > 0 from pg_locks where not granted"))
            held = asyncio.get_running_loop().time()
            await eventually(lambda: asyncio.get_running_loop().time() > held + 1.0)
        assert (await looking).cost < 0.5


async def test_after_a_long_lock_a_run_that_is_due_later_starts_in_time(
    database: str, conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    poll = 0.5
    async with App(database, settings=load({"QUEUE_SERVICE_POLL_INTERVAL": f"{poll}s"})) as app:

        @app.task
        async def noop() -> None: ...

        async with working(app):
            await app.wait(await app.enqueue("noop", {}), timeout=10)
            other = await session()
            async with other.transaction():
                await other.execute("lock table queue_service.runs")
                await eventually(lambda: one(other, "select count(*) > 0 from pg_locks where not granted"))
                since = time.monotonic()
                await eventually(lambda: time.monotonic() > since + 4.0)
            delayed = await app.enqueue("noop", {}, delay=2)
            run = await app.wait(delayed, timeout=20)
    assert run.claimed_at is not None
    assert run.claimed_at - run.run_at < timedelta(seconds=poll + 0.5)


class TestRunsWithoutALease:
    """As an asynchronous failover leaves them."""

    async def orphan(self, conn: Connection, *, minutes: int = 2, **fields: Any) -> int:
        run_id = await enqueued(conn, **fields)
        await claimed(conn, laned=fields.get("ordering_key") is not None)
        await conn.execute("delete from queue_service.leases")
        await conn.execute(
            "update queue_service.runs set claimed_at = clock_timestamp() - %s * interval '1 minute'", [minutes]
        )
        return run_id

    @pytest.mark.parametrize("key", [None, "k"])
    async def test_are_found_and_run_again(self, app: App, conn: Connection, key: str | None) -> None:
        @app.task
        async def noop() -> str:
            return "again"

        run_id = await self.orphan(conn, ordering_key=key)
        behind = await enqueued(conn, ordering_key=key)
        async with working(app):
            for each in (run_id, behind):
                assert (await app.wait(each, timeout=20)).result == "again"
        assert await rows(conn, "select id, losses from queue_service.finished_runs order by id") == [
            (run_id, 1),
            (behind, 0),
        ]

    async def test_that_were_claimed_a_moment_ago_are_left(self, app: App, conn: Connection) -> None:
        run_id = await self.orphan(conn, minutes=0)
        assert await LostRuns(app.fetch, max_losses=3).take_orphans() == []
        assert [row[:2] for row in await rows(conn, LEFT)] == [(run_id, "running")]

    async def test_of_a_task_that_is_not_begun_twice_end(self, app: App, conn: Connection) -> None:
        run_id = await self.orphan(conn)
        sweeper = Sweeper(app.fetch, app.notify, max_losses=3, final_tasks=["noop"])
        assert (await sweeper.once()).ended == 1
        assert await rows(conn, ENDED) == [(run_id, "failed", "worker_lost")]

    async def test_end_when_they_are_cancelled(self, app: App, conn: Connection) -> None:
        run_id = await self.orphan(conn)
        assert await app.cancel(run_id)
        assert [row[:2] for row in await rows(conn, ENDED)] == [(run_id, "cancelled")]

    async def test_are_looked_for_in_turn_however_many_others_there_are(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("queue_service.services.lost_runs.SCAN_LIMIT", 10)
        await conn.execute(
            "insert into queue_service.runs (queue, task, payload) select 'other', 'noop', '{}' from generate_series(1, 95)"
        )
        run_id = await self.orphan(conn)
        runs = LostRuns(app.fetch, max_losses=3)
        swept = [each.run_id for _ in range(11) for each in await runs.take_orphans()]
        assert swept == [run_id]
        # And from the front again.
        await self.orphan(conn, queue="default")
        assert len([each for _ in range(12) for each in await runs.take_orphans()]) == 1


class TestWhatIsRefused:
    """A sweep takes the others, one by one."""

    async def lapsed(self, conn: Connection, *, leases: int = 3, runs: int = 3) -> list[list[int]]:
        held: list[list[int]] = []
        for _ in range(leases):
            for _ in range(runs):
                await enqueued(conn)
            held.append([run.id for run, _ in await claimed(conn, limit=runs)])
        await lapse(conn)
        return held

    @pytest.mark.parametrize("max_losses", [1, 3])
    async def test_of_a_lease_its_other_runs_are_taken(
        self, app: App, conn: Connection, caplog: pytest.LogCaptureFixture, max_losses: int
    ) -> None:
        held = await self.lapsed(conn)
        bad = held[1][1]
        sweeper = Sweeper(app.fetch, app.notify, max_losses=max_losses)
        table, what = (
            ("finished_runs", f"id = {bad}") if max_losses == 1 else ("runs", f"id = {bad} and state = 'queued'")
        )
        async with refusing(conn, table, what):
            counts = await sweeper.once()
            assert counts.requeued + counts.ended == 8
            assert (await sweeper.once())[:2] == (0, 0)
            assert await rows(conn, "select id from queue_service.runs where state = 'running'") == [(bad,)]
            said = [record for record in caplog.records if getattr(record, "run_id", None) == bad]
            assert len(said) == 1
        # Tried again later.
        sweeper._lost_runs._retry_at = 0.0
        assert sum((await sweeper.once())[:2]) == 1
        assert await one(conn, "select count(*) from queue_service.leases") == 0

    @pytest.mark.parametrize("corruption", ["attempts = '{\"a\": 1}'", "losses = 2147483647", "attempts = '5'"])
    async def test_a_row_that_was_changed_by_hand_is_taken_with_the_others(
        self, app: App, conn: Connection, corruption: str
    ) -> None:
        held = await self.lapsed(conn, leases=1)
        await conn.execute(f"update queue_service.runs set {corruption} where id = %s".encode(), [held[0][0]])
        counts = await Sweeper(app.fetch, app.notify, max_losses=10**9).once()
        assert counts.requeued + counts.ended == 3

    async def test_of_what_expired_the_others_end(self, app: App, conn: Connection) -> None:
        ids = [await enqueued(conn, expires_in=timedelta(seconds=1)) for _ in range(5)]
        await conn.execute("update queue_service.runs set expires_at = clock_timestamp() - interval '1 minute'")
        async with refusing(conn, "finished_runs", f"id = {ids[2]}"):
            assert (await Sweeper(app.fetch, app.notify, max_losses=3).once()).expired == 4
        assert (await Sweeper(app.fetch, app.notify, max_losses=3).once()).expired == 1

    async def test_one_kind_of_sweep_that_fails_leaves_the_others(self, app: App, conn: Connection) -> None:
        await self.lapsed(conn, leases=1)
        await conn.execute("alter table queue_service.turn_markers rename to elsewhere")
        try:
            with pytest.raises(Exception, match="schema"):
                await Sweeper(app.fetch, app.notify, max_losses=3).once()
        finally:
            await conn.execute("alter table queue_service.elsewhere rename to turn_markers")
        assert {row[1] for row in await rows(conn, LEFT)} == {"queued"}


async def test_a_lock_on_its_row_of_the_roster_costs_a_worker_no_lease(
    database: str, conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    paces = {"LEASE": "2s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "100ms"}
    async with App(database, settings=load({f"QUEUE_SERVICE_{name}": value for name, value in paces.items()})) as app:
        release = asyncio.Event()

        @app.task
        async def hold() -> None:
            await release.wait()

        async with working(app) as worker:
            run_id = await app.enqueue("hold", {})
            await eventually(lambda: one(conn, "select count(*) = 1 from queue_service.leases"))
            other = await session()
            async with other.transaction():
                await other.execute("select from queue_service.workers where id = %s for update", [worker.id])
                since = time.monotonic()
                await eventually(lambda: time.monotonic() > since + 5.0)
            release.set()
            run = await app.wait(run_id, timeout=10)
        assert (run.attempt, run.losses) == (1, 0)
