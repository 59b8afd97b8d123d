"""The NOTIFY channels and what their notices say. A notice is a hint: losing one costs latency, never truth.

`runs`      `<priority> <queue>`        something was enqueued there
`finished`  `<run id>,<run id>…` or `*`  these runs ended (`*`: too many to name, look again)
`cancel`    `<run id>,…`                 someone asked to cancel these running runs
"""

from __future__ import annotations

from collections.abc import Iterable

RUNS = "queue_service_runs"
FINISHED = "queue_service_finished"
CANCEL = "queue_service_cancel"

EVERYTHING = "*"
# Postgres refuses payloads of 8,000 bytes and more.
MAX_PAYLOAD = 7_900


def enqueued(queue: str, priority: int) -> str:
    return f"{priority} {queue}"


def read_enqueued(payload: str) -> tuple[str, int] | None:
    """The queue and priority, or None for a payload that is not ours: any role may NOTIFY any channel."""
    priority, _, queue = payload.partition(" ")
    try:
        return (queue, int(priority)) if queue else None
    except ValueError:
        return None


def run_ids(ids: Iterable[int]) -> str:
    payload = ",".join(map(str, ids))
    return payload if len(payload) <= MAX_PAYLOAD else EVERYTHING


def read_run_ids(payload: str) -> set[int] | None:
    """The ids, or None for "look again"."""
    try:
        return {int(part) for part in payload.split(",")}
    except ValueError:
        return None
