"""Limits on a real database: no more runs of a queue, or of a key, than it allows, whoever claims."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from queue_service import App, Run, RunState
from queue_service.db.execute import Connection, fetch
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.runs import queries, settling, walks
from queue_service.runs.model import Ending, Return
from queue_service.runs.queries import Claimant, Taken, Wanted
from queue_service.worker.floors import FRONT
from tests.support import LEASE, blocked, claimed, enqueued, eventually, lapse, one, rows

Session = Callable[[], Awaitable[Connection]]
BY = Claimant(["noop"], 1, LEASE)


def allowed(*names: str, wanted: int = 10, laned: bool = False) -> Any:
    some = names or ("default",)
    if laned:
        return queries.claim_limited_lanes([(name, wanted) for name in some], BY)
    return queries.claim_limited([Wanted(name, wanted, {0: FRONT}) for name in some], BY)


async def begun(conn: Connection, *names: str, **options: Any) -> list[Run]:
    answer: Taken = await fetch(conn, allowed(*names, **options))
    return [run for run, _ in answer.runs]


async def wait_of(conn: Connection, queue: str = "default") -> float | None:
    answer: Taken = await fetch(conn, allowed(queue))
    assert answer.runs == []
    return answer.waits[queue]


async def finished(conn: Connection, *runs: Run) -> None:
    done = await fetch(conn, settling.finish([Ending(run.claim, RunState.SUCCEEDED) for run in runs], worker_id=1))
    assert len(done) == len(runs)


async def full_of(conn: Connection, count: int = 20, **fields: Any) -> None:
    for _ in range(count):
        await enqueued(conn, **fields)


async def turn_back(conn: Connection, seconds: float) -> None:
    """Let so much time have passed since the rate was last counted."""
    await conn.execute("update queue_service.queues set tokens_at = tokens_at - %s", [timedelta(seconds=seconds)])


class TestMaxRunning:
    async def test_is_never_exceeded_and_made_use_of(self, app: App, conn: Connection) -> None:
        await full_of(conn)
        assert await app.queues.limit("default", max_running=3)
        first = await begun(conn)
        assert len(first) == 3
        assert await begun(conn) == []
        await finished(conn, first[0])
        assert len(await begun(conn)) == 1
        await finished(conn, *first[1:])
        assert len(await begun(conn)) == 2

    async def test_takes_no_more_than_is_wanted(self, app: App, conn: Connection) -> None:
        await full_of(conn)
        await app.queues.limit("default", max_running=8)
        assert len(await begun(conn, wanted=5)) == 5
        assert len(await begun(conn, wanted=5)) == 3

    async def test_counts_what_was_claimed_before_it_was_set(self, app: App, conn: Connection) -> None:
        await full_of(conn)
        assert len(await claimed(conn, limit=2)) == 2
        await app.queues.limit("default", max_running=3)
        assert len(await begun(conn)) == 1

    async def test_counts_a_run_until_it_is_handed_back_or_its_lease_is_swept(self, app: App, conn: Connection) -> None:
        await full_of(conn)
        await app.queues.limit("default", max_running=2)
        one_run, _ = await begun(conn)
        await fetch(conn, settling.give_back([Return(one_run.claim)], worker_id=1))
        assert len(await begun(conn)) == 1
        await lapse(conn)
        assert len(await fetch(conn, queries.sweep(max_losses=3, limit=10))) == 2
        assert len(await begun(conn)) == 2

    async def test_is_of_its_queue_alone(self, app: App, conn: Connection) -> None:
        await full_of(conn, 5)
        await full_of(conn, 5, queue="other")
        await app.queues.limit("default", max_running=1)
        await app.queues.limit("other", max_running=2)
        assert sorted(run.queue for run in await begun(conn, "default", "other")) == ["default", "other", "other"]
        assert await begun(conn, "default", "other") == []

    async def test_holds_for_lanes_and_other_runs_together(self, app: App, conn: Connection) -> None:
        await full_of(conn, 5)
        for key in "abcde":
            await enqueued(conn, ordering_key=key)
        await app.queues.limit("default", max_running=3)
        assert len(await begun(conn, laned=True, wanted=2)) == 2
        assert len(await begun(conn)) == 1
        assert await begun(conn, laned=True) == []

    async def test_is_kept_by_the_claims_of_other_queues_too(self, app: App, conn: Connection) -> None:
        await full_of(conn, 3)
        await enqueued(conn, ordering_key="k")
        await app.queues.limit("default", max_running=1)
        assert await claimed(conn) == []
        assert await claimed(conn, laned=True) == []

    async def test_holds_for_a_suspect(self, app: App, conn: Connection) -> None:
        await full_of(conn, 2)
        await claimed(conn, limit=1)
        await lapse(conn)
        await fetch(conn, queries.sweep(max_losses=3, limit=10))
        await app.queues.limit("default", max_running=1)
        (run,) = await begun(conn)
        assert not await fetch(conn, queries.suspect_is_due(["default"], ["noop"]))
        assert await fetch(conn, queries.claim_suspect(["default"], BY)) == []
        await finished(conn, run)
        assert await fetch(conn, queries.suspect_is_due(["default"], ["noop"]))
        assert len(await fetch(conn, queries.claim_suspect(["default"], BY))) == 1
        assert await begun(conn) == []

    async def test_that_is_lowered_lets_what_runs_go_on(self, app: App, conn: Connection) -> None:
        await full_of(conn)
        await app.queues.limit("default", max_running=5)
        runs = await begun(conn)
        await app.queues.limit("default", max_running=2)
        await finished(conn, *runs[:3])
        assert await begun(conn) == []
        await finished(conn, runs[3])
        assert len(await begun(conn)) == 1

    async def test_that_is_taken_away_is_gone(self, app: App, conn: Connection) -> None:
        await full_of(conn)
        await app.queues.limit("default", max_running=1)
        assert await app.queues.limit("default")
        assert not await app.queues.limit("default")
        assert len(await claimed(conn)) == 10
        assert (await fetch(conn, allowed())).waits == {}

    async def test_of_a_paused_queue_lets_nothing_begin(self, app: App, conn: Connection) -> None:
        await full_of(conn)
        await app.queues.limit("default", max_running=5)
        await app.queues.pause("default")
        assert await begun(conn) == []
        await app.queues.resume("default")
        assert len(await begun(conn)) == 5

    async def test_is_announced_by_a_scan(self, app: App, conn: Connection) -> None:
        await full_of(conn, 1)
        await enqueued(conn, queue="other", ordering_key="k")
        scan = queries.scan(["default", "other"], ["noop"])
        assert (await fetch(conn, scan)).limited == set()
        await app.queues.limit("default", max_running=5)
        assert (await fetch(conn, scan)).limited == {"default"}
        await app.queues.limit("other", rate=5)
        assert (await fetch(conn, scan)).limited == {"default", "other"}


class TestMaxRunningPerKey:
    async def test_lets_so_many_of_a_lane_go_on_begun_in_order(self, app: App, conn: Connection) -> None:
        await app.queues.limit("default", max_running_per_key=2)
        ids = [await enqueued(conn, ordering_key="k") for _ in range(4)]
        other = await enqueued(conn, ordering_key="l")
        (_, _), (second, _), (third, _) = await claimed(conn, laned=True)
        assert [second.id, third.id] == [ids[1], other]
        assert await claimed(conn, laned=True) == []
        await finished(conn, second)
        ((third, _),) = await claimed(conn, laned=True)
        assert third.id == ids[2]
        assert await claimed(conn, laned=True) == []

    async def test_holds_for_lanes_that_were_there_before(self, app: App, conn: Connection) -> None:
        await full_of(conn, 5, ordering_key="k")
        ((first, _),) = await claimed(conn, laned=True)
        await app.queues.limit("default", max_running_per_key=3)
        assert [len(await claimed(conn, laned=True)) for _ in range(2)] == [2, 0]
        await app.queues.limit("default")
        await finished(conn, first)
        assert await claimed(conn, laned=True) == []

    async def test_holds_together_with_that_of_the_queue(self, app: App, conn: Connection) -> None:
        await app.queues.limit("default", max_running=3, max_running_per_key=2)
        await full_of(conn, 5, ordering_key="a")
        await full_of(conn, 5, ordering_key="b")
        assert [len(await begun(conn, laned=True)) for _ in range(2)] == [3, 0]

    async def test_is_shared_out_among_lanes_the_first_of_each_before_the_second_of_any(
        self, app: App, conn: Connection
    ) -> None:
        await app.queues.limit("default", max_running_per_key=10)
        for key, runs in (("a", 20), ("b", 20), ("c", 1)):
            await full_of(conn, runs, ordering_key=key)
        claims = [await claimed(conn, laned=True, limit=9) for _ in range(4)]
        counts = [Counter(run.ordering_key for run, _ in taken) for taken in claims]
        assert counts == [{"a": 3, "b": 3, "c": 1}, {"a": 5, "b": 4}, {"a": 2, "b": 3}, {}]

    async def test_is_filled_behind_one_that_waits_for_its_next_attempt(self, app: App, conn: Connection) -> None:
        await app.queues.limit("default", max_running_per_key=3)
        await full_of(conn, 5, ordering_key="k")
        (first, _), *_ = await claimed(conn, laned=True)
        assert await fetch(conn, settling.give_back([Return(first.claim, 60.0, failed=True)], worker_id=1))
        # It keeps its place, and the others theirs.
        assert await claimed(conn, laned=True) == []
        await conn.execute("update queue_service.runs set run_at = now() - interval '1 s' where id = %s", [first.id])
        assert [run.id for run, _ in await claimed(conn, laned=True)] == [first.id]

    async def test_begins_nothing_behind_a_run_that_is_for_another_worker_or_that_somebody_holds(
        self, app: App, conn: Connection, session: Session
    ) -> None:
        await app.queues.limit("default", max_running_per_key=5)
        ids = [await enqueued(conn, ordering_key="k", task=task) for task in ("noop", "noop", "noop", "theirs", "noop")]
        user = await session()
        await user.execute("begin")
        await user.execute("select from queue_service.runs where id = %s for update", [ids[1]])
        assert [run.id for run, _ in await claimed(conn, laned=True)] == ids[:1]
        await user.execute("rollback")
        assert [run.id for run, _ in await claimed(conn, laned=True)] == ids[1:3]
        assert await claimed(conn, laned=True) == []
        assert [run.id for run, _ in await claimed(conn, laned=True, tasks=("theirs",))] == ids[3:4]
        assert [run.id for run, _ in await claimed(conn, laned=True)] == ids[4:]

    async def test_of_a_lane_that_could_not_be_announced_is_kept_by_claims(self, conn: Connection) -> None:
        await full_of(conn, 5, ordering_key="k")
        await conn.execute("update queue_service.lanes set width = 4")
        assert [len(await claimed(conn, laned=True)) for _ in range(2)] == [1, 0]

    async def test_changes_lanes_in_batches_and_leaves_out_none(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("queue_service.app.queues.LANES_BATCH", 3)
        for number in range(10):
            await enqueued(conn, ordering_key=str(number))
        await enqueued(conn, queue="other", ordering_key="k")
        await app.queues.limit("default", max_running_per_key=4)
        assert await rows(conn, "select queue, width, count(*) from queue_service.lanes group by 1, 2 order by 1") == [
            ("default", 4, 10), ("other", 1, 1),
        ]  # fmt: skip

    async def test_waits_for_a_lane_that_another_holds(self, app: App, conn: Connection, session: Session) -> None:
        await full_of(conn, 2, ordering_key="k")
        holder = await session()
        await holder.execute("begin")
        await holder.execute("select from queue_service.lanes for update")
        limiting = asyncio.create_task(app.queues.limit("default", max_running_per_key=2))
        await eventually(lambda: one(conn, "select count(*) = 1 from queue_service.queues"))
        assert not limiting.done()
        await holder.execute("commit")
        assert await limiting
        assert await one(conn, "select width from queue_service.lanes") == 2


class TestRate:
    async def test_lets_so_many_begin_and_then_evenly(self, app: App, conn: Connection) -> None:
        await full_of(conn, 30)
        await app.queues.limit("default", rate=10, period=100)
        runs = await begun(conn)
        assert len(runs) == 10
        await finished(conn, *runs)
        wait = await wait_of(conn)
        assert wait is not None
        assert 9 < wait <= 10
        await turn_back(conn, 10)
        assert len(await begun(conn)) == 1
        await turn_back(conn, 25)
        assert len(await begun(conn)) == 2
        # What was left of the 25 seconds is not lost.
        await turn_back(conn, 5)
        assert len(await begun(conn)) == 1

    async def test_saves_up_no_more_than_the_burst(self, app: App, conn: Connection) -> None:
        await full_of(conn, 30)
        await app.queues.limit("default", rate=10, period=100, burst=3)
        assert len(await begun(conn)) == 3
        await turn_back(conn, 3_600)
        assert len(await begun(conn)) == 3
        assert await begun(conn) == []

    async def test_tells_no_wait_while_more_may_begin(self, app: App, conn: Connection) -> None:
        await full_of(conn, 30)
        await app.queues.limit("default", rate=10, period=100)
        assert (await fetch(conn, allowed(wanted=9))).waits == {"default": None}
        answer = await fetch(conn, allowed(wanted=9))
        assert len(answer.runs) == 1
        assert 9 < answer.waits["default"] <= 10

    async def test_takes_nothing_for_what_did_not_begin(self, app: App, conn: Connection) -> None:
        await app.queues.limit("default", rate=2, period=1_000)
        assert await begun(conn) == []
        await full_of(conn, 3)
        assert len(await begun(conn)) == 2

    async def test_holds_for_lanes_and_suspects(self, app: App, conn: Connection) -> None:
        await full_of(conn, 1)
        await claimed(conn)
        await lapse(conn)
        await fetch(conn, queries.sweep(max_losses=3, limit=10))
        for key in "abc":
            await enqueued(conn, ordering_key=key)
        await app.queues.limit("default", rate=2, period=1_000)
        assert len(await fetch(conn, queries.claim_suspect(["default"], BY))) == 1
        assert len(await begun(conn, laned=True)) == 1
        assert await begun(conn, laned=True) == []

    async def test_holds_together_with_max_running(self, app: App, conn: Connection) -> None:
        await full_of(conn, 30)
        await app.queues.limit("default", max_running=4, rate=6, period=1_000)
        first = await begun(conn)
        assert len(first) == 4
        await finished(conn, *first)
        assert len(await begun(conn)) == 2

    async def test_that_is_set_again_begins_afresh_only_where_it_changed(self, app: App, conn: Connection) -> None:
        await full_of(conn, 30)
        await app.queues.limit("default", rate=2, period=1_000)
        await begun(conn)
        assert not await app.queues.limit("default", rate=2, period=1_000)
        assert await begun(conn) == []
        # Nor where something else did.
        assert await app.queues.limit("default", max_running=50, rate=2, period=1_000)
        assert await begun(conn) == []
        assert await app.queues.limit("default", rate=3, period=1_000)
        assert len(await begun(conn)) == 3


class TestRace:
    """Claims of one queue at the same time, each in a session of its own. The first has not committed yet."""

    @pytest.mark.parametrize("limits", [{"max_running": 3}, {"rate": 3, "period": 1_000}])
    @pytest.mark.parametrize("laned", [False, True])
    @pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
    async def test_a_second_claim_takes_nothing_that_the_first_may_have(
        self, app: App, conn: Connection, session: Session, limits: dict[str, int], laned: bool, commit: bool
    ) -> None:
        for number in range(10):
            await enqueued(conn, ordering_key=str(number) if laned else None)
        await app.queues.limit("default", **limits)
        a, b = await session(), await session()
        await a.execute("begin")
        assert len(await begun(a, laned=laned, wanted=2)) == 2
        answer = await fetch(b, allowed(laned=laned))
        assert (answer.runs, answer.waits) == ([], {})
        await a.execute("commit" if commit else "rollback")
        assert len(await begun(b, laned=laned)) == (1 if commit else 3)

    async def test_a_claim_that_counted_before_another_claimed_takes_nothing(
        self, app: App, conn: Connection, session: Session
    ) -> None:
        await full_of(conn)
        await app.queues.limit("default", max_running=3)
        assert len(await begun(conn, wanted=1)) == 1
        a, b = await session(), await session()
        # A policy on the table of leases stops the second claim in the middle of its look.
        role = f"stopped_{conn.info.backend_pid}"
        for step in (
            f"create role {role}",
            f"grant usage on schema queue_service to {role}",
            f"grant all on all tables in schema queue_service to {role}",
            f"grant all on all sequences in schema queue_service to {role}",
            "alter table queue_service.leases enable row level security",
            "create policy stop on queue_service.leases using (pg_advisory_xact_lock(7)::text = '') with check (true)",
        ):
            await conn.execute(step.encode())
        try:
            await a.execute("select pg_advisory_lock(7)")
            await b.execute(f"set role {role}".encode())
            counting = asyncio.create_task(fetch(b, allowed()))
            await eventually(lambda: blocked(conn, b))
            assert len(await begun(conn)) == 2
            await a.execute("select pg_advisory_unlock(7)")
            answer = await counting
            assert (answer.runs, answer.waits) == ([], {})
            await finished(conn, *(await fetch(conn, walks.page(state=RunState.RUNNING))).runs[:1])
            assert len(await begun(b)) == 1
        finally:
            await b.execute("reset role")
            await conn.execute(f"drop owned by {role}".encode())
            await conn.execute(f"drop role {role}".encode())

    async def test_many_claims_at_once_never_take_too_much(self, app: App, conn: Connection, session: Session) -> None:
        await full_of(conn, 60)
        await app.queues.limit("default", max_running=5)
        sessions = [await session() for _ in range(4)]
        most = 0

        async def work(own: Connection) -> int:
            nonlocal most
            done = 0
            for _ in range(400):
                runs = await begun(own, wanted=3)
                most = max(most, await one(own, "select count(*) from queue_service.runs where state = 'running'"))
                if runs:
                    await finished(own, *runs)
                    done += len(runs)
                if not await one(own, "select count(*) from queue_service.runs"):
                    break
            return done

        done = await asyncio.gather(*(work(each) for each in sessions))
        assert sum(done) == 60
        assert 3 <= most <= 5

    async def test_a_limit_counts_what_a_claim_took_that_had_not_committed(
        self, app: App, conn: Connection, session: Session
    ) -> None:
        await full_of(conn)
        a, b = await session(), await session()
        await a.execute("begin")
        assert len(await claimed(a, limit=3)) == 3
        limiting = asyncio.create_task(app.queues.limit("default", max_running=4))
        await eventually(lambda: one(conn, "select true from pg_locks where not granted limit 1"))
        late = asyncio.create_task(claimed(b, limit=3))
        await eventually(lambda: blocked(conn, b))
        await a.execute("commit")
        assert await limiting
        # It waited for the limit, and saw it.
        assert await late == []
        assert len(await begun(conn)) == 1

    async def test_a_limit_that_cannot_be_set_in_time_says_so_and_changes_nothing(
        self, app: App, conn: Connection, session: Session
    ) -> None:
        await full_of(conn, 1)
        a = await session()
        await a.execute("begin")
        await claimed(a)
        with pytest.raises(DatabaseUnavailable, match="Another transaction"):
            await app.queues.limit("default", max_running=4)
        assert await one(conn, "select count(*) from queue_service.queues") == 0


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        ({"max_running": 0}, "pause"),
        ({"max_running": True}, "max_running"),
        ({"max_running_per_key": -1}, "max_running_per_key"),
        ({"rate": 1.5}, "rate"),
        ({"rate": 1, "period": 0}, "period"),
        ({"burst": 5}, "rate="),
    ],
)
async def test_what_is_no_limit_is_refused(app: App, limits: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        await app.queues.limit("default", **limits)
