"""A child in Python, by the library's `serve`: what it does with a turn are the words of its payload."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from typing import Any

from queue_service.supervisor import protocol
from queue_service.supervisor.child import Conversation, serve

witness: Conversation | None = None


async def handle(conversation: Conversation) -> Mapping[str, Any]:
    global witness  # noqa: PLW0603
    witness = witness or conversation
    said = 0
    for word in conversation.turn.payload.split():
        match word:
            case "delta":
                said += 1
                await conversation.event("delta", said)
            case "reply":
                return {"text": "done"}
            case "slow":
                await asyncio.sleep(0.3)  # the work of the agent
                return {"text": "slow"}
            case "withhold":
                await conversation.withhold("provider_overloaded")
            case "take":
                async for message in conversation.inputs():
                    await heard("input", message.message_id)
                    return {"text": "both"}
            case "crash":
                os._exit(3)
    await hold(conversation)
    raise AssertionError("it is held until it is cancelled")


async def hold(conversation: Conversation) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(inputs(conversation))
            group.create_task(interrupted(conversation))
            for request_id in ("may I", "gate-1"):
                group.create_task(decided(conversation, request_id))
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        await heard("cancelled", conversation.turn.message_id)
        raise


async def inputs(conversation: Conversation) -> None:
    async for message in conversation.inputs():
        await heard("input", message.message_id)


async def interrupted(conversation: Conversation) -> None:
    await conversation.interrupted.wait()
    await heard("interrupt", None)


async def decided(conversation: Conversation, request_id: str) -> None:
    decision = await conversation.decision(request_id)
    kind = "permission" if isinstance(decision, protocol.PermissionLine) else "decision"
    await heard(kind, decision.request_id)


async def heard(line: str, about: str | None) -> None:
    assert witness is not None
    await witness.event("heard", {"line": line, "about": about})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.write(1, b'{"type":"ready","protocol":%s}\n' % sys.argv[1].encode())
    asyncio.run(serve(handle, beat=0.1))
