"""What a worker calls when it starts and when it stops: to make what its handlers share, and to let go of it.

Each is called once for a worker, on its event loop: those of starting in their order, before anything is claimed; those of
stopping the other way round, when every handler has ended. One that fails to start keeps the worker from starting, and all
those of stopping are called. One that fails to stop, or takes too long, is logged and keeps no other from stopping.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from queue_service.app.hooks import Hook
from queue_service.exceptions import message, type_name
from queue_service.logs import get_logger

log = get_logger(__name__)

# For so many seconds each is waited for: a worker process has four in all when its handlers have had their time.
STOP_SECONDS = 3.0


@asynccontextmanager
async def started(on_start: Sequence[Hook], on_stop: Sequence[Hook]) -> AsyncIterator[None]:
    """For the length of the block, what these make is there."""
    try:
        for hook in on_start:
            await _call(hook)
        yield
    finally:
        for hook in reversed(on_stop):
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await _call(hook)
            except Exception as error:  # noqa: BLE001 - the others are to be stopped all the same
                log.error("a hook of stopping failed", hook=_name(hook), error=type_name(error), why=message(error))


async def _call(hook: Hook) -> None:
    called = hook()
    if inspect.isawaitable(called):
        await called


def _name(hook: Hook) -> str:
    return str(getattr(hook, "__qualname__", type_name(hook)))
