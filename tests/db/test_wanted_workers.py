"""How many workers a queue wants, in every state that its runs can be in."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import uuid4

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import errors as pg
from psycopg.conninfo import make_conninfo

from queue_service.testing import databases
from tests.db.counting import wanted

Conn = psycopg.Connection[Any]

PAST, FUTURE = "-1 hour", "1 hour"


@pytest.fixture
def conn(direct: str) -> Iterator[Conn]:
    with psycopg.connect(direct, autocommit=True) as opened:
        yield opened


def enqueue(conn: Conn, queue: str = "default", *, count: int = 1, run_at: str = PAST, **columns: object) -> list[int]:
    given = {"queue": queue, "task": "noop", "payload": "{}"} | columns
    names = ", ".join(given)
    cursor = conn.execute(
        f"insert into queue_service.runs ({names}, run_at) select {', '.join(['%s'] * len(given))}, "
        "clock_timestamp() + %s::interval from generate_series(1, %s) returning id".encode(),
        [*given.values(), run_at, count],
    )
    return [row[0] for row in cursor.fetchall()]


def begin(conn: Conn, *run_ids: int) -> None:
    """As a claim does."""
    conn.execute(
        "with lease as (insert into queue_service.leases (worker_id, expires_at, run_ids) "
        "values (1, clock_timestamp() + interval '1 hour', %(ids)s) returning id) "
        "update queue_service.runs set state = 'running', attempt = attempt + 1, lease_id = lease.id, "
        "claimed_at = clock_timestamp() from lease where runs.id = any(%(ids)s)",
        {"ids": list(run_ids)},
    )


def test_an_empty_queue_wants_nobody(conn: Conn) -> None:
    enqueue(conn, "other", count=5)
    assert wanted(conn, "default", 10) == 0
    assert wanted(conn, "other", 10) == 1


@pytest.mark.parametrize(("due", "slots", "workers"), [(1, 10, 1), (10, 10, 1), (11, 10, 2), (25, 1, 25), (25, 100, 1)])
def test_what_is_due_wants_so_many_as_have_slots_for_it(conn: Conn, due: int, slots: int, workers: int) -> None:
    enqueue(conn, count=due)
    assert wanted(conn, "default", slots) == workers


def test_a_queue_that_keeps_up_is_not_scaled_away_from_under_what_runs(conn: Conn) -> None:
    begin(conn, *enqueue(conn, count=12))
    assert wanted(conn, "default", 10) == 2
    assert wanted(conn, "default", 100) == 1


def test_what_runs_and_what_is_due_count_together(conn: Conn) -> None:
    begin(conn, *enqueue(conn, count=8))
    enqueue(conn, count=3)
    assert wanted(conn, "default", 10) == 2


def test_what_a_lost_worker_held_wants_one_who_takes_it_over(conn: Conn) -> None:
    begin(conn, *enqueue(conn))
    conn.execute("update queue_service.leases set expires_at = clock_timestamp() - interval '1 minute'")
    assert wanted(conn, "default", 10) == 1


@pytest.mark.parametrize(
    ("columns", "workers"),
    [
        ({"run_at": FUTURE}, 0),
        ({"expires_at": "2020-01-01Z"}, 0),
        ({"expires_at": "2999-01-01Z"}, 5),
        ({"priority": -5}, 5),
        ({"losses": 1}, 5),
        ({"reserved_for": "somebody"}, 5),
        ({"ordering_key": "one lane"}, 1),
        ({"ordering_key": "one lane", "run_at": FUTURE}, 0),
    ],
    ids=str,
)
def test_what_could_begin_now_counts(conn: Conn, columns: dict[str, Any], workers: int) -> None:
    enqueue(conn, count=5, **columns)
    assert wanted(conn, "default", 1) == workers


def test_every_priority_counts(conn: Conn) -> None:
    for priority in (32767, 3, 0, -32768):
        enqueue(conn, count=2, priority=priority)
        enqueue(conn, count=2, priority=priority, run_at=FUTURE)
    assert wanted(conn, "default", 1) == 8


def test_behind_the_running_head_of_a_lane_nothing_counts(conn: Conn) -> None:
    head, *_ = enqueue(conn, count=5, ordering_key="one")
    begin(conn, head)
    assert wanted(conn, "default", 1) == 1
    enqueue(conn, count=5, ordering_key="another", task="of another task")
    assert wanted(conn, "default", 1) == 2


def test_of_a_wide_lane_as_many_count_as_may_begin(conn: Conn) -> None:
    conn.execute("insert into queue_service.queues (name, max_running_per_key) values ('default', 3)")
    begin(conn, *enqueue(conn, count=5, ordering_key="one")[:1])
    assert wanted(conn, "default", 1) == 3
    enqueue(conn, count=2, ordering_key="another")
    assert wanted(conn, "default", 1) == 5


def test_a_paused_queue_wants_hands_for_what_runs_and_no_more(conn: Conn) -> None:
    conn.execute("insert into queue_service.queues (name, paused_at) values ('default', clock_timestamp())")
    enqueue(conn, count=5)
    enqueue(conn, count=5, ordering_key="one")
    assert wanted(conn, "default", 1) == 0
    begin(conn, *enqueue(conn, count=2))
    assert wanted(conn, "default", 1) == 2
    conn.execute("update queue_service.queues set resumes_at = clock_timestamp() + interval '1 hour'")
    assert wanted(conn, "default", 1) == 2
    conn.execute("update queue_service.queues set resumes_at = clock_timestamp() - interval '1 second'")
    assert wanted(conn, "default", 1) == 8


def test_a_queue_with_a_limit_wants_no_more_than_it_lets_run(conn: Conn) -> None:
    conn.execute("insert into queue_service.queues (name, max_running) values ('default', 4)")
    enqueue(conn, count=50)
    assert wanted(conn, "default", 1) == 4
    begin(conn, *enqueue(conn, count=3))
    assert wanted(conn, "default", 1) == 4
    # What ran before the limit was set goes on.
    begin(conn, *enqueue(conn, count=3))
    assert wanted(conn, "default", 1) == 6
    assert wanted(conn, "default", 6) == 1


def test_a_queue_with_a_rate_wants_what_may_begin_and_what_runs(conn: Conn) -> None:
    conn.execute(
        "insert into queue_service.queues (name, rate, period, burst, tokens, tokens_at) "
        "values ('default', 7, '1 day', 7, 7, clock_timestamp())"
    )
    enqueue(conn, count=50)
    assert wanted(conn, "default", 1) == 7
    conn.execute("update queue_service.queues set tokens = 0, tokens_at = clock_timestamp()")
    # Somebody has to be there when the next one may begin.
    assert wanted(conn, "default", 1) == 1
    begin(conn, *enqueue(conn, count=3))
    assert wanted(conn, "default", 1) == 3


def test_never_more_than_the_most(conn: Conn) -> None:
    enqueue(conn, count=30)
    begin(conn, *enqueue(conn, count=30))
    assert wanted(conn, "default", 1, 50) == 50
    assert wanted(conn, "default", 1, 7) == 7
    assert wanted(conn, "default", 1) == 60


@pytest.mark.parametrize(
    "arguments",
    [("default", 0), ("default", -1), ("default", None), (None, 10), ("default", 10, 0), ("default", 10, None)],
)
def test_what_makes_no_sense_is_an_error_and_no_number(conn: Conn, arguments: tuple[Any, ...]) -> None:
    enqueue(conn)
    with pytest.raises(pg.InvalidParameterValue, match=r"names no queue, or no number.*\n.*HINT.*Pass the queue"):
        wanted(conn, *arguments)


def test_who_may_call_it_sees_the_number_and_nothing_else(conn: Conn, direct: str, server: str) -> None:
    enqueue(conn, count=3)
    role = f"scaler_{uuid4().hex[:8]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create role {role} login".encode())
        try:
            conn.execute(f"grant usage on schema queue_service to {role}".encode())
            with psycopg.connect(make_conninfo(direct, user=role), autocommit=True) as scaler:
                with pytest.raises(pg.InsufficientPrivilege):
                    wanted(scaler, "default", 1)
                conn.execute(
                    f"grant execute on function queue_service.wanted_workers(text, integer, integer) to {role}".encode()
                )
                # What the caller has made does not stand in the way of what is meant.
                scaler.execute("create temp table runs (id bigint); create temp table leases (id bigint)")
                conn.execute("create function public.ceil(float8) returns float8 language sql as 'select 99::float8'")
                scaler.execute("set search_path = public, pg_catalog; set enable_indexscan = off")
                assert wanted(scaler, "default", 1) == 3
                with pytest.raises(pg.InsufficientPrivilege):
                    scaler.execute("select from queue_service.runs")
        finally:
            conn.execute(f"drop owned by {role}".encode())
            admin.execute(f"drop role {role}".encode())


class Row(NamedTuple):
    """A run as the test makes it."""

    is_running: bool
    is_future: bool
    expires: str | None
    priority: int
    key: str | None


class Queue(NamedTuple):
    paused: bool
    max_running: int | None
    width: int | None


ROWS = st.lists(
    st.builds(
        Row,
        st.booleans(),
        st.booleans(),
        st.sampled_from([None, "2020-01-01Z", "2999-01-01Z"]),
        st.integers(-2, 2),
        st.sampled_from([None, None, "a", "b"]),
    ),
    max_size=12,
)
QUEUES = st.builds(
    Queue, st.booleans(), st.one_of(st.none(), st.integers(1, 6)), st.one_of(st.none(), st.integers(1, 3))
)


def model(runs: list[Row], queue: Queue, slots: int) -> int:
    """What the function says, in plain words."""
    running = sum(each.is_running for each in runs)
    due = sum(_may_begin(each) for each in runs if each.key is None and not each.is_running)
    for key in ("a", "b"):
        lane = [each for each in runs if each.key == key]
        room = (queue.width or 1) - sum(each.is_running for each in lane)
        queued = [each for each in lane if not each.is_running]
        if room > 0 and any(map(_may_begin, queued)):
            due += max(1, sum(map(_may_begin, queued[:room])))
    if queue.paused:
        due = 0
    allowed = due if queue.max_running is None else min(due, max(queue.max_running - running, 0))
    return max(math.ceil((running + allowed) / slots), int(running + due > 0))


def _may_begin(run: Row) -> bool:
    return not run.is_future and run.expires != "2020-01-01Z"


@pytest.fixture(scope="module")
def modelled(server: str, template: str) -> Iterator[Conn]:
    with databases.made(server, template) as conninfo, psycopg.connect(conninfo, autocommit=True) as opened:
        yield opened


@settings(max_examples=150, deadline=None)
@given(ROWS, QUEUES, st.integers(1, 4))
def test_it_says_what_a_model_in_python_says(modelled: Conn, runs: list[Row], queue: Queue, slots: int) -> None:
    taken: dict[str, int] = {}
    made: list[Row] = []
    with modelled.transaction(force_rollback=True):
        modelled.execute(
            "insert into queue_service.queues (name, paused_at, max_running, max_running_per_key) values (%s, %s, %s, %s)",
            ["default", "2020-01-01Z" if queue.paused else None, queue.max_running, queue.width],
        )
        for run in runs:
            # No claim takes more of a lane than it is wide.
            is_full = run.key is not None and taken.get(run.key, 0) >= (queue.width or 1)
            given_run = run._replace(is_running=run.is_running and not is_full)
            (run_id,) = enqueue(
                modelled, run_at=FUTURE if given_run.is_future else PAST, expires_at=given_run.expires,
                priority=given_run.priority, ordering_key=given_run.key,
            )  # fmt: skip
            if given_run.is_running:
                begin(modelled, run_id)
                taken[given_run.key or ""] = taken.get(given_run.key or "", 0) + 1
            made.append(given_run)
        # What a worker does with lanes of which it finds nothing.
        modelled.execute("select queue_service.tend_lanes('{default,default}', '{a,b}')")
        assert wanted(modelled, "default", slots) == model(made, queue, slots)
