"""Every order in which two or three sessions can arm, extend and end one turn, each committing or rolling back.

Two orders are the same one where nothing can tell them apart, and are played once: twins that begin in one order or the
other, and transactions that have nothing left to do but to finish. In triples, replies and failures are one statement,
a turn that lapsed stands for one that did not, since everything but the sweep treats both alike, and no more than one rolls
back: of two that do, the second leaves what the first has left.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from itertools import combinations_with_replacement, count
from typing import Any, NamedTuple

import pytest

from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query, column, scalar
from queue_service.services.combiner import BUSY
from queue_service.turn import Turn
from queue_service.turns import queries
from queue_service.turns.model import TurnEnding, TurnFailure, failed, replied
from tests.races.stepper import Actor, Finish, History, Role, Stage

HOUR = timedelta(hours=1)
# A turn that is armed with this has lapsed by the time anybody looks.
MOMENT = timedelta(microseconds=1)
LIMIT = 100_000

KINDS = ("reply", "shared", "fail", "fail_deployment", "sweep", "run", "extend", "arm")
ENDERS = {"reply", "shared", "fail", "fail_deployment", "sweep", "run"}
FINISHES = (Finish.COMMIT, Finish.ROLLBACK)
POSITIONS = ("unarmed", "armed", "lapsed", "ended")
# The run that works on the turn, unless an actor arms it.
RUN_ID = 7
UNTAKEN = f"Its run {RUN_ID} has ended, or was deleted."
UNTAKEN_BY_NOBODY = "No worker took it up within 00:00:00.000001."
END_OF_RUN = """
select queue_service.end_turns(array[%(run_id)s::bigint],
    array[jsonb_build_object('deployment', %(key)s::text, 'message_id', 'm')], array['failed'],
    array[jsonb_build_object('message', %(by)s::text)])
"""

LOOK = """
with markers as (
    delete from queue_service.turn_markers where deployment = %(key)s returning deadline > clock_timestamp() as is_live
)
select (select coalesce(array_agg(is_live), '{}') from markers),
       (select coalesce(jsonb_agg(jsonb_build_array(kind, code, seq)), '[]') from queue_service.turn_outcomes
         where deployment = %(key)s),
       (select coalesce(sum(head), 0)::int from queue_service.streams where stream = %(key)s),
       (select coalesce(jsonb_agg(jsonb_build_array(seq, kind, terminal, body) order by seq), '[]')
          from queue_service.events where stream = %(key)s)
