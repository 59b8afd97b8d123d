"""Tasks: functions under stable names, what their handlers may return, and the registry of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Concatenate, Final, Generic, Literal, ParamSpec, Protocol, TypeVar, get_args, overload

from queue_service import backoff as growth
from queue_service import exceptions
from queue_service.errors import ConfigError, PayloadRefused
from queue_service.logs import get_logger
from queue_service.runs.model import Run
from queue_service.words import check_word

log = get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A", bound="BatchReturn")

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


GROWTHS: Final = {"exponential": growth.exponential, "linear": growth.linear, "fixed": growth.fixed}

Backoff = Literal["exponential", "linear", "fixed"] | Callable[[int, BaseException], "timedelta | float | None"]
Errors = type[BaseException] | tuple[type[BaseException], ...]
OnLost = Literal["retry", "fail"]


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a handler may fail before its run ends `failed`, and how long it waits between.

    The wait is `base` after the first failure; then it doubles (`exponential`), grows by `base` (`linear`) or stays
    (`fixed`), up to `cap`; with `jitter` it is shortened by up to a fifth. A callable gets the number of failures and the
    exception, and returns the wait (neither capped nor shortened), or None for no further try. One that raises, or returns
    no duration, is logged, and the exponential wait taken. A run's own `retry_delay` comes before all of these.

    Only errors that are `on` and not `never` are tried again. A timeout is a TimeoutError, and the death of a handler's
    process a ProcessDied.
    """

    max_attempts: int = 3
    backoff: Backoff = "exponential"
    base: timedelta | float = growth.BASE
    cap: timedelta | float = growth.CAP
    jitter: bool = True
    on: Errors = BaseException
    never: Errors = ()

    def __post_init__(self) -> None:
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int) or self.max_attempts < 1:
            raise ConfigError(f"max_attempts must be a whole number from 1, not {self.max_attempts!r}.")
        if inspect.iscoroutinefunction(self.backoff) or not (
            callable(self.backoff) or (isinstance(self.backoff, str) and self.backoff in GROWTHS)
        ):
            raise ConfigError(f"backoff must be {', '.join(GROWTHS)} or a plain function, not {self.backoff!r}.")
        duration(self.base, "base")
        duration(self.cap, "cap")
        _check_errors(self.on, "on")
        _check_errors(self.never, "never")

    def covers(self, error: BaseException) -> bool:
        """Whether an error of this type is tried again at all."""
        return exceptions.is_a(error, self.on) and not exceptions.is_a(error, self.never)

    def wait(self, failures: int, error: BaseException) -> float | None:
        """Seconds until the next try after so many failures, or None. Raises what a callable raises, and ConfigError for
        what it should not return."""
        if callable(self.backoff):
            asked = self.backoff(failures, error)
            return None if asked is None else duration(asked, "The wait that backoff returned").total_seconds()
        base, cap = duration(self.base, "base").total_seconds(), duration(self.cap, "cap").total_seconds()
        grown = GROWTHS[self.backoff]
        return grown(failures, base=base, cap=cap) if self.jitter else grown(failures, base=base, cap=cap, jitter=float)


def wait_after(run: Run, retry: Retry, error: BaseException, *, alone: bool = True) -> float | None:
    """Seconds until a run whose handler raised is tried again; None if that was its last try. Where it was not `alone` in
    its call, it may not be the cause: then there is a next try whatever the error is."""
    failures = run.failures + 1
    if failures >= (run.max_attempts or retry.max_attempts):
        return None
    try:
        if exceptions.is_a(error, RetryLater):
            return duration(error.delay, "The delay of a RetryLater").total_seconds()
        if alone and not retry.covers(error):
            return None
        wait = retry.wait(failures, error) if run.retry_delay is None else run.retry_delay.total_seconds()
        return growth.exponential(failures) if wait is None and not alone else wait
    except BaseException as broken:  # noqa: BLE001 - a policy that is broken must not cost its run the next try
        log.error(
            "a retry policy failed; the exponential wait is taken",
            run_id=run.id, task=run.task, why=exceptions.message(broken), error=exceptions.type_name(broken),
        )  # fmt: skip
        return growth.exponential(failures)


class Snooze:
    """Returned by a handler that wants to be run again after `delay`. Counts as neither success nor failure."""

    def __init__(self, delay: timedelta | float) -> None:
        self.delay = duration(delay, "Snooze(delay)")


class Defer(Snooze):
    """Returned by a handler that leaves its run to another process: `owner` may claim it after `delay`, and others a second
    later. Counts as neither success nor failure."""

    def __init__(self, delay: timedelta | float, owner: str | None = None) -> None:
        super().__init__(delay)
        if owner is not None:
            check_word(owner, "The owner of a Defer")
        self.owner = owner


class Cancel:
    """Returned by a handler to end its run `cancelled`, for this reason, without a retry."""

    def __init__(self, reason: str = "cancelled by its handler") -> None:
        self.reason = reason


