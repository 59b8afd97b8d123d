"""What a claim of lanes reads, with a plan that was made while there were none, and with one that is made now."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from queue_service.db import pool
from queue_service.runs import queries
from tests.plans.database import Sync, believed_empty, execution, flattened, prepare
from tests.support import claim

LANES, DEEP = 50_000, 50_000
# A lane of each of so many keys, one with that many runs, and as many runs in no lane.
FILL = """
insert into queue_service.runs (queue, task, payload, ordering_key, run_at)
select 'default', 'noop', '{}', 'key ' || n, clock_timestamp() - interval '1 hour' + n * interval '1 ms'
  from generate_series(1, 50000) as n;
insert into queue_service.runs (queue, task, payload, ordering_key, run_at)
select 'default', 'noop', '{}', 'deep', clock_timestamp() - interval '2 hours' from generate_series(1, 50000) as n;
insert into queue_service.runs (queue, task, payload) select 'default', 'noop', '{}' from generate_series(1, 50000) as n
"""
TAKEN = 200
STATEMENTS = {
    "claim lanes": (claim(laned=True, limit=TAKEN), 6 * TAKEN),
    "scan": (queries.scan(["default", "other"], ["noop"]), 10),
    "claim": (claim(limit=TAKEN), 2 * TAKEN + 5),
}


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[Sync]:
    with believed_empty(server, template, "queue_service_lane_plans", {"runs", "lanes"}) as conn:
        conn.execute(pool._SESSION.encode())
        for number, (query, _) in enumerate(STATEMENTS.values()):
            prepare(conn, f"p{number}", query)
        conn.execute(FILL.encode())
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
    told = [(each["Node Type"], each.get("Index Name"), each["Actual Rows"], each["Actual Loops"]) for each in reads]
    visited = sum(
        each["Actual Loops"] * (each["Actual Rows"] + each.get("Rows Removed by Filter", 0)) for each in reads
    )
    assert visited <= most, "\n".join(map(str, told))
    assert {each["Node Type"] for each in reads if each["Actual Loops"]} <= {
        "Index Scan",
        "Index Only Scan",
        "Tid Scan",
    }
