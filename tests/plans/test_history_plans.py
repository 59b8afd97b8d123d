"""What listings and retries of history read, with a plan made while it was empty, and with one that is made now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from queue_service.db.query import Query
from queue_service.runs import queries, walks
from queue_service.runs.model import RunState
from queue_service.runs.walks import SCAN_LIMIT, Filter, Place
from tests.plans.database import Sync, believed_empty, execution, flattened, prepare
from tests.support import make_ours

DAYS, ROWS = 4, 50_000
# As many live runs as a day's, and for each of four days as many that ended: one of two hundred failed, two of all are rare.
LIVE = """insert into queue_service.runs (id, queue, task, payload)
select 1000000 + n, 'default', 'noop', '{}' from generate_series(1, 50000) as n"""
ENDED = """
create table queue_service.finished_runs_2020010{day} partition of queue_service.finished_runs
    for values from ('2020-01-0{day}Z') to ('2020-01-0{next}Z') with (autovacuum_enabled = off);
insert into queue_service.finished_runs
    (id, finished_at, run_at, created_at, attempt, failures, losses, priority, state, queue, task, payload)
select {day} * 50000 + n, '2020-01-0{day}Z', '2020-01-01Z', '2020-01-01Z', 1, 0, 0, 0,
       case n % 200 when 0 then 'failed' else 'succeeded' end, 'default',
       case n % 50000 when 200 then 'rare' else 'noop' end, '{{}}'
  from generate_series(1, 50000) as n
"""


def looking(query: Query[Any], look: int) -> Query[Any]:
    """The same, looking at so many runs."""
    return replace(query, params={**query.params, "scan_limit": look})


FAILED = Filter(RunState.FAILED)
RECENT = Filter(RunState.FAILED, within=timedelta(hours=1))
RARE = Filter(RunState.FAILED, task="rare")
# The statement, and how many runs it may look at. A partition that is merged with others gives one that is not needed.
MERGED = DAYS + 2
STATEMENTS: dict[str, tuple[Query[Any], int]] = {
    "a page": (walks.page(), 2 * (50 + MERGED)),
    "a page from the middle": (walks.page(before=120_000), 50 + MERGED),
    "a page of what is rare": (walks.page(task="rare"), SCAN_LIMIT + MERGED),
    "a page of what failed": (walks.page(state=RunState.FAILED), 50 + MERGED),
    "a page of what failed and is rare": (walks.page(state=RunState.FAILED, task="rare"), 1_000 + MERGED),
    "a page of what succeeded": (walks.page(state=RunState.SUCCEEDED), 50 + 1 + MERGED),
    "a page of what is running": (walks.page(state=RunState.RUNNING), 0),
    "a page of what is queued": (walks.page(state=RunState.QUEUED), 50 + 1),
    "a run of history": (queries.get(120_000), 1),
    "a run of the last days": (queries.get_recent(120_000), 1),
    "a retry": (queries.retry(200 + 50_000), 2),
    "a deletion": (queries.delete(200 + 50_000), 2),
    "a batch of retries": (walks.retry_many(FAILED, Place(), limit=100), 1_000 + 3 * 100 + MERGED),
    "a batch of retries of what is rare": (walks.retry_many(RARE, Place(), limit=100), 2 * 1_000 + 8),
    "a stretch of what is rare": (looking(walks.retry_many(RARE, Place(), limit=100), 100), 2 * 100 + 3 + 2 * MERGED),
    "a batch of retries of what is recent": (walks.retry_many(RECENT, Place(), limit=100), 0),
    "a count of what failed": (walks.count_many(FAILED, Place(), limit=SCAN_LIMIT), 2 * 1_000),
}


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[Sync]:
    with believed_empty(server, template, "queue_service_history_plans", {"runs", "finished_runs_default"}) as conn:
        make_ours(conn)
        for day in range(1, DAYS + 1):
            conn.execute(ENDED.partition(";")[0].format(day=day, next=day + 1).encode())
        for number, (query, _) in enumerate(STATEMENTS.values()):
            prepare(conn, f"p{number}", query)
        for day in range(1, DAYS + 1):
            conn.execute(ENDED.partition(";")[2].format(day=day, next=day + 1).encode())
        conn.execute(LIVE.encode())
        yield conn


@pytest.mark.parametrize("name", STATEMENTS)
@pytest.mark.parametrize("planned", ["while empty", "now", "knowing what there is"])
def test_a_statement_reads_what_it_shows_or_moves_and_little_else(filled: Sync, name: str, planned: str) -> None:
    query, most = STATEMENTS[name]
    if planned == "knowing what there is":
        filled.execute("analyze queue_service.runs, queue_service.finished_runs")
    number = list(STATEMENTS).index(name)
    if planned != "while empty":
        filled.execute(f"deallocate p{number}".encode())
        prepare(filled, f"p{number}", query)
    statement = execution(f"p{number}", query).as_string(filled)
    with filled.transaction(force_rollback=True):
        row = filled.execute(f"explain (analyze, timing off, format json) {statement}".encode()).fetchone()
    assert row is not None
    nodes = list(flattened(row[0][0]["Plan"]))
    reads = [node for node in nodes if str(node.get("Relation Name")).startswith(("runs", "finished_runs"))]
    reads = [node for node in reads if "Scan" in node["Node Type"] and node["Actual Loops"]]
    shown = [(each["Node Type"], each.get("Index Name"), each["Actual Rows"], each["Actual Loops"]) for each in reads]
    assert {each["Node Type"] for each in reads} <= {"Index Scan", "Index Only Scan", "Tid Scan"}, shown
    visited = sum(
        each["Actual Loops"] * (each["Actual Rows"] + each.get("Rows Removed by Filter", 0)) for each in reads
    )
    assert visited <= most, "\n".join(map(str, shown))


def test_a_look_for_what_is_recent_opens_no_partition_of_the_days_before(filled: Sync) -> None:
    explain = b"explain (analyze, timing off, format json) "
    opened = {}
    for name, query in {"get": queries.get(120_000), "get_recent": queries.get_recent(120_000)}.items():
        row = filled.execute(explain + query.text.encode(), query.params).fetchone()
        assert row is not None
        nodes = flattened(row[0][0]["Plan"])
        opened[name] = {each["Relation Name"] for each in nodes if "finished" in str(each.get("Relation Name"))}
    assert len(opened["get_recent"]) < len(opened["get"])
