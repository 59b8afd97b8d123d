"""PgQueuer on asyncpg, with batches of 1,000, which it is quickest with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from benchmarks.contenders import contest

BATCH = 1_000


class Pgq:
    async def open(self, conninfo: str) -> None:
        logging.disable(logging.CRITICAL)
        self._conninfo = conninfo
        self._pool = await asyncpg.create_pool(conninfo, min_size=4, max_size=16)
        self._queries = Queries(AsyncpgPoolDriver(self._pool))
        if not await self._pool.fetchval("select to_regclass('pgqueuer') is not null"):
            await self._queries.install()

    async def clear(self) -> None:
        await self._pool.execute("truncate pgqueuer, pgqueuer_log, pgqueuer_statistics")

    async def enqueue(self, n: int) -> None:
        await self._queries.enqueue("q0", b"%d" % n, 0)

    async def enqueue_many(self, numbers: range, *, delay: float, queues: int, threads: bool) -> None:
        assert not threads, "it has none"
        after = timedelta(seconds=delay) if delay else None
        for start in range(0, len(numbers), 10_000):
            mine = numbers[start : start + 10_000]
            await self._queries.enqueue(
                [f"q{n % queues}" for n in mine], [b"%d" % n for n in mine], [0] * len(mine), [after] * len(mine)
            )

    @asynccontextmanager
    async def work(self, score: contest.Score, *, queues: int) -> AsyncIterator[None]:
        conn = await asyncpg.connect(self._conninfo)
        pgq = PgQueuer(AsyncpgDriver(conn))

        async def job(job: Job) -> None:
            assert job.payload is not None
            await score.handled(int(job.payload))

        for queue in range(queues):
            pgq.entrypoint(f"q{queue}")(job)
        running = asyncio.create_task(pgq.run(batch_size=BATCH))
        yield
        pgq.shutdown.set()
        await running
        await conn.close()

    async def left(self) -> int:
        return int(await self._pool.fetchval("select count(*) from pgqueuer"))

    async def close(self) -> None:
        await self._pool.close()


if __name__ == "__main__":
    contest.run(Pgq())