class HandedOn:
    """Returned by a handler whose turn is answered by somebody else, so that the end of its run does not end the turn: by
    the run of this id, whose end will, or by the deployment of this name, which is the turn's own. The run succeeds."""

    def __init__(self, to: int | str) -> None:
        if isinstance(to, bool) or not isinstance(to, (int, str)):
            raise ConfigError(f"HandedOn takes the id of a run or the name of a deployment, not {to!r}.")
        if isinstance(to, str):
            check_word(to, "The deployment of a HandedOn")
        self.to = to


class RetryLater(Exception):
    """Raised by a handler whose attempt failed and is to be tried again after `delay`, whatever the policy's wait and the
    run's `retry_delay` are. It counts as a failure like any other: the last one that is allowed ends the run."""

    def __init__(self, delay: timedelta | float) -> None:
        self.delay = duration(delay, "RetryLater(delay)")
        super().__init__(f"The handler asked to be tried again in {self.delay.total_seconds():g} s.")


class ProcessDied(Exception):
    """The process of a handler ended before it answered: it crashed, was killed, or the machine ran out of memory."""

    def __init__(self, how: str, *, signal: str | None = None) -> None:
        self.signal = signal
        super().__init__(f"The process of this handler {how}.")


# What the handler of a batch may return: for all of its runs, or for each.
BatchReturn = Snooze | Cancel | HandedOn | list[Any] | tuple[Any, ...] | Mapping[int, Any] | None

MAX_BATCH = 1_000
# A payload of a batch is read by its handler, and not taken apart into keywords.
ANY_PAYLOAD = inspect.Signature([inspect.Parameter("payload", inspect.Parameter.VAR_KEYWORD)])


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
        process: bool = False,
        batch: int | None = None,
        on_lost: OnLost = "retry",
    ) -> None:
        if on_lost not in get_args(OnLost):
            raise ConfigError(f"on_lost must be 'retry' or 'fail', not {on_lost!r}.")
        self.function = function
        self.name = name
        self.queue = queue
        self.timeout = timeout
        self.retry = retry
        self.on_lost = on_lost
        self.is_async = inspect.iscoroutinefunction(inspect.unwrap(function))
        self.process = process
        if process:
            _check_importable(name, function, self.is_async)
        self._enqueue = enqueue
        signature = _signature(function)
        self.batch = batch
        if batch is not None:
            _check_batch(name, batch, signature, retry, process=process)
            signature = ANY_PAYLOAD
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

    def together(self, run: Run) -> int:
        """How many runs may be handled in one call with this one, itself among them. One that may be the fault of a failed
        batch is handled with fewer, and alone where its next failure, or the loss of its worker, would be held against it.
        """
        if self.batch is None or run.losses or run.failures > 1:
            return 1
        if run.failures + 1 >= (run.max_attempts or self.retry.max_attempts):
            return 1
        return math.isqrt(self.batch) if run.failures else self.batch


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
        """Register a task. ConfigError if another function has its name already."""
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


class BatchDecorator(Protocol):
    """What `@app.task(batch=…)` returns. The payload of a run may have any keys."""

    @overload
    def __call__(self, function: Callable[[list[Run]], Awaitable[A]], /) -> Task[..., A]: ...
    @overload
    def __call__(self, function: Callable[[list[Run]], A], /) -> Task[..., A]: ...


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


def _check_importable(name: str, function: Callable[..., Any], is_async: bool) -> None:
    """A process finds the function by importing its module."""
    if is_async:
        raise ConfigError(f"Task {name!r} is async: its place is the event loop. process=True is for plain functions.")
    where = getattr(function, "__qualname__", "<")
    if "<" in where or not getattr(function, "__module__", None):
        raise ConfigError(
            f"Task {name!r} is not defined at the top of a module, so that another process cannot import it. "
            "Move it there, or leave process=True out."
        )


def _check_batch(name: str, batch: int, signature: inspect.Signature, retry: Retry, *, process: bool) -> None:
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= MAX_BATCH:
        raise ConfigError(f"batch must be a whole number from 1 to {MAX_BATCH:,}, not {batch!r}.")
    parameters = list(signature.parameters.values())
    takes_one = len(parameters) == 1 and parameters[0].kind in {
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    }
    if not takes_one or _run_parameter(signature) is not None:
        raise ConfigError(
            f"Task {name!r}{signature} must take the runs of a batch, and nothing else, as in "
            f"`async def {name}(runs: list[Run])`; each has its own payload."
        )
    if process:
        raise ConfigError(
            f"Task {name!r} cannot have both batch and process=True: a process is given one run at a time."
        )
    if batch > 1 and retry.max_attempts == 1:
        raise ConfigError(
            f"Task {name!r} has max_attempts=1, and the last attempt of a run is made alone, so that it fails for nobody "
            "else's fault: there would be no batches. Give it two attempts or more, or leave batch out."
        )


def _check_errors(value: object, what: str) -> None:
    types = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(each, type) and issubclass(each, BaseException) for each in types):
        raise ConfigError(
            f"Retry({what}=) takes exception types, such as (ConnectionError, TimeoutError), not {value!r}."
        )


def _where(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
