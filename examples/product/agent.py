"""The agent of one conversation: a process of its own, which a Supervisor starts and talks to."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from queue_service.supervisor.child import Conversation, serve


async def answer(conversation: Conversation) -> dict[str, Any]:
    """Repeats what it is told, word by word, and what is added while it does."""
    asked = [conversation.turn.payload["text"]]
    await conversation.event("status", {"text": "Thinking"})
    said: list[str] = []
    while asked:
        for word in asked.pop(0).split():
            if word == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            said.append(word)
            await conversation.event("delta", {"message_id": conversation.turn.message_id, "text": f"{word} "})
            await asyncio.sleep(0.01)
            if conversation.interrupted.is_set():
                return {"text": f"I stop at: {' '.join(said)}"}
        asked += [message.payload["text"] async for message in conversation.inputs(wait=False)]
    return {"text": f"You said: {' '.join(said)}"}


if __name__ == "__main__":
    asyncio.run(serve(answer))
