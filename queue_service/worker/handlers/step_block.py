"""A step as a block: what it writes on its connection and its result are committed together, or neither is, and a step that
is done lends no connection."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self, TypeVar

from queue_service.db.lending import Lender
from queue_service.db.steps import Steps
from queue_service.errors import ClaimLost, ConfigError
from queue_service.runs.claim import hold
from queue_service.runs.queries import plan_as_ours
from queue_service.steps import queries
from queue_service.steps.model import NewStep, Step
from queue_service.worker.handlers.block import Block
from queue_service.worker.handlers.steps import AttemptSteps, BlockingStore, StepStore, check_no_loop, result_of

A = TypeVar("A")
S = TypeVar("S")


class StepBlock(Block[A, S, NewStep]):
    """As `Run.step` says. `store` is None where there is no event loop of a worker."""

    def __init__(
        self,
        steps: AttemptSteps,
        name: str,
        conn: Any,
        *,
        lender: Lender,
        store: StepStore | None,
        blocking_store: BlockingStore,
    ) -> None:
        super().__init__(steps.run, conn, lender=lender, spelt=f"run.step({name!r}, conn=…)")
        self._steps = steps
        self._name = name
        self._store = store
        self._blocking_store = blocking_store
        self._conn: Any = None
        self._result: Any = None
        # What an earlier attempt has stored.
        self._found: Step | None = None
        self._is_committed = False
        self._was_looked_at = False

    @property
    def done(self) -> bool:
        self._was_looked_at = True
        return self._found is not None or self._is_committed

    @property
    def result(self) -> Any:
        return self._result if self._found is None else result_of(self._found, self._run)

    @result.setter
    def result(self, value: Any) -> None:
        if self._found is not None or self._is_committed:
            raise ConfigError(f"{self._is_done()} Its result stays as it is.")
        self._result = value

    @property
    def conn(self) -> Any:
        if self._found is not None:
            raise ConfigError(f"{self._is_done()} Look at `done` before you do anything in its block.")
        if self._conn is None:
            raise ConfigError(f"Step {self._name!r} has a connection only within its block.")
        return self._conn

    async def __aenter__(self) -> Self:
        if self._store is None or asyncio.get_running_loop() is not self._lender.loop:
            raise ConfigError("This is not the worker's event loop. Use `with run.step(…)`, in a plain handler.")
        self._steps.use(self._name)
        try:
            self._found = await self._store.take(self._steps, self._name)
            if self._found is None:
                self._conn = await self._begin()
        except BaseException:
            self._steps.release(self._name)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._found is not None:
            return None
        try:
            return await self._end(kind, error, trace)
        finally:
            self._left()

    def __enter__(self) -> Self:
        check_no_loop()
        self._steps.use(self._name)
        try:
            self._found = self._blocking_store.take(self._steps, self._name)
            if self._found is None:
                self._conn = self._begin_blocking()
        except BaseException:
            self._steps.release(self._name)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._found is not None:
            return None
        try:
            return self._end_blocking(kind, error, trace)
        finally:
            self._left()

    def _left(self) -> None:
        self._conn = None
        if not self._is_committed and self._in_doubt is None:
            # All was rolled back.
            self._steps.release(self._name)

    def _finish(self) -> Steps[NewStep]:
        self._check_is_ours()
        if not self._was_looked_at:
            raise ConfigError(
                f"The block of step {self._name!r} has never looked at `done`. At a later attempt it would do again what "
                "this one has done: begin it with `if not step.done:`. All was rolled back."
            )
        step = self._steps.done(self._name, self._result)
        yield plan_as_ours()
        # It waits for whoever has the run locked; from here on nobody can take the run away.
        is_held = yield hold(self._run.claim)
        if not is_held or not (yield queries.store([step])).get(step[:3]):
            raise ClaimLost(*self._run.claim)
        return step

    def _look(self, written: NewStep) -> Steps[bool]:
        yield hold(self._run.claim)
        is_stored: bool = yield queries.is_stored(written)
        return is_stored

    def _committed(self, written: NewStep) -> None:  # noqa: ARG002 - it is known by its name
        self._is_committed = True

    def _is_done(self) -> str:
        by = "this attempt" if self._found is None else f"attempt {self._found.attempt}"
        return f"Step {self._name!r} of run {self._run.id} is done, by {by}."
