"""Any sequence of operations on turns and their streams, against a model in Python that knows every row they leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from queue_service.db.execute import fetch_sync
from queue_service.db.query import Query
from queue_service.events import queries as events
from queue_service.events.model import StreamState
from queue_service.runs.model import NewRun
from queue_service.turn import Turn
from queue_service.turns import queries
from queue_service.turns.model import EndedTurn, TurnFailure, failed, replied
from queue_service.turns.queries import Key
from tests.support import make_ours

T = TypeVar("T")
LIMIT = 100_000
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
# Few of each, so that they meet.
DEPLOYMENTS = ["d", "e"]
MESSAGES = ["1", "2", "3"]
STREAMS = ["s", "t"]
KEYS = [(deployment, message) for deployment in DEPLOYMENTS for message in MESSAGES]
RUN = {name: getattr(NewRun("noop", "default", "{}"), name) for name in NewRun.__slots__ if name != "singleton_key"}

keys = st.sampled_from(KEYS)
deployments = st.sampled_from(DEPLOYMENTS)
streams = st.sampled_from(STREAMS)
batches = st.lists(st.sampled_from(MESSAGES), min_size=1, max_size=4)
picks = st.integers(0, 99)
codes = st.sampled_from(["provider_overloaded", "provider_auth_failed"])


@dataclass
class Known:
    """A turn as the model knows it. `kind` is None while it is owed an ending."""

    stream: str
    run_id: int | None = None
    is_late: bool = False
    is_admitted: bool = False
    withheld: str | None = None
    kind: str | None = None
    code: str | None = None
    seq: int | None = None

    def alive(self) -> None:
        """It gave a sign of life."""
        self.is_late, self.is_admitted = False, True


@dataclass
class Log:
    """A stream: its head, and the kind and the turn of each event that is still stored."""

    head: int = 0
    is_over: bool = False
    events: dict[int, tuple[str, Key | None]] = field(default_factory=dict)


TURNS = """
select o.deployment, o.message_id, o.stream, o.kind, o.code, o.seq, m.deployment is not null, m.run_id,
       coalesce(m.deadline < clock_timestamp(), false), m.admitted_at is not null, m.failure_code
  from queue_service.turn_outcomes as o
  full join queue_service.turn_markers as m using (deployment, message_id)"""
EVENTS = """
select stream, seq, kind, terminal, body ->> 'deployment', body #>> '{message_ids,0}' from queue_service.events"""


