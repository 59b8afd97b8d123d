"""Watching how far a run is, for as long as somebody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from queue_service.db.execute import NOT_EXECUTED
from queue_service.logs import get_logger
from queue_service.runs.model import Progress, Run

log = get_logger(__name__)

T = TypeVar("T")


async def watching(
    ended: Coroutine[Any, Any, T],
    look: Callable[[], Awaitable[Run | None]],
    on_progress: Callable[[Progress], object],
    *,
    poll_interval: float,
) -> T:
    """`await ended`, and report meanwhile what is new at each look."""
    waiting, watch = asyncio.ensure_future(ended), asyncio.ensure_future(_watch(look, on_progress, poll_interval))
    try:
        await asyncio.wait((waiting, watch), return_when=asyncio.FIRST_COMPLETED)
        if watch.done():
            raise await watch
        return await waiting
    finally:
        waiting.cancel()
        watch.cancel()
        await asyncio.wait((waiting, watch))


async def _watch(
    look: Callable[[], Awaitable[Run | None]], on_progress: Callable[[Progress], object], poll_interval: float
) -> BaseException:
    """For ever; or until the callback raises, which is what comes back."""
    last: Progress | None = None
    while True:
        try:
            run = await look()
        except NOT_EXECUTED as lost:
            log.debug("cannot look for progress; trying again", why=str(lost))
        else:
            if run is not None and run.reported not in {None, last}:
                last = run.reported
                try:
                    on_progress(run.reported)
                except BaseException as error:  # noqa: BLE001 - SystemExit would end the loop before it is raised to its caller
                    return error
        await asyncio.sleep(poll_interval)
