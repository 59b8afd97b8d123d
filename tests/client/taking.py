"""Reading a client's events, with an end to the patience."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from queue_service.client import ChatClient, Event


async def take(chat: ChatClient, number: int) -> list[Event]:
    """The next so many events, or fewer if the client has ended."""
    taken: list[Event] = []
    async with asyncio.timeout(60), aclosing(chat.events()) as events:
        async for event in events:
            taken.append(event)
            if len(taken) == number:
                break
    return taken


async def seqs(chat: ChatClient, number: int) -> list[int]:
    return [event.seq for event in await take(chat, number)]


class Signals:
    """Counts what `on_open` and `on_close` said."""

    def __init__(self) -> None:
        self.opened = self.closed = 0

    def on_open(self) -> None:
        self.opened += 1

    def on_close(self) -> None:
        self.closed += 1
