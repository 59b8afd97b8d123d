"""What an exception says of itself, whatever it does when it is asked.

An exception is somebody else's code: its `__str__` may raise, SystemExit as well as another error, and so may its
attributes, its notes and its class. Nothing here does. What Python keeps of every exception is read past its class, and
what only the exception itself can say is asked for once. The traceback module does neither; it is also endless where an
exception has a million notes.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator
from itertools import islice
from typing import Any, TypeGuard, TypeVar

T = TypeVar("T")

_qualname = type.__dict__["__qualname__"].__get__
_module = type.__dict__["__module__"].__get__
_traceback = BaseException.__dict__["__traceback__"].__get__
_cause = BaseException.__dict__["__cause__"].__get__
_context = BaseException.__dict__["__context__"].__get__
_hides_context = BaseException.__dict__["__suppress_context__"].__get__
_members = BaseExceptionGroup.__dict__["exceptions"].__get__

_MAY_GO_ON = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE

# Of an exception so many others are shown, which led to it or are in its group, and so many notes; of each the innermost
# frames.
EXCEPTIONS = 20
NOTES = 20
FRAMES = 20
MAX_MESSAGE = 8_000

_CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"
_FOLLOWED = "\nDuring handling of the above exception, another exception occurred:\n\n"


def is_a(value: object, kinds: type[T] | tuple[type[T], ...]) -> TypeGuard[T]:
    """As `isinstance`, which asks the value for its class where its type says no."""
    return issubclass(type(value), kinds)


def type_name(error: object) -> str:
    """The name of its class, whatever it says it is."""
    return str.__str__(_qualname(type(error)))


def message(error: BaseException) -> str:
    """Its text, up to MAX_MESSAGE characters; the name of its class where it has none, or cannot say it."""
    return text(error) or type_name(error)


def rendered(error: BaseException) -> str:
    """Its traceback with what led to it, much as Python prints it."""
    return "".join(_lines(error, iter(range(EXCEPTIONS))))


def release(error: BaseException) -> None:
    """Let go of what the functions hold that it, and what led to it, went through: it would live on until the next cyclic
    garbage collection. Coroutines and generators are left alone: one may only wait, and would be closed by this."""
    for each in _chain(error, iter(range(EXCEPTIONS))):
        trace = _traceback(each)
        while trace is not None:
            if not trace.tb_frame.f_code.co_flags & _MAY_GO_ON:
                # A RuntimeError: it is executed at this moment. What it held may raise whatever it likes when it goes.
                with contextlib.suppress(BaseException):
                    trace.tb_frame.clear()
            trace = trace.tb_next


def _lines(error: BaseException, budget: Iterator[int]) -> Iterator[str]:
    """`budget` gives one number for each exception that may still be shown."""
    chain = list(_chain(error, budget))
    for position in range(len(chain) - 1, -1, -1):
        each = chain[position]
        yield from _one(each, budget)
        if position:
            yield _CAUSED if _cause(chain[position - 1]) is each else _FOLLOWED


def _chain(error: BaseException, budget: Iterator[int]) -> Iterator[BaseException]:
    """The error, and what led to it, one after the other."""
    current: BaseException | None = error
    for _ in budget:
        if current is None:
            return
        yield current
        cause = _cause(current)
        # Not `or`, which would ask the cause whether it is true.
        current = cause if cause is not None or _hides_context(current) else _context(current)


def _one(error: BaseException, budget: Iterator[int]) -> Iterator[str]:
    yield from _frames(error)
    says = text(error)
    yield f"{_full_name(error)}: {says}\n" if says else f"{_full_name(error)}\n"
    for note in islice(_notes(error), NOTES):
        yield f"{text(note)}\n"
    if is_a(error, BaseExceptionGroup):
        for member in _members(error):
            for line in _lines(member, budget):
                yield "".join(f"  | {part}" for part in line.splitlines(keepends=True))


def _frames(error: BaseException) -> Iterator[str]:
    try:
        frames = traceback.format_tb(_traceback(error), limit=-FRAMES)
    except BaseException:  # noqa: BLE001 - the lines come from what the modules of the frames say they are
        return
    if frames:
        yield "Traceback (most recent call last):\n"
        yield from frames


def _notes(error: BaseException) -> Iterator[Any]:
    try:
        notes = object.__getattribute__(error, "__notes__")
    except BaseException:  # noqa: BLE001 - it may be a property
        return
    if type(notes) is list:
        yield from notes


def _full_name(error: BaseException) -> str:
    try:
        module = _module(type(error))
    except AttributeError:
        return type_name(error)
    return type_name(error) if module == "builtins" else f"{str.__str__(module)}.{type_name(error)}"


def text(value: object) -> str:
    """`str(value)`, up to MAX_MESSAGE characters; nothing where it cannot say it."""
    try:
        # A subclass of str would bring methods of its own.
        return str.__str__(str(value))[:MAX_MESSAGE]
    except BaseException:  # noqa: BLE001 - SystemExit and KeyboardInterrupt, too: they are the value's, not ours
        return ""
