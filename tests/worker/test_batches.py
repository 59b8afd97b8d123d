"""Handlers that take many runs at once: what each of these becomes, and that none pays for another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from queue_service import App, Cancel, Retry, RetryLater, Run, RunState, Snooze, Worker
from queue_service.db.execute import Connection
from queue_service.runs.model import Ending, Return
from queue_service.settings import load
from queue_service.worker import lag
from queue_service.worker.executor import Executor
from queue_service.worker.leases import Held, Lease
from queue_service.worker.tally import Settlement
from tests.support import enqueued, eventually, one, rows, working

RUNNING = "select count(*) from queue_service.runs where state = 'running'"


async def enqueued_all(app: App, task: str, count: int, **options: Any) -> list[int]:
    return await app.enqueue_many(task, [{"n": n} for n in range(count)], **options)


async def work_off(app: App, conn: Connection, concurrency: int = 1) -> None:
    """Let workers work until nothing is left, without waiting for retries to be due."""
    while await one(conn, "select count(*) > 0 from queue_service.runs"):
        await conn.execute("update queue_service.runs set run_at = clock_timestamp() - interval '1 s'")
        await Worker(app, {"default": concurrency}).run(once=True)


async def states(conn: Connection) -> dict[str, int]:
    every = "select state from queue_service.runs union all select state from queue_service.finished_runs"
    return dict(await rows(conn, f"select state, count(*) from ({every}) as every group by state"))


def numbers(runs: list[Run]) -> list[int]:
    return [run.payload["n"] for run in runs]


class Bench:
    """An executor whose runs and leases are made up, and what it says becomes of them."""

    def __init__(self) -> None:
        self.app = App("postgresql://nobody@localhost/nothing")
        self.outcomes: dict[int, Settlement] = {}
        self._slots: list[asyncio.Task[None]] = []
        # As the finisher's.
        self.is_full = False

    @asynccontextmanager
    async def executing(self, concurrency: int = 1) -> AsyncIterator[Executor]:
        executor = Executor(
            "default", concurrency, tasks=self.app.tasks, fetch=self.app.fetch, finisher=cast("Any", self), threads=cast("Any", None),
            processes=cast("Any", None), reported=cast("Any", None), result_limit=1_000, spawn=self._spawn, room=lambda: None,
        )  # fmt: skip
        try:
            yield executor
        finally:
            executor.closing = True
            for slot in self._slots:
                slot.cancel()
            await asyncio.gather(*self._slots, return_exceptions=True)

    def held(self, lease: Lease, task: str, n: int, **payload: Any) -> Held:
        now = datetime.now(UTC)
        run = Run(
            id=n, queue="default", task=task, state=RunState.RUNNING, payload=payload or {"n": n}, attempt=1, failures=0, losses=0,
            priority=0, created_at=now, run_at=now,
        )  # fmt: skip
        return Held(run, lease)

    def put(self, held: Held, outcome: Settlement) -> None:
        """As the finisher's."""
        assert held.run.id not in self.outcomes
        self.outcomes[held.run.id] = outcome

    def _spawn(self, slot: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self._slots.append(asyncio.create_task(slot))
        return self._slots[-1]


# What the handler gets


async def test_what_is_claimed_together_is_handled_in_one_call_and_in_order(app: App, conn: Connection) -> None:
    calls: list[list[int]] = []

    @app.task(batch=100)
    async def index(runs: list[Run]) -> None:
        calls.append(numbers(runs))

    await enqueued_all(app, "index", 250)
    tally = await Worker(app, {"default": 1}).run(once=True)
    assert calls == [list(range(100)), list(range(100, 200)), list(range(200, 250))]
    assert (tally.succeeded, tally.failed, tally.returned, tally.lost) == (250, 0, 0, 0)
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_concurrency_counts_calls_and_not_runs(app: App) -> None:
    calls: list[int] = []
    both = asyncio.Event()

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        calls.append(len(runs))
        if len(calls) == 2:
            both.set()
        await both.wait()

    await enqueued_all(app, "index", 40)
    async with asyncio.timeout(20):
        await Worker(app, {"default": 2}).run(once=True)
    assert calls == [10] * 4


async def test_a_sync_handler_of_a_batch_runs_in_a_thread(app: App) -> None:
    here = threading.get_ident()

    @app.task(batch=10)
    def index(runs: list[Run]) -> list[int]:
        assert threading.get_ident() != here
        return [2 * n for n in numbers(runs)]

    ids = await enqueued_all(app, "index", 25)
    await Worker(app).run(once=True)
    assert [run.result for run in await app.wait_many(ids, timeout=5)] == [2 * n for n in range(25)]


async def test_in_a_queue_with_ordinary_tasks_a_batch_takes_only_runs_of_its_own(app: App) -> None:
    calls: list[list[int]] = []
    alone: list[int] = []

    @app.task(batch=100)
    async def index(runs: list[Run]) -> None:
        calls.append(numbers(runs))

    @app.task
    async def note(n: int) -> None:
        alone.append(n)

    async with app.pool.connection() as conn:
        for n in range(20):
            await enqueued(conn, ["index", "note"][n % 2], payload=f'{{"n": {n}}}')
    tally = await Worker(app, {"default": 4}).run(once=True)
    assert tally.succeeded == 20
    assert alone == list(range(1, 20, 2))
    assert sorted(n for call in calls for n in call) == list(range(0, 20, 2))
    assert len(calls) < 10


async def test_the_runs_that_wait_keep_their_order_when_a_batch_is_taken_from_among_them() -> None:
    bench = Bench()
    begun: list[Any] = []

    @bench.app.task(batch=3)
    async def index(runs: list[Run]) -> None:
        begun.append(numbers(runs))

    @bench.app.task
    async def note(n: int) -> None:
        begun.append(n)

    async with bench.executing() as executor:
        lease = Lease(1, 0)
        tasks = ["index", "note", "note", "index", "note", "index", "index", "note"]
        executor.offer([bench.held(lease, task, n) for n, task in enumerate(tasks)])
        await eventually(lambda: len(bench.outcomes) == 8)
    assert begun == [[0, 3, 5], 1, 2, 4, [6], 7]


async def test_slow_handlers_hold_no_more_runs_than_their_calls_take(app: App, conn: Connection) -> None:
    release = asyncio.Event()
    calls: list[int] = []

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        calls.append(len(runs))
        await release.wait()

    await enqueued_all(app, "index", 100)
    async with working(app, {"default": 2}), working(app, {"default": 2}):
        await eventually(lambda: len(calls) == 4)
        assert await one(conn, RUNNING) == 40
        release.set()
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"))
    # What is left in the end, two claims may share in any way.
    assert calls[:4] == [10] * 4
    assert (max(calls), sum(calls)) == (10, 100)


@pytest.mark.parametrize("queue", ["default", "another"], ids=["declared there", "enqueued there"])
async def test_slow_ordinary_handlers_are_not_held_by_the_hundred_because_their_queue_has_batches(
    app: App, conn: Connection, queue: str
) -> None:
    release = asyncio.Event()
    begun: list[int] = []

    @app.task(batch=100, queue=queue)
    async def index(runs: list[Run]) -> None: ...

    @app.task(queue=queue)
    async def slow(n: int) -> None:
        begun.append(n)
        await release.wait()

    for n in range(100):
        await enqueued(conn, ["slow", "index"][n % 2], payload=f'{{"n": {n}}}')
    async with working(app, {"default": 2}), working(app, {"default": 2}):
        await eventually(lambda: len(begun) == 4)
        assert await one(conn, RUNNING) <= 6
        release.set()
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"))


async def test_a_queue_that_its_tasks_do_not_name_is_soon_handled_in_whole_batches(app: App) -> None:
    calls: list[int] = []

    @app.task(batch=50)
    async def index(runs: list[Run]) -> None:
        calls.append(len(runs))

    await enqueued_all(app, "index", 220, queue="elsewhere")
    await Worker(app, {"elsewhere": 1}).run(once=True)
    assert calls == [1, 50, 50, 50, 50, 19]


async def test_a_slot_that_is_left_free_is_given_runs_at_once(database: str) -> None:
    """Where one call takes all that was claimed for two, nothing but that tells of it until the call has ended."""
    calls: list[int] = []
    release = asyncio.Event()
    never = {f"QUEUE_SERVICE_{name}": "1h" for name in ("POLL_INTERVAL", "SWEEP_INTERVAL", "LEASE")}
    async with App(database, settings=load(never)) as app:

        @app.task(batch=10)
        async def index(runs: list[Run]) -> None:
            calls.append(len(runs))
            await release.wait()

        await enqueued_all(app, "index", 20, queue="elsewhere")
        async with working(app, {"elsewhere": 2}):
            await eventually(lambda: calls == [2, 10])
            release.set()


async def test_what_is_claimed_follows_the_slots_and_comes_in_whole_batches() -> None:
    bench = Bench()
    release = asyncio.Event()

    @bench.app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        await release.wait()

    async with bench.executing(concurrency=3) as executor:
        # Its speed is not to be looked at while this lasts.
        executor._ahead._measured = (time.monotonic() + 3_600, 0)
        assert executor.wants() == 30
        lease = Lease(1, 0)
        executor.offer([bench.held(lease, "index", n) for n in range(14)])
        assert executor.wants() == 0
        await eventually(lambda: not executor._waiting)
        assert executor.wants() == 10
        release.set()
        await eventually(lambda: len(bench.outcomes) == 14)
        assert executor.wants() == 30
        executor._ahead.runs = 29
        assert executor.wants() == 50


async def test_large_payloads_are_not_claimed_far_ahead() -> None:
    bench = Bench()

    @bench.app.task
    async def store(data: str) -> None: ...

    async with bench.executing(concurrency=10) as executor:
        executor._ahead.runs = executor._ahead._by_speed = 4_000
        executor._ahead._measured = (time.monotonic() + 3_600, 0)
        assert executor.wants() == 4_000
        for size, wanted in ((200_000, 41), (20, 4_010)):
            bench.outcomes.clear()
            executor.offer([bench.held(Lease(1, 0), "store", n, data="x" * size) for n in range(10)])
            await eventually(lambda: len(bench.outcomes) == 10)
            assert executor.wants() == wanted


async def test_a_batch_that_ends_is_not_taken_for_a_speed() -> None:
    bench = Bench()

    @bench.app.task(batch=100)
    async def index(runs: list[Run]) -> None: ...

    async with bench.executing() as executor:
        executor.offer([bench.held(Lease(1, 0), "index", n) for n in range(100)])
        await eventually(lambda: len(bench.outcomes) == 100)
        executor._ahead._measured = (time.monotonic() - 0.01, 0)
        executor.measure_speed()
        assert executor.wants() == 100
        assert executor._ahead.runs == 0


async def test_batches_that_never_wait_leave_the_loop_its_turns() -> None:
    bench = Bench()
    turns = 0

    @bench.app.task(batch=10)
    async def index(runs: list[Run]) -> None: ...

    async with bench.executing() as executor:
        executor.offer([bench.held(Lease(1, 0), "index", n) for n in range(1_000)])
        while len(bench.outcomes) < 1_000:
            turns += 1
            await asyncio.sleep(0)
    assert turns >= 1_000 // 50


async def test_a_handler_may_do_with_its_list_as_it_likes(app: App) -> None:
    @app.task(batch=10)
    async def index(runs: list[Run]) -> list[int]:
        results = []
        while runs:
            results.append(runs.pop(0).payload["n"])
        return results

    ids = await enqueued_all(app, "index", 3)
    await Worker(app, {"default": 1}).run(once=True)
    assert [run.result for run in await app.wait_many(ids, timeout=5)] == [0, 1, 2]


async def test_runs_of_a_lane_never_share_a_batch_and_heads_of_lanes_do(app: App) -> None:
    calls: list[list[Any]] = []

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        calls.append([(run.ordering_key, run.payload["n"]) for run in runs])

    for key in "abc":
        await enqueued_all(app, "index", 4, ordering_key=key)
    await Worker(app, {"default": 3}).run(once=True)
    for call in calls:
        assert len({key for key, _ in call}) == len(call)
    assert max(len(call) for call in calls) == 3
    for key in "abc":
        assert [n for call in calls for its, n in call if its == key] == list(range(4))


@pytest.mark.parametrize("keyed", [False, True], ids=["claimed alone", "claimed with others, as the head of its lane"])
async def test_a_run_that_lost_its_worker_is_handled_alone(app: App, conn: Connection, keyed: bool) -> None:
    calls: list[list[int]] = []

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        calls.append([run.losses for run in runs])

    ids = [
        await enqueued(conn, "index", payload=f'{{"n": {n}}}', ordering_key=f"k{n}" if keyed else None)
        for n in range(12)
    ]
    await conn.execute("update queue_service.runs set losses = 1 where id = any(%s)", [ids[:2]])
    await Worker(app, {"default": 1}).run(once=True)
    assert [call for call in calls if 1 in call] == [[1], [1]]
    assert len(calls) <= 4


# What it returns


async def test_a_list_says_of_each_run_what_becomes_of_it(app: App) -> None:
    @app.task(batch=10, retry=Retry(base=60))
    async def index(runs: list[Run]) -> list[Any]:
        return [{"n": 0}, None, Snooze(3_600), Cancel("not wanted"), ValueError("broken"), RetryLater(3_600), object()]

    ids = await enqueued_all(app, "index", 7)
    tally = await Worker(app, {"default": 1}).run(once=True)
    runs = [run for run_id in ids if (run := await app.get(run_id)) is not None]
    assert [run.state.value for run in runs] == [
        "succeeded", "succeeded", "queued", "cancelled", "queued", "queued", "failed",
    ]  # fmt: skip
    assert [run.result for run in runs[:2]] == [{"n": 0}, None]
    assert [run.failures for run in runs] == [0, 0, 0, 0, 1, 1, 1]
    assert [(run.error or {}).get("reason") for run in runs] == [
        None, None, None, "cancelled", "raised", "raised", "result_refused",
    ]  # fmt: skip
    assert [(run.error or {}).get("message") for run in runs[3:5]] == ["not wanted", "broken"]
    waits = [(run.run_at - datetime.now(UTC)).total_seconds() for run in (runs[2], runs[4], runs[5])]
    assert [wait > 3_000 for wait in waits] == [True, False, True]
    assert (tally.succeeded, tally.returned, tally.cancelled, tally.failed) == (2, 3, 1, 1)


async def test_a_dict_says_it_by_the_ids_of_the_runs(app: App) -> None:
    @app.task(batch=10, retry=Retry(never=(KeyError,)))
    async def index(runs: list[Run]) -> dict[int, Any]:
        return {run.id: run.payload["n"] or KeyError("no") for run in reversed(runs)}

    ids = await enqueued_all(app, "index", 5)
    await Worker(app, {"default": 1}).run(once=True)
    runs = await app.wait_many(ids, timeout=5)
    # What is said of one run is this run's own failure: its policy ends it at once, in company or not.
    assert [(run.state.value, run.result) for run in runs] == [
        ("failed", None), *(("succeeded", n) for n in range(1, 5)),
    ]  # fmt: skip


@pytest.mark.parametrize(("word", "state"), [(Snooze(60), "queued"), (Cancel("no more"), "cancelled")])
async def test_a_word_alone_is_for_all_of_them(app: App, conn: Connection, word: Any, state: str) -> None:
    @app.task(batch=10)
    async def index(runs: list[Run]) -> Any:
        return word

    await enqueued_all(app, "index", 5)
    await Worker(app, {"default": 1}).run(once=True)
    assert await states(conn) == {state: 5}
    assert await one(conn, "select sum(failures) from queue_service.runs") in {None, 0}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda _: [], "was given 3 runs and returned 0 answers"),
        (lambda runs: [1] * (len(runs) + 1), "returned 4 answers"),
        (lambda runs: {runs[0].id: 1}, "returned no answer for {1}, {2}"),
        (lambda runs: {**{run.id: 1 for run in runs}, 0: 1}, "returned an answer for 0, which it was not given"),
        (lambda runs: {str(run.id): 1 for run in runs}, "returned no answer for {0}, {1}, {2}"),
        (lambda _: "done", "a value of type str"),
        (lambda _: 3, "a value of type int"),
        (lambda _: ValueError("all of them"), "all of them"),
    ],
    ids=["none", "too many", "some missing", "unknown", "other keys", "text", "number", "an exception"],
)
async def test_no_run_ends_by_an_answer_that_is_in_doubt(
    app: App, conn: Connection, answer: Callable[[list[Run]], Any], says: str
) -> None:
    @app.task(batch=10, retry=Retry(base=60))
    async def index(runs: list[Run]) -> Any:
        return answer(runs)

    ids = await enqueued_all(app, "index", 3)
    tally = await Worker(app, {"default": 1}).run(once=True)
    assert (tally.succeeded, tally.returned) == (0, 3)
    for failures, error in await rows(conn, "select failures, error from queue_service.runs"):
        assert failures == 1
        assert says.format(*ids) in error["message"]


