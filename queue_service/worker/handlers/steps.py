"""The steps of a handler: each is done once, and stored by an attempt that still holds its claim.

Once a function has returned, its effect is there: its result is stored whatever happens to the handler, and through an
outage of the database, for as long as the run is this handler's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from queue_service import codec
from queue_service.backoff import Pauses
from queue_service.db.execute import REFUSED, fetch_sync, translated
from queue_service.db.lending import Lender
from queue_service.db.query import Query
from queue_service.errors import ClaimLost, ConfigError, DatabaseUnavailable, PayloadRefused
from queue_service.logs import get_logger
from queue_service.runs.model import Run
from queue_service.services.combiner import BUSY, FIRST_PAUSE, LAST_PAUSE, LOCK_SECONDS, Busy, Combiner, StillLocked
from queue_service.steps import queries
from queue_service.steps.model import NewStep, Step
from queue_service.waiting import to_its_end

log = get_logger(__name__)

T = TypeVar("T")

# Between two tries to store a step, while the database cannot be reached.
FIRST_TRY, LAST_TRY = 0.1, 5.0


class AttemptSteps:
    """Of one attempt of a run: which names it has used, and what earlier ones have stored. From any thread."""

    def __init__(self, run: Run, *, limit: int) -> None:
        self.run = run
        self._limit = limit
        self._used: set[str] = set()
        self._changing = threading.Lock()
        # Nothing is stored without a claim, and each claim is an attempt: before the first there is nothing.
        self._stored: dict[str, Step] | None = {} if run.attempt == 1 else None
        self.loading = asyncio.Lock()

    def use(self, name: str) -> None:
        """ConfigError for a name that this attempt has used."""
        if self.run.cancelled:
            raise ClaimLost(*self.run.claim)
        with self._changing:
            if name in self._used:
                raise ConfigError(
                    f"This attempt of run {self.run.id} has a step {name!r} already, done or under way. Give each step a "
                    "name of its own, made of what it works on, and the same at each attempt."
                )
            self._used.add(name)

    def release(self, name: str) -> None:
        """Nothing was done under this name, so it may be used again."""
        with self._changing:
            self._used.discard(name)

    @property
    def is_loaded(self) -> bool:
        return self._stored is not None

    def load(self, stored: Sequence[Step]) -> None:
        self._stored = {step.name: step for step in stored}

    def take(self, name: str) -> Step | None:
        """What an earlier attempt has stored under this name. It is kept no longer: a name is used once."""
        assert self._stored is not None
        return self._stored.pop(name, None)

    def done(self, name: str, result: Any) -> NewStep:
        """PayloadRefused for what cannot be stored."""
        try:
            text = codec.dumps_result(result, what=f"result of step {name!r}", limit=self._limit)
        except PayloadRefused as refused:
            raise PayloadRefused(f"{refused} The step is not stored: a later attempt does it again.") from None
        return NewStep(*self.run.claim, name, text)


class StepStore:
    """Of a worker, on its event loop. Steps that are done at the same time share a statement."""

    def __init__(self, fetch: Callable[[Query[Any]], Awaitable[Any]]) -> None:
        self._fetch = fetch
        self._storing: Combiner[NewStep, bool] = Combiner(self._send, name="step", weigh=lambda step: len(step.result))

    async def take(self, steps: AttemptSteps, name: str) -> Step | None:
        if not steps.is_loaded:
            async with steps.loading:
                if not steps.is_loaded:
                    steps.load(await self._fetch(queries.of_run(steps.run.id)))
        return steps.take(name)

    async def store(self, run: Run, step: NewStep) -> None:
        """Raises ClaimLost, StillLocked where another session has the run locked for long, and DatabaseUnavailable once the
        run is not this handler's any more."""
        pauses = Pauses(FIRST_TRY, LAST_TRY)
        while True:
            try:
                is_stored = await self._stored(step)
                break
            except StillLocked:
                raise
            except DatabaseUnavailable as lost:
                _log_outage(run, step, lost, pauses)
                if run.cancelled:
                    raise
                await asyncio.sleep(pauses.next())
        if not is_stored:
            raise ClaimLost(*run.claim)

    async def _stored(self, step: NewStep) -> bool:
        try:
            return await self._storing(step)
        except asyncio.CancelledError:
            # Whether it was sent is not known. It may be stored twice, and is stored once.
            with contextlib.suppress(DatabaseUnavailable, *REFUSED):
                await to_its_end(self._storing(step))
            raise

    async def _send(self, news: Sequence[NewStep]) -> Sequence[bool | Busy]:
        answers = await self._fetch(queries.store(news))
        return [BUSY if (answer := answers.get(step[:3])) is False else bool(answer) for step in news]


