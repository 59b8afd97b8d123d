"""The other side of `processes`: a process that executes runs one by one, and decides itself what becomes of each.

It decides because the exception and the retry policy are here, and neither would survive a trip as JSON. Jobs come in on
standard input and answers go out on standard output, both under numbers of their own: what a handler prints goes to
standard error. The end of the input is the end of the process, even in the middle of a run.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
import threading
import types
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from io import BufferedReader, BufferedWriter
from queue import SimpleQueue
from typing import Any, Self

import msgspec

from queue_service import logs
from queue_service.app import App
from queue_service.db.lending import Lender
from queue_service.db.lines import Borrower
from queue_service.db.session import Address
from queue_service.db.url import Server
from queue_service.errors import ConfigError
from queue_service.piped_process import die_with_parent, taken_pipes
from queue_service.runs import context
from queue_service.runs.model import Ending, Run
from queue_service.settings import Pooler
from queue_service.tasks import Retry, Task
from queue_service.turn import Input
from queue_service.worker.handlers import results
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
from queue_service.worker.handlers.step_block import StepBlock
from queue_service.worker.handlers.steps import AttemptSteps, StoreOfProcess, called_blocking, check_no_loop, has_ended
from queue_service.worker.handlers.transaction import Transaction
from queue_service.worker.tally import Settlement

# The program of the worker, imported under this name, does not take itself for the program of this process.
MAIN = "__mp_main__"
# How long what is idle may take to end once nobody listens.
LINGER = 1.0
# Seconds between what is passed on of a handler's reports.
REPORTS = 0.1

_job = msgspec.json.Decoder(Job).decode
_encode = msgspec.json.Encoder().encode


def serve(parent: int) -> None:
    """Until the worker closes its end, or is gone."""
    die_with_parent()
    if os.getppid() != parent:
        return
    incoming, outgoing = taken_pipes()
    out: BufferedWriter = BufferedWriter(outgoing)
    lines: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(
        target=_listen, args=(BufferedReader(incoming), lines), name="queue_service jobs", daemon=True
    ).start()
    while (line := lines.get()) is not None:
        _send(out, _executed(_job(line), out))


def _listen(incoming: BufferedReader, lines: SimpleQueue[bytes | None]) -> None:
    for line in incoming:
        lines.put(line)
    lines.put(None)
    # A handler at work, or a thread that one has left behind, would keep this process for ever.
    threading.Event().wait(LINGER)
    os._exit(1)


def _executed(job: Job, outgoing: BufferedWriter) -> RunEnded | RunReturned:
    run = job.run
    if job.logging != logs.configured and job.logging is not None:
        logs.configure(level=job.logging[0], fmt=job.logging[1])
    logs.running.set(run)
    # Until the task is found, only its number of attempts is known.
    retry = Retry(max_attempts=job.max_attempts)
    try:
        task = _found(job.module, run.task, job.main, job.main_file, job.conninfo)
        retry = task.retry
        _send(outgoing, HandlerBegun())
        with _Context(job, outgoing) as found, context.registered(found.find):
            outcome: Settlement = results.returned(run, task.function(**task.arguments(run)), limit=job.limit)
    except BaseException as error:  # noqa: BLE001 - whatever a handler raises is its run's failure
        outcome = results.raised(run, retry, error)
    return RunEnded(outcome) if isinstance(outcome, Ending) else RunReturned(outcome)


class _Context:
    """What the handler of this run can ask for. What it reports is passed on ten times a second at most, and once it has
    ended, nothing is: the worker would take it for the next run's."""

    def __init__(self, job: Job, outgoing: BufferedWriter) -> None:
        self._job = job
        self._outgoing = outgoing
        self._changing = threading.Lock()
        self._newest: str | None = None
        self._over = False
        self._has_ended = False
        self._steps = AttemptSteps(job.run, limit=job.limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._over = True

    def find(self, run: Run) -> Self | None:
        return self if run is self._job.run else None

    def transaction(self, conn: Any) -> Transaction[Any, Any]:
        job = self._job
        return Transaction(
            job.run, conn, lender=self._lender(), worker_id=job.worker_id, limit=job.limit,
            ended=self._ended,
        )  # fmt: skip

    def step(self, name: str, conn: Any) -> StepBlock[Any, Any]:
        store = self._step_store()
        return StepBlock(self._steps, name, conn, lender=self._lender(), store=None, blocking_store=store)

    def call_step(self, name: str, call: Callable[[], Any]) -> Any:
        store = self._step_store()
        check_no_loop()
        self._steps.use(name)
        return called_blocking(store, self._steps, name, call)

    def inputs(self, *, wait: bool) -> AsyncGenerator[Input, None]:
        del wait
        raise ConfigError("run.inputs() is for asynchronous handlers, and this one has a process. Read the stream.")

    def report(self, progress: str) -> bool:
        with self._changing:
            waits, self._newest = self._newest is not None, progress
        if not waits:
            timer = threading.Timer(REPORTS, self._pass_newest_on)
            timer.daemon = True
            timer.start()
        return True

    def _ended(self, ending: Ending) -> None:
        self._has_ended = True
        self._pass_on(RunSettled(ending))

    def _step_store(self) -> StoreOfProcess:
        if self._has_ended:
            raise has_ended(self._job.run)
        return StoreOfProcess(self._lender())

    def _lender(self) -> Lender:
        job = self._job
        return _lender(job.conninfo, job.pooler, job.lent_statement_timeout)

    def _pass_newest_on(self) -> None:
        with self._changing:
            newest, self._newest = self._newest, None
        if newest is not None:
            self._pass_on(ProgressReported(newest))

    def report_wait(self, waits: bool) -> None:
        self._pass_on(HandlerWaits(waits))

    def _pass_on(self, message: RunSettled | ProgressReported | HandlerWaits) -> None:
        with self._changing:
            if not self._over:
                _send(self._outgoing, message)


@functools.cache
def _lender(conninfo: str, pooler: Pooler, statement_timeout: timedelta) -> Lender:
    # There is one run at a time, and each block that is inside of another gets a connection all the same.
    address = Address(conninfo, pooler=pooler)
    return Lender(address, limit_of=lambda _: 1, statement_timeout=statement_timeout, on_wait=_pass_wait_on)


def _pass_wait_on(run: Borrower, waits: bool) -> None:
    found = context.find(run)
    if isinstance(found, _Context):
        found.report_wait(waits)


def _send(outgoing: BufferedWriter, message: Message | RunEnded | RunReturned) -> None:
    outgoing.write(_encode(message) + b"\n")
    outgoing.flush()


@functools.cache
def _found(module: str, name: str, main: str | None, main_file: str | None, conninfo: str) -> Task[..., Any]:
    """The task, once its module is imported. Its App is pointed at the worker's database."""
    if module == "__main__":
        module = MAIN
        _import_main(main, main_file)
    importlib.import_module(module)
    for each in list(sys.modules.values()):
        for value in list(getattr(each, "__dict__", {}).values()):
            # Not isinstance, which would ask proxies what they stand for.
            if issubclass(type(value), App) and _defines(value, name, module):
                value.database = Server(conninfo, source="worker")
                task: Task[..., Any] = value.tasks[name]
                return task
    raise ConfigError(
        f"Importing {module} registers no task {name!r} on an App that a module holds. "
        "Decorate the function where it is defined, with @app.task(process=True)."
    )


def _defines(app: App, name: str, module: str) -> bool:
    return name in app.tasks and app.tasks[name].function.__module__ == module


def _import_main(name: str | None, file: str | None) -> None:
    if MAIN in sys.modules:
        return
    if name is None and file is None:
        raise ConfigError("A task of processes cannot be defined in an interactive session. Move it to a module.")
    module = types.ModuleType(MAIN)
    sys.modules[MAIN] = module
    try:
        content = runpy.run_module(name, run_name=MAIN) if name else runpy.run_path(str(file), run_name=MAIN)
    except BaseException:
        del sys.modules[MAIN]
        raise
    module.__dict__.update(content)
