"""How near the worker comes to its own statements, and enqueues to what pgbench makes of them."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

from benchmarks import pgbench
from benchmarks.scenario import scenario
from queue_service import App, Worker
from queue_service.db.pool import Wire
from queue_service.runs import queries
from queue_service.runs.model import Ending, Floor, RunState
from queue_service.runs.queries import Wanted
from queue_service.worker.floors import FRONT

BATCH = 500
ENQUEUE = "insert into queue_service.runs (queue, task, payload) values ('default', 'noop', '{\"n\":1}') returning id;"


@scenario
async def floor(app: App, count: int) -> dict[str, float]:
    """Claim and finish in a bare loop, one statement after the other, and the whole worker."""
    done = asyncio.Event()
    handled = [0.0, 0.0, 0.0]

    @app.task()
    async def noop(n: int) -> None:
        handled[0] += 1
        handled[1] = handled[1] or time.perf_counter()
        if handled[0] == count:
            handled[2] = time.perf_counter()
            done.set()

    payloads = [{"n": n} for n in range(count)]
    await app.enqueue_many("noop", payloads)
    bare = count / await _bare(app, count)
    await app.enqueue_many("noop", payloads)
    worker = Worker(app, {"default": 100})
    running = asyncio.create_task(worker.run())
    await done.wait()
    worker.stop()
    await running
    whole = count / (handled[2] - handled[1])
    return {"bare loop, runs/s": bare, "worker, runs/s": whole, "worker to bare loop": whole / bare}


@scenario
async def enqueue_floor(app: App, count: int) -> dict[str, float]:
    """enqueue, and its statement by pgbench, with one caller and with sixteen."""

    @app.task()
    async def noop(n: int) -> None: ...

    figures: dict[str, float] = {}
    for callers in (1, 16):
        ours = await _enqueued(app, callers, min(count, 1_000 * callers))
        floor = await asyncio.to_thread(
            pgbench.rate, app.conninfo, [ENQUEUE], clients=callers, seconds=1 + count // 20_000
        )
        who = f"{callers} callers" if callers > 1 else "1 caller"
        figures |= {f"{who}, runs/s": ours, f"{who}, pgbench": floor, f"{who}, to pgbench": ours / floor}
    return figures


async def _enqueued(app: App, callers: int, count: int) -> float:
    numbers = iter(range(count))

    async def call() -> None:
        for n in numbers:
            await app.enqueue("noop", {"n": n})

    begun = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(callers)))
    return count / (time.perf_counter() - begun)


async def _bare(app: App, count: int) -> float:
    """Seconds for claiming and finishing so many, each batch from where the last one ended, as the worker does."""
    wire, place, left = Wire(app.conninfo, application="bare loop"), FRONT, count
    lease = timedelta(seconds=30)
    begun = time.perf_counter()
    while left:
        claim = queries.claim([Wanted("default", BATCH, {0: place})], tasks=["noop"], worker_id=1, lease=lease)
        runs = await wire.fetch(claim)
        endings = [Ending(run.claim, RunState.SUCCEEDED) for run, _ in runs]
        await wire.fetch(queries.finish(endings, worker_id=1, freed={held for _, held in runs}))
        left -= len(runs)
        place = Floor(runs[-1][0].run_at, runs[-1][0].id)
    taken = time.perf_counter() - begun
    await wire.close()
    return taken


@scenario
async def lanes(app: App, count: int) -> dict[str, float]:
    """Runs with an ordering key each, and runs of a hundred keys."""
    figures: dict[str, float] = {}
    for keys in (count, 100):
        begun, ended = [0.0], asyncio.Event()
        left = [count]

        async def laned(
            n: int, begun: list[float] = begun, left: list[int] = left, done: asyncio.Event = ended
        ) -> None:
            begun[0] = begun[0] or time.perf_counter()
            left[0] -= 1
            if not left[0]:
                begun.append(time.perf_counter())
                done.set()

        app.task(name=f"laned {keys}")(laned)
        async with app.pool.connection() as conn:
            await conn.execute(
                "insert into queue_service.runs (queue, task, payload, ordering_key) "
                "select 'default', %s, jsonb_build_object('n', n), 'k' || n %% %s from generate_series(1, %s) as n",
                [f"laned {keys}", keys, count],
            )
        worker = Worker(app, {"default": 100})
        running = asyncio.create_task(worker.run())
        await ended.wait()
        worker.stop()
        await running
        figures[f"{'a key each' if keys == count else '100 keys'}, runs/s"] = count / (begun[1] - begun[0])
    return figures
