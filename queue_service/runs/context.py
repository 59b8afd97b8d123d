"""What the handler of a run may ask of whoever executes it: a transaction that ends the run, and to store its progress.

A Run knows nobody: a reference to its worker would cost every run that is claimed. So those who execute handlers in this
process register here, and are asked for the context of a run. That costs whoever asks, and nobody else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

import msgspec

from queue_service import codec
from queue_service.errors import ConfigError
from queue_service.turn import Input

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


class RunContext(Protocol):
    """The execution of one run's handler. Its methods may be called from any thread."""

    def transaction(self, conn: Any) -> RunTransaction[Any, Any]: ...

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


def encoded_progress(value: float, note: str | None) -> str:
    """As `RunContext.report` takes it. ConfigError for what is no progress."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"Progress is a number from 0 to 1, not {value!r}.")
    if not (note is None or isinstance(note, str)):
        raise ConfigError(f"The note on a progress is text, not {type(note).__name__}.")
    return msgspec.json.encode({"value": value, "note": note and codec.sanitised(note[:MAX_NOTE])}).decode()