class Turns(RuleBasedStateMachine):
    conn: ClassVar[psycopg.Connection[Any]]

    def __init__(self) -> None:
        super().__init__()
        self.conn.execute(
            "truncate queue_service.turn_markers, queue_service.turn_outcomes, queue_service.streams,"
            " queue_service.events, queue_service.runs"
        )
        self.turns: dict[Key, Known] = {}
        self.logs: dict[str, Log] = {}

    def ask(self, query: Query[T]) -> T:
        return fetch_sync(self.conn, query)

    def owed(self, deployment: str | None = None) -> dict[Key, Known]:
        """The turns, of a deployment, that are owed an ending."""
        return {key: turn for key, turn in self.turns.items() if turn.kind is None and deployment in {None, key[0]}}

    def one_of(self, pick: int, *, owed: bool) -> Key:
        """A turn that is owed its ending, or one that has had it; where there is none, any."""
        those = [key for key, turn in self.turns.items() if (turn.kind is None) == owed] or KEYS
        return those[pick % len(those)]

    def log(self, stream: str) -> Log:
        return self.logs.setdefault(stream, Log())

    def ended(self, found: list[EndedTurn], expected: Mapping[Key, tuple[str, str | None]]) -> None:
        """These turns ended, each with this kind and code, and with the next seqs of their streams."""
        assert sorted((each.deployment, each.message_id) for each in found) == sorted(expected)
        heads = {stream: log.head for stream, log in self.logs.items()}
        for each in found:
            key = each.deployment, each.message_id
            turn, log = self.turns[key], self.log(self.turns[key].stream)
            turn.kind, turn.code = expected[key]
            turn.seq = each.seq
            assert (each.kind, each.stream) == (turn.kind, turn.stream)
            log.head += 1
            log.events[each.seq] = turn.kind, key
        for stream, log in self.logs.items():
            new = [each.seq for each in found if each.stream == stream]
            assert new == list(range(heads[stream] + 1, log.head + 1))

    @initialize(chosen=st.lists(streams, min_size=len(DEPLOYMENTS), max_size=len(DEPLOYMENTS)))
    def arm_all(self, chosen: list[str]) -> None:
        """A model that begins empty spends most of its steps on turns that nobody armed."""
        for deployment, stream in zip(DEPLOYMENTS, chosen, strict=True):
            self.arm(deployment, MESSAGES, stream)

    @rule(deployment=deployments, messages=batches, stream=streams)
    def arm(self, deployment: str, messages: list[str], stream: str) -> None:
        new = {(deployment, message) for message in messages} - self.turns.keys()
        asked = [self._owed((deployment, message), stream) for message in messages]
        assert self.ask(queries.arm(asked)) == {each.key: each.key in new for each in asked}
        for key in new:
            self.turns[key] = Known(stream)
            self.log(stream)

    @rule(key=keys, stream=streams)
    def dispatch(self, key: Key, stream: str) -> None:
        found = self.ask(queries.dispatch(self._owed(key, stream), RUN, None))
        assert found is not None
        if key not in self.turns:
            self.log(stream)
            self.turns[key] = Known(stream)
        turn = self.turns[key]
        assert found.new == (turn.kind is None and turn.run_id is None)
        if found.new:
            turn.run_id, turn.is_late, turn.is_admitted = found.run_id, False, False
        assert found.run_id == (turn.run_id if turn.kind is None else None)
        assert found.kind == turn.kind

    @staticmethod
    def _owed(key: Key, stream: str) -> queries.Owed:
        turn = Turn(deployment=key[0], message_id=key[1], stream=stream)
        return queries.Owed(turn.fields(LIMIT), HOUR, HOUR)

    @rule(pick=picks)
    def fall_silent(self, pick: int) -> None:
        self.lapse(self.one_of(pick, owed=True))

    def lapse(self, *silent: Key) -> None:
        for key in silent:
            self.conn.execute(
                "update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 s'"
                " where deployment = %s and message_id = %s",
                key,
            )
            if key in self.owed():
                self.turns[key].is_late = True

    @rule(deployment=deployments)
    def extend(self, deployment: str) -> None:
        expected = {key: turn for key, turn in self.owed(deployment).items() if turn.withheld is None}
        assert sorted(self.ask(queries.extend(deployment))) == sorted(message for _, message in expected)
        for turn in self.owed(deployment).values():
            if turn.withheld is None:
                turn.alive()
            # Its admission is over, but it gets no time that it has not had.
            turn.is_admitted = True

    @rule(deployment=deployments, code=codes, falls_silent=st.booleans())
    def withhold(self, deployment: str, code: str, *, falls_silent: bool) -> None:
        expected = self.owed(deployment)
        assert sorted(self.ask(queries.withhold(deployment, code, None))) == sorted(message for _, message in expected)
        for turn in expected.values():
            turn.withheld = code
        if falls_silent:
            self.lapse(*expected)

    @rule(deployment=deployments)
    def restore(self, deployment: str) -> None:
        expected = {key: turn for key, turn in self.owed(deployment).items() if turn.withheld is not None}
        assert sorted(self.ask(queries.restore(deployment))) == sorted(message for _, message in expected)
        for turn in expected.values():
            turn.withheld = None
            turn.alive()

    @rule(key=keys)
    def reset_admission(self, key: Key) -> None:
        is_owed = key in self.owed()
        assert self.ask(queries.reset_admission(*key)) == is_owed
        if is_owed:
            self.turns[key].is_late = self.turns[key].is_admitted = False

    @rule(deployment=deployments, messages=batches)
    def commit_reply(self, deployment: str, messages: list[str]) -> None:
        endings = [replied(deployment, message, {"text": "done"}, LIMIT) for message in messages]
        expected = {key: ("reply", None) for key in self.owed(deployment) if key[1] in messages}
        self.ended(self.ask(queries.end(endings, notify=False)), expected)

    @rule(key=keys)
    def fail(self, key: Key) -> None:
        expected = {key: ("error", "timeout")} if key in self.owed() else {}
        self.ended(self.ask(queries.end([failed(*key, TurnFailure("timeout"))], notify=False)), expected)

    @rule(deployment=deployments)
    def fail_deployment(self, deployment: str) -> None:
        expected = dict.fromkeys(self.owed(deployment), ("error", "worker_died"))
        query = queries.fail_deployment(deployment, TurnFailure("worker_died"), notify=False)
        self.ended(self.ask(query), expected)

    @rule(limit=st.integers(1, 3))
    def sweep(self, limit: int) -> None:
        late = {key: turn for key, turn in self.owed().items() if turn.is_late}
        found = self.ask(queries.sweep(limit=limit))
        assert len(found) == min(limit, len(late))
        taken = {(each.deployment, each.message_id) for each in found}
        self.ended(found, {key: ("error", late[key].withheld or "worker_unresponsive") for key in taken})

    @rule(key=keys)
    def sweep_one(self, key: Key) -> None:
        turn = self.owed().get(key)
        is_due = turn is not None and turn.is_late
        expected = {key: ("error", turn.withheld or "worker_unresponsive")} if turn is not None and is_due else {}
        self.ended(self.ask(queries.sweep_one(*key)), expected)

    @rule(key=keys)
    def discharge(self, key: Key) -> None:
        is_owed = key in self.owed()
        assert self.ask(queries.discharge(*key)) == is_owed
        if is_owed:
            self.turns[key].kind = "discharged"

    @rule(names=st.lists(streams, min_size=1, max_size=4))
    def append(self, names: list[str]) -> None:
        expected: list[int | None] = []
        for name in names:
            log = self.log(name)
            if not log.is_over:
                log.head += 1
                log.events[log.head] = "delta", None
            expected.append(None if log.is_over else log.head)
        new = [events.NewEvent(name, "delta", "{}") for name in names]
        assert self.ask(events.append(new, notify=False)) == expected

    @rule(stream=streams, is_over=st.booleans())
    def set_state(self, stream: str, *, is_over: bool) -> None:
        state = StreamState.ENDED if is_over else StreamState.ACTIVE
        assert self.ask(events.set_state(stream, state)) == self.log(stream).head
        self.log(stream).is_over = is_over

    @rule(stream=streams, back=st.integers(0, 2))
    def trim(self, stream: str, back: int) -> None:
        upto = self.logs.get(stream, Log()).head - back
        self.cut(stream, upto, self.ask(events.trim(stream, upto=upto, limit=99)))

    @rule(stream=streams, back=st.integers(0, 2))
    def prune_events(self, stream: str, back: int) -> None:
        upto = self.logs.get(stream, Log()).head - back
        self.conn.execute(
            "update queue_service.events set created_at = clock_timestamp() - interval '2 days'"
            " where stream = %s and seq <= %s",
            [stream, upto],
        )
        for name, last in self.ask(events.aged(DAY, after="", limit=9)):
            if last is not None:
                self.cut(name, last, self.ask(events.trim(name, upto=last, limit=99)))

    def cut(self, stream: str, upto: int, gone: int) -> None:
        """Events up to there went, except endings."""
        log = self.logs.get(stream, Log())
        going = [seq for seq, (_, key) in log.events.items() if seq <= upto and key is None]
        assert gone == len(going)
        for seq in going:
            del log.events[seq]

    @rule(pick=picks)
    def prune_turns(self, pick: int) -> None:
        key = self.one_of(pick, owed=False)
        self.conn.execute(
            "update queue_service.turn_outcomes set armed_at = clock_timestamp() - interval '2 days'"
            " where deployment = %s and message_id = %s and kind is not null",
            key,
        )
        is_old = key in self.turns and self.turns[key].kind is not None
        assert self.ask(queries.prune(DAY, limit=9)) == is_old
        if is_old:
            turn = self.turns.pop(key)
            if turn.seq is not None:
                del self.logs[turn.stream].events[turn.seq]

    @invariant()
    def every_turn_is_either_owed_an_ending_or_has_had_it(self) -> None:
        found = {(row[0], row[1]): row[2:] for row in self.conn.execute(TURNS.encode()).fetchall()}
        expected: dict[Key, tuple[Any, ...]] = {}
        for key, turn in self.turns.items():
            marker: tuple[Any, ...] = (False, None, False, False, None)
            if turn.kind is None:
                marker = (True, turn.run_id, turn.is_late, turn.is_admitted, turn.withheld)
            expected[key] = (turn.stream, turn.kind, turn.code, turn.seq, *marker)
        assert found == expected

    @invariant()
    def every_stream_has_its_events_without_gaps_and_one_ending_for_each_turn_that_ended(self) -> None:
        heads = dict(self.conn.execute("select stream, head from queue_service.streams").fetchall())
        assert heads == {stream: log.head for stream, log in self.logs.items()}
        stored: dict[tuple[str, int], tuple[Any, ...]] = {}
        for stream, seq, kind, is_terminal, deployment, message in self.conn.execute(EVENTS.encode()).fetchall():
            assert is_terminal == (kind in {"reply", "error"})
            stored[stream, seq] = kind, None if deployment is None else (deployment, message)
        assert stored == {
            (stream, seq): event for stream, log in self.logs.items() for seq, event in log.events.items()
        }
        endings = sorted(key for _, key in stored.values() if key is not None)
        assert endings == sorted(key for key, turn in self.turns.items() if turn.seq is not None)

    @invariant()
    def whoever_asks_hears_how_each_turn_stands(self) -> None:
        for key in KEYS:
            turn = self.turns.get(key)
            assert self.ask(queries.is_live(*key)) == (turn is not None and turn.kind is None and not turn.is_late)
            standing = self.ask(queries.standing(*key))
            assert (standing is None) == (turn is None)
            if standing is not None and turn is not None:
                outcome = standing.outcome
                assert (outcome and outcome.kind) == turn.kind
                assert (outcome is None) == (standing.seconds_left is not None)
                assert outcome is None or (outcome.body is None) == (turn.kind == "discharged")


@pytest.fixture
def machine(database: str) -> Iterator[type[Turns]]:
    with psycopg.connect(database, autocommit=True) as conn:
        make_ours(conn)
        Turns.conn = conn
        yield Turns


def test_no_sequence_of_operations_ends_a_turn_twice_or_forgets_to(machine: type[Turns]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )
