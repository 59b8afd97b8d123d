"""An agent that answers word by word, and waits at the word `(wait)` until somebody says `go` in the stream."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from queue_service import App, Run

app = App()


@app.task(queue="agent")
async def agent_turn(run: Run, text: str) -> None:
    turn = run.turn
    assert turn is not None
    if not await app.turns.is_live(turn.deployment, turn.message_id):
        return
    answer = f"You said: {text}"
    async with _beating(turn.deployment):
        await app.events.append(turn.stream, "status", {"text": "Thinking"})
        for word in re.findall(r"\S+\s*", answer):
            if word.strip() == "(wait)":
                await _told_to_go_on(turn.stream)
            await app.events.append(turn.stream, "delta", {"message_id": turn.message_id, "text": word})
    await app.turns.commit_reply(turn.deployment, [turn.message_id], {"text": answer})


async def _told_to_go_on(stream: str) -> None:
    async for event in app.events.follow(stream):
        if event.kind == "go":
            return


@asynccontextmanager
async def _beating(deployment: str) -> AsyncIterator[None]:
    async def beat() -> None:
        while True:
            await app.turns.extend(deployment)
            await asyncio.sleep(0.2)  # the pace of its beats

    beating = asyncio.create_task(beat())
    try:
        yield
    finally:
        beating.cancel()
