"""Procrastinate on psycopg, with asynchronous jobs, a concurrency of 100 and notices."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import procrastinate
from procrastinate import PsycopgConnector

from benchmarks.contenders import contest


class Procrastinate:
    _score: contest.Score

    async def open(self, conninfo: str) -> None:
        logging.disable(logging.CRITICAL)
        self._app = procrastinate.App(connector=PsycopgConnector(conninfo=conninfo, min_size=4, max_size=20))

        @self._app.task(name="job")
        async def job(n: int) -> None:
            await self._score.handled(n)

        @self._app.task(name="threaded")
        def threaded(n: int) -> None:
            self._score.handled_in_thread()

        self._job, self._threaded = job, threaded
        await self._app.open_async()
        if not await self._app.check_connection_async():
            await self._app.schema_manager.apply_schema_async()

    async def clear(self) -> None:
        await self._app.connector.execute_query_async("truncate procrastinate_jobs, procrastinate_events cascade")

    async def enqueue(self, n: int) -> None:
        await self._job.defer_async(n=n)

    async def enqueue_many(self, numbers: range, *, delay: float, queues: int, threads: bool) -> None:
        task = self._threaded if threads else self._job
        for queue in range(queues):
            options = {"queue": f"q{queue}"} | ({"schedule_in": {"seconds": delay}} if delay else {})
            mine = numbers[queue::queues]
            for start in range(0, len(mine), 10_000):
                jobs = [{"n": n} for n in mine[start : start + 10_000]]
                await task.configure(**options).batch_defer_async(*jobs)

    @asynccontextmanager
    async def work(self, score: contest.Score, *, queues: int) -> AsyncIterator[None]:  # noqa: ARG002 - it takes all
        self._score = score
        worker = asyncio.create_task(
            self._app.run_worker_async(concurrency=100, install_signal_handlers=False, shutdown_graceful_timeout=10)
        )
        yield
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker

    async def left(self) -> int:
        row = await self._app.connector.execute_query_one_async(
            "select count(*) as count from procrastinate_jobs where status not in ('succeeded', 'failed')"
        )
        return int(row["count"])

    async def close(self) -> None:
        await self._app.close_async()


if __name__ == "__main__":
    contest.run(Procrastinate())
