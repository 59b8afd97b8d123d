from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from queue_service import App, RunState, Turn
from queue_service.db import channels
from queue_service.db.channels import Notice
from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.runs import queries
from queue_service.runs.claim import hold
from queue_service.runs.model import NewRun
from queue_service.services.lost_runs import LEASE_LIMIT
from queue_service.services.sweeper import LANE_LIMIT, RUN_LIMIT, TURN_LIMIT, SweepCounts, Sweeper
from tests.support import claimed, enqueued, lapse, one, rows


class Recorded:
    """A sweeper that writes down what it asks and announces, and whose database may be gone."""

    def __init__(self, app: App, **options: Any) -> None:
        self.notices: list[Notice] = []
        self.asked: list[Query[Any]] = []
        self.is_gone = False
        self._app = app
        self.sweeper = Sweeper(self.fetch, self.notices.extend, **{"max_losses": 3} | options)

    async def fetch(self, query: Query[Any]) -> Any:
        self.asked.append(query)
        if self.is_gone:
            raise DatabaseUnavailable("gone")
        return await self._app.fetch(query)


@pytest.fixture
async def recorded(app: App) -> Recorded:
    return Recorded(app)


async def test_nothing_that_lapsed_is_announced_to_nobody(recorded: Recorded, conn: Connection) -> None:
    await enqueued(conn)
    await claimed(conn)
    assert await recorded.sweeper.once() == SweepCounts(0, 0, 0)
    assert recorded.notices == []
    assert await one(conn, "select state from queue_service.runs") == "running"


async def test_each_lane_that_gets_runs_back_is_announced_once(recorded: Recorded, conn: Connection) -> None:
    for queue, priority in [("default", 0), ("default", 0), ("default", 5), ("other", 0)]:
        await enqueued(conn, queue=queue, priority=priority)
    await claimed(conn, priorities=(5, 0))
    await claimed(conn, queue="other")
    await lapse(conn)
    assert await recorded.sweeper.once() == SweepCounts(4, 0, 0)
    expected = {channels.enqueued("default", 0), channels.enqueued("default", 5), channels.enqueued("other", 0)}
    assert set(recorded.notices) == expected
    assert len(recorded.notices) == 3


async def test_those_that_ended_are_announced_as_finished(recorded: Recorded, conn: Connection) -> None:
    asked, often = await enqueued(conn), await enqueued(conn)
    await claimed(conn)
    await conn.execute("update queue_service.runs set losses = 2 where id = %s", [often])
    await fetch(conn, queries.cancel(asked))
    await lapse(conn)
    assert await recorded.sweeper.once() == SweepCounts(0, 2, 0)
    ((channel, payload),) = recorded.notices
    assert channel == channels.FINISHED
    assert channels.read_run_ids(payload) == {asked, often}


async def test_with_one_loss_allowed_the_first_ends_the_run(app: App, conn: Connection) -> None:
    run_id = await enqueued(conn)
    await claimed(conn)
    await lapse(conn)
    assert await Recorded(app, max_losses=1).sweeper.once() == SweepCounts(0, 1, 0)
    run = await app.get(run_id)
    assert run is not None
    assert (run.state, run.losses) == (RunState.FAILED, 1)


async def test_leases_are_taken_in_bounded_passes_until_none_is_left(recorded: Recorded, conn: Connection) -> None:
    count = 2 * LEASE_LIMIT + 1
    for _ in range(count):
        await enqueued(conn)
        await claimed(conn, limit=1)
    await lapse(conn)
    assert await recorded.sweeper.once() == SweepCounts(count, 0, 0)
    limits = [query.params["limit"] for query in recorded.asked if "limit" in query.params]
    assert limits == [RUN_LIMIT] + 4 * [LEASE_LIMIT] + [LANE_LIMIT, TURN_LIMIT]
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_expiries_are_taken_in_bounded_passes_and_announced(recorded: Recorded, conn: Connection) -> None:
    await conn.execute(
        "insert into queue_service.runs (queue, task, payload, expires_at) select 'default', 'noop', '{}', "
        "'2020-01-01Z' from generate_series(1, 2500)"
    )
    assert await recorded.sweeper.once() == SweepCounts(0, 0, 2_500)
    assert {notice.channel for notice in recorded.notices} == {channels.FINISHED}
    assert len(recorded.notices) == 3
    assert await rows(conn, "select state, count(*) from queue_service.finished_runs group by 1") == [
        ("expired", 2_500)
    ]


