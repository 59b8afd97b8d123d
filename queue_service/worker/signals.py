"""The signals that stop a worker process, which then ends in time, whatever its handlers do.

The first lets handlers end, the second cancels them. A handler may go on all the same, or block the event loop, or leave a
thread behind for which Python waits: then a thread of ours hands back what is left, and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from queue_service.exceptions import message
from queue_service.logs import get_logger
from queue_service.worker.worker import Worker

log = get_logger(__name__)

NUMBERS = (signal.SIGTERM, signal.SIGINT)
# Seconds from when handlers have had their time until the process is ended from outside of the event loop.
PATIENCE = 4.0
# Seconds that a process whose worker has stopped gets to end by itself.
LINGER = 1.5


class StoppedBySignals:
    """For the length of the block, in the main thread. `has_stopped` is to be called when the worker has."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._count = 0
        self._before: dict[signal.Signals, Any] = {}
        self._end: threading.Timer | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._signalled) for number in NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def has_stopped(self, exit_code: int) -> None:
        self._end_in(LINGER, lambda: os._exit(exit_code))

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1
        again = "Signal again to cancel what is running." if self._count == 1 else "Cancelling what is running."
        # Not by way of a stream, which may be in the middle of a write here.
        with contextlib.suppress(OSError):
            os.write(2, f"Stopping. {again}\n".encode())
        self._worker.stop(now=self._count > 1)
        grace = self._worker.settings.drain_timeout.total_seconds() if self._count == 1 else 0.0
        self._end_in(grace + PATIENCE, self._abandon)

    def _abandon(self) -> None:
        try:
            self._worker.abandon()
        except Exception as failed:  # noqa: BLE001 - the process ends in any case
            log.error(
                "what this worker held could not be handed back; it is when its leases lapse", why=message(failed)
            )
        os._exit(1)

    def _end_in(self, seconds: float, end: Any) -> None:
        if self._end is not None:
            self._end.cancel()

        def ended() -> None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            end()

        self._end = threading.Timer(seconds, ended)
        self._end.daemon = True
        self._end.start()
