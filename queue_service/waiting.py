"""Waiting for what must come to its end, whoever is cancelled meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def to_its_end(call: Awaitable[T]) -> T:
    """`await call`, to its end even if we are cancelled meanwhile. That cancellation comes after it."""
    task = asyncio.ensure_future(call)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as asked:
            cancelled = asked
    if cancelled is not None:
        if not task.cancelled():
            # Looked at, or it would be reported as never retrieved.
            task.exception()
        raise cancelled
    return task.result()
