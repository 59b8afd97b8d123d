"""Whatever happens, in whatever order: events without a gap and once, messages in order and once."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable

import pytest

from queue_service.client import ChatClient
from queue_service.errors import SendFailed
from tests.client.server import Answer, Gateway

Make = Callable[..., ChatClient]

ROUNDS = 60
MISSES = (Answer(503), Answer(429), Answer(404), Answer(lost=True), Answer(lost=True, does=True))


async def misbehave(gateway: Gateway, chance: random.Random) -> None:
    """One thing that a gateway, or what is between, may do at any time."""
    line, stream = gateway.line, chance.choice("st")
    what = chance.randrange(9)
    if what == 0:
        line.cut()
    elif what == 1:
        line.finish()
    elif what == 2:
        await line.frame("goodbye", {"reason": "shutdown"}, retry=5)
    elif what == 3:
        await line.welcome(f"newer-{chance.random()}")
    elif what == 4:
        name = chance.choice(["send", "history", "reconnect", "events"])
        gateway.next[name].extend([chance.choice(MISSES), Answer()])
    elif what == 5 and gateway.streams[stream]:
        await line.event(chance.choice(gateway.streams[stream]))
    elif what == 6:
        gateway.is_silent = not gateway.is_silent
    else:
        await gateway.append(stream, *["delta"] * chance.randrange(1, 30))
        if gateway.is_silent and chance.random() < 0.5:
            await line.gap(stream, 1, gateway.heads[stream], gateway.heads[stream])


async def read(chat: ChatClient, streams: str) -> dict[str, list[int]]:
    """Until each has had its ending."""
    seen: defaultdict[str, list[int]] = defaultdict(list)
    open_ones = set(streams)
    async for event in chat.events():
        seen[event.stream].append(event.seq)
        if event.terminal:
            open_ones.remove(event.stream)
        if not open_ones:
            return seen
    raise AssertionError(f"the client ended before {open_ones} had")


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_lost_repeated_or_reordered(gateway: Gateway, client: Make, seed: int) -> None:
    chance = random.Random(seed)
    chat = client(buffer=20)
    receipts: list[asyncio.Future[object]] = []
    await chat.connect({"s": 0, "t": 0})
    reading = asyncio.ensure_future(read(chat, "st"))
    for n in range(ROUNDS):
        await misbehave(gateway, chance)
        receipts.append(asyncio.ensure_future(chat.send("s", {"text": str(n)})))
        await asyncio.sleep(chance.random() * 0.02)  # at any moment of what the client does about it
    outcomes = await asyncio.gather(*receipts, return_exceptions=True)
    gateway.is_silent = False
    gateway.next.clear()
    for stream in "st":
        await gateway.append(stream, "reply")
    async with asyncio.timeout(60):
        seen = await reading
    assert seen == {stream: list(range(1, gateway.heads[stream] + 1)) for stream in "st"}
    accepted = [int(event["body"]["body"]["text"]) for event in gateway.streams["s"] if event["kind"] == "message"]
    assert accepted == sorted(set(accepted))
    stored = [n for n, outcome in enumerate(outcomes) if not isinstance(outcome, SendFailed)]
    assert set(stored) <= set(accepted)
    assert len(stored) > ROUNDS / 2