# One that fails


@pytest.mark.parametrize(
    "retry",
    [Retry(max_attempts=3), Retry(max_attempts=8), Retry(never=(ValueError,)), Retry(backoff=lambda *_: None)],
    ids=["three attempts", "eight attempts", "an error that is not tried again", "a policy that never tries again"],
)
async def test_one_poisonous_run_fails_for_good_and_takes_nobody_with_it(
    app: App, conn: Connection, retry: Retry
) -> None:
    calls: list[int] = []

    @app.task(batch=100, retry=retry)
    async def index(runs: list[Run]) -> None:
        calls.append(len(runs))
        if 50 in numbers(runs):
            raise ValueError("poison")

    ids = await enqueued_all(app, "index", 100)
    await work_off(app, conn)
    assert await states(conn) == {"succeeded": 99, "failed": 1}
    poison = await app.get(ids[50])
    assert poison is not None
    assert poison.error is not None
    assert (poison.state, poison.error["message"]) == (RunState.FAILED, "poison")
    assert poison.failures == (8 if retry.max_attempts == 8 else 3)
    # All of them, by tens, and the ten with the poison one by one.
    assert calls[:11] == [100, *[10] * 10]
    assert calls[11:] == [1] * (10 + poison.failures - 3)
    assert await one(conn, "select max(failures) from queue_service.finished_runs where state = 'succeeded'") == 2


