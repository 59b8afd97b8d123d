"""A chat product: a page and a bot platform in front, agents in processes of their own behind. docs/agents.md explains it.

In this directory, with QUEUE_SERVICE_DATABASE_URL set, as many of each as you like:

    queue-service worker -a product:app -q agents:20 -q thread_response:10
    uvicorn product:web --port 8000
    uvicorn platform_stub:web --port 8001
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from queue_service import App, Deliveries, Delivery, FailedDelivery, Retry, Run, Shown, Snooze, Supervisors, Turn
from queue_service.gateway import Gateway, loopback, page
from queue_service.logs import get_logger

PLATFORM = os.environ.get("PLATFORM_URL", "http://127.0.0.1:8001")
AGENT = Path(__file__).with_name("agent.py")

log = get_logger(__name__)
app = App()
http = httpx2.AsyncClient(base_url=PLATFORM, timeout=10)


# What people see on the bot platform


class Chat:
    """A status is shown as a message, which the reply then takes the place of."""

    async def handle_status(self, delivery: Delivery) -> object:
        return await self._show(delivery, delivery.event.body["text"])

    async def handle_completion(self, delivery: Delivery) -> object:
        return await self._show(delivery, delivery.event.body["text"])

    async def handle_error(self, delivery: Delivery) -> object:
        return await self._show(delivery, delivery.event.body["message"])

    async def handle_delta(self, delivery: Delivery) -> None:
        """The platform shows whole messages."""

    async def handle_ephemeral(self, delivery: Delivery) -> None:
        """Nothing of ours is."""

    async def _show(self, delivery: Delivery, text: str) -> object:
        if delivery.platform_message_id is not None:
            answer = await http.put(f"/messages/{delivery.platform_message_id}", json={"text": text})
        else:
            # The platform knows the key again, should we die before the id is stored.
            new = {"channel": delivery.channel_id, "key": delivery.message_id, "text": text}
            answer = await http.post("/messages", json=new)
        if answer.status_code == 429:
            return Snooze(float(answer.headers["Retry-After"]))
        answer.raise_for_status()
        return Shown(answer.json()["id"])


def give_up(failed: FailedDelivery) -> None:
    log.error("a person was not shown what was said", channel_id=failed.channel_id, why=failed.reason)


deliveries = Deliveries(app, failed=give_up)
deliveries.register("chat", Chat())


# What answers

supervisors = Supervisors(app, [sys.executable, str(AGENT)], deliver=deliveries.send, delivered=("status",))


@app.on_start
async def make_table() -> None:
    async with app.pool.connection() as conn:
        await conn.execute(
            "create table if not exists public.bookings (id serial primary key, message_id text, what text)"
        )


@app.task(queue="agents", retry=Retry(max_attempts=5))
async def agent_turn(run: Run, text: str) -> Any:
    """Bookings are made here, each once. Everything else is for the agent of the conversation."""
    if text.startswith("book "):
        return await book(run, text.removeprefix("book "))
    return await supervisors.take(run)


async def book(run: Run, what: str) -> None:
    turn = run.turn
    assert turn is not None
    await app.turns.extend(turn.deployment)
    async with run.step("booking") as step:
        if not step.done:
            cursor = await step.conn.execute(
                "insert into bookings (message_id, what) values (%s, %s) returning id", [turn.message_id, what]
            )
            step.result = (await cursor.fetchone() or [0])[0]
    await app.turns.commit_reply(turn.deployment, [turn.message_id], {"text": f"Booked {what}: {step.result}"})


# What people reach

gateway = Gateway(app, authorize=loopback, options={"max_attempts": 5})


async def from_platform(request: Request) -> Response:
    """The platform's webhook. It is called again until it answers, and the message is taken in once."""
    said = await request.json()
    stream = f"chat/{said['channel']}"
    turn = Turn(
        deployment=stream, message_id=said["id"], stream=stream, platform="chat", channel_id=said["channel"],
        user_id=said["user"],
    )  # fmt: skip
    await app.turns.send(turn, "agent_turn", {"text": said["text"]}, ordering_key=stream, max_attempts=5)
    return JSONResponse({}, 202)


web = Starlette(
    routes=[*gateway.routes(), Route("/bot", from_platform, methods=["POST"]), *page.routes()],
    lifespan=gateway.lifespan,
)
