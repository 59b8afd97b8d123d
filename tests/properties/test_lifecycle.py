"""Any sequence of operations on runs, against a model in Python: no run is lost, doubled, or changed by a stale claim."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from queue_service.db.execute import fetch_sync
from queue_service.db.query import Query
from queue_service.runs import queries, settling
from queue_service.runs.claim import Claim
from queue_service.runs.model import Ending, NewRun, Return, RunState
from queue_service.runs.queries import Claimant
from tests.support import claim, make_ours

T = TypeVar("T")
LEASE = timedelta(seconds=30)
ENDINGS = [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED]


class Lifecycle(RuleBasedStateMachine):
    conn: ClassVar[psycopg.Connection[Any]]
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.conn.execute("truncate queue_service.runs, queue_service.finished_runs, queue_service.leases")
        self.state: dict[int, RunState] = {}
        self.attempt: dict[int, int] = {}
        self.losses: dict[int, int] = {}
        self.asked: set[int] = set()
        self.keys: dict[int, str] = {}
        self.leases: dict[int, set[int]] = {}

    def run_query(self, query: Query[T]) -> T:
        return fetch_sync(self.conn, query)

    def held(self, held: Claim) -> bool:
        return self.state.get(held.run_id) is RunState.RUNNING and self.attempt[held.run_id] == held.attempt

    def let_go(self, run_id: int) -> list[int]:
        """Take the run from its lease; the lease, if that was its last one."""
        for lease, runs in list(self.leases.items()):
            if run_id in runs:
                runs.discard(run_id)
                if not runs:
                    del self.leases[lease]
                    return [lease]
        return []

    def key_is_free(self, run_id: int) -> bool:
        live = {self.keys.get(each) for each, state in self.state.items() if not state.finished}
        return self.keys.get(run_id) is None or self.keys[run_id] not in live

    @rule(priority=st.integers(-1, 1), key=st.sampled_from([None, None, "a", "b"]))
    def enqueue(self, priority: int, key: str | None) -> None:
        new = NewRun("noop", "default", "{}", priority=priority, singleton_key=key)
        run_id = self.run_query(queries.enqueue(new))
        taken = {self.keys.get(each) for each, state in self.state.items() if not state.finished}
        assert (run_id is None) == (key is not None and key in taken)
        if run_id is not None:
            self.state[run_id], self.attempt[run_id], self.losses[run_id] = RunState.QUEUED, 0, 0
            if key is not None:
                self.keys[run_id] = key

    def taken(self, found: list[tuple[Any, int]]) -> Any:
        for run, lease in found:
            assert self.state[run.id] is RunState.QUEUED
            self.state[run.id] = RunState.RUNNING
            self.attempt[run.id] += 1
            self.leases.setdefault(lease, set()).add(run.id)
            assert run.claim == Claim(run.id, self.attempt[run.id])
        return multiple(*(run.claim for run, _ in found))

    @rule(target=claims, limit=st.integers(1, 3))
    def claim(self, limit: int) -> Any:
        found = self.run_query(claim(limit=limit, priorities=(-1, 0, 1)))
        due = [each for each, state in self.state.items() if state is RunState.QUEUED and not self.losses[each]]
        assert len(found) == min(limit, len(due))
        return self.taken(found)

    @rule(target=claims)
    def claim_suspect(self) -> Any:
        found = self.run_query(queries.claim_suspect(["default"], Claimant(["noop"], 2, LEASE)))
        due = [each for each, state in self.state.items() if state is RunState.QUEUED and self.losses[each]]
        assert len(found) == min(1, len(due))
        return self.taken(found)

    @rule(held=claims, state=st.sampled_from(ENDINGS))
    def finish(self, held: Claim, state: RunState) -> None:
        was_held = self.held(held)
        freed = self.let_go(held.run_id) if was_held else []
        done = self.run_query(settling.finish([Ending(held, state)], worker_id=1, freed=freed))
        assert done == ({held} if was_held else set())
        if was_held:
            self.state[held.run_id] = state

    @rule(held=claims, failed=st.booleans())
    def give_back(self, held: Claim, failed: bool) -> None:
        was_held = self.held(held)
        freed = self.let_go(held.run_id) if was_held else []
        done = self.run_query(settling.give_back([Return(held, failed=failed)], worker_id=1, freed=freed))
        assert done == ({held} if was_held else set())
        if was_held:
            cancelled = held.run_id in self.asked
            self.state[held.run_id] = RunState.CANCELLED if cancelled else RunState.QUEUED
            self.asked.discard(held.run_id)

    @rule(held=consumes(claims))
    def lose_the_worker_of(self, held: Claim) -> None:
        lease = next((lease for lease, runs in self.leases.items() if held.run_id in runs), None)
        if lease is None or not self.held(held):
            return
        self.conn.execute(
            "update queue_service.leases set expires_at = clock_timestamp() - interval '1 s' where id = %s", [lease]
        )
        lost = self.leases.pop(lease)
        swept = self.run_query(queries.sweep(limit=10, max_losses=2))
        assert {run.run_id for run in swept} == lost
        for run in swept:
            self.losses[run.run_id] += 1
            over = RunState.FAILED if self.losses[run.run_id] >= 2 else RunState.QUEUED
            self.state[run.run_id] = RunState.CANCELLED if run.run_id in self.asked else over
            self.asked.discard(run.run_id)
            assert run.state is self.state[run.run_id]

    @rule(pick=st.randoms(use_true_random=False))
    def cancel(self, pick: Any) -> None:
        if self.state:
            run_id = pick.choice(sorted(self.state))
            answer = self.run_query(queries.cancel(run_id))
            if self.state[run_id] is RunState.QUEUED:
                self.state[run_id] = RunState.CANCELLED
                assert answer == "cancelled"
            elif self.state[run_id] is RunState.RUNNING:
                self.asked.add(run_id)
                assert answer == "requested"
            else:
                assert answer is None

    @rule(pick=st.randoms(use_true_random=False))
    def retry(self, pick: Any) -> None:
        if self.state:
            run_id = pick.choice(sorted(self.state))
            can = self.state[run_id] in {RunState.FAILED, RunState.CANCELLED}
            answer = self.run_query(queries.retry(run_id))
            assert (answer is not None) == can
            if answer is not None:
                assert answer.has_moved == self.key_is_free(run_id)
            if answer is not None and answer.has_moved:
                self.state[run_id], self.losses[run_id] = RunState.QUEUED, 0
                self.asked.discard(run_id)

    @rule(pick=st.randoms(use_true_random=False))
    def delete(self, pick: Any) -> None:
        if self.state:
            run_id = pick.choice(sorted(self.state))
            can = self.state[run_id] is not RunState.RUNNING
            assert self.run_query(queries.delete(run_id)) == can
            if can:
                del self.state[run_id]

    @invariant()
    def the_tables_say_what_the_model_says(self) -> None:
        live = dict(self.conn.execute("select id, state from queue_service.runs").fetchall())
        over = self.conn.execute("select id, state from queue_service.finished_runs").fetchall()
        assert len({run_id for run_id, _ in over} | live.keys()) == len(over) + len(live)
        assert {**live, **dict(over)} == {run_id: state.value for run_id, state in self.state.items()}

    @invariant()
    def each_running_run_is_held_by_a_lease_that_lists_it(self) -> None:
        held = self.conn.execute(
            "select runs.id from queue_service.runs join queue_service.leases "
            "on leases.id = runs.lease_id and runs.id = any(leases.run_ids) where runs.state = 'running'"
        ).fetchall()
        assert {run_id for (run_id,) in held} == {i for i, state in self.state.items() if state is RunState.RUNNING}
        leases = self.conn.execute("select id from queue_service.leases").fetchall()
        assert {lease for (lease,) in leases} == self.leases.keys()


@pytest.fixture
def machine(database: str) -> Iterator[type[Lifecycle]]:
    with psycopg.connect(database, autocommit=True) as conn:
        make_ours(conn)
        Lifecycle.conn = conn
        yield Lifecycle


def test_no_sequence_of_operations_loses_or_doubles_a_run(machine: type[Lifecycle]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        ),
    )
