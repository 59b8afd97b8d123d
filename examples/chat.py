"""A conversation in the browser: `python examples/chat.py [--port 8000]`, then open the address it prints.

The gateway that serves the page and the worker that runs the agent share this process, and could be any number of each on
any number of machines: they meet in the database. The agent repeats what it is sent, word by word.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal

import uvicorn

from queue_service import App, Run, Worker
from queue_service.gateway import Gateway, loopback

HOST = "127.0.0.1"

app = App()


@app.task(queue="agent")
async def agent_turn(run: Run, text: str) -> None:
    """One message. Its words are seen as they come; the reply is what counts, and is stored with the end of the turn."""
    turn = run.turn
    assert turn is not None
    if not await app.turns.is_live(turn.deployment, turn.message_id):
        return
    answer = f"You said: {text}"
    for word in re.findall(r"\S+\s*", answer):
        await app.turns.extend(turn.deployment)
        await app.events.append(turn.stream, "delta", {"message_id": turn.message_id, "text": word})
        await asyncio.sleep(0.15)
    await app.turns.commit_reply(turn.deployment, [turn.message_id], {"text": answer})


async def main(port: int) -> None:
    gateway = Gateway(app, authorize=loopback, task="agent_turn")
    config = uvicorn.Config(
        gateway.asgi(with_page=True), host=HOST, port=port, log_level="warning", timeout_graceful_shutdown=5
    )
    async with app, asyncio.TaskGroup() as group:
        worker = Worker(app, {"agent": 10})
        group.create_task(worker.run())
        # The server takes the signal that stops it, and raises it once more when it has stopped. The worker then still
        # ends the turns it has begun.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: worker.stop())
        print(f"Open http://{HOST}:{port}/ and say something. Ctrl-C stops.", flush=True)
        await uvicorn.Server(config).serve()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="A conversation in the browser.")
    arguments.add_argument("--port", type=int, default=8000)
    asyncio.run(main(arguments.parse_args().port))
