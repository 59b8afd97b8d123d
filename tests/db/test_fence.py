"""A claim that is no longer held changes nothing, whatever it writes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

import msgspec
import pytest

from queue_service.db.execute import Connection, fetch
from queue_service.runs import queries, settling
from queue_service.runs.claim import Claim, hold
from queue_service.runs.model import Ending, Return, RunState
from queue_service.runs.queries import Claimant
from queue_service.steps import queries as steps
from queue_service.steps.model import NewStep
from tests.support import claimed, enqueued, lapse, one, rows

FIELDS = "id, attempt, state, failures, losses, run_at, lease_id, error, cancel_requested, progress"


async def swept(conn: Connection) -> None:
    await lapse(conn)
    await fetch(conn, queries.sweep(limit=10, max_losses=3))


async def swept_and_claimed_again(conn: Connection) -> None:
    await swept(conn)
    assert await fetch(conn, queries.claim_suspect(["default"], Claimant(["noop"], 2, timedelta(seconds=30))))


async def handed_back_and_claimed_again(conn: Connection) -> None:
    (held,) = await rows(conn, "select id, attempt, lease_id from queue_service.runs")
    await fetch(conn, settling.give_back([Return(Claim(held[0], held[1]))], worker_id=1, freed=[held[2]]))
    assert await claimed(conn, worker_id=2)


async def finished(conn: Connection) -> None:
    (held,) = await rows(conn, "select id, attempt, lease_id from queue_service.runs")
    ending = Ending(Claim(held[0], held[1]), RunState.SUCCEEDED, '"first"')
    assert await fetch(conn, settling.finish([ending], worker_id=1, freed=[held[2]]))


async def failed_and_retried_from_history(conn: Connection) -> None:
    (held,) = await rows(conn, "select id, attempt, lease_id from queue_service.runs")
    ending = Ending(Claim(held[0], held[1]), RunState.FAILED)
    await fetch(conn, settling.finish([ending], worker_id=1, freed=[held[2]]))
    assert await fetch(conn, queries.retry(held[0]))
    assert await claimed(conn, worker_id=2)


LOSSES = [
    swept, swept_and_claimed_again, handed_back_and_claimed_again, finished, failed_and_retried_from_history,
]  # fmt: skip


@pytest.mark.parametrize("lose", LOSSES, ids=lambda lose: lose.__name__)
async def test_every_write_of_a_stale_claim_changes_no_row(
    conn: Connection, lose: Callable[[Connection], Awaitable[None]]
) -> None:
    await enqueued(conn)
    ((run, lease),) = await claimed(conn)
    await lose(conn)
    live = await rows(conn, f"select {FIELDS} from queue_service.runs")
    history = await rows(conn, "select * from queue_service.finished_runs")
    leases = await rows(conn, "select id, run_ids from queue_service.leases")

    late = Ending(run.claim, RunState.SUCCEEDED, '"late"')
    assert await fetch(conn, settling.finish([late], worker_id=1)) == set()
    assert (
        await fetch(
            conn, settling.finish([msgspec.structs.replace(late, state=RunState.FAILED)], worker_id=1, freed=[lease])
        )
        == set()
    )
    assert await fetch(conn, settling.give_back([Return(run.claim, 5.0, failed=True)], worker_id=1)) == set()
    assert await fetch(conn, settling.give_back([Return(run.claim)], worker_id=1, freed=[lease])) == set()
    assert await fetch(conn, settling.report({run.claim: '{"value":0.5}'})) == set()
    assert await fetch(conn, hold(run.claim)) is False
    assert await fetch(conn, queries.extend([lease], timedelta(hours=1))) == set()
    assert await fetch(conn, steps.store([NewStep(*run.claim, "late", "1")])) == {}
    assert await fetch(conn, steps.of_run(run.id)) == []

    assert await rows(conn, f"select {FIELDS} from queue_service.runs") == live
    assert await rows(conn, "select * from queue_service.finished_runs") == history
    assert await rows(conn, "select id, run_ids from queue_service.leases") == leases


async def test_a_batch_ends_the_claims_that_are_held_and_no_other(conn: Connection) -> None:
    for _ in range(6):
        await enqueued(conn)
    taken = await claimed(conn)
    claims = [run.claim for run, _ in taken]
    stale = {Claim(claim.run_id, claim.attempt + 1) for claim in claims[::2]}
    batch = [Ending(claim, RunState.SUCCEEDED, str(claim.run_id)) for claim in [*stale, *claims[1::2]]]
    assert await fetch(conn, settling.finish(batch, worker_id=1)) == set(claims[1::2])
    assert await rows(conn, "select id, result from queue_service.finished_runs order by id") == [
        (claim.run_id, claim.run_id) for claim in claims[1::2]
    ]
    assert await one(conn, "select count(*) from queue_service.runs where state = 'running'") == 3


async def test_each_outcome_of_a_large_shuffled_batch_lands_with_its_own_run(conn: Connection) -> None:
    for _ in range(5):
        await conn.execute(
            "insert into queue_service.runs (queue, task, payload) select 'default', 'noop', '{}' "
            "from generate_series(1, 100)"
        )
    taken = await claimed(conn, limit=500)
    lease = taken[0][1]
    states = [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED]
    endings = [
        Ending(run.claim, states[run.id % 3], f'{{"n":{run.id}}}', f'{{"reason":"raised","message":"{run.id}"}}')
        for run, _ in reversed(taken)
    ]
    done = await fetch(conn, settling.finish(endings[::2] + endings[1::2], worker_id=9, freed=[lease]))
    assert done == {run.claim for run, _ in taken}
    for run_id, state, result, error, failures, worker_id in await rows(
        conn, "select id, state, result, error, failures, worker_id from queue_service.finished_runs"
    ):
        expected = states[run_id % 3]
        assert (state, failures, worker_id) == (expected.value, expected is RunState.FAILED, 9)
        assert result == ({"n": run_id} if expected is RunState.SUCCEEDED else None)
        assert error is None if expected is RunState.SUCCEEDED else error["message"] == str(run_id)
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_returns_wait_as_long_as_each_says_and_count_failures_only_where_asked(conn: Connection) -> None:
    ids = [await enqueued(conn) for _ in range(3)]
    before = dict(await rows(conn, "select id, run_at from queue_service.runs"))
    taken = {run.id: run.claim for run, _ in await claimed(conn)}
    returns = [
        Return(taken[ids[0]], 60.0, failed=True, error='{"reason":"raised"}'),
        Return(taken[ids[1]], 600.0),
        Return(taken[ids[2]]),
    ]
    assert await fetch(conn, settling.give_back(returns, worker_id=1)) == set(taken.values())
    found = await rows(
        conn,
        "select failures, error, state, lease_id, extract(epoch from run_at - clock_timestamp())::float8, run_at "
        "from queue_service.runs order by id",
    )
    assert [row[:4] for row in found] == [
        (1, {"reason": "raised"}, "queued", None), (0, None, "queued", None), (0, None, "queued", None),
    ]  # fmt: skip
    assert 30 < found[0][4] <= 60
    assert 570 < found[1][4] <= 600
    assert found[2][5] == before[ids[2]]
