from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from queue_service import App
from queue_service.db.execute import Connection, fetch
from queue_service.queues import queries as queues
from queue_service.roster import queries as roster
from queue_service.runs import queries, settling
from queue_service.runs.model import Ending, RunState
from tests.support import claimed, enqueued, one, rows


class TestPause:
    async def test_pausing_and_resuming_tell_whether_they_changed_anything(self, conn: Connection) -> None:
        answers = [
            await fetch(conn, query("q"))
            for query in (queues.resume, queues.pause, queues.pause, queues.resume, queues.resume, queues.pause)
        ]
        assert answers == [False, True, False, True, False, True]

    async def test_pausing_again_keeps_the_time_of_the_first(self, conn: Connection) -> None:
        await fetch(conn, queues.pause("q"))
        (before,) = await fetch(conn, queues.listed())
        await fetch(conn, queues.pause("q"))
        assert await fetch(conn, queues.listed()) == [before]
        assert before.paused_at is not None

    async def test_a_pause_for_a_time_ends_by_itself(self, conn: Connection) -> None:
        await enqueued(conn)
        await enqueued(conn, ordering_key="k")
        assert await fetch(conn, queues.pause("default", lasting=timedelta(hours=1)))
        (queue,) = await fetch(conn, queues.listed())
        assert queue.paused_at is not None
        assert queue.resumes_at == queue.paused_at + timedelta(hours=1)
        for laned in (False, True):
            assert await claimed(conn, laned=laned) == []
        scan = await fetch(conn, queries.scan(["default"], ["noop"]))
        assert (scan.due, scan.laned) == ([], set())
        await conn.execute("update queue_service.queues set resumes_at = clock_timestamp()")
        assert await fetch(conn, queues.listed()) == [queue._replace(paused_at=None, resumes_at=None)]
        assert not await fetch(conn, queues.resume("default"))
        for laned in (False, True):
            assert len(await claimed(conn, laned=laned)) == 1

    async def test_a_pause_may_be_made_longer_shorter_or_lasting(self, conn: Connection) -> None:
        until = datetime(2999, 1, 1, tzinfo=UTC)
        cases: list[dict[str, Any]] = [{"lasting": timedelta(hours=1)}, {"until": until}, {"until": until}, {}, {}]
        answers = [await fetch(conn, queues.pause("q", **how)) for how in cases]
        assert answers == [True, True, False, True, False]
        (queue,) = await fetch(conn, queues.listed())
        assert queue.resumes_at is None

    async def test_what_is_running_goes_on(self, conn: Connection) -> None:
        await enqueued(conn)
        ((run, lease),) = await claimed(conn)
        await fetch(conn, queues.pause("default"))
        assert await fetch(conn, queries.extend([lease], timedelta(minutes=1))) == {lease}
        ending = Ending(run.claim, RunState.SUCCEEDED)
        assert await fetch(conn, settling.finish([ending], worker_id=1, freed=[lease])) == {run.claim}

    async def test_a_paused_queue_takes_new_runs(self, conn: Connection) -> None:
        await fetch(conn, queues.pause("default"))
        assert await enqueued(conn)


class TestListed:
    async def test_queues_with_a_live_run_or_a_row_each_once_in_order(self, conn: Connection) -> None:
        assert await fetch(conn, queues.listed()) == []
        for queue, priority in [("b", 5), ("b", -5), ("b", 0), ("a", 0), ("c", 0), ("C", 0), ("ü", 0)]:
            await enqueued(conn, queue=queue, priority=priority)
        for queue in ("b", "empty"):
            await fetch(conn, queues.pause(queue))
        await fetch(conn, queues.pause("resumed"))
        await fetch(conn, queues.resume("resumed"))
        found = {queue.name: queue.paused_at is not None for queue in await fetch(conn, queues.listed())}
        assert found == {"a": False, "b": True, "c": False, "C": False, "ü": False, "empty": True, "resumed": False}
        assert len(await fetch(conn, queues.listed())) == 7

    async def test_a_queue_whose_last_run_ended_is_gone(self, conn: Connection) -> None:
        run_id = await enqueued(conn, queue="q")
        await fetch(conn, queries.cancel(run_id))
        assert await fetch(conn, queues.listed()) == []


