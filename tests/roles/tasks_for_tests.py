"""An App for processes under roles, whose handlers use what a worker's role is for."""

from __future__ import annotations

import asyncio
from pathlib import Path

from queue_service import App, Run

app = App()


@app.task
async def double(n: int) -> int:
    return 2 * n


@app.task
async def hold_at_first(begun: str, run: Run) -> int:
    """Its first attempt says that it has begun, and does not end."""
    if run.attempt == 1:
        await asyncio.to_thread(Path(begun).touch)
        await asyncio.Event().wait()
    return run.attempt


@app.task
async def agent_turn(text: str, run: Run) -> None:
    assert run.turn is not None

    async def think() -> str:
        return text.upper()

    thought = await run.step("think", think)
    await app.events.append(run.turn.stream, "delta", {"text": thought})
    await app.turns.commit_reply(run.turn.deployment, [run.turn.message_id], {"text": thought})
