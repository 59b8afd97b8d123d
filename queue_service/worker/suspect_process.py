"""The process of their own in which runs that lost their worker run, for as long as there are any.

It is a worker like its parent, which begins nothing else, and ends when none is due. One of them may kill it: then it is
started again after a pause that grows, and what it held is taken over as that of any lost worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence

from queue_service.backoff import Pauses
from queue_service.logs import get_logger
from queue_service.piped_process import send_signal
from queue_service.services.loop import Service

log = get_logger(__name__)

FIRST_PAUSE, MAX_PAUSE = 0.5, 30.0
# Seconds that it gets to end when this worker has ended.
END_SECONDS = 1.5


class SuspectProcess:
    """Started by `command`, if there is one, once `need` was called. It is told to stop by signals, and by the end of its
    standard input."""

    def __init__(self, command: Sequence[str] | None) -> None:
        self._command = command or ()
        self._needed = asyncio.Event()
        self._process: Process | None = None
        self._is_stopping = False

    def need(self) -> None:
        """There are suspects: let it run, if it does not."""
        self._needed.set()

    @property
    def is_possible(self) -> bool:
        return bool(self._command)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def run(self, service: Service) -> None:
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE)
        while not self._is_stopping:
            await self._needed.wait()
            self._needed.clear()
            if self._is_stopping:
                return
            if (code := await self._once()) == 0:
                service.well()
                pauses.reset()
            elif not self._is_stopping:
                service.failed(RuntimeError(f"the process for runs that lost their worker {_how(code)}"))
                await asyncio.sleep(pauses.next())

    def stop(self) -> None:
        """Let its handlers end, or (the second time) cancel them; and start it no more."""
        self._is_stopping = True
        self._needed.set()
        self._signal(signal.SIGTERM)

    async def close(self) -> None:
        """Be done with it: it hands back what it has, and is killed if it has not ended soon."""
        self.stop()
        if (process := self._process) is not None and process.stdin is not None:
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await process.wait()
            self._signal(signal.SIGKILL)

    async def _once(self) -> int:
        # A session of its own: Ctrl-C in our terminal is for us, and we stop it.
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, stdout=DEVNULL, start_new_session=True
        )
        log.info("runs that lost their worker run in a process of their own", pid=process.pid)
        if self._is_stopping and process.stdin is not None:
            # Nobody has told it: there was no process yet.
            process.stdin.close()
        return await process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                send_signal(self._process, number)


def _how(code: int) -> str:
    return f"ended with code {code}" if code >= 0 else f"was killed by signal {-code}"


# The other side: in that process itself


def stop_with_parent() -> None:
    """Once our standard input has ended, stop as by two signals: what runs here is handed back at once."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)
        # Or the second is lost in the first.
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="queue_service parent", daemon=True).start()


def own_command(*options: str) -> list[str]:
    """What started this process, with these options more."""
    return [sys.executable, "-m", "queue_service", *sys.argv[1:], *options]