class TestRoster:
    async def test_a_worker_is_listed_with_what_it_holds(self, conn: Connection) -> None:
        busy, idle = [await fetch(conn, roster.join(name, "1.0", '{"default": 3}')) for name in ("busy", "idle")]
        for _ in range(5):
            await enqueued(conn)
        taken = await claimed(conn, limit=2, worker_id=busy)
        await claimed(conn, limit=2, worker_id=busy)
        await claimed(conn, worker_id=999)
        await fetch(conn, settling.finish([Ending(taken[0][0].claim, RunState.SUCCEEDED)], worker_id=busy))
        listed = await fetch(conn, roster.listed(timedelta(minutes=1)))
        assert [(each.id, each.name, each.holds, each.is_alive) for each in listed] == [
            (busy, "busy", 3, True),
            (idle, "idle", 0, True),
        ]
        assert (listed[0].version, listed[0].queues) == ("1.0", {"default": 3})

    async def test_silence_makes_it_dead_a_beat_alive_again(self, conn: Connection) -> None:
        worker = await fetch(conn, roster.join("w", "1", "{}"))
        await conn.execute("update queue_service.workers set seen_at = clock_timestamp() - interval '2 min'")
        assert [each.is_alive for each in await fetch(conn, roster.listed(timedelta(minutes=1)))] == [False]
        await fetch(conn, roster.beat(worker))
        assert [each.is_alive for each in await fetch(conn, roster.listed(timedelta(minutes=1)))] == [True]
        assert await fetch(conn, roster.prune(timedelta(minutes=1))) == []

    async def test_ids_are_never_used_again(self, conn: Connection) -> None:
        first = await fetch(conn, roster.join("w", "1", "{}"))
        await fetch(conn, roster.leave(first))
        assert await fetch(conn, roster.join("w", "1", "{}")) > first
        assert await one(conn, "select count(*) from queue_service.workers") == 1

    async def test_leaving_and_pruning_take_the_one_they_name_and_what_it_holds_stays(self, conn: Connection) -> None:
        leaving, silent, staying = [await fetch(conn, roster.join("w", "1", "{}")) for _ in range(3)]
        await enqueued(conn)
        await claimed(conn, worker_id=silent)
        await fetch(conn, roster.leave(leaving))
        await conn.execute(
            "update queue_service.workers set seen_at = clock_timestamp() - interval '2 min' where id = %s", [silent]
        )
        assert await fetch(conn, roster.prune(timedelta(minutes=1))) == [silent]
        assert await rows(conn, "select id from queue_service.workers") == [(staying,)]
        assert await rows(conn, "select worker_id from queue_service.leases") == [(silent,)]


class TestPurge:
    async def test_everything_that_is_queued_goes_and_nothing_else(self, app: App, conn: Connection) -> None:
        for fields in (
            {},
            {"delay": timedelta(hours=1)},
            {"priority": 5},
            {"ordering_key": "k"},
            {"ordering_key": "k"},
        ):
            await enqueued(conn, **fields)
        await enqueued(conn, queue="other")
        ((running, _),) = await claimed(conn, limit=1)
        assert await app.queues.purge("default") == 4
        left = await rows(conn, "select queue, state from queue_service.runs order by queue")
        assert left == [("default", "running"), ("other", "queued")]
        assert await one(conn, "select count(*) from queue_service.lanes") == 0
        assert running

    async def test_it_goes_in_batches_and_tells_of_each(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("queue_service.app.queues.PURGE_BATCH", 10)
        await app.enqueue_many("noop", [{}] * 25)
        counts: list[int] = []
        assert await app.queues.purge("default", on_progress=counts.append) == 25
        assert counts == [10, 20, 25]
        assert await one(conn, "select count(*) from queue_service.runs") == 0
