"""Scenarios of turns and streams."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from datetime import timedelta

from benchmarks import pgbench
from benchmarks.scenario import scenario
from queue_service import App, Turn
from queue_service.cli import demo_turns
from queue_service.services.sweeper import Sweeper
from queue_service.turns import queries

CALLERS = 16
PROCESSES = 4
STREAMS = 500


async def answered(app: App, count: int, callers: int = CALLERS) -> float:
    """Turns armed and answered a second, by so many callers at once."""
    mark = uuid.uuid4().hex
    numbers = iter(range(count))

    async def call(caller: int) -> None:
        for n in numbers:
            turn = Turn(deployment=f"d{caller}", message_id=f"{mark}-{n}", stream=f"s{n % STREAMS}")
            await app.turns.arm(turn)
            assert await app.turns.commit_reply(turn.deployment, [turn.message_id], {"text": "Hello."})

    begun = time.perf_counter()
    await asyncio.gather(*(call(caller) for caller in range(callers)))
    return count / (time.perf_counter() - begun)


@scenario
async def turns(app: App, count: int) -> dict[str, float]:
    """arm + commit_reply, from one process."""
    count = min(count, 10_000)
    return {"turns/s, 16 callers": await answered(app, count), "turns/s, 1 caller": await answered(app, count // 10, 1)}


@scenario
async def turns_processes(app: App, count: int) -> dict[str, float]:
    """arm + commit_reply from four processes, and the same two statements by pgbench, one after the other."""
    count = min(count, 10_000)
    command = [sys.executable, "-m", "benchmarks.turns", app.conninfo, str(count)]
    workers = [await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE) for _ in range(PROCESSES)]
    answers = await asyncio.gather(*(worker.communicate() for worker in workers))
    ours = sum(float(out) for out, _ in answers)
    floor = await asyncio.to_thread(_pgbench, app.conninfo, seconds=1 + count // 1_400)
    return {"turns/s": ours, "turns/s, pgbench": floor, "ratio": ours / floor}


def _pgbench(conninfo: str, seconds: int) -> float:
    """What sixteen connections of pgbench reach with the two statements, prepared, and no notices."""
    key = '"deployment":"d\' || :client_id || \'","message_id":"p\' || :id || \'"'
    waits = '"stream":"s\' || :stream || \'","platform":"api","metadata":{},"admission":"5 min","execution":"1 min"'
    turn = f"'[{{{key},{waits}}}]'"
    ending = f'\'[{{{key},"kind":"reply","code": null,"body":{{"text":"Hello."}}}}]\''
    texts = queries.SQL.texts
    script = [
        f"\\set id random(1, {10**15})",
        f"\\set stream random(0, {STREAMS - 1})",
        pgbench.one_line(texts["arm"], turns=f"({turn})"),
        pgbench.one_line(texts["end"], endings=f"({ending})", notify="false"),
    ]
    return pgbench.rate(conninfo, script, clients=CALLERS, seconds=seconds)


@scenario
async def sweep(app: App, count: int) -> dict[str, float]:
    """100,000 lapsed turns of 1,000 streams, ended by four sweepers at once."""
    count = 2 * count
    async with app.pool.connection() as conn:
        await conn.execute(
            "with armed as (insert into queue_service.turn_outcomes (deployment, message_id, stream) "
            "select 'd' || n %% 100, n::text, 's' || n %% 1000 from generate_series(1, %s) as n "
            "returning deployment, message_id, stream) "
            "insert into queue_service.turn_markers (deployment, message_id, stream, admission, execution, deadline) "
            "select deployment, message_id, stream, '1 s', '1 s', clock_timestamp() from armed",
            [count],
        )
    apps = [App(app.conninfo) for _ in range(4)]
    for each in apps:
        await each.open()
    begun = time.perf_counter()
    ended = await asyncio.gather(
        *(Sweeper(each.fetch, each.notify, max_losses=3, grace=timedelta(0)).turns() for each in apps)
    )
    taken = time.perf_counter() - begun
    for each in apps:
        await each.close()
    async with app.pool.connection() as conn:
        cursor = await conn.execute("select count(*) from queue_service.events where terminal")
        (events,) = await cursor.fetchone() or (0,)
    assert sum(ended) == events == count, (ended, events)
    return {"seconds": taken, "turns/s": count / taken}


@scenario
async def follow(app: App, count: int) -> dict[str, float]:
    """From the call of append to the event in a follower on other connections, at 500 appends a second over 50 streams."""
    count, rate, names = min(count, 5_000), 500, [f"f{n}" for n in range(50)]
    called: dict[tuple[str, int], float] = {}
    taken: list[float] = []

    async with App(app.conninfo) as other:

        async def reader(name: str, wanted: int) -> None:
            async for event in other.events.follow(name):
                taken.append(1_000 * (time.perf_counter() - called[name, event.body["n"]]))
                if event.seq == wanted:
                    return

        readers = [asyncio.create_task(reader(name, count // len(names))) for name in names]
        await asyncio.sleep(1)
        begun = time.perf_counter()
        appends = set()
        for n in range(count):
            await asyncio.sleep(max(0, begun + n / rate - time.perf_counter()))
            name = names[n % len(names)]
            called[name, n] = time.perf_counter()
            appends.add(asyncio.create_task(app.events.append(name, "delta", {"n": n})))
        await asyncio.gather(*appends, *readers)
    cut = statistics.quantiles(taken, n=100)
    return {"p50 ms": cut[49], "p99 ms": cut[98]}


@scenario
async def crash(app: App, count: int) -> dict[str, float]:
    """From SIGKILL of an agent's process to its terminal error, read by a waiter in another process than its supervisor."""
    taken = []
    with demo_turns.host(app.conninfo):
        for n in range(max(2, min(count // 800, 60))):
            turn = Turn(deployment=f"c{uuid.uuid4().hex}", message_id="m", stream=f"crash {n}")
            await app.turns.dispatch(turn, "agent_turn", {"text": "Think."}, queue="agents")
            waiting = asyncio.create_task(app.turns.wait(turn.deployment, turn.message_id, timeout=30))
            async for event in app.events.follow(turn.stream):
                if event.kind == "status":
                    # Every turn has a process of its own; a moment later it has said all that it will say.
                    await asyncio.sleep(0.05)
                    begun = time.perf_counter()
                    os.kill(event.body["pid"], signal.SIGKILL)
                    outcome = await waiting
                    taken.append(1_000 * (time.perf_counter() - begun))
                    assert outcome.code == "worker_died", outcome
                    break
    cut = statistics.quantiles(taken, n=100)
    return {"p50 ms": cut[49], "p99 ms": cut[98]}


async def _work(conninfo: str, count: int) -> float:
    async with App(conninfo) as app:
        return await answered(app, count)


if __name__ == "__main__":
    os.environ.pop("QUEUE_SERVICE_DATABASE_URL", None)
    print(asyncio.run(_work(sys.argv[1], int(sys.argv[2]))))
