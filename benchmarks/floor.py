"""How near the worker comes to its own statements, and enqueues to what pgbench makes of them."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

from benchmarks import pgbench
from benchmarks.scenario import scenario
from queue_service import App, Worker
from queue_service.db.own_connection import OwnConnection
from queue_service.runs import queries, settling
from queue_service.runs.model import Ending, Floor, RunState
from queue_service.runs.queries import Claimant, Wanted
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
    connection, place, left = OwnConnection(app.conninfo, application="bare loop"), FRONT, count
    lease = timedelta(seconds=30)
    begun = time.perf_counter()
    while left:
        claim = queries.claim([Wanted("default", BATCH, {0: place})], Claimant(["noop"], 1, lease))
        runs = await connection.fetch(claim)
        endings = [Ending(run.claim, RunState.SUCCEEDED) for run, _ in runs]
        await connection.fetch(settling.finish(endings, worker_id=1, freed={held for _, held in runs}))
        left -= len(runs)
        place = Floor(runs[-1][0].run_at, runs[-1][0].id)
    taken = time.perf_counter() - begun
    await connection.close()
    return taken


@scenario
async def lanes(app: App, count: int) -> dict[str, float]:
    """Runs with an ordering key each, and runs of a hundred keys."""
    return {
        "a key each, runs/s": await _rate(app, "a key each", count, "'k' || n"),
        "100 keys, runs/s": await _rate(app, "100 keys", count, "'k' || n % 100"),
    }


@scenario
async def limits(app: App, count: int) -> dict[str, float]:
    """A queue of which a hundred runs may go on at once, one that allows ten, and one with a rate that is never reached."""
    figures = {}
    for what, given in {"100": {"max_running": 100}, "10": {"max_running": 10}, "a rate": {"rate": 1_000_000}}.items():
        await app.queues.limit("default", **given)
        figures[f"{what}, runs/s"] = await _rate(app, f"limited to {what}", count, "null")
    await app.queues.limit("default")
    return figures


@scenario
async def threads(app: App, count: int) -> dict[str, float]:
    """Sync handlers that take 10 ms, 32 at once: what threads make of the 3,200 runs a second that are possible."""
    rate = await _rate(app, "slow", count // 10, "null", takes=0.010, concurrency=32)
    return {"runs/s": rate, "of what is possible": rate / 3_200}


async def _rate(
    app: App, task: str, count: int, key: str, *, takes: float | None = None, concurrency: int = 100
) -> float:
    """Runs per second from the first handler's start to the last one's, with so many runs stored before. Handlers that
    take some time do so in threads."""
    left, begun, ended = count, 0.0, asyncio.Event()
    loop = asyncio.get_running_loop()

    def count_down() -> None:
        nonlocal left, begun
        begun = begun or time.perf_counter()
        left -= 1
        if not left:
            ended.set()

    async def handle(n: int) -> None:
        count_down()

    def handle_slowly(n: int) -> None:
        time.sleep(takes or 0)
        loop.call_soon_threadsafe(count_down)

    app.task(name=task)(handle if takes is None else handle_slowly)
    async with app.pool.connection() as conn:
        await conn.execute(
            (
                "insert into queue_service.runs (queue, task, payload, ordering_key) "  # noqa: S608 - our own text
                f"select 'default', '{task}', jsonb_build_object('n', n), {key} from generate_series(1, {count}) as n"
            ).encode()
        )
    worker = Worker(app, {"default": concurrency})
    running = asyncio.create_task(worker.run())
    await ended.wait()
    taken = time.perf_counter() - begun
    worker.stop()
    await running
    return count / taken
