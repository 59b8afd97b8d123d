"""A step and what takes its run away meet over one run: the step is stored before, and the next attempt finds it, or it is
not stored at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.runs import lost, queries, settling
from queue_service.runs.model import Ending, Return, Run, RunState
from queue_service.steps import queries as steps
from queue_service.steps.model import NewStep
from tests.support import blocked, claimed, enqueued, eventually, lapse

Open = Callable[[], Awaitable[Connection]]

TAKING: dict[str, Callable[[Run], Query[Any]]] = {
    "sweep": lambda _: queries.sweep(limit=10, max_losses=3),
    "last sweep": lambda _: queries.sweep(limit=10, max_losses=1),
    "finish": lambda run: settling.finish([Ending(run.claim, RunState.FAILED)], worker_id=1),
    "give back": lambda run: settling.give_back([Return(run.claim, 0.0, failed=True)], worker_id=1),
    "release": lambda _: lost.release_unheard(1, known=[]),
}
each_taking = pytest.mark.parametrize("take", TAKING.values(), ids=TAKING)
each_end = pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])


async def run_of(conn: Connection) -> tuple[Run, NewStep]:
    await enqueued(conn)
    ((run, _),) = await claimed(conn)
    await lapse(conn)
    return run, NewStep(*run.claim, "a", "1")


@each_taking
@each_end
async def test_what_takes_a_run_waits_for_a_step_that_is_under_way(
    conn: Connection, session: Open, take: Callable[[Run], Query[Any]], commit: bool
) -> None:
    storing, taking = await session(), await session()
    run, step = await run_of(conn)
    await storing.execute("begin")
    assert await fetch(storing, steps.store([step])) == {step[:3]: True}
    taken = asyncio.ensure_future(fetch(taking, take(run)))
    await eventually(lambda: blocked(conn, taking))
    await storing.execute("commit" if commit else "rollback")
    assert await taken
    # Whoever has the run now finds it, if it was stored.
    assert [each.name for each in await fetch(conn, steps.of_run(run.id))] == (["a"] if commit else [])


@each_taking
@each_end
async def test_a_step_comes_too_late_behind_what_takes_its_run(
    conn: Connection, session: Open, take: Callable[[Run], Query[Any]], commit: bool
) -> None:
    storing, taking = await session(), await session()
    run, step = await run_of(conn)
    await taking.execute("begin")
    assert await fetch(taking, take(run))
    # Not decided yet, and nobody is waited for.
    assert await fetch(storing, steps.store([step])) == {step[:3]: False}
    await taking.execute("commit" if commit else "rollback")
    assert await fetch(storing, steps.store([step])) == ({} if commit else {step[:3]: True})
    assert len(await fetch(conn, steps.of_run(run.id))) == (0 if commit else 1)


async def test_a_statement_that_began_before_the_sweep_stores_nothing_after_it(conn: Connection, session: Open) -> None:
    """Its snapshot shows the claim as held; what it has locked is another version of the run."""
    storing, sweeping, gate = await session(), await session(), await session()
    run, step = await run_of(conn)
    await gate.execute("select pg_advisory_lock(7)")
    query = steps.store([step])
    # As it is, but that it stops once its snapshot is taken.
    stopped = query.text.replace(
        "select distinct asked.run_id, asked.attempt from asked",
        "select distinct asked.run_id, asked.attempt from asked, (select pg_advisory_xact_lock_shared(7) offset 0) as gate",
    )
    assert stopped != query.text
    answer = asyncio.ensure_future(fetch(storing, Query(stopped, query.decode, query.params)))
    await eventually(lambda: blocked(conn, storing))
    assert await fetch(sweeping, TAKING["sweep"](run))
    await gate.execute("select pg_advisory_unlock(7)")
    assert await answer != {step[:3]: True}
    assert await fetch(conn, steps.of_run(run.id)) == []