async def test_of_two_attempts_the_second_is_made_alone(app: App, conn: Connection) -> None:
    calls: list[int] = []

    @app.task(batch=10, retry=Retry(max_attempts=2))
    async def index(runs: list[Run]) -> None:
        calls.append(len(runs))
        if 5 in numbers(runs):
            raise ValueError("poison")

    await enqueued_all(app, "index", 10)
    await work_off(app, conn)
    assert calls == [10, *[1] * 10]
    assert await states(conn) == {"succeeded": 9, "failed": 1}


async def test_a_run_with_one_attempt_of_its_own_is_handled_alone(app: App, conn: Connection) -> None:
    calls: list[int] = []

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        calls.append(len(runs))

    await enqueued_all(app, "index", 5, max_attempts=1)
    await enqueued_all(app, "index", 5)
    await Worker(app, {"default": 1}).run(once=True)
    assert sorted(calls) == [1, 1, 1, 1, 1, 5]


async def test_failed_runs_and_new_ones_are_not_mixed(app: App, conn: Connection) -> None:
    calls: list[list[int]] = []

    @app.task(batch=9)
    async def index(runs: list[Run]) -> None:
        calls.append([run.failures for run in runs])

    ids = await enqueued_all(app, "index", 18)
    await conn.execute("update queue_service.runs set failures = id %% 2 where id = any(%s)", [ids])
    await Worker(app, {"default": 1}).run(once=True)
    assert sum(len(call) for call in calls) == 18
    assert [call for call in calls if len(set(call)) > 1] == []
    assert max(len(call) for call in calls if 0 in call) > 3
    assert max(len(call) for call in calls if 1 in call) == 3


