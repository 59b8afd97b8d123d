"""What turns, failures and endings are, and the sentences about them, without a database."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest

from queue_service import Outcome, Run, RunState, Turn, TurnFailure
from queue_service.cli import markers
from queue_service.cli.runs import Surroundings, awaited, turn_of
from queue_service.errors import ConfigError, PayloadRefused
from queue_service.queues.queries import Queue
from queue_service.roster.queries import WorkerRow
from queue_service.turns.model import MAX_REASON, SENTENCES, Marker, TurnEnding, failed, known_code, replied
from queue_service.turns.queries import COUNT_LIMIT, TurnCounts

LIMIT = 1_000


def since(**ago: float) -> datetime:
    return datetime.now(UTC) - timedelta(**ago)


def marker(**fields: Any) -> Marker:
    return Marker(
        **{
            "deployment": "d", "message_id": "m", "stream": "s", "platform": "api", "channel_id": None, "user_id": None,
            "organization_id": None, "metadata": {}, "armed_at": since(seconds=3), "deadline": since(minutes=-4.01),
            "admitted_at": None, "admission": timedelta(minutes=5), "execution": timedelta(minutes=1), "run_id": None,
            "failure_code": None, "failure_reason": None, "overdue": False,
        }
        | fields
    )  # fmt: skip


def outcome(**fields: Any) -> Outcome:
    given: dict[str, Any] = {
        "deployment": "d",
        "message_id": "m",
        "stream": "conv-1",
        "armed_at": since(minutes=1),
        "kind": "reply",
    }
    return Outcome(**given | {"ended_at": since(seconds=5), "seq": 7, "body": {}} | fields)


def run(**fields: Any) -> Run:
    given: dict[str, Any] = {
        "id": 1, "queue": "mail", "task": "greet", "state": RunState.QUEUED, "payload": {}, "attempt": 0, "failures": 0,
        "losses": 0, "priority": 0, "created_at": since(seconds=5), "run_at": since(seconds=5),
    }  # fmt: skip
    return Run(**given | fields)


def worker(**fields: Any) -> WorkerRow:
    given: dict[str, Any] = {
            "id": 3, "name": "host:1", "version": "1", "queues": {"mail": 10}, "started_at": since(hours=1),
            "seen_at": since(seconds=2), "holds": 1, "is_alive": True, "failing": [],
    }  # fmt: skip
    return WorkerRow(**given | fields)


def around(*workers: WorkerRow, **of_queue: Any) -> Surroundings:
    nothing = dict.fromkeys(Queue._fields)
    return Surroundings(Queue(**{**nothing, "name": "mail", **of_queue}), workers, None)


class TestAFailure:
    @pytest.mark.parametrize("code", sorted(SENTENCES))
    def test_has_a_sentence_for_the_person_who_waits(self, code: str) -> None:
        assert TurnFailure(code).sentence == SENTENCES[code]
        assert SENTENCES[code].endswith(".")

    def test_of_an_unknown_code_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'worker_died'"):
            TurnFailure("worker_dead")

    def test_can_be_stored_whatever_its_texts_hold(self) -> None:
        failure = TurnFailure("internal_error", "a\x00b\ud800", "x" * 10_000)
        assert failure.message == "a\ufffdb\ufffd"
        assert failure.reason == "x" * MAX_REASON

    def test_whose_message_is_empty_has_the_codes_own(self) -> None:
        assert TurnFailure("cancelled", "").sentence == SENTENCES["cancelled"]

    def test_becomes_an_error_with_code_and_message_and_without_an_empty_reason(self) -> None:
        ending = failed("d", "m", TurnFailure("cancelled"))
        assert ending == TurnEnding("d", "m", "error", ending.body, "cancelled")
        assert json.loads(ending.body) == {"code": "cancelled", "message": SENTENCES["cancelled"]}
        assert json.loads(failed("d", "m", TurnFailure("cancelled", "Stop.", "r")).body) == {
            "code": "cancelled", "message": "Stop.", "reason": "r",
        }  # fmt: skip

    def test_that_was_read_back_has_a_code_of_the_catalogue(self) -> None:
        assert [known_code(code) for code in ("worker_died", "made_up", "", None)] == [
            "worker_died", "internal_error", "internal_error", None,
        ]  # fmt: skip


class Hostile(dict[str, Any]):
    def keys(self) -> Any:
        raise RuntimeError("no keys for you")

    def __iter__(self) -> Any:
        raise RuntimeError("no keys for you")


def nested(depth: int) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for _ in range(depth):
        body = {"in": body}
    return body


class TestAReply:
    def test_is_stored_as_it_is(self) -> None:
        ending = replied("d", "m", {"text": "ünï", "n": [1, None]}, LIMIT)
        assert (ending.kind, ending.code) == ("reply", None)
        assert json.loads(ending.body) == {"text": "ünï", "n": [1, None]}

    def test_may_be_any_mapping(self) -> None:
        assert json.loads(replied("d", "m", MappingProxyType({"a": 1}), LIMIT).body) == {"a": 1}

    def test_is_cleaned_where_that_helps(self) -> None:
        ending = replied("d", "m", {"t": "a\x00b\ud800", "n": math.nan, "i": math.inf, "\x00": 1}, LIMIT)
        assert ending.kind == "reply"
        assert json.loads(ending.body) == {"t": "a\ufffdb\ufffd", "n": None, "i": None, "\ufffd": 1}

    @pytest.mark.parametrize(
        "body",
        [
            {"text": "x" * 2 * LIMIT},
            nested(300),
            nested(50_000),
            ["no", "dict"],
            "text",
            None,
            {"o": object()},
            Hostile(a=1),
        ],
        ids=["too large", "too deep", "far too deep", "list", "text", "None", "no JSON", "hostile"],
    )
    def test_that_cannot_be_stored_becomes_an_error_that_says_so(self, body: Any) -> None:
        ending = replied("d", "m", body, LIMIT)
        assert (ending.kind, ending.code) == ("error", "reply_refused")
        said = json.loads(ending.body)
        assert said["message"] == SENTENCES["reply_refused"]
        assert said["reason"]


class TestATurn:
    @pytest.mark.parametrize("name", ["deployment", "message_id", "stream", "platform", "channel_id", "user_id"])
    @pytest.mark.parametrize(
        "value", ["", 7, "a\x00", "\ud800", "x" * 1_025], ids=["empty", "int", "NUL", "half", "long"]
    )
    def test_has_no_name_that_cannot_be_stored(self, name: str, value: Any) -> None:
        names: dict[str, Any] = {"deployment": "d", "message_id": "m", "stream": "s", name: value}
        with pytest.raises((ConfigError, PayloadRefused), match=name):
            Turn(**names)

    def test_goes_to_the_api_unless_it_says_otherwise(self) -> None:
        assert Turn(deployment="d", message_id="m", stream="s").platform == "api"

    @pytest.mark.parametrize("metadata", [{"a": "\x00"}, {"a": math.nan}, {"a": "x" * LIMIT}, {"a": object()}])
    def test_is_not_armed_with_metadata_that_cannot_be_stored(self, metadata: dict[str, Any]) -> None:
        with pytest.raises(PayloadRefused, match="metadata"):
            Turn(deployment="d", message_id="m", stream="s", metadata=metadata).fields(LIMIT)


class TestWhatIsSaidOfATurn:
    def test_that_was_armed(self) -> None:
        said = markers.awaited(marker())
        assert said.startswith("Armed 3s ago; waits for a worker's first sign of life, until ")
        assert said.endswith(" (in 4m).")

    def test_that_was_taken_up(self) -> None:
        said = markers.awaited(marker(admitted_at=since(seconds=2)))
        assert said.startswith("Taken up 2s ago; waits for its reply, or the worker's next sign of life, until ")

    def test_that_was_withheld(self) -> None:
        withheld = marker(failure_code="provider_quota_exhausted", deadline=since(seconds=-20.4))
        assert markers.awaited(withheld) == "Withheld: provider_quota_exhausted; lapses in 20s."
        late = marker(failure_code="timeout", failure_reason="slow", deadline=since(seconds=9), overdue=True)
        assert markers.awaited(late) == "Withheld: timeout (slow); lapsed 9s ago, and the next sweep ends it."

    def test_that_is_overdue(self) -> None:
        said = markers.awaited(marker(deadline=since(seconds=9), overdue=True))
        assert said.endswith("first sign of life, which was due 9s ago: the next sweep ends it.")

    def test_that_was_answered(self) -> None:
        assert markers.ended(outcome()) == "Answered 5s ago: reply, event 7 of stream conv-1."

    def test_that_failed(self) -> None:
        said = markers.ended(outcome(kind="error", code="cancelled", body={"message": "Stopped."}))
        assert said == "Failed 5s ago: cancelled, event 7 of stream conv-1. Stopped."

    def test_whose_event_was_pruned(self) -> None:
        assert markers.ended(outcome(kind="error", code="timeout", body=None)).endswith(SENTENCES["timeout"])

    def test_that_was_discharged(self) -> None:
        said = markers.ended(outcome(kind="discharged", seq=None, body=None))
        assert said == "Discharged 5s ago, without an event."

    @pytest.mark.parametrize(
        ("tally", "said"),
        [
            (TurnCounts(0, 0, None), "0 turns owed an ending, none overdue."),
            (TurnCounts(1, 0, None), "1 turn owed an ending, none overdue."),
            (
                TurnCounts(1_200, 3, timedelta(seconds=12.4)),
                "1,200 turns owed an ending, 3 overdue, the oldest for 12s.",
            ),
            (TurnCounts(COUNT_LIMIT, 1, timedelta(0)), "50,000+ turns owed an ending, 1 overdue, the oldest for 1s."),
        ],
    )
    def test_and_of_how_many_there_are(self, tally: TurnCounts, said: str) -> None:
        assert markers.counted(tally) == said


class TestWhatIsSaidOfARun:
    def test_that_is_due_and_nobody_works_on_its_queue(self) -> None:
        for others in ([], [worker(is_alive=False)], [worker(queues={"other": 1})]):
            said = awaited(run(), around(*others))
            assert said.startswith("Queued, and due since ")
            assert "(5s ago); no live worker works on queue mail: start one with " in said

    def test_that_waits_for_a_free_place(self) -> None:
        assert "a free place of the worker on queue mail" in awaited(run(), around(worker()))
        assert "a free place of the 2 workers on queue mail" in awaited(run(), around(worker(), worker(id=4)))

    def test_whose_queue_is_paused(self) -> None:
        said = awaited(run(), around(worker(), paused_at=since(hours=2)))
        assert "queue mail was paused 2h ago: `queue-service queues resume mail` goes on with it." in said

    def test_whose_queue_is_paused_until_a_time(self) -> None:
        said = awaited(run(), around(worker(), paused_at=since(hours=2), resumes_at=since(minutes=-4.01)))
        assert "queue mail was paused 2h ago until " in said
        assert "(in 4m): `queue-service queues resume mail` goes on with it." in said

    def test_that_has_a_lane_and_a_queue_with_limits(self) -> None:
        said = awaited(run(ordering_key="ada"), around(worker(), max_running=3))
        assert (
            "waits for its turn in lane ada, for room in the limits of the queue (3 running), for a free place" in said
        )
        assert "lane" not in awaited(run(), around(worker()))
        assert "limits" not in awaited(run(), around(worker()))

    def test_that_is_scheduled_and_expires(self) -> None:
        said = awaited(run(run_at=since(hours=-2.01), expires_at=since(hours=-3.01)), around())
        assert said.startswith("Scheduled for ")
        assert "(in 2h). It expires " in said
        assert said.endswith("(in 3h).")

    def test_that_is_tried_again_after_a_failure(self) -> None:
        error = {"reason": "raised", "message": "boom\nand more"}
        said = awaited(run(attempt=2, failures=1, error=error, run_at=since(minutes=-4.01)), around())
        assert said.startswith("Attempt 2 failed (raised: boom); tried again ")
        assert said.endswith("(in 4m).")
        due = awaited(run(attempt=2, failures=1, error=error), around(worker()))
        assert due.startswith("Attempt 2 failed (raised: boom); queued, and due since ")

    def test_that_is_running(self) -> None:
        running = run(state=RunState.RUNNING, attempt=2, claimed_at=since(seconds=4), worker_id=3)
        said = "Attempt 2 began 4s ago and runs on worker 3 (host:1), which was heard of 2s ago"
        assert awaited(running, around(worker())) == f"{said}."
        silent = awaited(running, around(worker(is_alive=False)))
        assert silent == f"{said}: when its lease lapses, another worker takes over."
        assert "a worker that is gone" in awaited(running, around())

    def test_that_is_to_be_cancelled(self) -> None:
        running = run(state=RunState.RUNNING, attempt=1, worker_id=3, cancel_requested=True)
        assert awaited(running, around(worker())).endswith(" Its cancellation was asked for.")

    def test_that_has_ended(self) -> None:
        done = run(state=RunState.SUCCEEDED, finished_at=since(seconds=5))
        assert awaited(done, around()).startswith("Ended succeeded ")
        lost = run(
            state=RunState.FAILED, finished_at=since(seconds=5), error={"reason": "worker_lost", "message": "gone"}
        )
        assert awaited(lost, around()).endswith("(5s ago), worker_lost: gone.")

    def test_and_of_the_turn_it_works_on(self) -> None:
        assert turn_of(around()) == ""
        said = turn_of(Surroundings(None, (), ("dep-1", "m1", since(minutes=-4.01))))
        assert said.startswith("It works on turn m1 of deployment dep-1, whose deadline is ")
        assert said.endswith("(in 4m).")