"""


class Part(NamedTuple):
    """What an actor does, and how its transaction ends."""

    kind: str
    finish: Finish


class Ground(NamedTuple):
    """What is left on the ground when all have finished."""

    markers: list[bool]
    outcomes: list[list[Any]]
    head: int
    events: list[tuple[int, str, bool, dict[str, Any]]]


NOTHING = Ground([], [], 0, [])


class Theatre:
    """Plays parts on one turn after another, and judges what is left of each."""

    def __init__(self, stage: Stage, conn: Connection) -> None:
        self._stage = stage
        self._conn = conn
        self._numbers = count(1)
        self.key = ""
        self.played = self.waits = 0

    async def violations(
        self, position: str, parts: Sequence[Part], *others: Callable[[str], Actor]
    ) -> AsyncIterator[str]:
        """What went wrong, in whichever order."""

        async def cast() -> list[Actor]:
            self.key = f"dep-{next(self._numbers)}"
            await self._place(position)
            actors = [actor(self.key, place, part, position) for place, part in enumerate(parts)]
            return actors + [other(self.key) for other in others]

        async for history in self._stage.explore(cast):
            self.played += 1
            self.waits += history.waits
            for wrong in judge(position, history, await self._look()):
                yield f"{position}: {wrong}, after {history}"

    def say(self, position: str) -> None:
        sys.stdout.write(f"\n{self.played} orders ({position}), in which a statement waited {self.waits} times")

    async def _place(self, position: str) -> None:
        if position != "unarmed":
            await fetch(self._conn, queries.arm([owed(self.key, MOMENT if position == "lapsed" else HOUR)]))
            await self._conn.execute(
                "update queue_service.turn_markers set run_id = %s where deployment = %s", [RUN_ID, self.key]
            )
        if position == "ended":
            await fetch(self._conn, queries.end([replied(self.key, "m", {"by": "the past"}, LIMIT)], notify=False))

    async def _look(self) -> Ground:
        """Take a look, and the marker away, which would be in the way of the next sweep."""
        cursor = await self._conn.execute(LOOK.encode(), {"key": self.key})
        row = await cursor.fetchone()
        assert row is not None
        return Ground(*row)


def owed(key: str, admission: timedelta) -> queries.Owed:
    return queries.Owed(Turn(deployment=key, message_id="m", stream=key).fields(LIMIT), admission, HOUR)


def actor(key: str, place: int, part: Part, position: str) -> Actor:
    name = f"{part.kind}-{place}"
    steps: dict[str, Query[Any]] = {
        "reply": queries.end([replied(key, "m", {"by": name}, LIMIT)], notify=True),
        "shared": shared(replied(key, "m", {"by": name}, LIMIT)),
        "fail": queries.end([failed(key, "m", TurnFailure("timeout", reason=name))], notify=True),
        "fail_deployment": queries.fail_deployment(key, TurnFailure("worker_died", reason=name), notify=True),
        "sweep": queries.sweep(limit=10, notify=True),
        "run": Query(END_OF_RUN, scalar, {"run_id": RUN_ID, "key": key, "by": name}),
        "extend": queries.extend(key),
        "arm": queries.arm([owed(key, MOMENT if position == "unarmed" else HOUR)]),
    }
    return Actor(name, (steps[part.kind], part.finish), twin=part)


def shared(ending: TurnEnding) -> Query[Any]:
    """The statement that callers share, which tells BUSY where it would have had to wait."""
    query = queries.end_free([[ending]], notify=True)

    def decode(rows: Sequence[Any]) -> Any:
        ended, busy = query.decode(rows)
        return BUSY if busy else ended

    return Query(query.text, decode, query.params)


def kind_of(role: Role) -> str:
    return role.name.split("-")[0]


class Results(NamedTuple):
    """What the statements of those who committed returned: who ended the turn, armed it, extended it."""

    enders: list[Role]
    winners: list[Role]
    arms: list[Role]
    armed: list[Role]
    extended: list[Role]

    @classmethod
    def by(cls, roles: Sequence[Role]) -> Results:
        done = [role for role in roles if role.committed]
        enders = [role for role in done if kind_of(role) in ENDERS and role.result is not BUSY]
        arms = [role for role in done if kind_of(role) == "arm"]
        return cls(
            enders=enders,
            winners=[role for role in enders if role.result],
            arms=arms,
            armed=[role for role in arms if any(role.result.values())],
            extended=[role for role in done if kind_of(role) == "extend" and role.result],
        )


def judge(position: str, history: History, ground: Ground) -> Iterator[str]:
    """What is wrong with what is left, given what each actor's statements returned."""
    results = Results.by(history.roles)
    yield from (f"{role.name} got {role.error!r}" for role in history.roles if role.error)
    yield from about_the_stream(ground)
    if len(results.armed) != (1 if results.arms and position == "unarmed" else 0):
        yield f"{len(results.armed)} were answered that they armed it"
    if position == "ended":
        yield from about_an_ending(ground, {"the past"})
        if results.winners or results.extended:
            yield "a turn that had ended was touched"
    elif position == "unarmed" and not results.armed:
        if results.winners or results.extended or ground != NOTHING:
            yield f"nobody armed it, and there is {ground}"
    elif results.winners:
        yield from about_an_ending(ground, signature(results.winners[0]))
        yield from about_winners(results)
    else:
        yield from about_a_debt(ground)
        if position != "unarmed" and any(kind_of(role) != "sweep" for role in results.enders):
            yield "an ending was refused, and nobody ended it"
        if results.extended and ground.markers != [True]:
            yield "it was extended, and is overdue"


def signature(role: Role) -> set[str]:
    """What the event says of whoever stored it. Sweeps do not sign."""
    return {UNTAKEN, UNTAKEN_BY_NOBODY, "No sign of life for 01:00:00."} if kind_of(role) == "sweep" else {role.name}


def about_winners(results: Results) -> Iterator[str]:
    if len(results.winners) > 1:
        yield f"{len(results.winners)} were answered that they ended it"
    if results.extended and any(kind_of(role) == "sweep" for role in results.winners):
        yield "it was extended and swept"


