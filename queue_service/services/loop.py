"""The one background loop: do something every so often, survive an outage of the database, and say so once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import timedelta

from queue_service.db.execute import cancellable
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger

log = get_logger(__name__)


async def every(interval: timedelta, once: Callable[[], Awaitable[object]], *, name: str) -> None:
    """Call `once` for ever, with up to a tenth of the interval as jitter, so that replicas drift apart. Only an
    unreachable database is survived; any other error is a mistake, and ends the loop for its owner to see.
    """
    lost = False
    while True:
        try:
            with cancellable():
                await once()
            if lost:
                log.info("the database is back", service=name)
            lost = False
        except DatabaseUnavailable as why:
            if not lost:
                log.warning("the database is lost; trying again", service=name, why=str(why))
            lost = True
        await asyncio.sleep(interval.total_seconds() * (0.95 + 0.1 * random.random()))  # noqa: S311