async def test_a_batch_that_failed_once_by_accident_is_soon_through(app: App, conn: Connection) -> None:
    calls: list[int] = []

    @app.task(batch=100)
    async def index(runs: list[Run]) -> None:
        calls.append(len(runs))
        if len(calls) == 1:
            raise ConnectionError("just now")

    await enqueued_all(app, "index", 100)
    await work_off(app, conn)
    assert calls == [100, *[10] * 10]
    assert await states(conn) == {"succeeded": 100}


# One that is stopped


async def test_a_run_that_is_cancelled_in_a_batch_ends_cancelled_and_the_others_go_on(app: App) -> None:
    batch: list[Run] = []
    release = asyncio.Event()

    @app.task(batch=10)
    async def index(runs: list[Run]) -> list[int]:
        batch.extend(runs)
        await release.wait()
        return numbers(runs)

    ids = await enqueued_all(app, "index", 5)
    async with working(app, {"default": 1}) as worker:
        await eventually(lambda: len(batch) == 5)
        assert await app.cancel(ids[2])
        await eventually(lambda: batch[2].cancelled)
        assert [run.cancelled for run in batch] == [False, False, True, False, False]
        release.set()
        runs = await app.wait_many(ids, timeout=10)
        await eventually(lambda: worker.tally.succeeded == 4)
        assert (worker.tally.cancelled, worker.tally.returned, worker.tally.lost) == (1, 0, 0)
    assert [(run.state.value, run.result) for run in runs] == [
        ("succeeded", 0), ("succeeded", 1), ("cancelled", None), ("succeeded", 3), ("succeeded", 4),
    ]  # fmt: skip


