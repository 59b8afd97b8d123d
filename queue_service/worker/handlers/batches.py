"""Which runs are handled in one call, and what its handler said of each: no run ends by an answer that is in doubt."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from queue_service.errors import AnswerRefused
from queue_service.exceptions import is_a
from queue_service.runs.model import Run
from queue_service.tasks import Task, Tasks
from queue_service.worker.handlers.results import WORDS
from queue_service.worker.leases import Held

# Named in a message, of the ids that an answer misses or has too many.
NAMED = 5


def taken(first: Held, task: Task[..., Any], waiting: deque[Held]) -> list[Held]:
    """`first`, and of those that wait the next ones that may be handled with it; they are not waiting any more."""
    size = task.together(first.run)
    batch, others = [first], list[Held]()
    while waiting and len(batch) < size:
        held = waiting.popleft()
        fits = held.run.task == task.name and task.together(held.run) == size
        (batch if fits else others).append(held)
    waiting.extendleft(reversed(others))
    return batch


def most(claimed: Iterable[Held], tasks: Tasks) -> dict[str, int]:
    """For each task of these runs, how many of its runs one call may take."""
    sizes: dict[str, int] = {}
    for held in claimed:
        name = held.run.task
        sizes[name] = max(sizes.get(name, 1), tasks[name].together(held.run))
    return sizes


def answers(runs: list[Run], answer: Any) -> list[Any]:
    """The answer for each run, in their order. Raises AnswerRefused, and an exception that was returned for all."""
    if is_a(answer, BaseException):
        raise answer
    if answer is None or is_a(answer, WORDS):
        return [answer] * len(runs)
    if isinstance(answer, (list, tuple)):
        if len(answer) != len(runs):
            raise _refused(runs, f"{len(answer):,} answers")
        return list(answer)
    if not isinstance(answer, Mapping):
        raise _refused(runs, f"a value of type {type(answer).__name__}")
    ids = {run.id for run in runs}
    if missing := sorted(ids - answer.keys()):
        raise _refused(runs, f"no answer for {_some(missing)}")
    if unknown := [key for key in answer if key not in ids]:
        raise _refused(runs, f"an answer for {_some(unknown)}, which it was not given")
    return [answer[run.id] for run in runs]


def _refused(runs: list[Run], what: str) -> AnswerRefused:
    """What a handler returned does not say what became of each run."""
    return AnswerRefused(
        f"The handler of task {runs[0].task!r} was given {len(runs):,} runs and returned {what}. Return None (all "
        "succeeded), a list with an answer for each run in their order, or a dict from run.id to the answer."
    )


def _some(ids: list[Any]) -> str:
    named = ", ".join(repr(each) for each in ids[:NAMED])
    return named if len(ids) <= NAMED else f"{named} and {len(ids) - NAMED:,} more"
