"""Runs of history queued again by a filter, batch after batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from queue_service import App
from queue_service.app import history
from queue_service.app.history import Retried
from queue_service.db import channels
from queue_service.db.channels import Notice
from queue_service.db.execute import Connection, fetch
from queue_service.errors import ConfigError
from queue_service.runs import queries, walks
from queue_service.runs.model import RunState
from queue_service.runs.walks import Filter, Place
from tests.support import blocked, claimed, enqueued, eventually, one, rows

Open = Callable[[], Awaitable[Connection]]

FAILED = Filter(RunState.FAILED)


async def ended(
    conn: Connection, count: int = 1, *, hours: float = 1, state: str = "failed", **fields: Any
) -> list[int]:
    """The ids of runs that ended so many hours ago."""
    given = {"queue": "default", "task": "noop", "singleton_key": None, "ordering_key": None, "priority": 0} | fields
    found = await rows(
        conn,
        """insert into queue_service.finished_runs (id, finished_at, claimed_at, run_at, created_at, attempt, failures, losses,
                state, payload, error, queue, task, singleton_key, ordering_key, priority)
           select nextval('queue_service.runs_id_seq'), statement_timestamp() - make_interval(secs => %s), '2020-01-01Z',
                '2020-01-01Z', '2020-01-01Z', 3, 3, 1, %s, '{"a": 1}', '{"reason": "raised"}', %s, %s, %s, %s, %s
             from generate_series(1, %s) returning id""",
        hours * 3600, state, *given.values(), count,
    )  # fmt: skip
    return [row[0] for row in found]


async def live(conn: Connection) -> list[int]:
    return [row[0] for row in await rows(conn, "select id from queue_service.runs order by id")]


async def over(conn: Connection) -> list[int]:
    return [row[0] for row in await rows(conn, "select id from queue_service.finished_runs order by id")]


class TestWhich:
    async def test_those_that_failed_unless_another_ending_is_named(self, app: App, conn: Connection) -> None:
        (failed,), (cancelled,), (expired,), (good,) = [
            await ended(conn, state=state) for state in ("failed", "cancelled", "expired", "succeeded")
        ]
        assert await app.retry_many() == Retried(1, 0)
        assert await live(conn) == [failed]
        assert await app.retry_many(state="cancelled") == await app.retry_many(state="expired") == Retried(1, 0)
        assert (await live(conn), await over(conn)) == ([failed, cancelled, expired], [good])

    async def test_of_a_queue_and_a_task(self, app: App, conn: Connection) -> None:
        await ended(conn, queue="q", task="other")
        await ended(conn, queue="other", task="t")
        (wanted,) = await ended(conn, queue="q", task="t")
        assert await app.retry_many(queue="q", task="t") == Retried(1, 0)
        assert await live(conn) == [wanted]
        assert await app.retry_many(queue="q") == await app.retry_many(task="t") == Retried(1, 0)

    @pytest.mark.parametrize(
        "since",
        [lambda: timedelta(hours=2), lambda: 7_200, lambda: datetime.now(UTC) - timedelta(hours=2)],
        ids=["timedelta", "seconds", "time"],
    )
    async def test_that_ended_since_a_time(self, app: App, conn: Connection, since: Callable[[], Any]) -> None:
        await ended(conn, hours=3)
        await ended(conn, hours=72)
        recent = await ended(conn, hours=1)
        assert await app.retry_many(since=since()) == Retried(1, 0)
        assert await live(conn) == recent

    async def test_the_oldest_first_as_many_as_are_asked_for(self, app: App, conn: Connection) -> None:
        ids = await ended(conn, 5)
        assert await app.retry_many(limit=3) == Retried(3, 0)
        assert await live(conn) == ids[:3]
        due = "select id from queue_service.runs order by run_at, id"
        assert [row[0] for row in await rows(conn, due)] == ids[:3]

    async def test_what_ends_after_it_began_is_left_alone(self, conn: Connection) -> None:
        """Or a queue that fails as fast as it is retried would keep this going for ever."""
        _, second = await ended(conn, 2)
        first = await fetch(conn, walks.retry_many(FAILED, Place(), limit=1))
        assert first.after is not None
        (late,) = await ended(conn, hours=0)
        rest = await fetch(conn, walks.retry_many(FAILED, Place(first.until, first.after), limit=9))
        assert rest.moved == 1
        assert (await live(conn))[-1] == second
        assert await over(conn) == [late]

    @pytest.mark.parametrize(
        "wrong",
        [{"state": "succeeded"}, {"state": "queued"}, {"state": "nonsense"}, {"since": datetime(2030, 1, 1)},  # noqa: DTZ001
         {"since": -1}, {"since": "2h"}],
        ids=str,
    )  # fmt: skip
    async def test_a_filter_that_makes_no_sense_is_refused(self, app: App, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            await app.retry_many(**wrong)


class TestHow:
    async def test_it_tells_of_each_batch(self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(history, "RETRIED_AT_ONCE", 2)
        await ended(conn, 5)
        counts: list[Retried] = []
        await app.retry_many(on_progress=counts.append)
        assert counts == [Retried(2, 0), Retried(4, 0), Retried(5, 0)]

    async def test_each_moves_as_retry_moves_it(self, app: App, conn: Connection) -> None:
        one_by_one, together = await ended(conn, 2, priority=3)
        assert await app.retry(one_by_one)
        assert await app.retry_many() == Retried(1, 0)
        moved = "select to_jsonb(runs) - array['id', 'run_at'] from queue_service.runs where id = %s"
        assert await one(conn, moved, together) == await one(conn, moved, one_by_one)
        assert await over(conn) == []

    async def test_workers_hear_of_each_queue_and_priority(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        announced: list[Notice] = []
        monkeypatch.setattr(app.opened.notifier, "send", announced.extend)
        await ended(conn, 2)
        await ended(conn, queue="other queue", priority=-7)
        await app.retry_many()
        assert sorted(announced) == sorted([channels.enqueued("default", 0), channels.enqueued("other queue", -7)])

    async def test_lanes_take_them_up_in_their_order(self, app: App, conn: Connection) -> None:
        ids = await ended(conn, 3, ordering_key="k")
        await app.retry_many()
        ((run, _),) = await claimed(conn, laned=True)
        assert run.id == ids[0]
        assert await one(conn, "select count(*) from queue_service.lanes") == 1

    @pytest.mark.parametrize("batch", [1, 2, 1_000])
    @pytest.mark.parametrize("look", [1, 3, 1_000])
    async def test_whatever_the_size_of_a_batch_and_of_a_stretch_nothing_is_passed_over(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch, batch: int, look: int
    ) -> None:
        monkeypatch.setattr(history, "RETRIED_AT_ONCE", batch)
        monkeypatch.setattr(walks, "SCAN_LIMIT", look)
        wanted = []
        for n in range(7):
            ids = await ended(conn, hours=n * 30, task="wanted" if n in {0, 3, 4, 6} else "noop")
            wanted += ids if n in {0, 3, 4, 6} else []
        assert await app.retry_many(task="wanted", dry_run=True) == Retried(4, 0)
        assert await app.retry_many(task="wanted", dry_run=True, limit=3) == Retried(3, 0)
        assert await live(conn) == []
        assert await app.retry_many(task="wanted") == Retried(4, 0)
        assert await live(conn) == wanted

    async def test_a_run_whose_singleton_key_is_taken_is_skipped_and_counted(self, app: App, conn: Connection) -> None:
        holder = await app.enqueue("noop", {}, singleton_key="held")
        (kept,) = await ended(conn, singleton_key="held")
        oldest, *younger = await ended(conn, 3, singleton_key="free")
        plain = await ended(conn, 2)
        assert await app.retry_many() == Retried(3, 3)
        assert await live(conn) == [holder, oldest, *plain]
        assert await over(conn) == [kept, *younger]
        assert await app.retry_many() == Retried(0, 3)


class TestRaces:
    async def test_two_operators_at_once_move_each_run_once(self, app: App, conn: Connection) -> None:
        ids = await ended(conn, 3_000)
        done = await asyncio.gather(*(app.retry_many() for _ in range(4)))
        assert sum(each.runs for each in done) == 3_000
        assert [each.skipped for each in done] == [0] * 4
        assert (await live(conn), await over(conn)) == (ids, [])

    @pytest.mark.parametrize("commit", [True, False])
    async def test_what_another_is_moving_is_stepped_over(self, conn: Connection, session: Open, commit: bool) -> None:
        first, second = await session(), await session()
        ids = await ended(conn, 4)
        await first.execute("begin")
        assert (await fetch(first, walks.retry_many(FAILED, Place(), limit=2))).moved == 2
        stepping = await fetch(second, walks.retry_many(FAILED, Place(), limit=9))
        assert (stepping.found, stepping.moved) == (2, 2)
        await first.execute("commit" if commit else "rollback")
        assert await live(conn) == (ids if commit else ids[2:])
        assert await over(conn) == ([] if commit else ids[:2])

    @pytest.mark.parametrize("commit", [True, False])
    async def test_a_single_retry_that_comes_first_is_stepped_over(
        self, conn: Connection, session: Open, commit: bool
    ) -> None:
        first, second = await session(), await session()
        ids = await ended(conn, 2)
        await first.execute("begin")
        assert await fetch(first, queries.retry(ids[0]))
        assert (await fetch(second, walks.retry_many(FAILED, Place(), limit=9))).moved == 1
        await first.execute("commit" if commit else "rollback")
        assert await live(conn) == (ids if commit else ids[1:])

    @pytest.mark.parametrize("commit", [True, False])
    async def test_a_single_retry_waits_for_the_batch_and_never_doubles_a_run(
        self, conn: Connection, session: Open, commit: bool
    ) -> None:
        first, second = await session(), await session()
        ids = await ended(conn, 2)
        await first.execute("begin")
        await fetch(first, walks.retry_many(FAILED, Place(), limit=9))
        waiting = asyncio.ensure_future(fetch(second, queries.retry(ids[0])))
        await eventually(lambda: blocked(conn, second))
        await first.execute("commit" if commit else "rollback")
        assert await waiting == (None if commit else queries.Retriable("default", 0, None, None, has_moved=True))
        assert await live(conn) == (ids if commit else ids[:1])

    @pytest.mark.parametrize("commit", [True, False])
    async def test_a_key_that_is_being_taken_is_waited_for(self, conn: Connection, session: Open, commit: bool) -> None:
        first, second = await session(), await session()
        (old,) = await ended(conn, singleton_key="k")
        await first.execute("begin")
        holder = await enqueued(first, singleton_key="k")
        waiting = asyncio.ensure_future(fetch(second, walks.retry_many(FAILED, Place(), limit=9)))
        await eventually(lambda: blocked(conn, second))
        await first.execute("commit" if commit else "rollback")
        batch = await waiting
        assert (batch.found, batch.moved) == (1, 0 if commit else 1)
        assert (await live(conn), await over(conn)) == (([holder], [old]) if commit else ([old], []))

    async def test_it_can_be_stopped_at_any_moment_and_begun_again(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(history, "RETRIED_AT_ONCE", 10)
        ids = await ended(conn, 95)

        def stop(so_far: Retried) -> None:
            if so_far.runs == 40:
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await app.retry_many(on_progress=stop)
        assert await live(conn) == ids[:40]
        assert await app.retry_many() == Retried(55, 0)
        assert (await live(conn), await over(conn)) == (ids, [])
