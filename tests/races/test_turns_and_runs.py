"""Turns and their runs end in statements that lock runs, lanes, markers and streams: in one order, whatever meets."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable

from queue_service import App, Deliveries, Delivery, Retry, Run, Turn
from queue_service.app.messages import Mode
from queue_service.db.execute import Connection
from queue_service.turns.model import TurnFailure
from tests.support import eventually, one, rows, working

MESSAGES, STREAMS = 300, 3
DEADLOCKS = "select deadlocks from pg_stat_database where datname = current_database()"


class Renders:
    async def handle(self, delivery: Delivery, /) -> None: ...

    handle_delta = handle_status = handle_error = handle_completion = handle_ephemeral = handle


async def _converse(app: App, numbers: Iterable[int]) -> None:
    dice = random.Random(random.SystemRandom().randrange(10**6))
    for n in numbers:
        stream = f"s{n % STREAMS}"
        turn = Turn(deployment=stream, message_id=f"m{n}", stream=stream, platform="chat", channel_id=stream)
        mode: Mode = dice.choice(["queue", "queue", "steer", "interrupt"])
        await app.turns.send(turn, "t", {"n": n}, mode=mode, ordering_key=stream)
        match dice.randrange(8):
            case 0:
                await app.turns.unsend(stream, turn.message_id)
            case 1:
                await app.turns.fail(stream, turn.message_id, TurnFailure("rejected"))
            case 2:
                await app.turns.extend(stream)


async def test_nothing_deadlocks_and_each_turn_ends_once_whatever_meets_in_a_conversation(
    app: App, conn: Connection
) -> None:
    @app.task(retry=Retry(max_attempts=2, backoff="fixed", base=0, jitter=False))
    async def t(run: Run, n: int) -> None:
        turn = run.turn
        assert turn is not None
        await app.events.append(turn.stream, "delta", {"message_id": turn.message_id})
        given = [each.message_id async for each in run.inputs(wait=False)]
        if n % 5 == 0:
            raise ValueError(n)
        if n % 7:
            await app.turns.commit_reply(turn.deployment, [turn.message_id, *given], {"n": n})

    deliveries = Deliveries(app)
    deliveries.register("chat", Renders())
    before = await one(conn, DEADLOCKS)
    async with working(app, {"default": 5, "thread_response": 5}):
        await asyncio.gather(*(_converse(app, range(each, MESSAGES, 6)) for each in range(6)))
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.turn_markers"), within=200)
    # Statistics are sent when a session is idle.
    await conn.execute("select pg_stat_force_next_flush()")
    assert await one(conn, DEADLOCKS) == before
    ended = Counter(await rows(conn, "select kind, code from queue_service.turn_outcomes"))
    assert sum(ended.values()) == MESSAGES
    # The last one: it was extended, and a busy machine came to it only after its deadline.
    codes = {None, "internal_error", "no_answer", "cancelled", "rejected", "worker_unresponsive"}
    assert {code for _, code in ended} <= codes
    assert await one(conn, "select count(*) from queue_service.events where terminal") == MESSAGES
    for stream, head, count, last in await rows(
        conn,
        "select s.stream, s.head, count(*), max(e.seq) from queue_service.streams as s "
        "join queue_service.events as e using (stream) group by s.stream, s.head",
    ):
        assert head == count == last, f"stream {stream} has a hole"
