"""What the statements about steps read, with a plan made while everything was empty: by key, however much there is."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from psycopg import sql

from queue_service.db.query import Query
from queue_service.steps import queries
from queue_service.steps.model import NewStep
from tests.plans.database import TYPES, Sync, believed_empty, execution, flattened, prepare
from tests.support import make_ours

RUNS, STEPS = 20_000, 200_000
TABLES = {"runs", "steps", "leases", "finished_runs_default"}
FILL = """
insert into queue_service.leases (worker_id, expires_at, run_ids) values (1, 'infinity', '{}');
insert into queue_service.runs (id, queue, task, payload, attempt, state, lease_id)
select n, 'default', 'noop', '{}', 2, 'running', (select max(id) from queue_service.leases) from generate_series(1, 20000) as n;
insert into queue_service.steps (run_id, name, attempt, created_at, result)
select n / 10 + 1, 'step ' || n % 10, 1, '2020-01-01Z'::timestamptz + n * interval '1 s', '{}' from generate_series(0, 199999) as n
"""
NEW = [NewStep(run_id, 2, f"new {n}", "1") for run_id in range(500, 550) for n in range(2)]

# The statement, and how many rows of `runs` and of `steps` it may read.
STATEMENTS: dict[str, tuple[Query[Any], dict[str, int]]] = {
    "one step": (queries.store(NEW[:1]), {"runs": 1, "steps": 0}),
    "many steps": (queries.store(NEW), {"runs": 50, "steps": 0}),
    "steps that are lost": (queries.store([NewStep(n, 1, "new", "1") for n in range(500, 600)]), {"runs": 200, "steps": 0}),
    "the steps of a run": (queries.of_run(700), {"runs": 0, "steps": 10}),
    "whether one is stored": (queries.is_stored(NewStep(700, 1, "step 1", "")), {"runs": 0, "steps": 1}),
    "the steps of a run that was deleted": (queries.forget(700), {"runs": 0, "steps": 10}),
    "a batch of old steps": (queries.prune(timedelta(1), queries.Place(), scan_limit=1_000), {"runs": 101, "steps": 1_000}),
    "nothing that is old": (queries.prune(timedelta(36_500), queries.Place(), scan_limit=1_000), {"runs": 0, "steps": 0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[Sync]:
    with believed_empty(server, template, "queue_service_step_plans", TABLES) as conn:
        make_ours(conn)
        TYPES["after_run"] = "bigint"
        for number, (query, _) in enumerate(STATEMENTS.values()):
            prepare(conn, f"p{number}", query)
        for statement in FILL.split(";"):
            conn.execute(statement.encode())
        yield conn


@pytest.mark.parametrize("name", STATEMENTS)
@pytest.mark.parametrize("planned", ["while empty", "now"])
def test_keys_lead_to_what_is_read(filled: Sync, name: str, planned: str) -> None:
    query, most = STATEMENTS[name]
    number = list(STATEMENTS).index(name)
    with filled.transaction(force_rollback=True):
        if planned == "now":
            filled.execute(f"deallocate p{number}".encode())
            prepare(filled, f"p{number}", query)
        explain = sql.SQL("explain (analyze, format json) ") + execution(f"p{number}", query)
        row = filled.execute(explain).fetchone()
    assert row is not None
    nodes = list(flattened(row[0][0]["Plan"]))
    scans = [node for node in nodes if "Scan" in node["Node Type"] and node.get("Relation Name") in TABLES]
    # A tid is where a row is.
    assert {node["Node Type"] for node in scans} <= {"Index Scan", "Index Only Scan", "Tid Scan"}
    # An index in which the key is not what comes first would be read from end to end.
    assert {node["Index Name"] for node in scans if node["Relation Name"] == "steps" and "Index Name" in node} <= {
        "steps_created_idx" if "old" in name else "steps_pkey"
    }
    for table, limit in most.items():
        read = [node for node in scans if node["Relation Name"] == table and node["Node Type"] != "Tid Scan"]
        assert sum(node["Actual Rows"] * node["Actual Loops"] for node in read) <= limit
        assert [node for node in read if node.get("Rows Removed by Filter", 0) > 10] == []
