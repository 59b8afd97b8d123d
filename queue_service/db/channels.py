"""The NOTIFY channels and what their notices say. A notice is a hint: losing one costs latency, never truth.

`runs`      `<priority> <queue>`        something was enqueued there
`finished`  `<run id>,<run id>…` or `*`  these runs ended (`*`: too many to name, look again)
`cancel`    `<run id>,…`                 someone asked to cancel these running runs
`events`    `<seq> <stream>` or `*`      the stream has come to this event, or changed otherwise (`*`: look everywhere)
`gateways`  `<replica>`                  this replica of the gateway is asked something, or has an answer
`every`     as `runs`                    something is there that each worker is to look for, and not only the first
`echo_<id>` nothing                      a process hears itself
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from queue_service.db.query import Query, nothing
from queue_service.db.statements import Statements

SQL = Statements("queue_service.db")

RUNS = "queue_service_runs"
FINISHED = "queue_service_finished"
CANCEL = "queue_service_cancel"
EVENTS = "queue_service_events"
GATEWAYS = "queue_service_gateways"
EVERY = "queue_service_every"
ECHO = "queue_service_echo"

EVERYTHING = "*"
# Postgres refuses payloads of 8,000 bytes and more.
MAX_PAYLOAD = 7_900
MANY_STREAMS = 50


class Notice(NamedTuple):
    channel: str
    payload: str


Notify = Callable[[list[Notice]], None]


def notify(notices: Collection[Notice], *, alone: bool) -> Query[None]:
    """Send notices: `alone` in a transaction of their own, or else with the caller's, when it commits."""
    channels, payloads = zip(*notices, strict=True)
    name = "notify_alone" if alone else "notify"
    return SQL.query(name, nothing, channels=list(channels), payloads=list(payloads))


def enqueued(queue: str, priority: int) -> Notice:
    return Notice(RUNS, f"{priority} {queue}")


def read_enqueued(payload: str) -> tuple[str, int] | None:
    """The queue and priority, or None for a payload that is not ours: any role may NOTIFY any channel."""
    priority, _, queue = payload.partition(" ")
    try:
        number = int(priority)
    except ValueError:
        return None
    return (queue, number) if queue and -(2**15) <= number < 2**15 else None


def appended(heads: Mapping[str, int]) -> list[Notice]:
    """Notices of streams that have come to these events; one for all where there are too many to name."""
    if len(heads) > MANY_STREAMS:
        return [Notice(EVENTS, EVERYTHING)]
    return [Notice(EVENTS, f"{seq} {stream}") for stream, seq in heads.items()]


def read_appended(payload: str) -> tuple[str, int] | None:
    """The stream and its seq, or None for "look everywhere"."""
    seq, _, stream = payload.partition(" ")
    # Python refuses to read very long numbers.
    return (stream, int(seq)) if stream and seq.isdecimal() and len(seq) < 20 else None


def about_runs(channel: str, ids: Iterable[int]) -> Notice:
    payload = ",".join(map(str, ids))
    return Notice(channel, payload if len(payload) <= MAX_PAYLOAD else EVERYTHING)


def read_run_ids(payload: str) -> set[int] | None:
    """The ids, or None for "look again"."""
    try:
        return {int(part) for part in payload.split(",")}
    except ValueError:
        return None
