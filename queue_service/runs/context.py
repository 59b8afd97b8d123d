"""What the handler of a run may ask of whoever executes it: a transaction that ends the run, steps that are done once, and
to store its progress.

A Run knows nobody: a reference to its worker would cost every run that is claimed. So those who execute handlers in this
process register here, and are asked for the context of a run. That costs whoever asks, and nobody else.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

import msgspec

from queue_service import codec
from queue_service.errors import ConfigError
from queue_service.turn import Input
from queue_service.words import check_word

C_co = TypeVar("C_co", covariant=True)
A_co = TypeVar("A_co", covariant=True)
S_co = TypeVar("S_co", covariant=True)

MAX_NOTE = 500


class RunTransaction(Protocol[A_co, S_co]):
    """What `Run.transaction` returns: a block for `async with` or for `with`. `result` becomes the result of the run."""

    result: Any

    async def __aenter__(self) -> A_co: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...
    def __enter__(self) -> S_co: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...


class BegunStep(Protocol[C_co]):
    """What the block of a step gets."""

    # JSON: what an earlier attempt has stored, or None until the block sets it. ConfigError for who sets that of a step
    # which is done; PayloadRefused for who reads a stored one that cannot be read.
    result: Any

    @property
    def done(self) -> bool:
        """Whether it is stored: by an earlier attempt, or once the block was left. A block must look here before it does
        anything: one that never does is refused as it is left, at its first attempt."""

    @property
    def conn(self) -> C_co:
        """The connection of the transaction that stores the step. ConfigError where it is done, and outside the block."""


class RunStep(Protocol[A_co, S_co]):
    """What `Run.step` without a function returns: a block for `async with` or for `with`."""

    async def __aenter__(self) -> BegunStep[A_co]: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...
    def __enter__(self) -> BegunStep[S_co]: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None: ...


class RunContext(Protocol):
    """The execution of one run's handler. Its methods may be called from any thread."""

    def transaction(self, conn: Any) -> RunTransaction[Any, Any]: ...

    def step(self, name: str, conn: Any) -> RunStep[Any, Any]: ...

    def call_step(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of the step, or on the event loop of the worker a coroutine that returns it. `call` is made unless an
        earlier attempt has stored the step; what it returns is awaited on the event loop, where it can be."""

    def inputs(self, *, wait: bool) -> AsyncGenerator[Input, None]:
        """The messages that were sent to steer the run's turn. ConfigError where there is no event loop, or no turn."""

    def report(self, progress: str) -> bool:
        """Store this soon: a JSON object of value and note. Returns False if the run is not this handler's any more."""


FindContext = Callable[[Any], RunContext | None]

_registered: list[FindContext] = []


@contextmanager
def registered(find: FindContext) -> Iterator[None]:
    """For the length of the block, `find` is asked for the context of runs. It returns None for those of others."""
    _registered.append(find)
    try:
        yield
    finally:
        _registered.remove(find)


def find(run: Any) -> RunContext | None:
    """The context of this very Run object; None if no handler that was given it is executed in this process."""
    for each in _registered:
        if (found := each(run)) is not None:
            return found
    return None


def step(found: RunContext, name: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `Run.step`."""
    check_word(name, "The name of a step")
    if function is None:
        if args or kwargs.keys() - {"conn"}:
            raise ConfigError(
                f"Step {name!r} has arguments, but no function to call with them: run.step(name, function, …)."
            )
        return found.step(name, kwargs.get("conn"))
    if not callable(function):
        if inspect.iscoroutine(function):
            function.close()
        raise ConfigError(
            f"Step {name!r} takes a function, and its arguments after it, not {type(function).__name__}: where an earlier "
            "attempt has done the step, nothing may be called."
        )
    return found.call_step(name, functools.partial(function, *args, **kwargs))


def encoded_progress(value: float, note: str | None) -> str:
    """As `RunContext.report` takes it. ConfigError for what is no progress."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"Progress is a number from 0 to 1, not {value!r}.")
    if not (note is None or isinstance(note, str)):
        raise ConfigError(f"The note on a progress is text, not {type(note).__name__}.")
    return msgspec.json.encode({"value": value, "note": note and codec.sanitised(note[:MAX_NOTE])}).decode()
