"""queue_service, as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from benchmarks.contenders import contest
from queue_service import App, Worker, logs
from queue_service.db import schema


class QueueService:
    _app: App
    _score: contest.Score

    async def open(self, conninfo: str) -> None:
        logs.configure(level="error", fmt="auto")
        await asyncio.to_thread(schema.upgrade, conninfo)
        self._app = App(conninfo)

        @self._app.task()
        async def job(n: int) -> None:
            await self._score.handled(n)

        @self._app.task()
        def threaded(n: int) -> None:
            self._score.handled_in_thread()

        await self._app.open()

    async def clear(self) -> None:
        async with self._app.pool.connection() as conn:
            await conn.execute("truncate queue_service.runs, queue_service.finished_runs, queue_service.leases")

    async def enqueue(self, n: int) -> None:
        await self._app.enqueue("job", {"n": n})

    async def enqueue_many(self, numbers: range, *, delay: float, queues: int, threads: bool) -> None:
        after = timedelta(seconds=delay) if delay else None
        task = "threaded" if threads else "job"
        for queue in range(queues):
            payloads = [{"n": n} for n in numbers[queue::queues]]
            await self._app.enqueue_many(task, payloads, queue=name(queue), delay=after)

    @asynccontextmanager
    async def work(self, score: contest.Score, *, queues: int) -> AsyncIterator[None]:
        self._score = score
        worker = Worker(self._app, {name(queue): 100 for queue in range(queues)})
        running = asyncio.create_task(worker.run())
        yield
        worker.stop()
        await running

    async def left(self) -> int:
        async with self._app.pool.connection() as conn:
            row = await (await conn.execute("select count(*) from queue_service.runs")).fetchone()
        return row[0] if row else 0

    async def close(self) -> None:
        await self._app.close()


def name(queue: int) -> str:
    return f"q{queue}" if queue else "default"


if __name__ == "__main__":
    contest.run(QueueService())