def about_the_stream(ground: Ground) -> Iterator[str]:
    seqs = [seq for seq, *_ in ground.events]
    if seqs != list(range(1, ground.head + 1)):
        yield f"the stream's head is {ground.head}, its events are {seqs}"


def about_an_ending(ground: Ground, signed: set[str]) -> Iterator[str]:
    endings = [(seq, kind, body) for seq, kind, terminal, body in ground.events if terminal]
    if len(endings) != 1:
        yield f"it ended with {len(endings)} terminal events"
    for seq, kind, body in endings:
        if body.get("by", body.get("reason")) not in signed:
            yield f"it ended with the event of somebody else than {signed}: {body}"
        if ground.outcomes != [[kind, body.get("code"), seq]]:
            yield f"it ended with {kind} {seq}, and its outcome is {ground.outcomes}"
    if ground.markers:
        yield "it ended, and has a marker"


def about_a_debt(ground: Ground) -> Iterator[str]:
    if len(ground.markers) != 1:
        yield "nobody ended it, and it has no marker"
    if ground.outcomes != [[None, None, None]]:
        yield f"nobody ended it, and its outcome is {ground.outcomes}"
    if ground.events:
        yield f"nobody ended it, and it has events: {ground.events}"


@pytest.fixture
async def theatre(session: Callable[[], Awaitable[Connection]]) -> Theatre:
    return Theatre(await Stage.open(session, actors=3), await session())


def casts(kinds: Sequence[str], size: int) -> Iterator[tuple[Part, ...]]:
    return combinations_with_replacement([Part(kind, finish) for kind in kinds for finish in FINISHES], size)


@pytest.mark.parametrize("position", POSITIONS)
async def test_two_sessions_leave_a_turn_either_ended_once_or_owed_in_whatever_order_they_meet(
    theatre: Theatre, position: str
) -> None:
    found = [wrong for parts in casts(KINDS, 2) async for wrong in theatre.violations(position, parts)]
    theatre.say(position)
    assert found == []
    # Of four orders of two transactions, two for twins.
    parts = len(KINDS) * len(FINISHES)
    assert theatre.played == 4 * math.comb(parts, 2) + 2 * parts
    assert bool(theatre.waits) == (position != "ended")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("position", ["unarmed", "lapsed"])
async def test_three_sessions_leave_a_turn_either_ended_once_or_owed_in_whatever_order_they_meet(
    theatre: Theatre, position: str
) -> None:
    found = []
    for parts in casts(("shared", "fail", "fail_deployment", "sweep", "extend", "arm"), 3):
        # Where nobody arms it, nobody does anything.
        is_armed = position == "lapsed" or any(part.kind == "arm" for part in parts)
        if is_armed and sum(part.finish is Finish.ROLLBACK for part in parts) <= 1:
            found += [wrong async for wrong in theatre.violations(position, parts)]
    theatre.say(position)
    assert found == []
    assert theatre.played > 2_000


async def test_deleting_the_marker_and_storing_the_ending_in_two_transactions_would_be_noticed(
    theatre: Theatre,
) -> None:
    def dies_in_between(key: str) -> Actor:
        taken = "delete from queue_service.turn_markers where deployment = %(key)s returning message_id"
        return Actor("death", (Query(taken, column, {"key": key}), Finish.COMMIT))

    found = [wrong async for wrong in theatre.violations("lapsed", [Part("sweep", Finish.COMMIT)], dies_in_between)]
    assert any("nobody ended it, and it has no marker" in wrong for wrong in found)
    assert len(found) < theatre.played


async def test_a_sweep_that_looks_first_and_ends_by_id_would_be_noticed(theatre: Theatre) -> None:
    def ends_what_it_saw(key: str) -> Actor:
        failure = TurnFailure("worker_unresponsive", reason=UNTAKEN)

        def end(seen: list[queries.Key]) -> Query[Any]:
            return queries.end([failed(*each, failure) for each in seen], notify=True)

        return Actor("sweep-blind", (queries.overdue(limit=10), end, Finish.COMMIT))

    found = [wrong async for wrong in theatre.violations("lapsed", [Part("extend", Finish.COMMIT)], ends_what_it_saw)]
    assert any("it was extended and swept" in wrong for wrong in found)
    assert len(found) < theatre.played