async def test_a_handler_whose_runs_are_all_cancelled_is_cancelled_itself(app: App) -> None:
    begun, interrupted = asyncio.Event(), asyncio.Event()

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            interrupted.set()

    ids = await enqueued_all(app, "index", 3)
    async with working(app, {"default": 1}):
        await asyncio.wait_for(begun.wait(), 10)
        for run_id in ids:
            assert not interrupted.is_set()
            await app.cancel(run_id)
        runs = await app.wait_many(ids, timeout=10)
        assert interrupted.is_set()
        # The slot is still good for others.
        begun.clear()
        after = await app.enqueue("index", {"n": 0})
        await asyncio.wait_for(begun.wait(), 10)
        await app.cancel(after)
    assert {run.state for run in runs} == {RunState.CANCELLED}


async def test_a_batch_that_fails_leaves_a_run_that_was_cancelled_in_it_cancelled(app: App, conn: Connection) -> None:
    batch: list[Run] = []

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        batch.extend(runs)
        await eventually(lambda: runs[0].cancelled)
        raise ValueError("at last")

    ids = await enqueued_all(app, "index", 3)
    async with working(app, {"default": 1}):
        await eventually(lambda: len(batch) == 3)
        await app.cancel(ids[0])
        assert (await app.wait(ids[0], timeout=10)).state is RunState.CANCELLED
        await eventually(lambda: one(conn, "select count(*) = 2 from queue_service.runs where failures = 1"))


