"""What an enqueue accepts, and the steps it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Literal

from queue_service import codec
from queue_service.db import channels
from queue_service.db.query import interval_literal
from queue_service.db.steps import MAX_TRIES, Copy, Steps
from queue_service.errors import (
    ConfigError,
    DatabaseRefused,
    DatabaseUnavailable,
    DuplicateRun,
    QueueServiceError,
    nearest,
)
from queue_service.runs import queries
from queue_service.runs.model import NewRun
from queue_service.runs.queries import Reserved
from queue_service.tasks import Tasks, duration
from queue_service.turn import Turn
from queue_service.words import check_word

OnConflict = Literal["return", "replace", "raise"]
SHARED = frozenset(
    {
        "queue", "priority", "delay", "run_at", "expires_in", "ordering_key", "max_attempts", "retry_delay", "timeout",
        "metadata", "organization_id",
    }
)  # fmt: skip
POLICIES = ("return", "replace", "raise")

MAX_QUEUE = 128
MAX_TASK = 256


def new_run(
    tasks: Tasks,
    payload_limit: int,
    task: str,
    payload: Mapping[str, Any],
    *,
    queue: str | None = None,
    priority: int = 0,
    delay: timedelta | float | None = None,
    run_at: datetime | None = None,
    expires_in: timedelta | float | None = None,
    singleton_key: str | None = None,
    ordering_key: str | None = None,
    max_attempts: int | None = None,
    retry_delay: timedelta | float | None = None,
    timeout: timedelta | float | None = None,
    metadata: Mapping[str, Any] | None = None,
    organization_id: str | None = None,
) -> NewRun:
    """Check everything a caller can get wrong. A task that is not registered here may be known to a worker elsewhere."""
    check_word(task, "task", MAX_TASK)
    known = tasks.get(task)
    queue = queue if queue is not None else (known.queue if known is not None else "default")
    check_word(queue, "queue", MAX_QUEUE)
    for value, what in (
        (singleton_key, "singleton_key"),
        (ordering_key, "ordering_key"),
        (organization_id, "organization_id"),
    ):
        if value is not None:
            check_word(value, what)
    _check_integer(priority, "priority", -(2**15), 2**15 - 1)
    if max_attempts is not None:
        _check_integer(max_attempts, "max_attempts", 1, 2**31 - 1)
    if delay is not None and run_at is not None:
        raise ConfigError("delay and run_at both say when. Pass one of them.")
    if run_at is not None:
        check_moment(run_at, "run_at")
    text = codec.dumps_object(payload, what="payload", limit=payload_limit)
    if known is not None:
        known.check(payload)
    return NewRun(
        task=task,
        queue=queue,
        payload=text,
        priority=priority,
        delay=None if delay is None else duration(delay, "delay"),
        run_at=run_at,
        expires_in=None if expires_in is None else duration(expires_in, "expires_in", positive=True),
        singleton_key=singleton_key,
        ordering_key=ordering_key,
        max_attempts=max_attempts,
        retry_delay=None if retry_delay is None else duration(retry_delay, "retry_delay"),
        timeout=None if timeout is None else duration(timeout, "timeout", positive=True),
        metadata=None if metadata is None else codec.dumps_object(metadata, what="metadata", limit=payload_limit),
        organization_id=organization_id,
    )


def of_turn(
    tasks: Tasks,
    payload_limit: int,
    turn: Turn,
    task: str,
    payload: Mapping[str, Any],
    metadata: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], channels.Notice | None]:
    """The run that works on a turn, as the statements about turns take it, and the notice of it."""
    if refused := options.keys() & {"singleton_key", "on_conflict"}:
        raise ConfigError(f"A turn's run has no {min(refused)}: the turn itself is what is unique about it.")
    turn = of_one_organization(turn, options)
    with_turn = {**(metadata or {}), "turn": {**turn.fields(payload_limit), "metadata": dict(turn.metadata)}}
    new = new_run(
        tasks, payload_limit, task, payload, metadata=with_turn, **{**options, "organization_id": turn.organization_id}
    )
    return {name: getattr(new, name) for name in NewRun.__slots__ if name != "singleton_key"}, notice(new)


def of_one_organization(turn: Turn, options: Mapping[str, Any]) -> Turn:
    """The turn, of the organization of its run where that is said of the run alone. Whoever may end the run would not see a
    turn of another one, which would be owed an ending until its deadline. Raises ConfigError where they differ."""
    organization_id = options.get("organization_id")
    if organization_id is None or organization_id == turn.organization_id:
        return turn
    if turn.organization_id is not None:
        raise ConfigError(
            f"A turn's run is of the organization of the turn, which is {turn.organization_id!r}, and not of "
            f"{organization_id!r}. Say it once: Turn(organization_id=…)."
        )
    return replace(turn, organization_id=organization_id)


def new_runs(
    tasks: Tasks, payload_limit: int, task: str, payloads: Iterable[Mapping[str, Any]], options: Mapping[str, Any]
) -> tuple[NewRun, list[str]]:
    """What the runs have in common, and the payload of each as JSON text."""
    unknown = options.keys() - SHARED
    if unknown & {"singleton_key", "on_conflict"}:
        raise ConfigError("enqueue_many stores runs that are all alike: singleton_key needs enqueue, one by one.")
    if unknown:
        name = min(unknown)
        raise ConfigError(f"enqueue_many has no option {name!r}.{nearest(name, SHARED)}")
    check_word(task, "task", MAX_TASK)
    known = tasks.get(task)
    texts = []
    for payload in payloads:
        texts.append(codec.dumps_object(payload, what="payload", limit=payload_limit))
        if known is not None:
            known.check(payload)
    queue = options.get("queue")
    queue = known.queue if queue is None and known is not None else queue
    # Checked as a run with an empty payload, which no signature is held against here.
    return new_run(Tasks(), payload_limit, task, {}, **{**options, "queue": queue}), texts


def notice(new: NewRun) -> channels.Notice | None:
    """The notice for workers. A delayed run is found by polling when it is due."""
    return None if new.delay else channels.enqueued(new.queue, new.priority)


def check_policy(on_conflict: str) -> None:
    """ConfigError for a word that `on_conflict` does not know."""
    if on_conflict not in POLICIES:
        raise ConfigError(f"on_conflict must be one of {', '.join(POLICIES)}.{nearest(str(on_conflict), POLICIES)}")


def enqueue(new: NewRun, on_conflict: OnConflict, notice: channels.Notice | None) -> Steps[int]:
    """Store one run; the id of it, or of the live run that holds its singleton key, as `on_conflict` asks. The notice
    goes out when the transaction commits."""
    store = queries.replace if on_conflict == "replace" else queries.enqueue
    for _ in range(MAX_TRIES):
        run_id = yield store(new, notice)
        if run_id is not None:
            return int(run_id)
        if new.singleton_key is None:
            # Each try takes the next id: where ids were restored, and what gives them was not, some are in use.
            continue
        holder = yield queries.singleton_holder(new.queue, new.singleton_key, new.organization_id)
        # None: it ended since the insert met it. The key is free, and the insert may be tried again. One that is queued was
        # stored since `replace` looked for it.
        if holder is None or (on_conflict == "replace" and holder.is_queued):
            continue
        if on_conflict == "return":
            return int(holder.run_id)
        why = "and on_conflict is 'raise'" if on_conflict == "raise" else "and it is running: it cannot be replaced"
        raise DuplicateRun(holder.run_id, new.singleton_key, why=why)
    if new.singleton_key is None:
        raise DatabaseRefused(
            f"The database gave a new run {MAX_TRIES} ids in a row that other runs have. The sequence "
            "queue_service.runs_id_seq is behind, as after a restore of data alone: set it to the greatest id there is."
        )
    raise never_free(f"Singleton key {new.singleton_key!r}", are_shared=(yield queries.are_keys_shared()))


def never_free(key: str, *, are_shared: bool) -> QueueServiceError:
    """A key could not be had, and whoever has it was not to be seen."""
    if are_shared:
        return DatabaseRefused(
            f"{key} is that of another organization's live run. Each organization has keys of its own from revision 0026 "
            "on: migrate (queue-service db migrate), once no process of an older version is left."
        )
    return DatabaseUnavailable(f"{key} changed hands {MAX_TRIES} times while we looked at it.")


def enqueue_many(first: NewRun, payloads: Sequence[str], notice: channels.Notice | None) -> Steps[list[int]]:
    """Store many runs, all alike but for their payloads; their ids, in order. One statement, so all or none."""
    if not payloads:
        return []
    reserved: Reserved = yield queries.reserve(len(payloads), first.delay, first.run_at, first.expires_in)
    is_now = first.delay is None and first.run_at is None and first.expires_in is None
    shared = {
        "queue": first.queue, "task": first.task, "run_at": None if is_now else reserved.due.isoformat(),
        "expires_at": reserved.expires and reserved.expires.isoformat(), "priority": first.priority,
        "ordering_key": first.ordering_key, "max_attempts": first.max_attempts,
        "retry_delay": _interval(first.retry_delay), "timeout": _interval(first.timeout), "metadata": first.metadata,
        "organization_id": first.organization_id or reserved.organization_id,
    }  # fmt: skip
    if reserved.is_secured:
        # Where there is row security, Postgres refuses every COPY.
        yield queries.store_reserved(reserved.ids, payloads, shared)
    else:
        yield _copy(reserved.ids, payloads, shared)
    if notice is not None:
        yield channels.notify([notice], alone=False)
    return list(reserved.ids)


def _copy(ids: Sequence[int], payloads: Sequence[str], shared: Mapping[str, object]) -> Copy:
    # What the table would default to is left out: each column that a row does not have saves the server 1 %.
    said = {
        column: value for column, value in shared.items() if value is not None and (column, value) != ("priority", 0)
    }
    middle = "\t".join(_escaped(str(value)) for value in said.values())
    rows = [f"{run_id}\t{middle}\t{_escaped(payload)}\n" for run_id, payload in zip(ids, payloads, strict=True)]
    return Copy(f"copy queue_service.runs (id, {', '.join(said)}, payload) from stdin", "".join(rows))


def _escaped(text: str) -> str:
    if "\\" in text:
        text = text.replace("\\", r"\\")
    # JSON text never holds these raw, but a queue name may.
    if "\t" in text or "\n" in text or "\r" in text:
        text = text.replace("\t", r"\t").replace("\n", r"\n").replace("\r", r"\r")
    return text


def _interval(value: timedelta | None) -> str | None:
    return None if value is None else interval_literal(value)


def _check_integer(value: object, what: str, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{what} must be a whole number from {least} to {most}, not {value!r}.")


def check_moment(moment: object, what: str) -> None:
    """ConfigError for what is no datetime with a time zone, of the years 1901 to 8998."""
    if not isinstance(moment, datetime):
        raise ConfigError(f"{what} must be a datetime, not {type(moment).__name__}.")
    if moment.utcoffset() is None:
        raise ConfigError(
            f"{what}={moment.isoformat()} has no time zone, so it names no moment. "
            "Use datetime.now(timezone.utc) and the like."
        )
    if not 1900 < moment.year < 8999:
        raise ConfigError(f"{what}={moment.isoformat()} is too far away. Use a year from 1901 to 8998.")
