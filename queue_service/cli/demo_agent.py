"""The agent of the demo's second act: a task that hands turns to a child process for each deployment, and that child.

The child is this module run as a program: it says its process id, streams a few words, and replies, or never does.
"""

from __future__ import annotations

import asyncio
import os
import sys

from queue_service.app import App
from queue_service.runs.model import Run
from queue_service.supervisor import Supervisor
from queue_service.supervisor.child import Conversation, serve
from queue_service.tasks import HandedOn

app = App()
supervisors: dict[str, Supervisor] = {}


@app.task(queue="agents")
async def agent_turn(run: Run, text: str) -> HandedOn:
    turn = run.turn
    assert turn is not None
    supervisor = supervisors.get(turn.deployment)
    if supervisor is None or supervisor.pid is None:
        command = [sys.executable, "-m", "queue_service.cli.demo_agent"]
        supervisor = supervisors[turn.deployment] = Supervisor(app, turn.deployment, command)
        await supervisor.start()
    await supervisor.send(turn, {"text": text})
    return HandedOn(turn.deployment)


async def answer(conversation: Conversation) -> dict[str, str]:
    text = conversation.turn.payload["text"]
    await conversation.event("status", {"pid": os.getpid()})
    for word in ("Let", "me", "see."):
        await conversation.event("delta", {"text": word})
    if text != "Hello?":
        await asyncio.Event().wait()
    return {"text": f"You said: {text}"}


if __name__ == "__main__":
    asyncio.run(serve(answer, beat=0.2))
