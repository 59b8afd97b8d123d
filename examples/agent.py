"""A conversation with an echo agent that crashes once: `python examples/agent.py`.

The agent is a process of its own (`python examples/agent.py child`), run by a Supervisor inside the worker. Each message
is a turn: it is dispatched, its events are followed, and it gets exactly one ending, also when the agent dies.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

from queue_service import App, Run, Supervisors, Turn, Worker
from queue_service.supervisor.child import Conversation, serve

app = App()
supervisors = Supervisors(app, [sys.executable, __file__, "child"])


@app.task(queue="agent")
async def agent_turn(run: Run, text: str) -> Any:
    """Take the turn to the child of its deployment, in whichever worker that is, until it has ended."""
    return await supervisors.take(run, {"text": text})


async def echo(conversation: Conversation) -> Mapping[str, Any]:
    """The agent: what runs in the child."""
    text = conversation.turn.payload["text"]
    if text == "crash":
        await conversation.event("status", {"text": "about to crash", "at": time.time()})
        os.kill(os.getpid(), signal.SIGKILL)
    for word in text.split():
        await conversation.event("delta", {"text": word})
        await asyncio.sleep(0.05)
    return {"text": f"You said: {text}"}


async def converse(conversation: str) -> None:
    cursor, crashed_at = 0, 0.0
    for number, text in enumerate(["Hello there", "crash", "Are you back?"], 1):
        turn = Turn(deployment=f"agent of {conversation}", message_id=f"m{number}", stream=conversation)
        print(f"you: {text}", flush=True)
        # In a lane of their own, the messages of a conversation are worked on one after the other.
        await app.turns.dispatch(turn, "agent_turn", {"text": text}, ordering_key=conversation)
        async for event in app.events.follow(conversation, after=cursor):
            cursor = event.seq
            note = ""
            if event.kind == "status":
                crashed_at = event.body["at"]
            elif event.kind == "error":
                note = (
                    f" ({event.body['code']}, {event.body['reason']}; {1000 * (time.time() - crashed_at):.0f} ms later)"
                )
            print(f"  {event.seq} {event.kind}: {event.body.get('text') or event.body['message']}{note}", flush=True)
            if event.terminal:
                break


async def main() -> None:
    async with app:
        worker = Worker(app, {"agent": 10})
        working = asyncio.create_task(worker.run())
        try:
            await converse(f"conversation {uuid.uuid4()}")
        finally:
            worker.stop()
            await working


if __name__ == "__main__":
    asyncio.run(serve(echo) if sys.argv[1:] == ["child"] else main())
