"""What changes lanes, all of it at once and each in a transaction of its own: no two ever wait for each other."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from psycopg import errors as pg

from queue_service import App
from queue_service.app import enqueue as enqueueing
from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.db.steps import Copy
from queue_service.errors import Deadlock
from queue_service.queues import queries as queues
from queue_service.runs import lanes, lost, queries, settling, walks
from queue_service.runs.model import Ending, NewRun, Return, Run, RunState
from queue_service.runs.walks import Filter, Place
from queue_service.tasks import Tasks
from tests.db.test_lanes import assert_sound
from tests.support import blocked, claim, eventually, one, rows

Open = Callable[[], Awaitable[Connection]]
KEYS = [*"abcdefgh"]
SECONDS, SESSIONS = 4.0, 10
SOON = timedelta(milliseconds=5)


class Player:
    """Takes one statement after the other, as all that works on a queue does."""

    def __init__(self, conn: Connection, number: int) -> None:
        self.conn = conn
        self.worker_id = number + 1
        self.dice = random.Random(random.SystemRandom().randrange(10**6))
        self.held: list[tuple[Run, int]] = []
        self.met: list[str] = []
        self.taken: Counter[str] = Counter()

    async def play(self, until: float) -> None:
        moves = [name for name in dir(self) if name.startswith("do_")]
        while time.monotonic() < until:
            name = self.dice.choice(moves)
            self.taken[name] += 1
            try:
                await getattr(self, name)()
            except pg.DeadlockDetected as met:
                self.met.append(f"{name}: {met} {met.diag.message_detail} {met.diag.context}")

    async def ask(self, query: Query[Any]) -> Any:
        return await fetch(self.conn, query)

    def new(self, **options: Any) -> NewRun:
        return NewRun("noop", "default", "{}", ordering_key=self.dice.choice(KEYS), **options)

    async def some(self, table: str, state: str) -> int:
        query = f"select id from queue_service.{table} where state = '{state}' order by random() limit 1"
        return await one(self.conn, query) or 0

    async def do_enqueue(self) -> None:
        await self.ask(queries.enqueue(self.new(expires_in=self.dice.choice([None, SOON]))))

    async def do_enqueue_all(self) -> None:
        await self.ask(queries.enqueue_all([self.new() for _ in range(self.dice.randrange(1, 6))]))

    async def do_replace(self) -> None:
        await self.ask(queries.replace(self.new(singleton_key=self.dice.choice(KEYS))))

    async def do_enqueue_many(self) -> None:
        options = {"ordering_key": self.dice.choice(KEYS)}
        first, texts = enqueueing.new_runs(Tasks(), 1_000, "noop", [{}, {}], options)
        steps = enqueueing.enqueue_many(first, texts, None)
        answer = await self.ask(next(steps))  # type: ignore[arg-type]
        copying = steps.send(answer)
        assert isinstance(copying, Copy)
        async with self.conn.cursor() as cursor, cursor.copy(copying.statement.encode()) as copy:
            await copy.write(copying.data)

    async def do_claim(self) -> None:
        laned = claim(
            laned=True, limit=self.dice.randrange(1, 6), worker_id=self.worker_id, lease=timedelta(seconds=0.2)
        )
        self.held += await self.ask(laned)

    async def do_finish(self) -> None:
        held, self.held = self.held, []
        states = [RunState.SUCCEEDED, RunState.FAILED]
        ends = [Ending(run.claim, self.dice.choice(states)) for run, _ in held]
        await self.ask(settling.finish(ends, worker_id=self.worker_id, freed={lease for _, lease in held}))

    async def do_give_back(self) -> None:
        held, self.held = self.held, []
        backs = [Return(run.claim, 0.0, failed=self.dice.random() < 0.5) for run, _ in held]
        await self.ask(settling.give_back(backs, worker_id=self.worker_id, freed={lease for _, lease in held}))

    async def do_release_unheard(self) -> None:
        await self.ask(lost.release_unheard(self.worker_id, known=sorted({lease for _, lease in self.held})))

    async def do_sweep(self) -> None:
        await self.ask(queries.sweep(limit=5, max_losses=3))

    async def do_expire(self) -> None:
        await self.ask(queries.expire(limit=10))

    async def do_cancel(self) -> None:
        await self.ask(queries.cancel(await self.some("runs", self.dice.choice(["queued", "running"]))))

    async def do_delete(self) -> None:
        await self.ask(queries.delete(await self.some("runs", "queued")))

    async def do_purge(self) -> None:
        if self.dice.random() < 0.2:
            await self.ask(queries.purge("default", limit=self.dice.choice([3, 100])))

    async def do_retry(self) -> None:
        await self.ask(queries.retry(await self.some("finished_runs", "failed")))

    async def do_retry_many(self) -> None:
        await self.ask(walks.retry_many(Filter(RunState.FAILED), Place(), limit=10))

    async def do_tend(self) -> None:
        await self.ask(lanes.tend_after(lanes.Lane("", ""), limit=10))

    async def do_make_lanes(self) -> None:
        await self.ask(lanes.make_lanes([lanes.Lane("default", key) for key in KEYS]))

    async def do_widen(self) -> None:
        width = self.dice.choice([1, 2])
        if self.dice.random() < 0.2:
            limits = queues.QueueLimits(None, width, None, None, None)
            await self.ask(queues.limit("default", limits))
            await self.ask(queues.widen("default", width, limit=5))


@pytest.mark.slow
async def test_nothing_that_works_on_lanes_waits_for_what_waits_for_it(session: Open, conn: Connection) -> None:
    players = [Player(await session(), number) for number in range(SESSIONS)]
    for player in players:
        await player.conn.execute("set deadlock_timeout = '20ms'")
    until = time.monotonic() + SECONDS
    await asyncio.gather(*(player.play(until) for player in players))
    met = [each for player in players for each in player.met]
    taken = sum((player.taken for player in players), Counter())
    assert met == [], f"{len(met)} deadlocks in {taken}"
    assert await rows(conn, "select 1 from queue_service.runs limit 1")


async def test_a_replacement_that_changes_its_lane_takes_the_two_in_their_order(
    session: Open, conn: Connection
) -> None:
    a, b, c = [await session() for _ in range(3)]
    await fetch(conn, queries.enqueue(NewRun("noop", "default", "{}", singleton_key="k", ordering_key="y")))
    await fetch(conn, queries.enqueue(NewRun("noop", "default", "{}", ordering_key="x")))
    await a.execute("begin")
    await fetch(a, queries.enqueue(NewRun("noop", "default", "{}", ordering_key="x")))
    both = [NewRun("noop", "default", "{}", ordering_key=key) for key in "xy"]
    there = asyncio.create_task(fetch(b, queries.enqueue_all(both)))
    await eventually(lambda: blocked(conn, b))
    replacing = queries.replace(NewRun("noop", "default", "{}", singleton_key="k", ordering_key="x"))
    and_back = asyncio.create_task(fetch(c, replacing))
    await eventually(lambda: blocked(conn, c))
    await a.execute("commit")
    assert len(await there) == 2
    assert await and_back == 1
    await assert_sound(conn)


async def test_endings_that_cross_a_transaction_of_the_callers_are_stored_when_that_is_over(
    app: App, session: Open, conn: Connection
) -> None:
    mine = await session()
    for key in "xy":
        await fetch(conn, queries.enqueue(NewRun("noop", "default", "{}", ordering_key=key)))
    held = await fetch(conn, claim(laned=True))
    assert len(held) == 2
    await mine.execute("begin")
    await app.enqueue("noop", {}, ordering_key="y", conn=mine)
    ends = [Ending(run.claim, RunState.SUCCEEDED) for run, _ in held]
    ending = asyncio.create_task(app.fetch(settling.finish(ends, worker_id=1)), name="ending")
    waiting = (
        "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    )
    await eventually(lambda: one(conn, waiting))
    # It holds x now. The server ends one of the two.
    try:
        await app.enqueue("noop", {}, ordering_key="x", conn=mine)
        await mine.execute("commit")
    except Deadlock:
        await mine.execute("rollback")
    assert await ending == {run.claim for run, _ in held}
    await assert_sound(conn)
