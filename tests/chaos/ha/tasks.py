"""What the workers do: each run leaves a row that is there once, if what it promises is true."""

from __future__ import annotations

from queue_service import App, Retry, Run

# Without a key: two of a kind are what is looked for.
EFFECTS = "create table if not exists public.ha_effects (uid text not null, name text not null, run_id bigint, attempt integer)"
LEAVE = "insert into public.ha_effects (uid, name, run_id, attempt) values (%s, %s, %s, %s)"

# An outage in the middle of a handler is a failure of its attempt.
UNTIL_IT_IS_DONE = Retry(max_attempts=1000, base=0.2, cap=1)

app = App()


@app.task(retry=UNTIL_IT_IS_DONE)
async def effect(run: Run, uid: str) -> None:
    """One row with a step, and another one with the ending."""
    async with run.step("step") as step:
        if not step.done:
            await step.conn.execute(LEAVE, [uid, "step", run.id, run.attempt])
    async with run.transaction() as conn:
        await conn.execute(LEAVE, [uid, "ending", run.id, run.attempt])


@app.task(retry=UNTIL_IT_IS_DONE)
async def plain(uid: str) -> str:
    return uid


@app.task(retry=UNTIL_IT_IS_DONE)
async def answer(run: Run, uid: str) -> None:
    """An event, and the reply."""
    turn = run.turn
    assert turn is not None
    await app.turns.extend(turn.deployment)
    await app.events.append(turn.stream, "delta", {"uid": uid})
    await app.turns.commit_reply(turn.deployment, [turn.message_id], {"text": uid})
