"""How soon all works again when the database was gone for a while: a scenario of our own."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.contests import LONG, TASTE
from benchmarks.scenario import scenario
from queue_service import App, Worker
from queue_service.errors import DatabaseUnavailable
from tests.chaos.proxy import Proxy

Call = Callable[[], Awaitable[object]]
# For how many seconds it is gone, and how often each.
SHORT, SHORT_REPEATS = (1.0, 5.0), 20
LONGER, LONGER_REPEATS = (17.0, 60.0), 5
LONG.add("outages_long")


@scenario
async def outages(app: App, count: int) -> dict[str, float]:
    """From when a fresh connection could write again to the first success, the database gone for 1 and 5 s."""
    if count <= TASTE.drain:
        return await measured(app, (0.2,), 2)
    return await measured(app, SHORT, SHORT_REPEATS)


@scenario
async def outages_long(app: App, count: int) -> dict[str, float]:
    """The same, gone for 17 and 60 s."""
    return await measured(app, LONGER, LONGER_REPEATS)


async def measured(beside: App, lengths: Sequence[float], repeats: int) -> dict[str, float]:
    """`beside` sees no outage: it enqueues what the worker has to come back for."""
    figures: dict[str, float] = {}
    async with Proxy(target(beside.conninfo)).open() as proxy:
        conninfo = make_conninfo(beside.conninfo, host="127.0.0.1", port=proxy.port)
        for seconds in lengths:
            taken: dict[str, list[float]] = defaultdict(list)
            async with App(conninfo) as app:
                began: asyncio.Queue[float] = asyncio.Queue()

                app.task(name="begin")(noting(began))
                for _ in range(repeats):
                    for name, late in (await once(app, beside, proxy, began, seconds)).items():
                        taken[name].append(1_000 * late)
            for name, all_late in taken.items():
                cut = statistics.quantiles(all_late, n=100, method="inclusive")
                figures |= {
                    f"{name}, gone {seconds:g} s, p50 ms": cut[49],
                    f"{name}, gone {seconds:g} s, p99 ms": cut[98],
                }
    return figures


def target(conninfo: str) -> int | str:
    given = conninfo_to_dict(conninfo)
    host, port = str(given.get("host", "127.0.0.1")), int(str(given.get("port", 5432)))
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else port


def noting(began: asyncio.Queue[float]) -> Callable[[], Awaitable[None]]:
    """A handler that says when it began."""

    async def begin() -> None:
        began.put_nowait(time.monotonic())

    return begin


async def once(app: App, beside: App, proxy: Proxy, began: asyncio.Queue[float], seconds: float) -> dict[str, float]:
    """One outage: how long each waited, in seconds, once a fresh connection could write."""
    answered: dict[str, float] = {}
    worker = Worker(app)
    working = asyncio.create_task(worker.run())
    # One that has not started yet would not survive it.
    await beside.enqueue("begin", {})
    await began.get()
    # Who calls meanwhile waits, or is refused and calls again.
    out = asyncio.create_task(proxy.fail("refuse", seconds))
    await asyncio.sleep(0)
    calls: dict[str, Call] = {
        "enqueue": lambda: app.enqueue("noop", {}, queue="nobody", singleton_key="k"),
        "commit_reply": lambda: app.turns.commit_reply("d", ["m"], {"text": "Hello."}),
        "sweep": app.turns.sweep,
    }
    waiting = [asyncio.create_task(insist(name, call, answered)) for name, call in calls.items()]
    await out
    fresh = await fresh_write(proxy, beside.conninfo)
    await beside.enqueue("begin", {})
    await asyncio.gather(*waiting)
    answered["claim"] = await began.get()
    worker.stop()
    await working
    return {name: max(0.0, at - fresh) for name, at in answered.items()}


async def insist(name: str, call: Call, answered: dict[str, float]) -> None:
    while name not in answered:
        try:
            await call()
        except DatabaseUnavailable:
            await asyncio.sleep(0.01)
        else:
            answered[name] = time.monotonic()


async def fresh_write(proxy: Proxy, conninfo: str) -> float:
    """When a fresh connection through the proxy could write (monotonic)."""
    through = make_conninfo(conninfo, host="127.0.0.1", port=proxy.port)
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(through, autocommit=True) as conn:
                await conn.execute("create temporary table written ()")
                return time.monotonic()
        except psycopg.OperationalError:
            await asyncio.sleep(0.005)
