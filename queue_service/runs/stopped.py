"""Which claims' handlers were asked to stop in this process.

An attribute would cost every run that is claimed; this costs those that are stopped, and is read from any thread. What is
kept is small, and the oldest goes first: nobody knows when the last thread that looks here has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

REMEMBERED = 10_000

_stopped: dict[tuple[Any, ...], None] = {}
_watching: list[Callable[[tuple[Any, ...]], None]] = []
_changing = threading.Lock()


def mark(claim: tuple[Any, ...]) -> None:
    with _changing:
        _stopped[claim] = None
        if len(_stopped) > REMEMBERED:
            del _stopped[next(iter(_stopped))]
    for each in _watching:
        each(claim)


def is_marked(claim: tuple[Any, ...]) -> bool:
    return claim in _stopped


def watch(call: Callable[[tuple[Any, ...]], None]) -> None:
    """From now on call this for each claim that was marked, in the thread that did."""
    _watching.append(call)


def unwatch(call: Callable[[tuple[Any, ...]], None]) -> None:
    _watching.remove(call)
