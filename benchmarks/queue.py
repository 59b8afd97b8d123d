"""Scenarios of the runs queue."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import resource
import statistics
import time
from collections.abc import AsyncIterator
from datetime import timedelta

from benchmarks.harness import scenario
from queue_service import App, Worker
from queue_service.db.pool import connect


class Clock:
    """When the first handler began."""

    first: float | None = None
    begun: asyncio.Event | None = None


def add_tasks(app: App) -> None:
    @app.task()
    async def noop(n: int) -> None:
        if Clock.first is None:
            Clock.first = time.perf_counter()

    @app.task()
    async def ping(n: int) -> None:
        Clock.first = time.perf_counter()
        if Clock.begun is not None:
            Clock.begun.set()


async def drained(app: App, count: int, *, once: bool = True) -> float:
    """Runs a second, from the first handler's start to the last ending written."""
    Clock.first = None
    worker = Worker(app, {"default": 100})
    tally = await worker.run(once=once)
    assert tally.succeeded == count, tally
    assert Clock.first is not None
    return count / (time.perf_counter() - Clock.first)


async def worked(app: App, count: int) -> float:
    """As `drained`, for a queue that is not emptied: until `count` runs have ended."""
    Clock.first = None
    worker = Worker(app, {"default": 100})
    running = asyncio.create_task(worker.run())
    while worker.tally.succeeded < count:
        await asyncio.sleep(0.01)
    assert Clock.first is not None
    rate = worker.tally.succeeded / (time.perf_counter() - Clock.first)
    worker.stop(now=True)
    await running
    return rate


@scenario
async def drain(app: App, count: int) -> dict[str, float]:
    """No-op async runs, history kept, by one worker process."""
    await app.enqueue_many("noop", [{"n": n} for n in range(count)])
    return {"runs/s": await drained(app, count), "RSS MB": rss()}


@scenario
async def bulk(app: App, count: int) -> dict[str, float]:
    """enqueue_many."""
    payloads = [{"n": n} for n in range(count)]
    begun = time.perf_counter()
    await app.enqueue_many("noop", payloads)
    return {"runs/s": count / (time.perf_counter() - begun)}


@scenario
async def single(app: App, count: int) -> dict[str, float]:
    """enqueue, one after the other, each committed."""
    count = min(count, 3_000)
    begun = time.perf_counter()
    for n in range(count):
        await app.enqueue("noop", {"n": n})
    return {"runs/s": count / (time.perf_counter() - begun)}


@scenario
async def latency(app: App, count: int) -> dict[str, float]:
    """From the call of enqueue to the start of the handler, in one process, with pauses of 2 ms and 12 ms between."""
    return {**await _latency(app, min(count, 1_000), 0.002), **await _latency(app, min(count, 1_000), 0.012)}


async def _latency(app: App, count: int, pause: float) -> dict[str, float]:
    worker = Worker(app, {"default": 10})
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(1)
    taken = []
    for n in range(count):
        Clock.begun = asyncio.Event()
        begun = time.perf_counter()
        await app.enqueue("ping", {"n": n})
        await Clock.begun.wait()
        taken.append(1_000 * ((Clock.first or 0) - begun))
        await asyncio.sleep(pause)
    worker.stop()
    await running
    cut = statistics.quantiles(taken, n=100)
    label = f"pause {pause * 1000:.0f} ms"
    return {f"p50 ms, {label}": cut[49], f"p99 ms, {label}": cut[98]}


@scenario
async def backlog(app: App, count: int) -> dict[str, float]:
    """The first `count` of 1,000,000 queued runs."""
    for _ in range(10):
        await app.enqueue_many("noop", [{"n": n} for n in range(100_000)])
    return {"runs/s": await worked(app, count), "RSS MB": rss()}


@scenario
async def scheduled(app: App, count: int) -> dict[str, float]:
    """Due runs behind 1,000,000 future-scheduled ones of higher priority."""
    for _ in range(10):
        await app.enqueue_many("noop", [{"n": n} for n in range(100_000)], delay=timedelta(hours=1), priority=5)
    await app.enqueue_many("noop", [{"n": n} for n in range(count)])
    return {"runs/s": await drained(app, count)}


@scenario
async def pinned(app: App, count: int) -> dict[str, float]:
    """Six times `count` runs while another session's snapshot keeps vacuum from removing any dead row."""
    async with pinned_xmin(app):
        rates = []
        for _ in range(6):
            await app.enqueue_many("noop", [{"n": n} for n in range(count)])
            rates.append(await drained(app, count))
    return {"runs/s, first": rates[0], "runs/s, last": rates[-1]}


@contextlib.asynccontextmanager
async def pinned_xmin(app: App) -> AsyncIterator[None]:
    conn = await connect(app.conninfo)
    try:
        await conn.execute("set idle_in_transaction_session_timeout = 0")
        await conn.execute("begin isolation level repeatable read")
        await conn.execute("select count(*) from queue_service.runs")
        yield
    finally:
        await conn.close()


def rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if platform.system() == "Linux" else 1024**2)
