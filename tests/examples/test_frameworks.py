"""Each framework's example, served over a socket: an order and its run are committed together, or neither is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import httpx2
import pytest
from psycopg.conninfo import conninfo_to_dict

from queue_service import App
from queue_service.db.execute import Connection
from queue_service.testing import assert_enqueued, refute_enqueued
from tests.support import rows

ROOT = Path(__file__).parents[2]
ADA = {"number": 1, "email": "ada@example.org"}


@pytest.fixture(params=["fastapi_app", "flask_app", "django_app"])
def address(request: pytest.FixtureRequest, database: str) -> Iterator[str]:
    """Where the example listens."""
    where = {str(name): str(value) for name, value in conninfo_to_dict(database).items()}
    url = f"postgresql:///{where.pop('dbname')}?{urlencode(where)}"
    with subprocess.Popen(
        [sys.executable, ROOT / "examples" / f"{request.param}.py", "--port", "0"],
        env={"DATABASE_URL": url, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as served:
        try:
            assert served.stdout is not None and served.stderr is not None
            line = served.stdout.readline()
            assert line.startswith("http"), served.stderr.read()
            address = line.strip().removesuffix("/docs").rstrip("/")
            # Answered once it has started, and has made its table.
            assert httpx2.get(f"{address}/runs/1", timeout=60).status_code == 404
            yield address
        finally:
            served.kill()


async def test_an_order_is_committed_with_its_run(address: str, app: App, conn: Connection) -> None:
    async with httpx2.AsyncClient(timeout=60) as client:
        taken = await client.post(f"{address}/orders", json=ADA)
        assert taken.status_code == 201, taken.text
        run = await assert_enqueued(app, "confirm", ADA, count=1)
        assert taken.json() == {"run": run.id}
        shown = await client.get(f"{address}/runs/{run.id}")
    assert shown.json() == {"task": "confirm", "state": "queued", "payload": ADA}
    assert await rows(conn, "select number, email from orders") == [(1, "ada@example.org")]


async def test_an_order_that_is_rolled_back_leaves_no_run(address: str, app: App, conn: Connection) -> None:
    await conn.execute("insert into orders values (1, 'bob@example.org')")
    async with httpx2.AsyncClient(timeout=60) as client:
        # The run is enqueued before the database finds that the number is taken.
        refused = await client.post(f"{address}/orders", json=ADA)
    assert refused.status_code == 409, refused.text
    await refute_enqueued(app, "confirm")
    assert await rows(conn, "select email from orders") == [("bob@example.org",)]


async def test_a_payload_the_task_does_not_take_is_refused_before_anything_is_stored(
    address: str, app: App, conn: Connection
) -> None:
    async with httpx2.AsyncClient(timeout=60) as client:
        refused = await client.post(f"{address}/orders", json={"number": 1, "colour": "red"})
    assert refused.status_code >= 400
    await refute_enqueued(app, "confirm")
    assert await rows(conn, "select number from orders") == []
