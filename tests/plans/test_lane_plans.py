"""What claims of lanes and claims within limits read, with plans that were made while there was nothing, and with new ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from queue_service.queues import queries as queues
from queue_service.runs import queries
from queue_service.runs.queries import Claimant, Wanted
from queue_service.worker.floors import FRONT
from tests.plans.database import Sync, believed_empty, execution, flattened, prepare
from tests.support import LEASE, claim, make_ours

DEEP = 50_000
# A lane of each of so many keys, one with that many runs, and as many runs in no lane.
FILL = """
insert into queue_service.runs (queue, task, payload, ordering_key, run_at)
select 'default', 'noop', '{}', 'key ' || n, clock_timestamp() - interval '1 hour' + n * interval '1 ms'
  from generate_series(1, 50000) as n;
insert into queue_service.runs (queue, task, payload) select 'default', 'noop', '{}' from generate_series(1, 50000) as n;
insert into queue_service.queues (name, max_running, rate, period, burst, tokens, tokens_at)
values ('limited', 500, 500, '1 s', 500, 500, clock_timestamp());
insert into queue_service.runs (queue, task, payload, ordering_key)
select 'limited', 'noop', '{}', case when n % 2 = 0 then 'key ' || n end from generate_series(1, 50000) as n;
-- Leases of a busy worker, and those of which the runs count: as many of them run.
insert into queue_service.leases (worker_id, expires_at, run_ids)
select 1, clock_timestamp() + interval '1 hour', array[n] from generate_series(1, 2000) as n;
with first as (select array_agg(id) as ids from (
    select id from queue_service.runs where queue = 'limited' and ordering_key is null order by id limit 300) as runs
), lease as (
    insert into queue_service.leases (worker_id, expires_at, run_ids, limited)
    select 1, clock_timestamp() + interval '1 hour', ids, true from first returning id
)
update queue_service.runs set state = 'running', lease_id = lease.id from lease, first where runs.id = any(first.ids)
"""
# So few at a time: one transaction with all of them would make as many versions of the lane's row, and walk through them.
DEEPEN = """
insert into queue_service.runs (queue, task, payload, ordering_key, run_at)
select 'default', 'noop', '{}', 'deep', clock_timestamp() - interval '2 hours' from generate_series(1, 1000) as n
"""
TAKEN, RUNNING = 200, 300
BY = Claimant(["noop"], 1, LEASE)
STATEMENTS = {
    "claim lanes": (claim(laned=True, limit=TAKEN), 6 * TAKEN),
    "scan": (queries.scan(["default", "other"], ["noop"]), 10),
    "claim": (claim(limit=TAKEN), 2 * TAKEN + 5),
    # Those that run are counted, and passed over in the index, where a floor would spare that.
    "claim limited": (queries.claim_limited([Wanted("limited", TAKEN, {0: FRONT})], BY), 2 * RUNNING + 2 * TAKEN + 5),
    "claim limited lanes": (queries.claim_limited_lanes([("limited", TAKEN)], BY), RUNNING + 6 * TAKEN),
    "claim suspect": (queries.claim_suspect(["limited", "default"], BY), 5),
    "widen": (queues.widen("limited", 3, limit=TAKEN), 4 * TAKEN),
}


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[Sync]:
    with believed_empty(server, template, "queue_service_lane_plans", {"runs", "lanes"}) as conn:
        make_ours(conn)
        for number, (query, _) in enumerate(STATEMENTS.values()):
            prepare(conn, f"p{number}", query)
        conn.execute("set statement_timeout = 0")
        conn.execute(FILL.encode())
        for _ in range(DEEP // 1_000):
            conn.execute(DEEPEN.encode(), prepare=False)
        yield conn


@pytest.mark.parametrize("name", STATEMENTS)
@pytest.mark.parametrize("planned", ["while empty", "now", "knowing what there is"])
def test_a_statement_reads_what_it_takes_and_little_else(filled: Sync, name: str, planned: str) -> None:
    query, most = STATEMENTS[name]
    explain = b"explain (analyze, timing off, format json) "
    if planned == "knowing what there is":
        filled.execute("analyze queue_service.runs, queue_service.lanes")
    with filled.transaction(force_rollback=True):
        if planned == "while empty":
            statement = execution(f"p{list(STATEMENTS).index(name)}", query).as_string(filled).encode()
            row = filled.execute(explain + statement).fetchone()
        else:
            row = filled.execute(explain + query.text.encode(), query.params).fetchone()
    assert row is not None
    reads = [node for node in flattened(row[0][0]["Plan"]) if node.get("Relation Name") in {"runs", "lanes"}]
    reads = [node for node in reads if "Scan" in node["Node Type"]]
    shown = [(each["Node Type"], each.get("Index Name"), each["Actual Rows"], each["Actual Loops"]) for each in reads]
    visited = sum(
        each["Actual Loops"] * (each["Actual Rows"] + each.get("Rows Removed by Filter", 0)) for each in reads
    )
    assert visited <= most, "\n".join(map(str, shown))
    assert {each["Node Type"] for each in reads if each["Actual Loops"]} <= {
        "Index Scan",
        "Index Only Scan",
        "Tid Scan",
    }
