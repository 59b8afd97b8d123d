"""Processes for handlers that compute: a run has one to itself, and a process that dies is that attempt's failure only.

JSON lines go in and out, and nothing is pickled: the process imports the task's module and finds it by name. A run that
is given up has its process killed, with all that it started, and the next run gets a new one. A process never outlives
this one: it notices the end of its pipe, and on Linux the kernel kills it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from queue_service import logs
from queue_service.db.session import Address
from queue_service.logs import get_logger
from queue_service.piped_process import PipedProcess
from queue_service.runs.model import Run
from queue_service.settings import Settings
from queue_service.tasks import ProcessDied, Task
from queue_service.worker.handlers.process_protocol import (
    HandlerBegun,
    HandlerWaits,
    Job,
    Message,
    ProgressReported,
    RunEnded,
    RunReturned,
    RunSettled,
)
from queue_service.worker.tally import Settlement

log = get_logger(__name__)

# What is found before it can be asked for: our own package, where this process found it.
BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
    "from queue_service.worker.handlers.process_main import serve; serve(int(sys.argv[1]))"
)
# How long a process may take to start and to import the task's module.
STARTUP = 60.0
# How long an idle process gets to end by itself, once its pipe is closed.
EXIT_SECONDS = 2.0
# Around a result: the traceback of an error, and the names of fields.
ENVELOPE = 256 * 1024

_decode = msgspec.json.Decoder(
    HandlerBegun | HandlerWaits | RunSettled | ProgressReported | RunEnded | RunReturned
).decode


class Processes:
    """`size` at most, made when they are first needed. Belongs to one event loop."""

    def __init__(self, size: int, *, address: Address, worker_id: int, settings: Settings) -> None:
        self._places = asyncio.Semaphore(size)
        self._address = address
        self._worker_id = worker_id
        self._result_limit = settings.payload_limit
        self._lent_statement_timeout = settings.lent_statement_timeout
        self._idle: list[_Process] = []
        self._living: set[_Process] = set()

    async def run(
        self, task: Task[..., Any], run: Run, *, on_turn: Callable[[], None], on_message: Callable[[Message], None]
    ) -> Settlement:
        """The outcome of this run. `on_turn` is called when it need not wait for a process any more: from then on its
        handler may be called at any moment. `on_message` gets what its process sends before the answer,
        first of all HandlerBegun. When cancelled, the process is killed. Raises ProcessDied."""
        job = self._job(task, run)
        async with self._places:
            on_turn()
            while True:
                process = self._taken()
                process.run = run
                try:
                    outcome = await process.do(job, on_message)
                except BaseException as error:
                    process.kill()
                    # It died while it was idle, and that was noticed only now.
                    if isinstance(error, ProcessDied) and process.served and not process.has_begun:
                        continue
                    raise
                process.served += 1
                process.run = None
                self._idle.append(process)
                return outcome

    def pid_of(self, run: Run) -> int | None:
        """The process that executes this run; None while it waits for one. May be called from any thread."""
        return next((process.pid for process in list(self._living) if process.run is run), None)

    async def close(self) -> None:
        """End them all."""
        lives = [process.life for process in self._living]
        for process in self._living:
            process.close()
        if lives:
            await asyncio.wait(lives, timeout=EXIT_SECONDS)
        for process in list(self._living):
            process.kill()
        if lives:
            await asyncio.wait(lives, timeout=EXIT_SECONDS)

    def _taken(self) -> _Process:
        while self._idle:
            process = self._idle.pop()
            if not process.has_ended:
                return process
        # Twice: a result is text within a line, and its quotes take two characters there.
        process = _Process(limit=2 * self._result_limit + ENVELOPE)
        self._living.add(process)
        process.life.add_done_callback(lambda _life: self._living.discard(process))
        return process

    def _job(self, task: Task[..., Any], run: Run) -> bytes:
        main, main_file = _main() if task.function.__module__ == "__main__" else (None, None)
        return msgspec.json.encode(
            Job(
                module=task.function.__module__, main=main, main_file=main_file, run=run,
                conninfo=self._address.conninfo, pooler=self._address.pooler,
                lent_statement_timeout=self._lent_statement_timeout,
                limit=self._result_limit, max_attempts=run.max_attempts or task.retry.max_attempts,
                worker_id=self._worker_id, logging=logs.configured,
            )
        )  # fmt: skip


class _Process:
    """From its start to its end. It does one thing at a time."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._child: PipedProcess | None = None
        self._job: bytes | None = None
        self._answer: asyncio.Future[Settlement] | None = None
        self._on_message: Callable[[Message], None] = lambda _message: None
        self._doomed = False
        self.has_begun = False
        self.served = 0
        self.run: Run | None = None
        self.has_ended = False
        self.life = asyncio.create_task(self._live())

    async def do(self, job: bytes, on_message: Callable[[Message], None]) -> Settlement:
        """What this process answers to a job. `on_message` gets what it sends before. Until its handler has begun, STARTUP
        bounds it, and then the caller does. Raises ProcessDied."""
        self._answer = asyncio.get_running_loop().create_future()
        self.has_begun = False
        try:
            async with asyncio.timeout(STARTUP) as patience:

                def received(message: Message) -> None:
                    if isinstance(message, HandlerBegun):
                        self.has_begun = True
                        patience.reschedule(None)
                    on_message(message)

                self._on_message = received
                if self._child is None:
                    self._job = job
                else:
                    self._child.write(job)
                return await self._answer
        except TimeoutError:
            raise ProcessDied(f"was not ready within {STARTUP:g} s, and was killed") from None
        finally:
            self._answer = None

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def kill(self) -> None:
        self._doomed = True
        if self._child is not None and not self.has_ended:
            # Its whole session: what the handler started goes with it.
            with contextlib.suppress(OSError):
                os.killpg(self._child.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let it end by itself, as soon as it has nothing to do."""
        if self._child is None:
            self.kill()
        else:
            self._child.close()

    async def _live(self) -> None:
        try:
            how, number = _how(await self._ended())
        except Exception as broken:  # noqa: BLE001 - whoever waits for its answer must hear of it, or would wait for ever
            how, number = f"could not be run: {type(broken).__name__}: {broken}", None
        self.has_ended = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ProcessDied(how, signal=number))
        elif not self._doomed and number is not None:
            log.warning("an idle process for handlers died", how=how)

    async def _ended(self) -> str:
        child = await PipedProcess.spawn(
            [sys.executable, "-c", BOOT, str(os.getpid()), json.dumps([str(path) for path in sys.path])],
            env=None, cwd=None, limit=self._limit, take=self._take, overrun=self._overrun,
        )  # fmt: skip
        self._child = child
        if self._doomed:
            self.kill()
        elif self._job is not None:
            child.write(self._job)
        ended = await child.ended()
        # What it said before it ended still counts.
        await child.silent()
        child.close()
        return ended

    def _take(self, line: bytes) -> None:
        if self._child is not None:
            self._child.resume()
        # What cannot be read was printed while Python started: later, what is printed goes elsewhere.
        with contextlib.suppress(msgspec.DecodeError):
            message = _decode(line)
            if not isinstance(message, (RunEnded, RunReturned)):
                self._on_message(message)
            elif self._answer is not None and not self._answer.done():
                self._answer.set_result(message.outcome)

    def _overrun(self, how: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ProcessDied(how))


def _how(ended: str) -> tuple[str, str | None]:
    """A clause about its end, and the signal that was the cause."""
    if not ended.startswith("killed by "):
        return f"ended with {ended}", None
    number = ended.removeprefix("killed by ")
    doubt = " (out of memory, perhaps)" if number == "SIGKILL" else ""
    return f"was killed by {number}{doubt}", number


def _main() -> tuple[str | None, str | None]:
    """The module and the file of the program that runs here, to be imported under another name."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    return (None if spec is None else spec.name), getattr(main, "__file__", None)
