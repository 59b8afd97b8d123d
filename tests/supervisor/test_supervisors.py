"""Turns are taken to the one child of their deployment, whichever worker claims them, and their runs wait for their ending."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from queue_service import App, Run, Snooze, Supervisors, Turn
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError
from tests.supervisor.agents import AGENTS
from tests.support import eventually, one, quick_app, rows, working

RUNNING = "select count(*) from queue_service.runs where state = 'running'"
ENDINGS = "select message_id, kind, code from queue_service.turn_outcomes where kind is not null order by 1"
HEARD = "select body ->> 'line', body ->> 'about' from queue_service.events where kind = 'heard' order by seq"
OWNERS = "select deployment, owner from queue_service.deployments order by 1"


def taking(app: App, command: Any = AGENTS["python"], **options: Any) -> Supervisors:
    """With a task `agent_turn` whose payload says what the child does."""
    supervisors = Supervisors(app, command, **{"grace": 0.5} | options)

    @app.task(queue="agent")
    async def agent_turn(run: Run, words: str) -> Any:
        return await supervisors.take(run, words)

    return supervisors


@pytest.fixture
async def other(database: str) -> AsyncIterator[App]:
    """Another process, as far as the database knows."""
    async with quick_app(database) as opened:
        yield opened


async def dispatched(app: App, message_id: str, words: str, deployment: str = "d", **options: Any) -> int:
    turn = Turn(deployment=deployment, message_id=message_id, stream="s")
    return await app.turns.dispatch(turn, "agent_turn", {"words": words}, queue="agent", **options)


async def deltas(conn: Connection) -> int:
    return int(await one(conn, "select count(*) from queue_service.events where kind = 'delta'"))


async def found(app: App, run_id: int) -> Run:
    run = await app.get(run_id)
    assert run is not None
    return run


async def state_of(app: App, run_id: int) -> str:
    return (await found(app, run_id)).state.value


async def test_two_workers_have_one_child_for_each_deployment_and_every_turn_is_answered(
    app: App, other: App, conn: Connection
) -> None:
    started: Counter[str] = Counter()

    def command(deployment: str) -> list[str]:
        started[deployment] += 1
        return AGENTS["python"]

    supervisors = [taking(each, command) for each in (app, other)]
    async with working(app, {"agent": 4}), working(other, {"agent": 4}):
        for number in range(40):
            await dispatched(app, f"m{number}", "delta reply", f"d{number % 4}")
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"), within=60)
        owners = await rows(conn, OWNERS)
    assert {kind for _, kind, _ in await rows(conn, ENDINGS)} == {"reply"}
    assert len(await rows(conn, ENDINGS)) == 40
    # Who came second began none, but may have tried.
    assert [deployment for deployment, _ in owners] == ["d0", "d1", "d2", "d3"]
    for deployment, owner in owners:
        home = supervisors[0] if owner == app.identity else supervisors[1]
        assert home[deployment].pid is not None
    for each in supervisors:
        await each.stop()


async def test_a_turn_that_is_claimed_elsewhere_is_left_to_the_process_that_has_its_deployment(
    app: App, other: App, conn: Connection
) -> None:
    async with taking(app), taking(other) as there:
        async with working(other, {"agent": 4}):
            await dispatched(app, "m1", "delta hold")
            await eventually(lambda: deltas(conn))
            async with working(app, {"agent": 4}):
                for number in range(2, 12):
                    await dispatched(app, f"m{number}", "reply")
                await eventually(lambda: _equal(rows(conn, RUNNING), [(1,)]), within=30)
                await eventually(lambda: _equal(_count(conn), 10), within=30)
                assert await rows(conn, OWNERS) == [("d", other.identity)]
                await app.turns.commit_reply("d", ["m1"], {})
        assert there["d"].pid is not None


async def test_what_a_child_says_is_of_the_attempt_that_gave_it_the_turn(app: App, conn: Connection) -> None:
    said = "select run_id, attempt from queue_service.events where kind = 'delta'"
    async with taking(app), working(app, {"agent": 4}):
        run_id = await dispatched(app, "m", "delta reply")
        await eventually(lambda: _equal(_count(conn), 1))
    assert await rows(conn, said) == [(run_id, 1)]


async def test_a_run_goes_on_for_as_long_as_its_turn_is_owed_an_ending(app: App, conn: Connection) -> None:
    async with taking(app), working(app, {"agent": 4}):
        run_id = await dispatched(app, "m", "delta hold")
        await eventually(lambda: deltas(conn))
        assert await state_of(app, run_id) == "running"
        await app.turns.commit_reply("d", ["m"], {"text": "by somebody else"})
        await eventually(lambda: _equal(state_of(app, run_id), "succeeded"))


async def test_a_turn_that_has_lapsed_when_it_is_taken_ends_as_one_and_not_as_one_without_an_answer(
    app: App, conn: Connection
) -> None:
    supervisors = Supervisors(app, AGENTS["python"])
    lapse = "update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 s'"

    @app.task(queue="agent")
    async def agent_turn(run: Run, words: str) -> Any:
        await conn.execute(lapse)
        return await supervisors.take(run, words)

    async with working(app, {"agent": 4}):
        run_id = await dispatched(app, "m", "reply")
        await eventually(lambda: _equal(state_of(app, run_id), "succeeded"))
    assert await rows(conn, ENDINGS) == [("m", "error", "worker_unresponsive")]


async def test_a_crash_ends_the_turn_that_was_given_and_the_lane_goes_on_with_the_next_child(
    app: App, other: App, conn: Connection
) -> None:
    async with taking(app), taking(other), working(app, {"agent": 4}), working(other, {"agent": 4}):
        for number, words in enumerate(["delta slow", "delta crash", "delta slow"]):
            await dispatched(app, f"m{number}", words, ordering_key="s")
        await dispatched(app, "healthy", "delta slow", "another")
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"), within=60)
    assert await rows(conn, ENDINGS) == [
        ("healthy", "reply", None), ("m0", "reply", None), ("m1", "error", "worker_died"), ("m2", "reply", None),
    ]  # fmt: skip


async def test_a_worker_that_stops_waits_for_the_answer_that_is_being_made(app: App, conn: Connection) -> None:
    async with taking(app):
        async with working(app, {"agent": 4}):
            await dispatched(app, "m", "delta slow")
            await eventually(lambda: deltas(conn))
        assert await rows(conn, ENDINGS) == [("m", "reply", None)]


async def test_an_answer_that_takes_longer_than_the_drain_is_begun_again_by_the_next_worker(
    app: App, other: App, conn: Connection
) -> None:
    async with taking(app) as here:
        async with working(app, {"agent": 4}) as worker:
            run_id = await dispatched(app, "m", "delta hold")
            await eventually(lambda: deltas(conn))
            worker.stop(now=True)
        # The child heard of it, and the turn is owed an ending still, by the run that went back.
        assert await state_of(app, run_id) == "queued"
        assert await app.turns.is_live("d", "m")
        assert here["d"]._given.message_ids == []
    await conn.execute('update queue_service.runs set payload = \'{"words": "reply"}\'')
    async with taking(other), working(other, {"agent": 4}):
        await eventually(lambda: _equal(rows(conn, ENDINGS), [("m", "reply", None)]))


async def test_a_run_that_is_cancelled_takes_its_turn_back_from_the_child(app: App, conn: Connection) -> None:
    async with taking(app), working(app, {"agent": 4}):
        await dispatched(app, "witness", "delta hold")
        await eventually(lambda: deltas(conn))
        run_id = await dispatched(app, "m", "delta hold")
        await eventually(lambda: _equal(deltas(conn), 2))
        await app.cancel(run_id)
        await eventually(lambda: _equal(rows(conn, HEARD), [("cancelled", "m")]))
        await app.turns.commit_reply("d", ["witness"], {})


async def test_a_child_that_cannot_be_started_ends_the_turn_that_it_was_to_get_and_its_run_says_why(
    app: App, conn: Connection
) -> None:
    await app.turns.arm(Turn(deployment="d", message_id="waits", stream="s"))
    async with taking(app, ["/nonexistent/agent"]), working(app, {"agent": 4}):
        run_id = await dispatched(app, "m", "reply")
        await eventually(lambda: _equal(state_of(app, run_id), "cancelled"))
    assert await rows(conn, ENDINGS) == [("m", "error", "worker_startup_failed")]
    assert "No such file" in ((await found(app, run_id)).error or {})["message"]


async def test_a_run_that_lost_its_worker_gets_the_deployment_from_the_one_that_has_it(
    app: App, other: App, conn: Connection
) -> None:
    async with taking(app) as here, taking(other):
        async with working(app, {"agent": 4}):
            await dispatched(app, "m1", "reply")
            await eventually(lambda: _equal(rows(conn, ENDINGS), [("m1", "reply", None)]))
        # Its child is warm, and no run that lost its worker is claimed there.
        assert here["d"].pid is not None
        run_id = await dispatched(app, "m2", "reply")
        await conn.execute("update queue_service.runs set losses = 1")
        async with working(other, {"agent": 4}):
            await eventually(lambda: _equal(_count(conn), 2), within=30)
            assert await rows(conn, OWNERS) == [("d", other.identity)]
    # It waited for the deployment, and did not come back again and again meanwhile.
    assert (await found(app, run_id)).attempt == 1


async def test_what_was_stopped_starts_no_more_children_and_leaves_turns_to_others(
    app: App, other: App, conn: Connection
) -> None:
    here = taking(app)
    await here.stop()
    async with taking(other):
        async with working(app, {"agent": 4}):
            run_id = await dispatched(app, "m", "reply")
            await eventually(lambda: one(conn, "select attempt > 0 and state = 'queued' from queue_service.runs"))
            assert (await found(app, run_id)).failures == 0
        async with working(other, {"agent": 4}):
            await eventually(lambda: _equal(rows(conn, ENDINGS), [("m", "reply", None)]))


async def test_a_stop_does_not_wait_for_a_deployment_that_is_asked_for(app: App, other: App, conn: Connection) -> None:
    async with taking(other), working(other, {"agent": 4}):
        await dispatched(app, "m1", "delta hold")
        await eventually(lambda: deltas(conn))
        here = taking(app)
        # Enqueued for later, so that it is claimed here.
        run_id = await dispatched(app, "m2", "reply", delay=3_600)
        await conn.execute("update queue_service.runs set losses = 1 where id = %s", [run_id])
        run = await found(app, run_id)
        answer = asyncio.create_task(here.take(run))
        await eventually(lambda: one(conn, "select wanted_at is not null from queue_service.deployments"))
        await asyncio.wait_for(here.stop(), 2)
        assert isinstance(await answer, Snooze)
        await app.turns.commit_reply("d", ["m1"], {})


async def test_a_stop_while_turns_are_answered_gives_them_back(app: App, conn: Connection) -> None:
    async with taking(app, grace=0.1) as here, working(app, {"agent": 4}):
        run_id = await dispatched(app, "m", "delta hold")
        await eventually(lambda: deltas(conn))
        await here.stop()
        await eventually(lambda: _equal(state_of(app, run_id), "queued"))
        assert await app.turns.is_live("d", "m")


async def test_an_idle_child_may_end_and_the_next_turn_gets_another(app: App, conn: Connection) -> None:
    async with taking(app) as here, working(app, {"agent": 4}):
        for number in range(3):
            await dispatched(app, f"m{number}", "reply")
            await eventually(lambda: _equal(_count(conn), number + 1))  # noqa: B023
            child = here["d"]
            await child.stop()
            with pytest.raises(KeyError):
                here["d"]


async def test_a_run_without_a_turn_says_so(app: App) -> None:
    supervisors = taking(app)
    run_id = await app.enqueue("agent_turn", {"words": "reply"})
    run = await found(app, run_id)
    with pytest.raises(ConfigError, match="works on no turn"):
        await supervisors.take(run)


async def _equal(asked: Any, expected: object) -> bool:
    return bool(await asked == expected)


async def _count(conn: Connection) -> int:
    return int(await one(conn, "select count(*) from queue_service.turn_outcomes where kind is not null"))
