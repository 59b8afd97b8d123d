"""Tasks: functions under stable names, what their handlers may return, and the registry of them."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from queue_service.errors import ConfigError, PayloadRefused
from queue_service.runs.model import Run

P = ParamSpec("P")
R = TypeVar("R")

# Beyond this a moment may not fit a Python datetime, and nobody waits that long.
LONGEST = timedelta(days=36_500)


def duration(value: timedelta | float, what: str, *, positive: bool = False) -> timedelta:
    """A `timedelta`, or a number of seconds, as `timedelta`; ConfigError for negative, infinite and absurd ones."""
    if isinstance(value, bool) or not isinstance(value, (timedelta, int, float)):
        raise ConfigError(f"{what} must be a timedelta or a number of seconds, not {type(value).__name__}.")
    if isinstance(value, (int, float)):
        if not -LONGEST.total_seconds() <= value <= LONGEST.total_seconds():
            raise ConfigError(f"{what} is {value} seconds; it must be finite and at most {LONGEST.days} days.")
        value = timedelta(seconds=value)
    if value < timedelta(0) or (positive and not value):
        raise ConfigError(f"{what} must {'be positive' if positive else 'not be negative'}, not {value}.")
    if value > LONGEST:
        raise ConfigError(f"{what} must be at most {LONGEST.days} days, not {value}.")
    return value


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a handler may raise before its run ends `failed`. The wait between grows as `2^failures` seconds, at most
    300, unless the run has a fixed `retry_delay`.
    """

    max_attempts: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int) or self.max_attempts < 1:
            raise ConfigError(f"max_attempts must be a whole number from 1, not {self.max_attempts!r}.")


class Snooze:
    """Returned by a handler: not now; run me again after `delay`. Counts as neither success nor failure."""

    def __init__(self, delay: timedelta | float) -> None:
        self.delay = duration(delay, "Snooze(delay)")


class Defer(Snooze):
    """Returned by a handler that leaves its run to another process: `owner` may claim it after `delay`, and others a second
    later. Counts as neither success nor failure."""

    def __init__(self, delay: timedelta | float, owner: str | None = None) -> None:
        super().__init__(delay)
        self.owner = owner


class Cancel:
    """Returned by a handler: end this run `cancelled`, for this reason, without a retry."""

    def __init__(self, reason: str = "cancelled by its handler") -> None:
        self.reason = reason


class Enqueue(Protocol):
    async def __call__(self, task: str, payload: Mapping[str, Any], /) -> int: ...


class Task(Generic[P, R]):
    """A registered function. Calling it calls the function; `enqueue` takes the function's own parameters."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        queue: str,
        timeout: timedelta | None,
        retry: Retry,
        enqueue: Enqueue,
    ) -> None:
        self.function = function
        self.name = name
        self.queue = queue
        self.timeout = timeout
        self.retry = retry
        self.is_async = inspect.iscoroutinefunction(inspect.unwrap(function))
        self._enqueue = enqueue
        signature = _signature(function)
        self.run_parameter = _run_parameter(signature)
        self._signature = signature.replace(
            parameters=[p for p in signature.parameters.values() if p.name != self.run_parameter]
        )
        _check_parameters(name, self._signature)
        self._parameters = frozenset(self._signature.parameters)
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in self._signature.parameters.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> int:
        """Enqueue a run of this task with these arguments. Returns its id."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as refused:
            raise PayloadRefused(f"Task {self.name!r}{self._signature} cannot be called so: {refused}.") from None
        payload: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            payload.update(
                value if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
            )
        return await self._enqueue(self.name, payload)

    def check(self, payload: Mapping[str, Any]) -> None:
        """Raise PayloadRefused unless the function can be called with these keywords."""
        # The usual payload names each parameter; only another one is worth the ten times slower look.
        if payload.keys() == self._parameters and not self._takes_any:
            return
        try:
            self._signature.bind(**payload)
        except TypeError as refused:
            raise PayloadRefused(f"Task {self.name!r}{self._signature} cannot be called so: {refused}.") from None

    def arguments(self, run: Run) -> dict[str, Any]:
        """The keywords to call the function with for this run."""
        if self.run_parameter is None:
            return dict(run.payload)
        return {**run.payload, self.run_parameter: run}


class Tasks(Mapping[str, Task[..., Any]]):
    """The registry of one App."""

    def __init__(self) -> None:
        self._by_name: dict[str, Task[..., Any]] = {}

    def __getitem__(self, name: str) -> Task[..., Any]:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, task: Task[..., Any]) -> None:
        taken = self._by_name.get(task.name)
        if taken is not None and taken.function is not task.function:
            raise ConfigError(
                f"Two functions want the task name {task.name!r}: {_where(taken.function)} and "
                f"{_where(task.function)}. Give one of them another name=."
            )
        self._by_name[task.name] = task


class Decorator(Protocol):
    """What `@app.task(…)` returns. A first parameter of type Run is ours to fill, and not part of the task's own."""

    @overload
    def __call__(self, function: Callable[Concatenate[Run, P], Awaitable[R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Run, P], R], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # noqa: BLE001 - evaluating an annotation runs whatever it says
        # An annotation that only a type checker can resolve. The names of the parameters are all that is needed.
        return inspect.signature(function)


def _run_parameter(signature: inspect.Signature) -> str | None:
    for parameter in signature.parameters.values():
        if parameter.annotation is Run or parameter.annotation in {"Run", "queue_service.Run"}:
            return parameter.name
        if parameter.name == "run" and parameter.annotation is inspect.Parameter.empty:
            return parameter.name
    return None


def _check_parameters(name: str, signature: inspect.Signature) -> None:
    for parameter in signature.parameters.values():
        if parameter.kind in {parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL}:
            raise ConfigError(
                f"Task {name!r} takes {parameter} by position, but a payload is a JSON object. Give it a name."
            )


def _where(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
