"""What was read and not yet taken: a bounded queue. While it is full, whoever puts waits, so the socket is not read, and
the gateway keeps what comes, in the stream where it is stored anyway.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Buffer(Generic[T]):
    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._has_room = asyncio.Event()
        self._has_items = asyncio.Event()
        self._ended = False
        self._failure: BaseException | None = None

    async def put(self, item: T) -> None:
        """Waits for room. Cancelled while it waits, it has put nothing."""
        while len(self._items) >= self._size:
            self._has_room.clear()
            await self._has_room.wait()
        self._items.append(item)
        self._has_items.set()

    async def take(self) -> T | None:
        """The next item; None after the last one, or what went wrong is raised."""
        while not self._items:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                return None
            self._has_items.clear()
            await self._has_items.wait()
        self._has_room.set()
        return self._items.popleft()

    def end(self, failure: BaseException | None = None) -> None:
        """Nothing more will be put. What was, can still be taken."""
        if not self._ended:
            self._ended, self._failure = True, failure
            self._has_items.set()