async def test_a_batch_over_its_time_fails_as_one(app: App, conn: Connection) -> None:
    cancelled: list[list[bool]] = []

    @app.task(batch=10, timeout=0.05, retry=Retry(base=60))
    async def index(runs: list[Run]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append([run.cancelled for run in runs])

    await enqueued_all(app, "index", 5)
    await Worker(app, {"default": 1}).run(once=True)
    assert cancelled == [[True] * 5]
    errors = await rows(conn, "select failures, error ->> 'reason' from queue_service.runs")
    assert errors == [(1, "timeout")] * 5


async def test_a_run_with_a_time_of_its_own_does_not_end_the_others(app: App) -> None:
    @app.task(batch=10, timeout=60, retry=Retry(base=60))
    async def index(runs: list[Run]) -> list[str]:
        hurried = next(run for run in runs if run.timeout)
        await eventually(lambda: hurried.cancelled)
        return ["done"] * len(runs)

    ids = await enqueued_all(app, "index", 4)
    hurried = await app.enqueue("index", {"n": 4}, timeout=0.05)
    await Worker(app, {"default": 1}).run(once=True)
    assert [run.result for run in await app.wait_many(ids, timeout=5)] == ["done"] * 4
    run = await app.get(hurried)
    assert run is not None
    assert run.error is not None
    assert (run.state, run.failures, run.error["reason"]) == (RunState.QUEUED, 1, "timeout")


async def test_a_batch_whose_lease_is_lost_is_given_up_and_handled_by_another(app: App, conn: Connection) -> None:
    begun: list[int] = []

    @app.task(batch=10)
    async def index(runs: list[Run]) -> list[int]:
        begun.append(len(runs))
        if runs[0].losses == 0:
            await asyncio.Event().wait()
        return [run.losses for run in runs]

    ids = await enqueued_all(app, "index", 3)
    async with working(app, {"default": 1}) as worker:
        await eventually(lambda: begun == [3])
        # As a sweep elsewhere would.
        await conn.execute(
            "with gone as (delete from queue_service.leases) update queue_service.runs "
            "set state = 'queued', lease_id = null, claimed_at = null, losses = 1"
        )
        runs = await app.wait_many(ids, timeout=20)
        await eventually(lambda: worker.tally.lost == 3)
    assert [run.result for run in runs] == [1, 1, 1]
    assert begun == [3, 1, 1, 1]


async def test_of_a_batch_from_two_leases_the_runs_of_a_lost_one_are_left_out_or_dropped() -> None:
    bench = Bench()
    calls: list[list[int]] = []
    release = asyncio.Event()

    @bench.app.task(batch=10)
    async def index(runs: list[Run]) -> list[int]:
        calls.append(numbers(runs))
        await release.wait()
        return numbers(runs)

    async with bench.executing() as executor:
        kept, lost_before, lost_during = Lease(1, 0), Lease(2, 0), Lease(3, 0)
        lost_before.lost = True
        held = [bench.held([kept, lost_before, lost_during][n % 3], "index", n) for n in range(9)]
        executor.offer(held)
        await eventually(lambda: calls == [[0, 2, 3, 5, 6, 8]])
        executor.lose(lost_during)
        assert [each.run.cancelled for each in held] == [False, False, True] * 3
        release.set()
        await eventually(lambda: len(bench.outcomes) == 9)
        assert executor.is_idle
    succeeded = {n: Ending(held[n].run.claim, RunState.SUCCEEDED, str(n)) for n in (0, 3, 6)}
    assert bench.outcomes == {n: Return(held[n].run.claim) for n in range(9)} | succeeded


async def test_stop_lets_a_batch_end(app: App, conn: Connection) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        started.set()
        await release.wait()

    await enqueued_all(app, "index", 15)
    async with working(app, {"default": 1}) as worker:
        await asyncio.wait_for(started.wait(), 10)
        worker.stop()
        release.set()
    assert await states(conn) == {"succeeded": 10, "queued": 5}


async def test_stop_now_cancels_the_handler_and_hands_all_its_runs_back(app: App, conn: Connection) -> None:
    begun: list[Run] = []
    cancelled: list[bool] = []

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        begun.extend(runs)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.extend(run.cancelled for run in runs)

    await enqueued_all(app, "index", 20)
    before = await rows(conn, "select id, run_at from queue_service.runs order by id")
    async with working(app, {"default": 2}) as worker:
        await eventually(lambda: len(begun) == 20)
        worker.stop(now=True)
    assert cancelled == [True] * 20
    after = await rows(conn, "select id, run_at, state, failures, losses from queue_service.runs order by id")
    assert after == [(*row, "queued", 0, 0) for row in before]
    assert (worker.tally.returned, worker.tally.failed, worker.tally.lost) == (20, 0, 0)
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_what_a_batch_still_returns_when_the_worker_stops_counts(app: App) -> None:
    started = asyncio.Event()

    @app.task(batch=10)
    async def index(runs: list[Run]) -> list[Any]:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return ["done", *[Snooze(0)] * (len(runs) - 1)]
        return []

    ids = await enqueued_all(app, "index", 3)
    async with working(app, {"default": 1}) as worker:
        await asyncio.wait_for(started.wait(), 10)
        worker.stop(now=True)
    runs = [await app.get(run_id) for run_id in ids]
    assert [(run.state.value, run.result, run.failures) for run in runs if run] == [
        ("succeeded", "done", 0), ("queued", None, 0), ("queued", None, 0),
    ]  # fmt: skip


async def test_a_worker_that_is_cancelled_itself_stops_its_batch_and_the_runs_are_rescued(app: App) -> None:
    begun: list[Run] = []

    @app.task(batch=10)
    async def index(runs: list[Run]) -> None:
        if not begun:
            begun.extend(runs)
            await asyncio.Event().wait()

    ids = await enqueued_all(app, "index", 3)
    running = asyncio.create_task(Worker(app, {"default": 1}).run())
    await eventually(lambda: len(begun) == 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 10)
    assert [run.cancelled for run in begun] == [True] * 3
    async with working(app):
        assert {run.state for run in await app.wait_many(ids, timeout=20)} == {RunState.SUCCEEDED}


async def test_a_batch_that_blocks_the_event_loop_is_reported_by_a_run_of_it(
    app: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lag, "THRESHOLD", 0.2)
    monkeypatch.setattr(lag, "LOOK_PERIOD", 0.01)

    @app.task(batch=10)
    async def hog(runs: list[Run]) -> None:
        time.sleep(1)  # noqa: ASYNC251  # what is to be reported

    ids = await enqueued_all(app, "hog", 3)
    await Worker(app, {"default": 1}).run(once=True)
    reports = [record.__dict__ for record in caplog.records if "loop is blocked" in record.message]
    assert [report["run_id"] for report in reports if report["task"] is not None] == [ids[0]]
