"""Hot statements keep to their indexes, whatever the planner believes about the size of `runs`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from queue_service import App
from queue_service.db.execute import Connection
from queue_service.db.query import Query
from queue_service.runs import queries, settling
from queue_service.runs.claim import Claim, hold
from queue_service.runs.model import Ending, Return, RunState
from queue_service.runs.queries import Claimant
from tests.plans.database import Sync, believed_empty
from tests.support import claim, make_ours, one

LEASE = timedelta(seconds=30)

FILL = """insert into queue_service.runs (queue, task, payload, run_at)
select 'default', 'noop', '{}', clock_timestamp() - interval '1 hour' + n * interval '1 ms' from generate_series(1, %s) n"""


@pytest.fixture(scope="module", params=[0, 50, 500_000], ids=lambda n: f"{n} rows")
def filled(request: pytest.FixtureRequest, server: str, template: str) -> Iterator[tuple[Sync, int]]:
    """A database with so many queued runs, whose statistics say that there are none."""
    with believed_empty(server, template, f"queue_service_plans_{request.param}", {"runs"}) as conn:
        make_ours(conn)
        conn.execute(FILL.encode(), [request.param])
        yield conn, request.param


def statements() -> dict[str, Query[Any]]:
    claims = [Claim(run_id, 1) for run_id in range(1, 501)]
    return {
        "claim": claim(limit=500, priorities=(0, 5)),
        "claim_lanes": claim(limit=500, laned=True),
        "claim_suspect": queries.claim_suspect(["default"], Claimant(["noop"], 1, LEASE)),
        "scan": queries.scan(["default", "other"], ["noop"]),
        "finish": settling.finish([Ending(each, RunState.SUCCEEDED) for each in claims], worker_id=1, freed=[1]),
        "give_back": settling.give_back([Return(each) for each in claims], worker_id=1, freed=[1]),
        "sweep": queries.sweep(limit=20, max_losses=3),
        "busy_leases": queries.busy_leases(limit=20),
        "hold": hold(Claim(1, 1)),
        "busy": settling.busy(claims),
        "report": settling.report(dict.fromkeys(claims, '{"value":0.5}')),
        "expire": queries.expire(limit=1_000),
        "extend": queries.extend([1, 2, 3], LEASE),
        "cancel": queries.cancel(1),
        "cancel_requests": queries.cancel_requests([1, 2, 3]),
        "endings": queries.endings([1, 2, 3]),
        "get_many": queries.get_many([1, 2, 3]),
    }


INDEXES = {
    "claim": {"runs_claim_idx", "runs_pkey"},
    "claim_lanes": {"runs_lane_idx", "runs_pkey"},
    "claim_suspect": {"runs_suspect_idx", "runs_pkey"},
    "scan": {"runs_claim_idx"},
    "finish": {"runs_pkey"},
    "give_back": {"runs_pkey"},
    "sweep": {"runs_pkey"},
    "busy_leases": {"runs_pkey"},
    "hold": {"runs_pkey"},
    "busy": {"runs_pkey"},
    "report": {"runs_pkey"},
    "expire": {"runs_expiry_idx", "runs_pkey"},
    "extend": set(),
    "cancel": {"runs_pkey"},
    "cancel_requests": {"runs_pkey"},
    "endings": {"runs_pkey"},
    "get_many": {"runs_pkey"},
}


def explained(conn: Sync, query: Query[Any], how: str) -> dict[str, Any]:
    """The plan of the statement as our sessions run it; nothing it did remains."""
    with conn.transaction(force_rollback=True):
        row = conn.execute(f"explain ({how}, format json) {query.text}".encode(), query.params).fetchone()
    assert row is not None
    plan = row[0] if isinstance(row[0], list) else json.loads(row[0])
    found: dict[str, Any] = plan[0]["Plan"]
    return found


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


@pytest.mark.parametrize("name", sorted(INDEXES))
def test_runs_is_reached_by_index_conditions_only(filled: tuple[Sync, int], name: str) -> None:
    conn, _ = filled
    reads = [node for node in nodes(explained(conn, statements()[name], "costs off")) if "Scan" in node["Node Type"]]
    on_runs = [node for node in reads if str(node.get("Relation Name", "")) == "runs"]
    assert [node for node in on_runs if node["Node Type"] not in {"Index Scan", "Index Only Scan"}] == []
    assert {node["Index Name"] for node in on_runs} == INDEXES[name]
    # A walk along a whole index is a sequential scan by another name; the partial ones are small by design.
    unbounded = {node["Index Name"] for node in on_runs if "Index Cond" not in node}
    assert unbounded <= {"runs_suspect_idx"}


def test_a_claim_sorts_nothing_and_touches_only_what_it_takes(filled: tuple[Sync, int]) -> None:
    conn, count = filled
    plan = explained(conn, statements()["claim"], "analyze, buffers")
    assert [node for node in nodes(plan) if node["Node Type"] in {"Sort", "Incremental Sort"}] == []
    taken = min(count, 500)
    walked = [node for node in nodes(plan) if node.get("Index Name") == "runs_claim_idx"]
    assert sum(node["Actual Rows"] * node["Actual Loops"] for node in walked) <= taken
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= 100 + 12 * taken


@pytest.mark.parametrize("name", ["sweep", "finish", "give_back", "expire", "claim_suspect"])
def test_what_finds_nothing_touches_next_to_nothing(filled: tuple[Sync, int], name: str) -> None:
    conn, _ = filled
    plan = explained(conn, statements()[name], "analyze, buffers")
    # Looking 500 runs up by id costs some pages each; a walk through the table would cost twenty thousand.
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= 2_500


def test_claiming_changes_no_index(database: str) -> None:
    with psycopg.connect(database) as conn:
        make_ours(conn)
        conn.execute(FILL.encode(), [1_000])
        taken = claim(limit=500)
        conn.execute(taken.text.encode(), taken.params)
        row = conn.execute(
            "select pg_stat_get_xact_tuples_updated(c), pg_stat_get_xact_tuples_hot_updated(c) "
            "from (select 'queue_service.runs'::regclass::oid as c) as runs"
        ).fetchone()
    assert row == (500, 500)


async def test_a_bulk_enqueue_writes_pages_not_rows(app: App, conn: Connection) -> None:
    count = 10_000
    await app.enqueue_many("noop", [{"n": n} for n in range(count)])
    before = await one(conn, "select pg_current_wal_insert_lsn()")
    await app.enqueue_many("noop", [{"n": n} for n in range(count)])
    written = await one(conn, "select pg_current_wal_insert_lsn() - %s::pg_lsn", before)
    # 265 bytes a run with its two index entries; row by row it would be 309.
    assert written < 285 * count
