"""What every contender is put through: each function measures one of them once, on an empty database."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.arena import Arena


class Sizes(NamedTuple):
    """How much of it: the whole, or a taste that shows that it works."""

    drain: int = 50_000
    single: int = 2_000
    samples: int = 500
    seconds: float = 10.0
    backlog: int = 1_000_000
    queues: int = 1_000
    times: int = 6
    minutes: float = 30.0

    def of(self, name: str, count: int) -> int:
        """Procrastinate gets a tenth of the jobs, or one round of it would last as long as all the others."""
        return count // 10 if name == "procrastinate" else count


TASTE = Sizes(drain=600, single=100, samples=20, seconds=1.0, backlog=2_000, queues=5, times=2, minutes=0.1)
Contest = Callable[[Arena, str, Sizes], dict[str, float]]
CONTESTS: dict[str, Contest] = {}
# Those that take so long that they have to be asked for, and that only we are put through.
LONG: set[str] = set()


def contest(function: Contest) -> Contest:
    CONTESTS[function.__name__] = function
    return function


def long(function: Contest) -> Contest:
    LONG.add(function.__name__)
    return contest(function)


@contest
def drain(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """Asynchronous no-op jobs, one worker process."""
    count = sizes.of(name, sizes.drain)
    with arena.programs(name) as (program,):
        start = arena.usage(program)
        bulk = program.ask("bulk", count=count)
        filled = arena.usage(program)
        worked = program.ask("work", count=count)
        end = arena.usage(program)
    used = end.since(start, count) | {"CPU ms a job": end.since(filled, count)["CPU ms a job"]}
    return {"jobs/s": worked["rate"], "enqueued in bulk/s": bulk["rate"], "RSS MB": worked["rss"], **used}


@contest
def io(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """Jobs that wait for 1 ms."""
    return {"jobs/s": _worked(arena, name, sizes.of(name, sizes.drain), {}, pause=0.001)}


@contest
def threads(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """Synchronous no-op jobs, in threads. PgQueuer has none, and Node no threads to run them in."""
    if name not in ("queue_service", "procrastinate"):
        return {}
    return {"jobs/s": _worked(arena, name, sizes.of(name, sizes.drain // 5), {"threads": True})}


@contest
def enqueue(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """Jobs enqueued one by one, each committed: one after the other, and by sixteen callers of a process at once."""
    with arena.programs(name) as (program,):
        program.ask("enqueue", count=sizes.single // 10, callers=1)
        one = program.ask("enqueue", count=sizes.single, callers=1)
        sixteen = program.ask("enqueue", count=4 * sizes.single, callers=16)
    return {"1 caller, jobs/s": one["rate"], "16 callers, jobs/s": sixteen["rate"]}


@contest
def latency(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """From the call that enqueues to the start of the handler, when there is nothing else to do."""
    with arena.programs(name) as (program,):
        figures = program.ask("latency", count=sizes.samples, pause=0.01)
    return {"p50 ms": figures["p50"], "p99 ms": figures["p99"]}


@contest
def steady(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """1,000 jobs a second enqueued one by one, and handled meanwhile, in one process."""
    with arena.programs(name) as (program,):
        figures = program.ask("steady", rate=1_000, seconds=sizes.seconds)
    return {"p50 ms": figures["p50"], "p99 ms": figures["p99"], "jobs/s": figures["rate"]}


@contest
def processes(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """Asynchronous no-op jobs, four worker processes."""
    count = sizes.of(name, 2 * sizes.drain)
    with arena.programs(name, 4) as programs:
        programs[0].ask("bulk", count=count)
        for program in programs:
            program.tell("share")
        answers = [program.answer() for program in programs]
    assert sum(answer["count"] for answer in answers) == count, answers
    taken = max(answer["last"] for answer in answers) - min(answer["first"] for answer in answers if answer["count"])
    return {"jobs/s": count / taken}


@contest
def backlog(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """The first jobs of a million."""
    if name == "procrastinate":
        return {}
    with arena.programs(name) as (program,):
        program.ask("bulk", count=sizes.backlog)
        worked = program.ask("work", count=sizes.drain, left=1)
    return {"jobs/s": worked["rate"], "RSS MB": worked["rss"]}


@contest
def scheduled(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """Due jobs behind a million that are due in an hour."""
    if name == "procrastinate":
        return {}
    with arena.programs(name) as (program,):
        program.ask("bulk", count=sizes.backlog, delay=3_600)
        program.ask("bulk", count=sizes.drain)
        worked = program.ask("work", count=sizes.drain, left=1)
    return {"jobs/s": worked["rate"]}


@contest
def pinned(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """Jobs, again and again, while another session's snapshot keeps vacuum from removing any dead row."""
    count, rates = sizes.of(name, sizes.drain // 2), []
    with arena.programs(name) as (program,), arena.connection() as conn:
        conn.execute("begin isolation level repeatable read")
        conn.execute("select count(*) from pg_class")
        for _ in range(sizes.times):
            program.ask("bulk", count=count)
            rates.append(program.ask("work", count=count)["rate"])
    return {"first, jobs/s": rates[0], "last, jobs/s": rates[-1]}


@contest
def queues(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """Asynchronous no-op jobs of a thousand queues (entrypoints, task identifiers), one worker process."""
    count = sizes.of(name, sizes.drain)
    return {"jobs/s": _worked(arena, name, count, {"queues": sizes.queues}, queues=sizes.queues)}


@long
def ten_million(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """The first jobs of ten million."""
    with arena.programs(name) as (program,):
        for _ in range(10):
            program.ask("bulk", count=sizes.backlog)
        worked = program.ask("work", count=sizes.drain, left=1)
    return {"jobs/s": worked["rate"], "RSS MB": worked["rss"]}


@long
def soak(arena: Arena, name: str, sizes: Sizes) -> dict[str, float]:
    """1,000 jobs a second for half an hour, and what grows meanwhile."""
    sample = "select pg_relation_size(oid) / 1e6 from pg_class where relname = any(%s) order by relname"
    seconds = 60 * sizes.minutes
    named = ["RSS MB", "runs MB", "claim index MB", "primary key MB"]
    seen: dict[str, float] = {}
    with arena.programs(name) as (program,), arena.connection() as conn:
        program.tell("steady", rate=1_000, seconds=seconds)
        begun = time.monotonic()
        for sixth in range(1, 7):
            time.sleep(max(0.0, begun + sixth * seconds / 6 - 1 - time.monotonic()))
            rows = conn.execute(sample, [["runs", "runs_claim_idx", "runs_pkey"]]).fetchall()
            sizes_now = [program.rss, *(float(row[0]) for row in rows)]
            seen |= {f"{what}, {sixth}/6": value for what, value in zip(named, sizes_now, strict=True)}
        figures = program.answer(patience=seconds)
    return {"jobs/s": figures["rate"], "p50 ms": figures["p50"], "p99 ms": figures["p99"], **dict(sorted(seen.items()))}


def _worked(arena: Arena, name: str, count: int, made: dict[str, Any], **how: Any) -> float:
    """The rate at which jobs that were made so are handled so."""
    with arena.programs(name) as (program,):
        program.ask("bulk", count=count, **made)
        return program.ask("work", count=count, **how)["rate"]
