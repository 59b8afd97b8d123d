"""Which events of a stream become lines to the child: those about its turns, and only what came after they were given."""

from __future__ import annotations

from typing import Any

import pytest

from queue_service import App, Event, Turn
from queue_service.services.loop import Services
from queue_service.supervisor.followers import Followers
from queue_service.supervisor.given import GivenTurns
from queue_service.supervisor.protocol import (
    CancelledLine,
    DecisionLine,
    InputLine,
    InterruptLine,
    PermissionLine,
    SupervisorLine,
)


class Stream:
    """Turns `m` and `later` are with the child, given when the head of the stream was 5 and 7."""

    def __init__(self) -> None:
        self.left: list[str] = []
        self.given = GivenTurns(self.left.append)
        self._followers = Followers(App("postgresql:///unused"), "d", Services(), self.given, self._say)
        self.give("m", 5)
        self.give("later", 7)

    def give(self, message_id: str, after: int) -> None:
        self.given.add(Turn(deployment="d", message_id=message_id, stream="s"), after)

    def lines(self, seq: int, kind: str, body: Any) -> list[SupervisorLine]:
        event = Event(stream="s", seq=seq, kind=kind, body=body, terminal=kind in {"reply", "error"})
        return self._followers._lines(event)

    async def _say(self, line: SupervisorLine) -> None: ...


@pytest.mark.parametrize(
    ("kind", "body", "line"),
    [
        ("permission", {"request_id": "r", "answer": [1], "user_id": "ada"}, PermissionLine("s", "r", [1], "ada")),
        ("decision", {"key": "k", "state": "passed"}, DecisionLine("s", "k", {"key": "k", "state": "passed"})),
        ("decision", {"request_id": "r"}, DecisionLine("s", "r", {"request_id": "r"})),
        ("interrupt", {"message_id": None, "user_id": "ada"}, InterruptLine("s", None, "ada")),
        ("interrupt", {"message_id": "m"}, InterruptLine("s", "m")),
        ("message", {"message_id": "x", "body": {"a": 1}, "mode": "steer"}, InputLine("x", "s", {"a": 1})),
    ],
)
def test_what_people_say_after_a_turn_was_given_reaches_its_child(
    kind: str, body: dict[str, Any], line: SupervisorLine
) -> None:
    assert Stream().lines(5, kind, body) == []
    assert Stream().lines(6, kind, body) == [line]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("permission", {"answer": True}), ("permission", {"request_id": 7}), ("permission", None), ("permission", "yes"),
        ("decision", {}), ("decision", {"key": ["k"]}), ("interrupt", {"message_id": "another"}),
        ("interrupt", {"message_id": "later"}), ("message", {"message_id": "x", "body": {}}),
        ("message", {"message_id": "m", "body": {}, "mode": "steer"}), ("message", {"body": {}, "mode": "steer"}),
        ("message", {"message_id": "x", "body": {}, "mode": "steer", "deployment": "another"}),
        ("delta", {"text": "x"}), ("gap", {"from": 1, "to": 2}), ("reply", {"deployment": "d"}),
        ("error", {"deployment": "d", "message_ids": [1, None]}), ("error", {"deployment": "d", "message_ids": "m"}),
    ],
)  # fmt: skip
def test_what_is_about_no_turn_of_the_child_or_cannot_be_read_is_passed_over(kind: str, body: Any) -> None:
    assert Stream().lines(6, kind, body) == []


def test_an_ending_by_somebody_else_takes_the_turn_from_the_child() -> None:
    stream = Stream()
    assert stream.lines(5, "error", {"deployment": "d", "message_ids": ["m"], "code": "cancelled"}) == []
    assert stream.lines(6, "error", {"deployment": "another", "message_ids": ["m"], "code": "cancelled"}) == []
    assert stream.lines(7, "error", {"deployment": "d", "message_ids": ["m", "x"], "code": "timeout"}) == [
        CancelledLine("m", "timeout")
    ]
    assert stream.given.message_ids == ["later"]
    assert stream.left == []
    assert stream.lines(8, "reply", {"deployment": "d", "message_ids": ["later"]}) == [
        CancelledLine("later", "replied")
    ]
    assert stream.left == ["s"]
    assert stream.given.none_left.is_set()


def test_the_ending_of_what_the_child_has_answered_is_its_own() -> None:
    stream = Stream()
    stream.given.answered(["m", "unknown"])
    assert stream.lines(6, "reply", {"deployment": "d", "message_ids": ["m"]}) == []
    assert "m" in stream.given


def test_a_message_is_offered_once_and_one_that_ends_is_taken_back() -> None:
    stream = Stream()
    message = {"message_id": "x", "body": {}, "mode": "steer"}
    assert len(stream.lines(6, "message", message)) == 1
    assert stream.lines(7, "message", message) == []
    assert stream.given.stream_of("x") == "s"
    # It is no turn of the child's: the child's end does not end it.
    assert "x" not in stream.given
    ended = {"deployment": "d", "message_ids": ["x"], "code": "cancelled"}
    assert stream.lines(8, "error", ended) == [CancelledLine("x", "cancelled")]
    assert stream.lines(9, "error", ended) == []


def test_what_was_offered_is_forgotten_with_the_last_turn_of_its_stream() -> None:
    stream = Stream()
    stream.lines(6, "message", {"message_id": "x", "body": {}, "mode": "steer"})
    stream.given.ended(["m", "later"])
    assert stream.given.stream_of("x") is None


def test_a_turn_that_is_given_again_is_another_giving() -> None:
    stream = Stream()
    first = stream.given.get("m")
    stream.given.answered(["m"])
    stream.give("m", 9)
    assert stream.given.get("m") is not first
    ended = {"deployment": "d", "message_ids": ["m"], "code": "timeout"}
    assert stream.lines(9, "error", ended) == []
    assert stream.lines(10, "error", ended) == [CancelledLine("m", "timeout")]
