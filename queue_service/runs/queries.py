"""The operations on runs, as values: one function for each statement of the `.sql` files beside this one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec

from queue_service.db import channels
from queue_service.db.channels import Notice
from queue_service.db.query import Query, Rows, array_literal, column, found, interval_literal, nothing, scalar
from queue_service.runs.model import Floor, NewRun, Run, RunState
from queue_service.runs.rows import read_claimed, read_runs
from queue_service.runs.sql import SQL

# Of a queue, a scan lists so many priorities where something is due: the highest.
MAX_PRIORITIES = 64

# Above this, a count is shown as "this many or more": counting a backlog is work nobody asked for.
COUNT_LIMIT = 50_001


class DuePriority(NamedTuple):
    """One priority of one queue where something is due, and where the first of it stands."""

    queue: str
    priority: int
    first: Floor


class Scan(NamedTuple):
    """What a look from the front found, and when that was, by the database's clock. `laned` are the queues of which a lane
    is to be looked at, `limited` those of all these that have a limit. `cost` is how long the database looked, in
    seconds."""

    at: datetime
    due: list[DuePriority]
    laned: set[str]
    limited: set[str]
    cost: float


class SweptRun(NamedTuple):
    run_id: int
    state: RunState
    queue: str
    priority: int


class Retriable(NamedTuple):
    queue: str
    priority: int
    singleton_key: str | None
    organization_id: str | None
    has_moved: bool


class Holder(NamedTuple):
    """The live run that holds a singleton key."""

    run_id: int
    is_queued: bool


class Reserved(NamedTuple):
    """Ids for runs, when these are due, and when they expire. The organization of the session, and whether row security
    holds for it."""

    due: datetime
    expires: datetime | None
    ids: list[int]
    organization_id: str | None
    is_secured: bool


class Depth(NamedTuple):
    """Counts up to COUNT_LIMIT, and since when the first due run of the highest priority has been due."""

    due: int
    later: int
    running: int
    first_due: datetime | None


def enqueue(new: NewRun, notice: Notice | None = None) -> Query[int | None]:
    """The id; None if a live run holds the singleton key. The notice goes out with the commit."""
    return SQL.query("enqueue", scalar, **_fields(new, notice))


def enqueue_all(news: Sequence[NewRun]) -> Query[list[int]]:
    """The ids, in order. None of the runs has a singleton key."""
    return SQL.query("enqueue_all", column, runs=msgspec.json.encode([_object(new) for new in news]).decode())


def replace(new: NewRun, notice: Notice | None = None) -> Query[int | None]:
    """The id; None if the run that holds the singleton key is already running, or came or went at this moment."""
    return SQL.query("replace", scalar, **_fields(new, notice))


def singleton_holder(queue: str, singleton_key: str, organization_id: str | None) -> Query[Holder | None]:
    """Without an organization, that of the session."""

    def decode(rows: Rows) -> Holder | None:
        return Holder(rows[0][0], rows[0][1] == RunState.QUEUED) if rows else None

    return SQL.query(
        "singleton_holder", decode, queue=queue, singleton_key=singleton_key, organization_id=organization_id
    )


def are_keys_shared() -> Query[bool]:
    return SQL.query("are_keys_shared", scalar)


def reserve(
    count: int, delay: timedelta | None, run_at: datetime | None, expires_in: timedelta | None
) -> Query[Reserved]:
    return SQL.query(
        "reserve", lambda rows: Reserved(*rows[0][:-1]), count=count, delay=delay, run_at=run_at, expires_in=expires_in
    )


def store_reserved(ids: Sequence[int], payloads: Sequence[str], shared: Mapping[str, object]) -> Query[None]:
    """`shared` is what the runs have in common: every other column that an enqueue sets."""
    return SQL.query("store_reserved", nothing, ids=array_literal(ids), payloads=list(payloads), **shared)


def hidden_from() -> Query[str | None]:
    """The role of the session, if row security hides runs from it."""
    return SQL.query("hidden_from", scalar)


def scan(queues: Sequence[str], tasks: Sequence[str], *, owner: str | None = None) -> Query[Scan]:
    """What claims by this owner could take, if limits allow; without one, what is reserved for nobody. Of a queue, the
    highest MAX_PRIORITIES priorities."""
    return SQL.query("scan", _scan, queues=list(queues), tasks=list(tasks), owner=owner, most=MAX_PRIORITIES)


class Wanted(NamedTuple):
    """How many runs to claim of a queue, and where to begin at each of its priorities."""

    queue: str
    runs: int
    floors: Mapping[int, Floor]


class Claimant(NamedTuple):
    """Who claims: what it knows how to do, its lease, and whose runs come to it a second before they are anyone's. Runs of
    `final_tasks` end when they are lost."""

    tasks: Sequence[str]
    worker_id: int
    lease: timedelta
    owner: str | None = None
    final_tasks: Sequence[str] = ()

    @property
    def params(self) -> dict[str, object]:
        return {**self._asdict(), "tasks": list(self.tasks), "final_tasks": list(self.final_tasks) or None}


class Taken(NamedTuple):
    """What was claimed of lanes, or within limits: the runs, as of `claim`; for each queue that no other session was
    claiming from, in how many seconds its rate lets more begin, or None if it is not the rate that forbids it; the queues
    of which lanes are to be tended, and those that may give more although less came than was asked for."""

    runs: list[tuple[Run, int]]
    waits: dict[str, float | None]
    barren: set[str]
    unfinished: set[str]


def claim(asked: Sequence[Wanted], by: Claimant) -> Query[list[tuple[Run, int]]]:
    """The claimed runs, those of each queue in the order of execution, each with the id of the one lease that holds them
    all. Queues that have a limit give none."""
    return SQL.query("claim", read_claimed, **_from_floors(asked), **by.params, limited=False)


def claim_lanes(asked: Sequence[tuple[str, int]], by: Claimant) -> Query[Taken]:
    """The heads of free lanes, claimed: of each queue as many as are asked for, of each lane one, or as many as it is wide.
    The runs come in the order in which they were enqueued."""
    return SQL.query("claim_lanes", _taken_of_lanes, **_from_lanes(asked), **by.params, limited=False)


def claim_limited(asked: Sequence[Wanted], by: Claimant) -> Query[Taken]:
    """As `claim`, of queues that have a limit."""
    return SQL.query("claim_limited", _taken, **_from_floors(asked), **by.params, limited=True)


def claim_limited_lanes(asked: Sequence[tuple[str, int]], by: Claimant) -> Query[Taken]:
    """As `claim_lanes`, of queues that have a limit."""
    return SQL.query("claim_limited_lanes", _taken_of_lanes, **_from_lanes(asked), **by.params, limited=True)


def claim_suspect(queues: Collection[str], by: Claimant) -> Query[list[tuple[Run, int]]]:
    """At most one run, with its lease."""
    return SQL.query("claim_suspect", read_claimed, queues=list(queues), **by.params, limited=True)


def suspect_is_due(queues: Collection[str], tasks: Sequence[str]) -> Query[bool]:
    return SQL.query("suspect_is_due", scalar, queues=list(queues), tasks=list(tasks))


def extend(leases: Collection[int], lease: timedelta) -> Query[set[int]]:
    """The leases that are still held. A missing one was swept, and each claim under it is lost."""
    return SQL.query("extend", _id_set, leases=array_literal(sorted(leases)), lease=lease)


def cancel_requests(leases: Collection[int]) -> Query[list[int]]:
    return SQL.query("cancel_requests", column, leases=array_literal(sorted(leases)))


def plan_as_ours() -> Query[None]:
    return SQL.query("plan_as_ours", nothing)


def sweep(*, limit: int, max_losses: int, excluding: Collection[int] = ()) -> Query[list[SweptRun]]:
    """What was taken from lapsed leases, `excluding` these. `limit` counts leases; each holds what one claim took."""
    return SQL.query(
        "sweep", read_swept, limit=limit, max_losses=max_losses, excluding=array_literal(sorted(excluding))
    )


def expire_one(run_id: int) -> Query[list[int]]:
    return SQL.query("expire_one", column, run_id=run_id)


def take_back(deployment: str, message_id: str) -> Query[int | None]:
    """The run of a turn, which has ended before it was ever begun, and the turn with it. None: it was too late for that."""
    return SQL.query("take_back", scalar, deployment=deployment, message_id=message_id)


def late(*, limit: int) -> Query[list[int]]:
    """Runs whose time to start has passed."""
    return SQL.query("late", column, limit=limit)


def busy_leases(*, limit: int) -> Query[set[int]]:
    """Lapsed leases that a sweep would have to wait for, since another session has a run of theirs locked, or its lane."""
    return SQL.query("busy_leases", _id_set, limit=limit)


def expire(*, limit: int) -> Query[list[int]]:
    return SQL.query("expire", column, limit=limit)


def cancel(run_id: int) -> Query[str | None]:
    """`cancelled`, `requested` (it is running, and its worker will be notified), or None: no such live run."""
    return SQL.query("cancel", scalar, run_id=run_id)


def retry(run_id: int) -> Query[Retriable | None]:
    """The run, which went back unless a live one has its singleton key; None: history has no such run that did not
    succeed."""
    return SQL.query("retry", lambda rows: Retriable(*rows[0]) if rows else None, run_id=run_id)


def delete(run_id: int) -> Query[bool]:
    """True if it is gone; False if it is running or unknown."""
    return SQL.query("delete", found, run_id=run_id)


def purge(queue: str, *, limit: int) -> Query[int]:
    """How many queued runs went: at most `limit` that stand in a lane, and as many that do not."""
    return SQL.query("purge", scalar, queue=queue, limit=limit)


def get(run_id: int) -> Query[Run | None]:
    return SQL.query("get", _first, run_id=run_id)


def get_recent(run_id: int) -> Query[Run | None]:
    """As `get`, much quicker; None also if the run has ended more than three days ago."""
    return SQL.query("get_recent", _first, run_id=run_id)


def get_many(run_ids: Collection[int]) -> Query[list[Run]]:
    """Those of these runs that exist, in no order."""
    return SQL.query("get_many", read_runs, run_ids=array_literal(sorted(run_ids)))


def endings(run_ids: Collection[int]) -> Query[dict[int, RunState | None]]:
    """Those that have ended, with how; those that do not exist, with None. Live ones are missing."""

    def decode(rows: Rows) -> dict[int, RunState | None]:
        return {run_id: RunState(state) if state else None for run_id, state in rows}

    return SQL.query("endings", decode, run_ids=array_literal(sorted(run_ids)))


def depth(queue: str) -> Query[Depth]:
    return SQL.query("depth", lambda rows: Depth(*rows[0]), queue=queue, most=COUNT_LIMIT)


def _fields(new: NewRun, notice: Notice | None) -> dict[str, object]:
    fields = {name: getattr(new, name) for name in NewRun.__slots__}
    return fields | {"channel": channels.RUNS, "notice": None if notice is None else notice.payload}


def _object(new: NewRun) -> dict[str, object]:
    """Without the fields that are null."""
    fields: dict[str, object] = {"queue": new.queue, "task": new.task, "priority": new.priority}
    fields["payload"] = msgspec.Raw(new.payload.encode())
    for name in ("run_at", "ordering_key", "max_attempts", "organization_id"):
        if (value := getattr(new, name)) is not None:
            fields[name] = value
    for name in ("delay", "expires_in", "retry_delay", "timeout"):
        if (value := getattr(new, name)) is not None:
            fields[name] = interval_literal(value)
    if new.metadata is not None:
        fields["metadata"] = msgspec.Raw(new.metadata.encode())
    return fields


def _from_floors(asked: Sequence[Wanted]) -> dict[str, object]:
    floors = [(each.queue, priority, each.floors[priority]) for each in asked for priority in sorted(each.floors)[::-1]]
    return {
        "queues": [each.queue for each in asked],
        "wanted": [each.runs for each in asked],
        "floor_queues": [queue for queue, _, _ in floors],
        "priorities": [priority for _, priority, _ in floors],
        "floors": [floor.run_at for _, _, floor in floors],
        "floor_ids": [floor.id for _, _, floor in floors],
    }


def _from_lanes(asked: Sequence[tuple[str, int]]) -> dict[str, object]:
    return {"queues": [queue for queue, _ in asked], "wanted": [wanted for _, wanted in asked]}


def _first(rows: Rows) -> Run | None:
    return next(iter(read_runs(rows)), None)


def _id_set(rows: Rows) -> set[int]:
    return {row[0] for row in rows}


def read_swept(rows: Rows) -> list[SweptRun]:
    return [SweptRun(run_id, RunState(state), queue, priority) for run_id, state, queue, priority in rows]


def _scan(rows: Rows) -> Scan:
    due = [
        DuePriority(queue, priority, Floor(run_at, run_id)) for _, queue, priority, run_at, run_id, *_ in rows if run_id
    ]
    laned = {row[1] for row in rows if row[1] and row[2] is None}
    return Scan(rows[0][0], due, laned, {row[1] for row in rows if row[5]}, max(row[6] for row in rows))


def _taken(rows: Rows) -> Taken:
    claimed = type(rows)(row for row in rows if row[0] is not None)  # type: ignore[call-arg]
    return Taken(
        read_claimed(claimed),
        {row[-4]: row[-3] for row in rows},
        {row[-4] for row in rows if row[-2]},
        {row[-4] for row in rows if row[-1]},
    )


def _taken_of_lanes(rows: Rows) -> Taken:
    taken = _taken(rows)
    taken.runs.sort(key=lambda each: each[0].id)
    return taken
