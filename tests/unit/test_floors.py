"""Floors only ever skip what was handed out, or what the next scan will find."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from queue_service import Run, RunState
from queue_service.runs.model import Floor
from queue_service.runs.queries import MAX_PRIORITIES, DuePriority
from queue_service.worker.floors import COMMIT_LAG, FRONT, Floors

START = datetime(2030, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def run(seconds: float, run_id: int, *, priority: int = 0, queue: str = "q") -> Run:
    return Run(
        id=run_id, queue=queue, task="noop", state=RunState.RUNNING, payload={}, attempt=1, failures=0, losses=0,
        priority=priority, created_at=START, run_at=at(seconds),
    )  # fmt: skip


def test_a_queue_without_news_has_no_floors() -> None:
    assert Floors().by_priority == {}


def test_a_hint_makes_a_new_priority_looked_at_from_the_front() -> None:
    floors = Floors()
    floors.hint(5)
    assert floors.by_priority == {5: FRONT}


def test_a_hint_does_not_lower_a_floor() -> None:
    floors = Floors()
    floors.claimed([run(3, 7)])
    floors.hint(0)
    assert floors.by_priority == {0: Floor(at(3), 7)}


def test_a_claim_moves_the_floor_to_the_last_run_of_each_priority() -> None:
    floors = Floors()
    floors.claimed([run(2, 9, priority=1), run(1, 3), run(1, 4), run(1, 5)])
    assert floors.by_priority == {1: Floor(at(2), 9), 0: Floor(at(1), 5)}


def test_a_claim_of_an_earlier_run_does_not_lower_the_floor() -> None:
    floors = Floors()
    floors.claimed([run(5, 1)])
    floors.claimed([run(4, 99)])
    assert floors.by_priority == {0: Floor(at(5), 1)}


def test_a_claim_of_nothing_changes_nothing() -> None:
    floors = Floors()
    floors.hint(3)
    floors.claimed([])
    assert floors.by_priority == {3: FRONT}


def test_a_scan_takes_over_what_it_found_even_behind_the_floor() -> None:
    floors = Floors()
    floors.claimed([run(50, 1)])
    floors.scanned(at(60), [DuePriority("q", 0, Floor(at(10), 2))])
    assert floors.by_priority == {0: Floor(at(10), 2)}


def test_a_scan_sets_each_priority_in_which_something_is_due() -> None:
    floors = Floors()
    floors.scanned(at(10), [DuePriority("q", 0, Floor(at(1), 1)), DuePriority("q", 5, Floor(at(2), 2))])
    assert floors.by_priority == {0: Floor(at(1), 1), 5: Floor(at(2), 2)}


def test_a_scan_raises_an_empty_stretch_to_a_second_before_it() -> None:
    floors = Floors()
    floors.hint(0)
    floors.scanned(at(60), [])
    assert floors.by_priority == {0: Floor(at(60) - COMMIT_LAG, 0)}
    assert timedelta(seconds=1) == COMMIT_LAG


def test_a_scan_of_an_empty_stretch_does_not_lower_a_floor() -> None:
    floors = Floors()
    floors.claimed([run(59.5, 8)])
    floors.scanned(at(60), [])
    assert floors.by_priority == {0: Floor(at(59.5), 8)}


def test_a_queue_of_many_priorities_keeps_the_highest() -> None:
    floors = Floors()
    for priority in range(MAX_PRIORITIES):
        floors.hint(priority)
    floors.hint(-1)
    floors.hint(MAX_PRIORITIES)
    assert sorted(floors.by_priority) == list(range(1, MAX_PRIORITIES + 1))
    floors.scanned(at(61), [DuePriority("q", -3, Floor(at(1), 1))])
    assert floors.by_priority == {-3: Floor(at(1), 1)}


def test_what_is_below_a_list_that_was_cut_waits_for_the_next_scan() -> None:
    floors = Floors()
    floors.scanned(at(60), [DuePriority("q", priority, Floor(at(1), 1)) for priority in range(MAX_PRIORITIES)])
    floors.hint(-5)
    assert -5 not in floors.by_priority
    floors.scanned(at(61), [])
    floors.hint(-5)
    assert len(floors.by_priority) <= MAX_PRIORITIES


@settings(deadline=None)
@given(st.lists(st.integers(-500, 500), min_size=70, max_size=120), st.integers(1, 100))
def test_any_number_of_priorities_is_claimed_the_highest_first(priorities: list[int], limit: int) -> None:
    queue = Queue()
    for priority in priorities:
        queue.enqueue(priority, 0)
    for _ in range(len(priorities)):
        if not queue.waiting:
            break
        queue.now += 1
        queue.scan()
        queue.claim(limit)
        assert len(queue.floors.by_priority) <= MAX_PRIORITIES
    assert [priority for _, priority in queue.out] == sorted(priorities, reverse=True)


class Queue:
    """What the database holds, and a worker that looks at it only through its floors."""

    def __init__(self) -> None:
        self.now = 0.0
        self.floors = Floors()
        self.waiting: dict[Floor, int] = {}
        self.out: list[tuple[Floor, int]] = []
        self.ids = 0

    def passed(self) -> set[Floor]:
        """Due or not, the waiting runs that no claim can see."""
        floors = self.floors.by_priority
        return {place for place, priority in self.waiting.items() if place < floors.get(priority, FRONT)}

    def enqueue(self, priority: int, delay: float) -> None:
        self.ids += 1
        self.waiting[Floor(at(self.now + delay), self.ids)] = priority
        self.floors.hint(priority)

    def claim(self, limit: int) -> None:
        taken: list[tuple[Floor, int]] = []
        for priority, floor in sorted(self.floors.by_priority.items(), reverse=True):
            seen = sorted(
                p for p, of in self.waiting.items() if of == priority and floor <= p <= Floor(at(self.now), 2**62)
            )
            taken += [(place, priority) for place in seen]
        taken = taken[:limit]
        for place, _ in taken:
            del self.waiting[place]
        self.out += taken
        self.floors.claimed([run_of(place, priority) for place, priority in taken])

    def hand_back(self) -> set[Floor]:
        back = dict(self.out)
        self.out.clear()
        self.waiting |= back
        return set(back)

    def scan(self) -> None:
        due: dict[int, Floor] = {}
        for place, priority in sorted(self.waiting.items()):
            if place.run_at <= at(self.now):
                due.setdefault(priority, place)
        highest = sorted(due, reverse=True)[:MAX_PRIORITIES]
        self.floors.scanned(at(self.now), [DuePriority("q", priority, due[priority]) for priority in highest])


def run_of(place: Floor, priority: int) -> Run:
    return run((place.run_at - START).total_seconds(), place.id, priority=priority)


STEPS = st.lists(
    st.tuples(st.just("enqueue"), st.integers(-1, 1), st.sampled_from([0.0, 0.5, 3.0]))
    | st.tuples(st.just("commit late"), st.integers(-1, 1), st.sampled_from([0.5, 0.9, 5.0]))
    | st.tuples(st.just("claim"), st.integers(1, 4), st.just(0.0))
    | st.tuples(st.sampled_from(["scan", "hand back"]), st.just(0), st.just(0.0))
    | st.tuples(st.just("wait"), st.just(0), st.sampled_from([0.1, 0.6, 2.0])),
    max_size=40,
)


@given(STEPS)
def test_a_floor_never_passes_a_run_that_was_not_claimed(steps: Iterable[tuple[str, int, float]]) -> None:
    queue = Queue()
    for what, number, seconds in steps:
        before = queue.passed()
        allowed = set(before)
        if what == "enqueue":
            queue.enqueue(number, seconds)
        elif what == "commit late":
            queue.enqueue(number, -seconds)
            allowed |= set(queue.waiting) - before
        elif what == "claim":
            queue.claim(number)
        elif what == "hand back":
            allowed |= queue.hand_back()
        elif what == "wait":
            queue.now += seconds
        else:
            queue.scan()
            allowed = set()
        assert queue.passed() <= allowed


@given(STEPS)
def test_a_scan_and_claims_empty_a_queue_whatever_came_before(steps: Iterable[tuple[str, int, float]]) -> None:
    queue = Queue()
    for what, number, seconds in steps:
        if what in {"enqueue", "commit late"}:
            queue.enqueue(number, seconds if what == "enqueue" else -seconds)
        elif what == "claim":
            queue.claim(number)
        elif what == "hand back":
            queue.hand_back()
        elif what == "wait":
            queue.now += seconds
        else:
            queue.scan()
    queue.now += 10
    queue.scan()
    queue.claim(1_000)
    assert queue.waiting == {}


@given(st.sampled_from([0.0, 0.3, 0.9]), st.floats(1.0, 100.0))
def test_a_run_that_commits_within_a_second_is_met_by_the_next_claim(late: float, now: float) -> None:
    queue = Queue()
    queue.now = now
    queue.floors.hint(0)
    queue.scan()
    queue.enqueue(0, -late)
    queue.claim(10)
    assert queue.waiting == {}
