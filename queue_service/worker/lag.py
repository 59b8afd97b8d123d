"""Reports a handler that blocks the event loop: which task, and where it is, once for each time that it does.

Seen from a thread of its own, which asks a loop at work for a sign of life twice a second, and looks at the loop's stack
when none comes. What blocks the loop loses no lease, since the keeper has its own; but every other handler waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from queue_service.logs import get_logger
from queue_service.runs.model import Run

log = get_logger(__name__)

THRESHOLD = 1.0
LOOK_PERIOD = 0.5


class LagWatch:
    """`run_of` finds the run whose handler an asyncio task executes; it is called from the thread."""

    def __init__(self, run_of: Callable[[asyncio.Task[Any]], Run | None]) -> None:
        self._run_of = run_of
        self._stop = threading.Event()
        self._alive = threading.Event()

    async def run(self) -> None:
        """Watch the loop that this is called on, until cancelled."""
        loop = asyncio.get_running_loop()
        ident = threading.get_ident()
        thread = threading.Thread(target=self._watch, args=(loop, ident), name="queue_service lag", daemon=True)
        thread.start()
        try:
            await loop.create_future()
        finally:
            self._stop.set()
            self._alive.set()

    def _watch(self, loop: asyncio.AbstractEventLoop, ident: int) -> None:
        # A closed loop: nobody is left to be watched.
        with contextlib.suppress(RuntimeError):
            while not self._stop.wait(LOOK_PERIOD):
                # A loop that waits has no task at work, and would be woken only to say so.
                if asyncio.current_task(loop) is None:
                    continue
                self._alive.clear()
                asked = time.monotonic()
                loop.call_soon_threadsafe(self._alive.set)
                reported: object = self
                while not self._alive.wait(THRESHOLD):
                    reported = self._report(loop, ident, reported)
                if reported is not self:
                    log.info("the event loop turns again", seconds=round(time.monotonic() - asked, 1))

    def _report(self, loop: asyncio.AbstractEventLoop, ident: int, reported: object) -> Run | None:
        """Report the run that blocks the loop, unless it is the one that was `reported` last."""
        frame = sys._current_frames().get(ident)  # noqa: SLF001 - the one way to see where another thread is
        task = asyncio.current_task(loop)
        run = None if task is None else self._run_of(task)
        if run is reported:
            return run
        log.warning(
            "the event loop is blocked: every handler and every answer waits. Await, or make it a plain function",
            task=None if run is None else run.task, run_id=None if run is None else run.id, seconds=THRESHOLD,
            stack="" if frame is None else "".join(traceback.format_stack(frame, limit=20)),
        )  # fmt: skip
        return run
