"""What the statements about replicas read where requests were left in great numbers, whatever is believed of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from queue_service.db.query import Query
from queue_service.replicas import queries
from queue_service.replicas.model import Done, Request
from tests.plans.database import Sync, believed_empty, looked, prepare
from tests.support import make_ours

TABLES = {"gateways", "gateway_requests"}
LATER, SILENCE = timedelta(minutes=1), timedelta(minutes=1)

# Each of a hundred replicas is asked by each other one; a hundredth is answered, another has expired.
FILL = """
insert into queue_service.gateways (id, expires_at, revision)
select 'g' || n, clock_timestamp() + interval '1 h', '9999' from generate_series(0, 99) as n;
insert into queue_service.gateway_requests (id, gateway, expires_at, answer, body)
select 'g' || n / 500 || '.' || n, 'g' || n % 100,
       clock_timestamp() + case when n % 1000 = 7 then interval '-1 min' else interval '1 h' end,
       case when n % 100 = 3 then 'applied' end, '{}'
  from generate_series(0, 49999) as n
"""

# The most rows that each may look at.
STATEMENTS: dict[str, tuple[Callable[[], Query[Any]], int]] = {
    "beat": (lambda: queries.beat("g1", LATER), 1),
    "ask": (lambda: queries.ask([(f"g{n}", Request(f"new.{n}", "{}")) for n in range(50)], LATER), 50),
    "asked": (lambda: queries.asked("g1", limit=100), 100),
    "answer": (lambda: queries.answer({f"g0.{n}": Done.APPLIED for n in range(100)}), 100),
    "take answers": (lambda: queries.take_answers([f"g0.{n}" for n in range(100)]), 100),
    "leave": (lambda: queries.leave("g1"), 1 + 500),
    # All replicas, and what has expired, which is looked up once more to be deleted.
    "prune": (lambda: queries.prune(SILENCE), 100 + 2 * 50),
}


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[Sync]:
    with believed_empty(server, template, "queue_service_replica_plans", TABLES) as conn:
        make_ours(conn)
        for number, (make, _) in enumerate(STATEMENTS.values()):
            prepare(conn, f"p{number}", make())
        conn.execute(FILL.encode())
        yield conn


@pytest.fixture(scope="module", params=["planned while empty", "believed empty", "believed full"])
def stage(request: pytest.FixtureRequest, filled: Sync) -> str:
    """The stages follow one another on one database."""
    if request.param == "believed full":
        filled.execute("analyze")
    return str(request.param)


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_looks_at_what_it_takes_and_little_else(filled: Sync, stage: str, name: str) -> None:
    make, most = STATEMENTS[name]
    prepared = f"p{list(STATEMENTS).index(name)}" if stage == "planned while empty" else None
    with filled.transaction(force_rollback=True):
        look = looked(filled, make(), TABLES, prepared=prepared)
    assert look.visited <= most, look.shown
    requests = {kind for table, kind in look.kinds if table == "gateway_requests"}
    assert requests <= {"Index Scan", "Index Only Scan"}, look.shown
