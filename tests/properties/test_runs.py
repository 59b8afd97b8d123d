"""Batches, several queues, expiry and lost workers in any order, against a model that knows every column that matters.

`test_lifecycle.py` walks single runs; here writes come in batches that mix held and stale claims.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from queue_service import Run
from queue_service.db.execute import fetch_sync
from queue_service.db.query import Query
from queue_service.runs import queries, settling
from queue_service.runs.claim import Claim
from queue_service.runs.model import Ending, NewRun, Return, RunState
from queue_service.runs.queries import Claimant
from tests.support import LEASE, claim, make_ours

T = TypeVar("T")
QUEUES = ["default", "other"]
KEYS = [None, None, None, "a", "b"]
MAX_LOSSES = 3
OVER = [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED]

batches = st.lists(
    st.tuples(st.integers(0, 999), st.sampled_from(OVER), st.booleans()),
    min_size=1,
    max_size=6,
    unique_by=lambda t: t[0],
)
picks = st.integers(0, 999)


@dataclass
class Known:
    """What the model knows of a run; `Line` is the same as the database has it."""

    queue: str
    key: str | None
    expires: bool
    state: RunState = RunState.QUEUED
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    lease: int | None = None
    is_asked: bool = False
    # When it ended.
    was_running: bool = False
    result: Any = None
    message: str | None = None
    # The attempts before the last that failed or were lost.
    attempts: list[str] = field(default_factory=list)

    def line(self) -> tuple[Any, ...]:
        return (
            self.queue, self.key, self.state.value, self.attempt, self.failures, self.losses, self.lease, self.is_asked,
            self.result, self.message, self.attempts or None,
        )  # fmt: skip

    def keep_attempt(self) -> None:
        self.attempts.append(f"{self.attempt}: {self.message}")

    def end(self, state: RunState) -> None:
        self.was_running = self.state is RunState.RUNNING
        self.state, self.lease, self.is_asked = state, None, False

    def requeue(self) -> None:
        self.state, self.lease = RunState.QUEUED, None


ATTEMPTS = """(select array_agg((each ->> 'attempt') || ': ' || coalesce(each -> 'error' ->> 'message', '') order by place)
   from jsonb_array_elements(attempts) with ordinality as kept (each, place))"""

LINES = f"""
select id, queue, singleton_key, state, attempt, failures, losses, lease_id, cancel_requested, null::jsonb,
       error ->> 'message', {ATTEMPTS}
  from queue_service.runs
