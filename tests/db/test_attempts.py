"""The attempts of a run: what is kept of each, for how many, and where they go with the run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from queue_service import Attempt, Run, RunState
from queue_service.codec import describe_error
from queue_service.db.execute import Connection, fetch
from queue_service.runs import queries, settling
from queue_service.runs.model import Ending, NewRun, Return
from queue_service.runs.queries import Claimant
from tests.support import LEASE, claimed, enqueued, lapse, one

SWEEP = queries.sweep(limit=10, max_losses=3)


async def found(conn: Connection, run_id: int) -> Run:
    run = await fetch(conn, queries.get(run_id))
    assert run is not None
    return run


async def begun(conn: Connection, *, worker_id: int = 1, suspect: bool = False) -> tuple[Run, int]:
    """The one run, claimed, and its lease."""
    again = queries.claim_suspect(["default"], Claimant(["noop"], worker_id, LEASE))
    (taken,) = await (fetch(conn, again) if suspect else claimed(conn, worker_id=worker_id))
    return taken


async def fail(conn: Connection, message: str = "m", *, worker_id: int = 1, suspect: bool = False) -> None:
    """Claim the one run, and let this attempt fail; the next is due."""
    run, lease = await begun(conn, worker_id=worker_id, suspect=suspect)
    error = msgspec.json.encode({"reason": "raised", "message": message}).decode()
    back = Return(run.claim, failed=True, error=error)
    assert await fetch(conn, settling.give_back([back], worker_id=worker_id, freed=[lease]))


async def lose(conn: Connection, *, worker_id: int = 1) -> None:
    """Claim the one run, and let its worker vanish."""
    await begun(conn, worker_id=worker_id)
    await lapse(conn)
    assert len(await fetch(conn, SWEEP)) == 1


async def end(conn: Connection, state: RunState, *, suspect: bool = False) -> None:
    run, lease = await begun(conn, worker_id=9, suspect=suspect)
    ending = Ending(run.claim, state, error='{"reason": "raised", "message": "the last"}')
    assert await fetch(conn, settling.finish([ending], worker_id=9, freed=[lease]))


def brief(attempts: tuple[Attempt, ...]) -> list[tuple[int, int | None, Any]]:
    """Number, worker and message of each."""
    return [(each.attempt, each.worker_id, each.error and each.error["message"]) for each in attempts]


async def test_a_run_that_never_failed_keeps_nothing_and_tells_of_the_attempt_it_had(conn: Connection) -> None:
    run_id = await enqueued(conn)
    assert (await found(conn, run_id)).attempts == ()
    run, lease = await begun(conn, worker_id=3)
    assert run.attempts == ()
    running = await found(conn, run_id)
    assert running.claimed_at is not None
    assert running.attempts == (Attempt(attempt=1, worker_id=3, claimed_at=running.claimed_at),)
    await fetch(conn, settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=3, freed=[lease]))
    done = await found(conn, run_id)
    assert done.attempts == (Attempt(attempt=1, worker_id=3, claimed_at=running.claimed_at, ended_at=done.finished_at),)
    assert await one(conn, "select attempts is null from queue_service.finished_runs") is True


async def test_each_failure_and_each_loss_is_shown_with_its_worker_and_its_times(conn: Connection) -> None:
    run_id = await enqueued(conn)
    await fail(conn, "first", worker_id=1)
    await lose(conn, worker_id=2)
    await end(conn, RunState.FAILED, suspect=True)
    run = await found(conn, run_id)
    assert brief(run.attempts) == [
        (1, 1, "first"), (2, 2, "The worker was lost while this run was with it."), (3, 9, "the last"),
    ]  # fmt: skip
    assert [each.error and each.error["reason"] for each in run.attempts] == ["raised", "worker_lost", "raised"]
    times = [time for each in run.attempts for time in (each.claimed_at, each.ended_at)]
    assert times == sorted(time for time in times if time is not None)
    assert (run.attempts[-1].claimed_at, run.attempts[-1].ended_at) == (run.claimed_at, run.finished_at)


async def test_an_attempt_that_went_well_has_no_error_though_the_run_had_one(conn: Connection) -> None:
    run_id = await enqueued(conn)
    await fail(conn, "first")
    await end(conn, RunState.SUCCEEDED)
    assert brief((await found(conn, run_id)).attempts) == [(1, 1, "first"), (2, 9, None)]


async def test_an_attempt_that_goes_on_has_no_error_either(conn: Connection) -> None:
    run_id = await enqueued(conn)
    await fail(conn, "first")
    await begun(conn, worker_id=4)
    running = await found(conn, run_id)
    assert brief(running.attempts) == [(1, 1, "first"), (2, 4, None)]
    assert running.attempts[-1].ended_at is None


async def test_what_is_handed_back_or_snoozes_is_not_kept(conn: Connection) -> None:
    run_id = await enqueued(conn)
    await fail(conn, "first")
    for delay in (None, -1.0):
        run, lease = await begun(conn)
        assert await fetch(conn, settling.give_back([Return(run.claim, delay)], worker_id=1, freed=[lease]))
    await fail(conn, "fourth")
    assert brief((await found(conn, run_id)).attempts) == [(1, 1, "first"), (4, 1, "fourth")]


async def test_the_last_twenty_are_kept_and_the_numbers_say_what_is_missing(conn: Connection) -> None:
    run_id = await enqueued(conn)
    for n in range(1, 24):
        await fail(conn, str(n))
    assert brief((await found(conn, run_id)).attempts) == [(n, 1, str(n)) for n in range(4, 24)]
    await lose(conn)
    assert [each.attempt for each in (await found(conn, run_id)).attempts] == list(range(5, 25))
    await end(conn, RunState.FAILED, suspect=True)
    assert [each.attempt for each in (await found(conn, run_id)).attempts] == list(range(5, 26))
    await fetch(conn, queries.retry(run_id))
    assert [each.attempt for each in (await found(conn, run_id)).attempts] == list(range(6, 26))


async def test_long_errors_are_shortened_but_for_the_last(conn: Connection) -> None:
    run_id = await enqueued(conn)
    described = describe_error(RuntimeError("x" * 50_000))
    run, lease = await begun(conn)
    back = Return(run.claim, failed=True, error=described)
    assert await fetch(conn, settling.give_back([back], worker_id=1, freed=[lease]))
    run = await found(conn, run_id)
    (kept,) = run.attempts
    whole = msgspec.json.decode(described)
    assert run.error == whole
    assert kept.error == whole | {"message": whole["message"][:1_000], "traceback": whole["traceback"][-2_000:]}
    run, lease = await begun(conn)
    assert await fetch(
        conn, settling.finish([Ending(run.claim, RunState.FAILED, error=described)], worker_id=1, freed=[lease])
    )
    assert (await found(conn, run_id)).attempts[-1].error == whole


async def ended_by_finish(conn: Connection) -> tuple[RunState, list[Any]]:
    await end(conn, RunState.CANCELLED, suspect=True)
    return RunState.CANCELLED, [(3, 9, "the last")]


async def ended_by_hand_back(conn: Connection) -> tuple[RunState, list[Any]]:
    run, lease = await begun(conn, suspect=True)
    assert await fetch(conn, queries.cancel(run.id)) == "requested"
    assert await fetch(conn, settling.give_back([Return(run.claim)], worker_id=6, freed=[lease]))
    return RunState.CANCELLED, [(3, 6, "It was cancelled while it ran.")]


async def ended_by_a_failure(conn: Connection) -> tuple[RunState, list[Any]]:
    run, _ = await begun(conn, suspect=True)
    assert await fetch(conn, queries.cancel(run.id)) == "requested"
    failed = Return(run.claim, failed=True, error='{"message": "third"}')
    assert await fetch(conn, settling.give_back([failed], worker_id=6))
    return RunState.CANCELLED, [(3, 6, "third")]


async def ended_by_sweep(conn: Connection) -> tuple[RunState, list[Any]]:
    await begun(conn, suspect=True, worker_id=5)
    await lapse(conn)
    assert len(await fetch(conn, queries.sweep(limit=10, max_losses=2))) == 1
    return RunState.FAILED, [(3, 5, "The worker was lost while this run was with it, for the 2. time.")]


async def cancelled_while_queued(conn: Connection) -> tuple[RunState, list[Any]]:
    run_id = await one(conn, "select id from queue_service.runs")
    assert await fetch(conn, queries.cancel(run_id)) == "cancelled"
    return RunState.CANCELLED, []


async def expired(conn: Connection) -> tuple[RunState, list[Any]]:
    await conn.execute("update queue_service.runs set expires_at = '2020-01-01Z'")
    assert len(await fetch(conn, queries.expire(limit=10))) == 1
    return RunState.EXPIRED, []


@pytest.mark.parametrize(
    "ending",
    [ended_by_finish, ended_by_hand_back, ended_by_a_failure, ended_by_sweep, cancelled_while_queued, expired],
    ids=lambda ending: ending.__name__,
)
async def test_attempts_go_with_the_run_into_history_and_back(
    conn: Connection, ending: Callable[[Connection], Awaitable[tuple[RunState, list[Any]]]]
) -> None:
    run_id = await enqueued(conn, expires_in=timedelta(hours=1))
    await fail(conn, "first")
    await lose(conn, worker_id=2)
    before = [(1, 1, "first"), (2, 2, "The worker was lost while this run was with it.")]
    state, last = await ending(conn)
    over = await found(conn, run_id)
    assert over.state is state
    assert brief(over.attempts) == before + last
    assert await fetch(conn, queries.retry(run_id)) is not None
    back = await found(conn, run_id)
    assert brief(back.attempts) == before + last
    assert [(each.claimed_at, each.ended_at) for each in back.attempts] == [
        (each.claimed_at, each.ended_at) for each in over.attempts
    ]
    await fail(conn, "after that")
    assert brief((await found(conn, run_id)).attempts)[: len(before + last)] == before + last


async def test_a_run_that_is_put_in_the_place_of_another_begins_without_its_attempts(conn: Connection) -> None:
    run_id = await enqueued(conn, singleton_key="s")
    await fail(conn, "of the other")
    assert await fetch(conn, queries.replace(NewRun("noop", "default", "{}", singleton_key="s"))) == run_id
    assert (await found(conn, run_id)).attempts == ()


async def test_a_lease_with_several_runs_tells_each_of_its_own_attempt(conn: Connection) -> None:
    first = await enqueued(conn)
    await fail(conn, "first", worker_id=1)
    second = await enqueued(conn)
    assert len(await claimed(conn, worker_id=8)) == 2
    await lapse(conn)
    assert len(await fetch(conn, SWEEP)) == 2
    assert [each.attempt for each in (await found(conn, first)).attempts] == [1, 2]
    assert [(each.attempt, each.worker_id) for each in (await found(conn, second)).attempts] == [(1, 8)]
