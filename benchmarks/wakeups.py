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
ROUNDS = 6
# How long a run holds its slot, so that others have to begin the next ones.
HOLD = 0.5
# Workers say a sixth of their lease apart that they live: after so many seconds each knows of all.
SETTLE = 7.0

# What the worker processes serve.
served = App()


@served.task
async def noop() -> None: ...


@served.task
async def begun() -> tuple[int, float]:
    """In which process, and when."""
    at = time.time()
    await asyncio.sleep(HOLD)
    return os.getpid(), at


@asynccontextmanager
async def workers(app: App, number: int, concurrency: int = 10) -> AsyncIterator[list[int]]:
    """So many processes, as they are started in earnest, which hear of notices and know of each other. Their pids."""
    environment = {**os.environ, "QUEUE_SERVICE_DATABASE_URL": app.conninfo, "QUEUE_SERVICE_LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "queue_service", "worker", "-a", "benchmarks.wakeups:served"]
    started = [
        await asyncio.create_subprocess_exec(
            *command, "-q", f"default:{concurrency}", env=environment, stderr=asyncio.subprocess.DEVNULL
        )
        for _ in range(number)
    ]
    listening: Query[int] = Query(
        "select count(*) from pg_stat_activity where datname = current_database() "
        "and application_name = 'queue_service listener' and position('queue_service_cancel' in query) > 0",
        scalar,
    )
    try:
        while await app.fetch(listening) < number:
            await asyncio.sleep(0.1)
        await asyncio.sleep(SETTLE)
        yield [each.pid for each in started]
    finally:
        for each in started:
            with contextlib.suppress(ProcessLookupError):
                each.send_signal(signal.SIGTERM)
        await asyncio.gather(*(each.wait() for each in started))


async def waited(app: App, count: int) -> list[float]:
    """From the call that enqueues to the answer of the one that waits, in ms: one after the other."""
    taken = []
    for _ in range(count):
        at = time.perf_counter()
        await app.wait(await app.enqueue("noop", {}), timeout=60)
        taken.append(1_000 * (time.perf_counter() - at))
    return taken


@scenario
async def idle_workers(app: App, count: int) -> dict[str, float]:
    """enqueue and wait, one run after the other, beside 1, 4, 10 and 24 idle worker processes."""
    figures: dict[str, float] = {}
    for number in NUMBERS:
        async with workers(app, number):
            await waited(app, min(count, SAMPLES) // 4)
            figures[f"{number} workers, p50 ms"] = statistics.median(await waited(app, min(count, SAMPLES)))
    return {**figures, "24 to 1": figures["24 workers, p50 ms"] / figures["1 workers, p50 ms"]}


@scenario
async def all_begin(app: App, count: int) -> dict[str, float]:
    """24 runs at once for 24 workers of one slot each, until all have begun; 1,000 for 10 workers, until each has one."""
    del count
    async with workers(app, 24, concurrency=1):
        slots = [await first_begun(app, 24) for _ in range(ROUNDS)]
    async with workers(app, 10, concurrency=100):
        burst = [await first_begun(app, 1_000) for _ in range(ROUNDS)]
    return {
        "24 of 24 begun, ms": statistics.median(each[-1] for each in slots),
        "12 of 24 begun, ms": statistics.median(each[11] for each in slots),
        "10 of 10 awake, ms": statistics.median(each[-1] for each in burst),
    }


async def first_begun(app: App, runs: int) -> list[float]:
    """When each process began its first of so many runs, in ms since they were enqueued."""
    at = time.time()
    firsts: dict[int, float] = {}
    for run_id in await app.enqueue_many("begun", [{}] * runs):
        result = (await app.wait(run_id, timeout=60)).result
        assert isinstance(result, list), result
        pid, begun_at = result
        firsts[pid] = min(begun_at, firsts.get(pid, begun_at))
    return sorted(1_000 * (each - at) for each in firsts.values())
