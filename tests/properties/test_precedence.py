from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from queue_service.worker.precedence import AFTER_SECOND, MOST, MOST_OF_SECOND, REST, SECOND, SLICE, STEP, Precedence

FLEETS = st.sets(st.integers(1, 2**40), min_size=1, max_size=40)
MOMENTS = st.floats(0, 1e9)


def knowing(fleet: set[int], *, database_time: float = 0.0) -> list[Precedence]:
    """Each of the fleet, all of which know of all, on machines whose clocks differ."""
    made = []
    for worker_id in fleet:
        precedence = Precedence(worker_id)
        precedence.learn(sorted(fleet), database_time, 0.0, 0.0)
        made.append(precedence)
    return made


@given(FLEETS, MOMENTS)
def test_at_every_moment_each_place_is_somebodys(fleet: set[int], now: float) -> None:
    assert sorted(each.rank(now) for each in knowing(fleet)) == list(range(len(fleet)))


@given(FLEETS, st.integers(0, 10**9))
def test_everyone_has_its_turn_to_be_the_first(fleet: set[int], begin: int) -> None:
    workers = knowing(fleet)
    moments = [(begin + number + 0.5) * SLICE for number in range(len(fleet))]
    firsts = [min(workers, key=lambda each: each.rank(now)) for now in moments]
    assert len({id(each) for each in firsts}) == len(fleet)


@given(FLEETS, st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_clocks_of_machines_need_not_agree(fleet: set[int], one: float, another: float) -> None:
    """Where the database says it is noon, on machines where it is something else."""
    noon = 1.7e9 + SLICE / 2
    ranks = []
    for number, worker_id in enumerate(sorted(fleet)):
        clock = one if number % 2 else another
        precedence = Precedence(worker_id)
        precedence.learn(fleet, noon, clock, clock)
        ranks.append(precedence.rank(clock))
    assert sorted(ranks) == list(range(len(fleet)))


@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=20), st.floats(-1e6, 1e6))
def test_each_answer_narrows_down_what_time_the_database_has(answers: list[tuple[float, float]], behind: float) -> None:
    """Each takes some time to be given, and some to arrive: it is somewhere between."""
    precedence = Precedence(1)
    for number, (before, after) in enumerate(answers):
        now = 1_000.0 + number
        precedence.learn([1, 2], now + behind, now - before, now + after)
    best_before, best_after = (min(each) for each in zip(*answers, strict=True))
    assert abs(precedence._offset - behind) <= (best_before + best_after) / 2 + 1e-6


def test_clocks_that_have_drifted_apart_are_compared_anew() -> None:
    precedence = Precedence(1)
    precedence.learn([1, 2], 100.0, 100.0, 100.001)
    precedence.learn([1, 2], 205.0, 200.0, 200.001)
    assert precedence._offset == pytest.approx(4.9995)


@given(FLEETS.filter(lambda fleet: len(fleet) > 2), MOMENTS)
def test_whoever_rests_while_others_are_called_is_awake_when_its_turn_comes(fleet: set[int], now: float) -> None:
    for worker in knowing(fleet):
        assert worker.rest(now) == 0.0
        rest = worker.rest(now + 0.001)
        assert 0.0 <= rest <= REST
        if worker.rank(now + 0.001) < 2:
            assert rest == 0.0
        assert all(worker.rank(now + 0.001 + rest * part) >= 2 for part in (0.0, 0.5, 0.99) if rest)
        # Notices that come now and then are read.
        assert worker.rest(now + 1.0) == 0.0


@given(st.integers(1, 2**40), MOMENTS)
def test_one_that_knows_of_no_other_never_waits(worker_id: int, now: float) -> None:
    alone = Precedence(worker_id)
    alone.looked(0, now, found=True)
    assert alone.is_alone
    assert alone.delay(alone.rank(now), now, is_idle=False) == 0.0


class Looking(RuleBasedStateMachine):
    """One worker among others, whatever it finds or does not."""

    @initialize(fleet=FLEETS.filter(lambda fleet: len(fleet) > 1))
    def join(self, fleet: set[int]) -> None:
        self.fleet = fleet
        self.worker = Precedence(min(fleet))
        self.worker.learn(fleet, 0.0, 0.0, 0.0)
        self.now = 0.0

    @rule(seconds=st.floats(0, 1))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(others=FLEETS)
    def learn(self, others: set[int]) -> None:
        self.fleet = others | {min(self.fleet), -1}
        self.worker.learn(self.fleet, self.now, self.now, self.now)

    @rule(rank=st.integers(0, 40), found=st.booleans())
    def looked(self, rank: int, *, found: bool) -> None:
        before = self.delays()
        self.worker.looked(rank, self.now, found=found)
        after = self.delays()
        if rank > 0 and found:
            assert all(now <= then for now, then in zip(after[1:], before[1:], strict=True))
        elif rank > 0:
            assert all(now >= then for now, then in zip(after[1:], before[1:], strict=True))

    def delays(self) -> list[float]:
        return [self.worker.delay(rank, self.now, is_idle=True) for rank in range(40)]

    @invariant()
    def the_first_looks_at_once_and_the_second_within_moments(self) -> None:
        if not hasattr(self, "worker"):
            return
        delays = self.delays()
        assert delays[0] in {0.0, AFTER_SECOND} or self.worker.is_alone
        assert SECOND <= delays[1] <= SECOND * MOST_OF_SECOND
        assert delays[2:] == sorted(delays[2:])
        assert all(SECOND + STEP <= each <= (SECOND + STEP * 40) * MOST for each in delays[2:])
        assert self.worker.delay(0, self.now, is_idle=True) == 0.0


TestLooking = Looking.TestCase
