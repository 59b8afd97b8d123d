"""What a queue has to do to be measured, and the conversation in which it is told to: a line of JSON in, a line out.

Each queue is a program of its own, in an environment of its own, so this module needs nothing but the standard library.
`contest.mjs` says the same to Node. Times are taken here, in the process that works: from the first handler's start to the
last one's end, and from the call that enqueues to the start of the handler.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import statistics
import sys
import threading
import time
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol


class Contender(Protocol):
    """One queue. While `work` is entered, jobs are handled by calling `score.handled`, in threads
    `score.handled_in_thread`."""

    async def open(self, conninfo: str) -> None: ...

    async def clear(self) -> None:
        """Make the tables, and empty them."""

    async def enqueue(self, n: int) -> None: ...

    async def enqueue_many(self, numbers: range, *, delay: float, queues: int, threads: bool) -> None:
        """Jobs that are due after `delay` seconds, dealt to so many queues, run in threads or not."""

    def work(self, score: Score, *, queues: int) -> AbstractAsyncContextManager[None]: ...

    async def left(self) -> int:
        """How many jobs are not finished, the future ones too."""

    async def close(self) -> None: ...


class Score:
    """When the handlers began and ended."""

    def __init__(self, wanted: int, pause: float = 0.0) -> None:
        self.wanted = wanted
        self.count = 0
        self.pause = pause
        self.first = self.last = 0.0
        self.begun: dict[int, float] = {}
        # When those were called whose time to the start of the handler is wanted, and these times, in ms. They take the
        # place of `begun`, so that half an hour of them takes no memory to speak of.
        self.called: dict[int, float] = {}
        self.taken = array("d")
        self.done = asyncio.Event()
        self._arrival: tuple[int, asyncio.Event] = (-1, self.done)
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()

    def handled_in_thread(self) -> None:
        with self._lock:
            self.count += 1
            self.last = time.perf_counter()
            self.first = self.first or self.last
            if self.count == self.wanted:
                self._loop.call_soon_threadsafe(self.done.set)

    async def handled(self, n: int) -> None:
        now = time.perf_counter()
        self.first = self.first or now
        if n in self.called:
            self.taken.append(1_000 * (now - self.called.pop(n)))
        else:
            self.begun[n] = now
        if n == self._arrival[0]:
            self._arrival[1].set()
        if self.pause:
            await asyncio.sleep(self.pause)
        self.count += 1
        self.last = time.perf_counter()
        if self.count == self.wanted:
            self.done.set()

    async def arrival(self, n: int) -> float:
        """When the handler of this one began."""
        if n not in self.begun:
            self._arrival = (n, asyncio.Event())
            await self._arrival[1].wait()
        return self.begun[n]


class Contest:
    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._next = 0

    def _numbers(self, count: int) -> range:
        self._next += count
        return range(self._next - count, self._next)

    async def clear(self) -> dict[str, float]:
        await self._contender.clear()
        return {}

    async def bulk(self, count: int, delay: float = 0.0, queues: int = 1, threads: bool = False) -> dict[str, float]:
        numbers = self._numbers(count)
        begun = time.perf_counter()
        await self._contender.enqueue_many(numbers, delay=delay, queues=queues, threads=threads)
        return {"rate": count / (time.perf_counter() - begun)}

    async def enqueue(self, count: int, callers: int) -> dict[str, float]:
        numbers = iter(self._numbers(count))

        async def call() -> None:
            for n in numbers:
                await self._contender.enqueue(n)

        begun = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(callers)))
        return {"rate": count / (time.perf_counter() - begun)}

    async def work(self, count: int, left: int = 0, pause: float = 0.0, queues: int = 1) -> dict[str, float]:
        """Handle so many jobs. Where all were to be handled, the database has to agree."""
        score = Score(count, pause)
        async with self._contender.work(score, queues=queues):
            await score.done.wait()
        if left == 0 and (unfinished := await self._contender.left()):
            raise SystemExit(f"{unfinished} of {count} jobs were left unfinished")
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {"rate": count / (score.last - score.first), "rss": used.ru_maxrss / 1024}

    async def share(self) -> dict[str, float]:
        """Handle what there is, until there has been nothing for a second, and nothing is left to anybody. Times are those
        of the clock on the wall."""
        score = Score(0)
        async with self._contender.work(score, queues=1):
            while time.perf_counter() < score.last + 1 or await self._contender.left():
                await asyncio.sleep(0.1)
        wall = time.time() - time.perf_counter()
        return {"count": score.count, "first": score.first + wall, "last": score.last + wall}

    async def latency(self, count: int, pause: float) -> dict[str, float]:
        """One job at a time, with a pause in between, enqueued by the process that works."""
        score = Score(10**9)
        taken = []
        async with self._contender.work(score, queues=1), self._warm(score):
            for n in self._numbers(count):
                called = time.perf_counter()
                await self._contender.enqueue(n)
                taken.append(1_000 * (await score.arrival(n) - called))
                await asyncio.sleep(pause)
        return quantiles(taken)

    async def steady(self, rate: int, seconds: float) -> dict[str, float]:
        """So many jobs a second, enqueued one by one while others are handled."""
        score = Score(10**9)
        calls = set()
        count = int(rate * seconds)

        async def enqueue(n: int) -> None:
            score.called[n] = time.perf_counter()
            await self._contender.enqueue(n)

        async with self._contender.work(score, queues=1), self._warm(score):
            begun = time.perf_counter()
            for place, n in enumerate(self._numbers(count)):
                await asyncio.sleep(max(0.0, begun + place / rate - time.perf_counter()))
                call = asyncio.create_task(enqueue(n))
                calls.add(call)
                call.add_done_callback(calls.discard)
            await asyncio.gather(*calls)
            while len(score.taken) < count:
                await asyncio.sleep(0.001)
            taken = time.perf_counter() - begun
        return {**quantiles(score.taken), "rate": count / taken}

    @contextlib.asynccontextmanager
    async def _warm(self, score: Score) -> AsyncIterator[None]:
        """Once it works at all, and has caches and plans."""
        for n in self._numbers(50):
            await self._contender.enqueue(n)
            await score.arrival(n)
        yield

    async def converse(self) -> None:
        await self._contender.open(sys.argv[1])
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command: dict[str, Any] = json.loads(line)
            answer = await getattr(self, command.pop("do"))(**command)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        await self._contender.close()


def quantiles(taken: Sequence[float]) -> dict[str, float]:
    cut = statistics.quantiles(taken, n=100)
    return {"p50": cut[49], "p99": cut[98]}


def run(contender: Contender) -> None:
    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.install()
    asyncio.run(Contest(contender).converse())
