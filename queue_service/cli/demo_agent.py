"""The agent of the demo's second act: a task that hands turns to a child process for each deployment, and that child.

The child is this module run as a program: it says its process id, streams a few words, and replies, or never does.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from queue_service.app import App
from queue_service.runs.model import Run
from queue_service.supervisor import Supervisors
from queue_service.supervisor.child import Conversation, serve

app = App()
supervisors = Supervisors(app, [sys.executable, "-m", "queue_service.cli.demo_agent"])


@app.task(queue="agents")
async def agent_turn(run: Run, text: str) -> Any:
    return await supervisors.take(run, {"text": text})


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