union all
select id, queue, singleton_key, state, attempt, failures, losses, null, false, result, error ->> 'message', {ATTEMPTS}
  from queue_service.finished_runs"""


@dataclass
class Model:
    runs: dict[int, Known] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def those(self, *states: RunState) -> list[int]:
        return [run_id for run_id, run in self.runs.items() if run.state in states]

    def holder(self, queue: str, key: str | None) -> int | None:
        live = self.those(RunState.QUEUED, RunState.RUNNING)
        return next((i for i in live if key and (self.runs[i].queue, self.runs[i].key) == (queue, key)), None)

    def is_held(self, held: Claim) -> bool:
        run = self.runs.get(held.run_id)
        return run is not None and run.state is RunState.RUNNING and run.attempt == held.attempt

    def freed(self, ending: set[Claim]) -> list[int]:
        """The leases whose last runs these are."""
        going = {held.run_id for held in ending if self.is_held(held)}
        leases = {self.runs[run_id].lease for run_id in going}
        kept = {run.lease for run_id, run in self.runs.items() if run_id not in going}
        return sorted(lease for lease in leases - kept if lease is not None)


class Runs(RuleBasedStateMachine):
    conn: ClassVar[psycopg.Connection[Any]]

    def __init__(self) -> None:
        super().__init__()
        self.conn.execute("truncate queue_service.runs, queue_service.finished_runs, queue_service.leases")
        self.model = Model()

    def ask(self, query: Query[T]) -> T:
        return fetch_sync(self.conn, query)

    def any_of(self, pick: int, *states: RunState) -> int:
        """A run in one of these states, or an id that nobody has."""
        known = self.model.those(*(states or RunState))
        return known[pick % len(known)] if known else 999_999_999

    @rule(queue=st.sampled_from(QUEUES), key=st.sampled_from(KEYS), expires=st.booleans(), replaces=st.booleans())
    def enqueue(self, queue: str, key: str | None, *, expires: bool, replaces: bool) -> None:
        new = NewRun("noop", queue, "{}", singleton_key=key, expires_in=timedelta(hours=1) if expires else None)
        run_id = self.ask(queries.replace(new) if replaces else queries.enqueue(new))
        holder = self.model.holder(queue, key)
        if holder is None:
            assert run_id is not None
            assert run_id not in self.model.runs
            self.model.runs[run_id] = Known(queue, key, expires)
        elif replaces and self.model.runs[holder].state is RunState.QUEUED:
            assert run_id == holder
            held = self.model.runs[holder]
            held.expires, held.failures, held.message, held.attempts = expires, 0, None, []
            # Whether a new run in the place of a suspect is one is not this test's business.
            held.losses = self.conn.execute("select losses from queue_service.runs where id = %s", [holder]).fetchall()[
                0
            ][0]
        else:
            assert run_id is None

    def took(self, found: list[tuple[Run, int]], due: list[int], limit: int) -> None:
        assert len(found) == min(limit, len(due))
        assert {run.id for run, _ in found} <= set(due)
        assert len({lease for _, lease in found}) <= 1
        for run, lease in found:
            known = self.model.runs[run.id]
            known.state, known.attempt, known.lease = RunState.RUNNING, known.attempt + 1, lease
            assert run.attempt == known.attempt
            self.model.claims.append(run.claim)

    @rule(queue=st.sampled_from(QUEUES), limit=st.integers(1, 4))
    def claim(self, queue: str, limit: int) -> None:
        queued = self.model.those(RunState.QUEUED)
        due = [i for i in queued if self.model.runs[i].queue == queue and not self.model.runs[i].losses]
        self.took(self.ask(claim(queue=queue, limit=limit)), due, limit)

    @rule()
    def claim_suspect(self) -> None:
        due = [i for i in self.model.those(RunState.QUEUED) if self.model.runs[i].losses]
        self.took(self.ask(queries.claim_suspect(QUEUES, Claimant(["noop"], 2, LEASE))), due, 1)

    def batch(self, chosen: list[tuple[int, RunState, bool]]) -> dict[Claim, tuple[RunState, bool]]:
        claims = self.model.claims
        return {claims[-1 - pick % len(claims)]: (state, flag) for pick, state, flag in chosen}

    @precondition(lambda self: self.model.claims)
    @rule(chosen=batches)
    def finish(self, chosen: list[tuple[int, RunState, bool]]) -> None:
        batch = self.batch(chosen)
        held = {each for each in batch if self.model.is_held(each)}
        endings = [
            Ending(each, state, f'"{each.run_id}/{each.attempt}"' if says else "null", f'{{"message":"{each.run_id}"}}')
            for each, (state, says) in batch.items()
        ]
        assert self.ask(settling.finish(endings, worker_id=1, freed=self.model.freed(held))) == held
        for each in held:
            (state, says), run = batch[each], self.model.runs[each.run_id]
            run.end(state)
            if state is RunState.SUCCEEDED:
                run.result = f"{each.run_id}/{each.attempt}" if says else None
            else:
                run.message = str(each.run_id)
                run.failures += state is RunState.FAILED

    @precondition(lambda self: self.model.claims)
    @rule(chosen=batches)
    def give_back(self, chosen: list[tuple[int, RunState, bool]]) -> None:
        batch = self.batch(chosen)
        held = {each for each in batch if self.model.is_held(each)}
        returns = [
            Return(each, failed=failed, error=f'{{"message":"back {each.run_id}"}}' if failed else "null")
            for each, (_, failed) in batch.items()
        ]
        assert self.ask(settling.give_back(returns, worker_id=1, freed=self.model.freed(held))) == held
        for each in held:
            (_, failed), run = batch[each], self.model.runs[each.run_id]
            run.failures += failed
            run.message = f"back {each.run_id}" if failed else run.message
            if run.is_asked:
                run.message = run.message if failed else "It was cancelled while it ran."
                run.end(RunState.CANCELLED)
            else:
                if failed:
                    run.keep_attempt()
                run.requeue()

    @precondition(lambda self: self.model.those(RunState.RUNNING))
    @rule(pick=picks, saved=st.booleans())
    def lose_a_worker(self, pick: int, *, saved: bool) -> None:
        lease = self.model.runs[self.any_of(pick, RunState.RUNNING)].lease
        assert lease is not None
        self.conn.execute("update queue_service.leases set expires_at = now() - interval '1 s' where id = %s", [lease])
        if saved:
            assert self.ask(queries.extend([lease], LEASE)) == {lease}
        swept = self.ask(queries.sweep(limit=5, max_losses=MAX_LOSSES))
        held = [] if saved else [run_id for run_id, run in self.model.runs.items() if run.lease == lease]
        assert sorted(each.run_id for each in swept) == sorted(held)
        for each in swept:
            run = self.model.runs[each.run_id]
            run.losses += 1
            is_last = run.losses >= MAX_LOSSES
            if run.is_asked or is_last:
                run.message = f"The worker was lost while this run was with it, for the {run.losses}. time."
                run.end(RunState.CANCELLED if run.is_asked else RunState.FAILED)
            else:
                run.message = "The worker was lost while this run was with it."
                run.keep_attempt()
                run.requeue()
            assert each.state is run.state
        if not saved:
            assert self.ask(queries.extend([lease], LEASE)) == set()

    @rule(pick=picks)
    def expire(self, pick: int) -> None:
        run_id = self.any_of(pick)
        self.conn.execute(
            "update queue_service.runs set expires_at = now() - interval '1 s' where id = %s and expires_at is not null",
            [run_id],
        )
        run = self.model.runs.get(run_id)
        is_over = run is not None and run.expires and run.state is RunState.QUEUED
        assert self.ask(queries.expire(limit=5)) == ([run_id] if is_over else [])
        if run is not None and is_over:
            run.message = run.message or "It was not started in time."
            run.end(RunState.EXPIRED)
        else:
            self.conn.execute(
                "update queue_service.runs set expires_at = now() + interval '1 h' where expires_at is not null"
            )

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        run_id = self.any_of(pick)
        run = self.model.runs.get(run_id)
        answers = {RunState.QUEUED: "cancelled", RunState.RUNNING: "requested"}
        assert self.ask(queries.cancel(run_id)) == (answers.get(run.state) if run else None)
        if run is not None and run.state is RunState.RUNNING:
            run.is_asked = True
        if run is not None and run.state is RunState.QUEUED:
            run.message = run.message or "It was cancelled before it started."
            run.end(RunState.CANCELLED)

    @rule(pick=picks)
    def retry(self, pick: int) -> None:
        run_id = self.any_of(pick, RunState.FAILED, RunState.CANCELLED, RunState.EXPIRED, RunState.SUCCEEDED)
        run = self.model.runs.get(run_id)
        if run is None or run.state is RunState.SUCCEEDED:
            assert self.ask(queries.retry(run_id)) is None
        elif self.model.holder(run.queue, run.key) is not None:
            assert self.ask(queries.retry(run_id)) == queries.Retriable(run.queue, 0, run.key, None, has_moved=False)
        else:
            assert self.ask(queries.retry(run_id)) == queries.Retriable(run.queue, 0, run.key, None, has_moved=True)
            if run.was_running:
                run.keep_attempt()
            run.state, run.failures, run.losses, run.expires = RunState.QUEUED, 0, 0, False

    @rule(pick=picks)
    def delete(self, pick: int) -> None:
        run_id = self.any_of(pick)
        run = self.model.runs.get(run_id)
        can = run is not None and run.state is not RunState.RUNNING
        assert self.ask(queries.delete(run_id)) == can
        if can:
            del self.model.runs[run_id]

    @invariant()
    def every_run_is_in_one_place_and_as_the_model_says(self) -> None:
        found = self.conn.execute(LINES.encode()).fetchall()
        assert len(found) == len({row[0] for row in found})
        assert {row[0]: row[1:] for row in found} == {run_id: run.line() for run_id, run in self.model.runs.items()}

    @invariant()
    def leases_are_those_of_running_runs_and_list_them(self) -> None:
        listed = dict(self.conn.execute("select id, run_ids from queue_service.leases").fetchall())
        held = {run_id: run.lease for run_id, run in self.model.runs.items() if run.lease is not None}
        assert listed.keys() == set(held.values())
        assert all(run_id in listed[lease] for run_id, lease in held.items())


@pytest.fixture
def machine(database: str) -> Iterator[type[Runs]]:
    with psycopg.connect(database, autocommit=True) as conn:
        make_ours(conn)
        Runs.conn = conn
        yield Runs


def test_no_sequence_of_batches_loses_or_doubles_a_run_or_obeys_a_stale_claim(machine: type[Runs]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=120,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )
