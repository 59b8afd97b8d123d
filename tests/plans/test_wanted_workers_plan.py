"""What a scaler reads of a large queue every half a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.db.counting import wanted
from tests.plans.database import Sync, believed_empty

FILL = """
insert into queue_service.runs (queue, task, payload, priority, run_at)
select 'deep', 'noop', '{}', n % 5, clock_timestamp() - n * interval '1 ms' from generate_series(1, 200000) as n;
insert into queue_service.runs (queue, task, payload, run_at)
select 'later', 'noop', '{}', clock_timestamp() + interval '1 day' from generate_series(1, 200000) as n;
insert into queue_service.runs (queue, task, payload, ordering_key, run_at)
select 'lanes', 'noop', '{}', 'key ' || n, clock_timestamp() - interval '1 hour' from generate_series(1, 50000) as n;
insert into queue_service.runs (queue, task, payload, ordering_key, run_at)
select 'later lanes', 'noop', '{}', 'key ' || n, clock_timestamp() + interval '1 day' from generate_series(1, 50000) as n;
insert into queue_service.runs (queue, task, payload, ordering_key)
select 'one lane', 'noop', '{}', 'key' from generate_series(1, 20000) as n;
insert into queue_service.queues (name, paused_at) values ('paused', clock_timestamp());
insert into queue_service.runs (queue, task, payload) select 'paused', 'noop', '{}' from generate_series(1, 50000) as n;
with first as (select array_agg(id) as ids from (select id from queue_service.runs where queue = 'deep' limit 300) as runs
), lease as (
    insert into queue_service.leases (worker_id, expires_at, run_ids)
    select 1, clock_timestamp() + interval '1 hour', ids from first returning id
)
update queue_service.runs set state = 'running', lease_id = lease.id from lease, first where runs.id = any(first.ids);
"""
RUNNING = 300
SLOTS, MOST = 10, 50


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[Sync]:
    with believed_empty(server, template, "queue_service_wanted_plan", {"runs", "lanes"}) as conn:
        conn.execute(FILL.encode())
        yield conn


@pytest.mark.parametrize(
    ("queue", "workers", "most_rows"),
    [
        ("deep", MOST, 2 * SLOTS * MOST + 2 * RUNNING),
        ("later", 0, RUNNING + 50),
        ("lanes", MOST, 2 * SLOTS * MOST + RUNNING + 50),
        ("later lanes", 0, RUNNING + 50),
        ("one lane", 1, RUNNING + 50),
        ("paused", 0, RUNNING + 50),
        ("nowhere", 0, RUNNING + 50),
    ],
)
@pytest.mark.parametrize("knowing", [False, True], ids=["believed empty", "analysed"])
def test_it_reads_no_more_than_the_most_workers_could_run(
    filled: Sync, queue: str, workers: int, most_rows: int, *, knowing: bool
) -> None:
    with filled.transaction(force_rollback=True):
        if knowing:
            filled.execute("analyze queue_service.runs, queue_service.lanes, queue_service.leases")
        before = _read(filled)
        assert wanted(filled, queue, SLOTS, MOST) == workers
        assert _read(filled) - before <= most_rows


def _read(conn: Sync) -> int:
    """How many rows of our tables this transaction has read so far, but for what it was told by an analyse."""
    row = conn.execute(
        "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_xact_user_tables "
        "where schemaname = 'queue_service'"
    ).fetchone()
    assert row is not None
    number: int = row[0]
    return number
