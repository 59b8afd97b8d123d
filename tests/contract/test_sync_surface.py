"""`app.sync` is complete: what can be awaited on an App and its faces has a blocking twin, and no twin says otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, assert_type

import pytest

from queue_service import App, Event, Outcome, Run
from queue_service.app.sync import Blocking, SyncApp


def pairs() -> Iterator[tuple[str, object, object]]:
    """An App and each of its public parts that has something to await, with what stands for it in the twin."""
    app = App("postgresql://nowhere")
    twin = app.sync
    yield "app", app, twin
    for name, part in vars(app).items():
        if not name.startswith("_") and awaitables(part):
            yield name, part, getattr(twin, name, None)


def awaitables(part: object) -> dict[str, Any]:
    """What is asynchronous and public in an object's class: methods, and those that give one thing after the other."""
    return {
        name: member
        for name, member in inspect.getmembers(type(part))
        if not name.startswith("_") and (inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member))
    }


PAIRS = list(pairs())


def test_the_faces_that_are_compared_are_all_there() -> None:
    assert {"app", "turns", "events"} <= {name for name, _, _ in PAIRS}


@pytest.mark.parametrize(("part", "twin"), [pair[1:] for pair in PAIRS], ids=[name for name, _, _ in PAIRS])
class TestEachFace:
    def test_has_a_twin_of_every_public_method(self, part: object, twin: object) -> None:
        assert isinstance(twin, Blocking), f"`app.sync` has nothing for {type(part).__name__}"
        assert [method for method in awaitables(part) if not callable(getattr(twin, method, None))] == []

    def test_has_no_method_that_is_still_to_be_awaited(self, part: object, twin: object) -> None:
        assert awaitables(twin) == {}, type(part).__name__

    def test_takes_the_same_arguments_and_says_the_same(self, part: object, twin: object) -> None:
        for method, member in awaitables(part).items():
            blocking = getattr(type(twin), method)
            # Those that are written out, such as `follow`, wrap nothing.
            assert getattr(blocking, "__wrapped__", member) is member, method
            assert arguments(blocking) == arguments(member), method
            assert inspect.getdoc(blocking), method


def arguments(method: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(method, follow_wrapped=True).parameters.values())[1:]


def test_the_types_are_those_of_the_methods(app: App) -> None:
    """Read by the type checker, which would refuse another answer."""

    def typed(q: SyncApp) -> None:
        assert_type(q.enqueue("noop", {}), int)
        assert_type(q.enqueue_many("noop", [{}]), list[int])
        assert_type(q.get(1), Run | None)
        assert_type(q.wait(1, timeout=1), Run)
        assert_type(q.cancel(1), bool)
        assert_type(q.turns.outcome("dep-1", "m1"), Outcome | None)
        assert_type(q.turns.commit_reply("dep-1", ["m1"], {}), list[str])
        assert_type(q.events.append("conv-1", "delta", {}), int)
        assert_type(q.events.follow("conv-1"), Iterator[Event])

    assert callable(typed)
