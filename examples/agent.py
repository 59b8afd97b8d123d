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

from queue_service import App, HandedOn, Run, Snooze, Turn, Worker
from queue_service.errors import DeploymentDown
from queue_service.supervisor import Supervisor
from queue_service.supervisor.child import Conversation, serve

app = App()
supervisors: dict[str, Supervisor] = {}
starting = asyncio.Lock()


@app.task(queue="agent")
async def agent_turn(text: str, run: Run) -> Snooze | HandedOn | None:
    """Hand the turn to its deployment; the answer comes later, from the child."""
    turn = run.turn
    assert turn is not None
    if not await app.turns.is_live(turn.deployment, turn.message_id):
        return None
    supervisor = await supervisor_of(turn.deployment)
    try:
        await supervisor.send(turn, {"text": text})
    except DeploymentDown:
        return Snooze(0.1)
    return HandedOn(turn.deployment)


async def supervisor_of(deployment: str) -> Supervisor:
    """The one that runs the deployment's child: a new one where there is none, or it died."""
    async with starting:
        current = supervisors.get(deployment)
        if current is not None and current.pid is None:
            # Until it has ended the turns of its child, a new child's turns would be taken for them.
            await current.wait()
        if current is None or current.pid is None:
            current = supervisors[deployment] = Supervisor(app, deployment, [sys.executable, __file__, "child"])
            await current.start()
        return current


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
        await app.turns.dispatch(turn, "agent_turn", {"text": text})
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
            for supervisor in supervisors.values():
                await supervisor.stop()
            worker.stop()
            await working


if __name__ == "__main__":
    asyncio.run(serve(echo) if sys.argv[1:] == ["child"] else main())