class TestAfterAnOutage:
    async def test_leases_have_their_grace_and_expiries_go_on(self, app: App, conn: Connection) -> None:
        recorded = Recorded(app, grace=timedelta(minutes=1))
        await enqueued(conn)
        await claimed(conn)
        await lapse(conn)
        await enqueued(conn, expires_in=timedelta(hours=1))
        await conn.execute("update queue_service.runs set expires_at = '2020-01-01Z' where state = 'queued'")
        recorded.is_gone = True
        with pytest.raises(DatabaseUnavailable):
            await recorded.sweeper.once()
        recorded.is_gone = False
        assert await recorded.sweeper.once() == SweepCounts(0, 0, 1)
        assert await recorded.sweeper.once() == SweepCounts(0, 0, 0)

    async def test_when_the_grace_is_over_what_lapsed_is_taken(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [1_000.0]
        monkeypatch.setattr("queue_service.services.sweeper.time.monotonic", lambda: now[0])
        recorded = Recorded(app, grace=timedelta(seconds=10))
        await enqueued(conn)
        ((_, lease),) = await claimed(conn)
        await enqueued(conn)
        ((saved, other),) = await claimed(conn)
        await lapse(conn)
        recorded.is_gone = True
        with pytest.raises(DatabaseUnavailable):
            await recorded.sweeper.once()
        recorded.is_gone = False
        assert await recorded.sweeper.once() == SweepCounts(0, 0, 0)
        assert await fetch(conn, queries.extend([other], timedelta(minutes=1))) == {other}
        now[0] += 9.9
        assert await recorded.sweeper.once() == SweepCounts(0, 0, 0)
        now[0] += 0.2
        assert await recorded.sweeper.once() == SweepCounts(1, 0, 0)
        assert await rows(conn, "select id from queue_service.leases") == [(other,)]
        assert await rows(conn, "select id from queue_service.runs where state = 'running'") == [(saved.id,)]
        assert lease != other

    async def test_without_one_there_is_no_grace(self, app: App, conn: Connection) -> None:
        recorded = Recorded(app, grace=timedelta(minutes=1))
        await enqueued(conn)
        await claimed(conn)
        await lapse(conn)
        assert await recorded.sweeper.once() == SweepCounts(1, 0, 0)


@pytest.mark.parametrize("what", ["run", "lane"])
async def test_what_a_transaction_has_locked_is_left_until_it_ends_and_holds_up_nothing_else(
    app: App, conn: Connection, session: Callable[[], Awaitable[Connection]], what: str
) -> None:
    impatient, other = await session(), await session()
    await impatient.execute("set lock_timeout = '100ms'")
    asked: list[Query[Any]] = []

    async def ask(query: Query[Any]) -> Any:
        asked.append(query)
        return await fetch(impatient, query)

    sweeper = Sweeper(ask, lambda _notices: None, max_losses=3)
    first = await enqueued(conn, ordering_key="a")
    ((run, _),) = await claimed(conn, laned=True)
    for _ in range(LEASE_LIMIT):
        await enqueued(conn)
        await claimed(conn)
    await lapse(conn)
    await conn.execute("update queue_service.leases set expires_at = expires_at - interval '1 h' where id = 1")
    await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
    await conn.execute("update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 s'")
    await other.execute("begin")
    if what == "run":
        assert await fetch(other, hold(run.claim))
    else:
        await fetch(other, queries.enqueue(NewRun("noop", "default", "{}", ordering_key="a")))
    assert await sweeper.once() == SweepCounts(LEASE_LIMIT, 0, 0, 1)
    assert await one(conn, "select state from queue_service.runs where id = %s", first) == "running"
    # Known from then on: there is no more waiting for it.
    await enqueued(conn, queue="other")
    await claimed(conn, queue="other")
    await conn.execute("update queue_service.leases set expires_at = clock_timestamp() where id <> 1")
    asked.clear()
    assert await sweeper.once() == SweepCounts(1, 0, 0)
    assert len([query for query in asked if "max_losses" in query.params]) == 2
    await other.execute("commit")
    assert await sweeper.once() == SweepCounts(1, 0, 0)
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_a_run_that_expired_in_a_lane_that_is_locked_is_left_and_holds_up_nothing_else(
    recorded: Recorded, conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    other = await session()
    for key in ("a", "b", None):
        await enqueued(conn, ordering_key=key, expires_in=timedelta(hours=1))
    await conn.execute("update queue_service.runs set expires_at = clock_timestamp()")
    await other.execute("begin")
    await fetch(other, queries.enqueue(NewRun("noop", "default", "{}", ordering_key="a")))
    assert await recorded.sweeper.once() == SweepCounts(0, 0, 2)
    await other.execute("commit")
    assert await recorded.sweeper.once() == SweepCounts(0, 0, 1)
