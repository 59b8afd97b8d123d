"""Scenarios of workers that have nothing to do: what it costs to wake the one that is to work, and how soon all begin."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.scenario import scenario
from queue_service import App
from queue_service.db.query import Query, scalar

NUMBERS = (1, 4, 10, 24)
SAMPLES = 400
HOLD = 0.5

# What the worker processes serve: `queue-service worker -a benchmarks.wakeups:served`.
served = App()


@served.task
async def noop() -> None: ...


@served.task
async def held() -> float:
    """When it began. It then holds its slot, so that no other run begins there."""
    begun = time.time()
    await asyncio.sleep(HOLD)
    return begun


@asynccontextmanager
async def workers(app: App, number: int, concurrency: int = 10) -> AsyncIterator[list[int]]:
    """So many worker processes of their own, each of which hears of notices and has looked for the last time at what there
    was before. Their pids."""
    environment = {**os.environ, "QUEUE_SERVICE_DATABASE_URL": app.conninfo, "QUEUE_SERVICE_LOG_LEVEL": "error"}
    command = [
        sys.executable,
        "-m",
        "queue_service",
        "worker",
        "-a",
        f"{__name__}:served",
        "-q",
        f"default:{concurrency}",
    ]
    started = [
        await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.DEVNULL)
        for _ in range(number)
    ]
    try:
        listening: Query[int] = Query(
            "select count(*)::int from pg_stat_activity where datname = current_database() "
            "and application_name = 'queue_service listener' and query ilike 'listen%%cancel%%'",
            scalar,
            {},
        )
        while await app.fetch(listening) < number:
            await asyncio.sleep(0.1)
        # A beat, after which each knows of all the others.
        await asyncio.sleep(0.5 if number == 1 else SETTLE)
        yield [each.pid for each in started]
    finally:
        for each in started:
            with contextlib.suppress(ProcessLookupError):
                each.send_signal(signal.SIGTERM)
        await asyncio.gather(*(each.wait() for each in started))


# The default lease is 30 s, and a worker says a sixth of it apart that it lives.
SETTLE = 7.0


async def waited(app: App, count: int) -> list[float]:
    """From the call that enqueues to the answer of the one that waits, in ms: one after the other."""
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        await app.wait(await app.enqueue("noop", {}), timeout=30)
        taken.append(1_000 * (time.perf_counter() - begun))
    return taken


@scenario
async def idle_workers(app: App, count: int) -> dict[str, float]:
    """enqueue and wait, one run after the other, beside 1, 4, 10 and 24 idle worker processes."""
    figures: dict[str, float] = {}
    for number in NUMBERS:
        async with workers(app, number):
            await waited(app, 50)
            taken = await waited(app, min(count, SAMPLES))
            figures[f"{number} workers, p50 ms"] = statistics.median(taken)
    return {**figures, "24 to 1": figures["24 workers, p50 ms"] / figures["1 workers, p50 ms"]}


@scenario
async def all_begin(app: App, count: int) -> dict[str, float]:
    """24 runs enqueued at once for 24 workers with one slot each: until the last one has begun."""
    del count
    figures = []
    async with workers(app, 24, concurrency=1):
        for _ in range(6):
            enqueued = time.time()
            runs = await app.enqueue_many("held", [{}] * 24)
            begun = [(await app.wait(run_id, timeout=30)).result for run_id in runs]
            figures.append([1_000 * (each - enqueued) for each in sorted(begun)])
            await asyncio.sleep(HOLD)
    return {
        "half begun, ms": statistics.median(each[11] for each in figures),
        "all begun, ms": statistics.median(each[-1] for each in figures),
    }