class BlockingStore(Protocol):
    """As StepStore, for handlers that are not on the worker's event loop."""

    def take(self, steps: AttemptSteps, name: str) -> Step | None: ...
    def store(self, run: Run, step: NewStep) -> None: ...


class StoreOfThreads:
    """The worker's own store, for handlers in its threads. ClaimLost where the worker has ended."""

    def __init__(self, store: StepStore, loop: asyncio.AbstractEventLoop) -> None:
        self._store = store
        self._loop = loop

    def take(self, steps: AttemptSteps, name: str) -> Step | None:
        return self._result(steps.run, self._store.take(steps, name))

    def store(self, run: Run, step: NewStep) -> None:
        self._result(run, self._store.store(run, step))

    def _result(self, run: Run, call: Coroutine[Any, Any, T]) -> T:
        try:
            future = asyncio.run_coroutine_threadsafe(call, self._loop)
        except RuntimeError:
            call.close()
            raise ClaimLost(*run.claim) from None
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClaimLost(*run.claim) from None


class StoreOfProcess:
    """Of a process for handlers, on the connections that it lends."""

    def __init__(self, lender: Lender) -> None:
        self._lender = lender

    def take(self, steps: AttemptSteps, name: str) -> Step | None:
        if not steps.is_loaded:
            steps.load(self._fetch(steps.run, queries.of_run(steps.run.id)))
        return steps.take(name)

    def store(self, run: Run, step: NewStep) -> None:
        """As StepStore.store."""
        busy, pauses = Pauses(FIRST_PAUSE, LAST_PAUSE), Pauses(FIRST_TRY, LAST_TRY)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                answer = self._fetch(run, queries.store([step])).get(step[:3])
            except DatabaseUnavailable as lost:
                # The worker kills this process once the run is not its any more.
                _log_outage(run, step, lost, pauses)
                time.sleep(pauses.next())
                continue
            if answer is None:
                raise ClaimLost(*run.claim)
            if answer:
                return
            if time.monotonic() > deadline:
                raise StillLocked("step")
            time.sleep(busy.next())

    def _fetch(self, run: Run, query: Query[T]) -> T:
        with translated(), self._lender.blocking_transaction(run) as conn:
            return fetch_sync(conn, query)


async def called(store: StepStore, steps: AttemptSteps, name: str, call: Callable[[], Any]) -> Any:
    """The result of a step whose name is in use, on the worker's event loop."""
    try:
        found = await store.take(steps, name)
        if found is not None:
            return result_of(found, steps.run)
        value = call()
        if inspect.isawaitable(value):
            value = await value
    except BaseException:
        steps.release(name)
        raise
    step = steps.done(name, value)
    await store.store(steps.run, step)
    return codec.loads(step.result)


def called_blocking(store: BlockingStore, steps: AttemptSteps, name: str, call: Callable[[], Any]) -> Any:
    """As `called`, anywhere else."""
    try:
        found = store.take(steps, name)
        if found is not None:
            return result_of(found, steps.run)
        value = call()
        _check_plain(value, name)
    except BaseException:
        steps.release(name)
        raise
    step = steps.done(name, value)
    store.store(steps.run, step)
    return codec.loads(step.result)


def _check_plain(value: Any, name: str) -> None:
    if not inspect.isawaitable(value):
        return
    if inspect.iscoroutine(value):
        value.close()
    raise ConfigError(
        f"The function of step {name!r} is asynchronous, and this handler is a plain function. Give it a plain one, or "
        "make the handler `async def`."
    )


def result_of(step: Step, run: Run) -> Any:
    """PayloadRefused where it cannot be read."""
    if step.unreadable is not None:
        raise PayloadRefused(
            f"The result of step {step.name!r} of run {run.id} cannot be read as it is stored: {step.unreadable}. "
            "Something else than this library has stored it so."
        )
    return step.result


def has_ended(run: Run) -> ConfigError:
    """For a step that comes too late."""
    return ConfigError(
        f"Run {run.id} has ended with the transaction of its handler before: nothing can be stored any more. Put the step "
        "before it."
    )


def check_no_loop() -> None:
    """ConfigError where an event loop runs: what blocks here would block it."""
    if asyncio._get_running_loop() is not None:  # noqa: SLF001 - None in a thread, where the public one raises
        raise ConfigError(
            "This step would block an event loop. In a coroutine handler use `await run.step(name, function)` or "
            "`async with run.step(name)`; a loop that a plain handler has started itself can have no steps."
        )


def _log_outage(run: Run, step: NewStep, lost: DatabaseUnavailable, pauses: Pauses) -> None:
    if not pauses.count:
        log.warning(
            "cannot store a step that is done; trying until it works",
            run_id=run.id, task=run.task, step=step.name, why=str(lost),
        )  # fmt: skip
