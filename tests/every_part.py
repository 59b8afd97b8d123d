"""Every part of the product in short, for tests about what is between it and the database, or who it is there."""

from __future__ import annotations

from typing import Any

from queue_service import Run, Turn
from tests.gateway.served import serving
from tests.support import quick_app, working

TURN = Turn(deployment="dep", message_id="m1", stream="ann/conv")


async def use_all(database: str) -> dict[str, Any]:
    """Every part that writes, in short."""
    app = quick_app(database)

    @app.task
    async def echo(n: int) -> int:
        return n

    @app.task
    async def charge(run: Run) -> str:
        async def pay() -> str:
            return "paid"

        receipt: str = await run.step("charge", pay)
        async with run.transaction() as conn:
            await conn.execute("select 1")
        return receipt

    @app.task
    async def answer(run: Run) -> None:
        assert run.turn is not None
        await app.events.append(run.turn.stream, "delta", {"text": "Hel"})
        await app.turns.commit_reply("dep", ["m1"], {"text": "Hello"})

    async with app:
        ids = await app.enqueue_many("echo", [{"n": n} for n in range(30)], ordering_key="lane")
        charged = await app.enqueue("charge", {})
        await app.turns.dispatch(TURN, "answer", {})
        await app.schedules.put("hourly", "echo", {"n": 1}, cron="0 * * * *")
        async with working(app, {"default": 5}), serving(app) as served, served.client("ann") as ann:
            done = [await app.wait(run_id, timeout=30) for run_id in [*ids, charged]]
            outcome = await app.turns.wait("dep", "m1", timeout=30)
            async with ann.connected("?stream=ann/conv") as (stream, _):
                event = await stream.event()
        await app.cancel(await app.enqueue("echo", {"n": 1}, delay=60))
        await app.turns.sweep()
    return {"states": {each.state for each in done}, "outcome": outcome.kind, "event": event["kind"]}
