"""What somebody has stored so that it cannot be read, by SQL or with an older library, ends or shows itself, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from queue_service import App, RunState, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.runs.walks import page
from tests.support import enqueued, one, rows, working

DEEP = "(repeat('{\"a\":', 3000) || '1' || repeat('}', 3000))::jsonb"

CORRUPTIONS = {
    "number": "payload = '{\"n\": 1e5000}'",
    "digits": "payload = jsonb_build_object('n', repeat('7', 5000)::numeric)",
    "depth": f"payload = {DEEP}",
    "created": "created_at = 'infinity'",
    "created long ago": "created_at = '4713-01-01 BC'",
    "claims": "attempt = 2147483647",
    "metadata": "metadata = '[1e5000]'",
    "timeout": "timeout = '100000000 years'",
    "retry delay": "retry_delay = '-100000000 years'",
}


@pytest.fixture
def app(app: App) -> App:
    @app.task
    async def noop(n: int = 0) -> str:
        return "well"

    return app


async def corrupted(conn: Connection, **fields: Any) -> dict[int, str]:
    """For each corruption a run that has it."""
    bad: dict[int, str] = {}
    for name, corruption in CORRUPTIONS.items():
        run_id = await enqueued(conn, **fields)
        await conn.execute(f"update queue_service.runs set {corruption} where id = %s".encode(), [run_id])
        bad[run_id] = name
    return bad


async def assert_each_has_ended(app: App, conn: Connection, bad: dict[int, str], good: list[int]) -> None:
    stored = "select id, state, error ->> 'reason' from queue_service.finished_runs order by id"
    expected = [(run_id, "failed", "unreadable") for run_id in bad] + [(run_id, "succeeded", None) for run_id in good]
    assert await rows(conn, stored) == sorted(expected)
    for run_id, name in bad.items():
        run = await app.get(run_id)
        assert run is not None
        assert run.error is not None
        assert (run.state, run.error["reason"], run.queue) == (RunState.FAILED, "unreadable", "default")
        assert name == "claims" or run.unreadable
    for run in await app.wait_many(good, timeout=10):
        assert (run.result, run.unreadable) == ("well", None)
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_runs_that_cannot_be_read_end_and_the_others_go_on(app: App, conn: Connection) -> None:
    before = [await enqueued(conn) for _ in range(3)]
    bad = await corrupted(conn)
    after = [await enqueued(conn) for _ in range(3)]
    tally = await Worker(app).run(once=True)
    assert (tally.succeeded, tally.failed) == (6, len(CORRUPTIONS))
    await assert_each_has_ended(app, conn, bad, before + after)
    # What was stored is kept as it was.
    kept = "select count(*) from queue_service.finished_runs where payload::text like '%%000000000%%' or payload @> '{\"a\": {}}'"
    assert await one(conn, kept) == 2


@pytest.mark.parametrize("where", ["lanes", "limited", "limited lanes", "suspects"])
async def test_wherever_they_stand(app: App, conn: Connection, where: str) -> None:
    good = [await enqueued(conn, ordering_key="k" if "lanes" in where else None)]
    bad = await corrupted(conn, ordering_key="k" if "lanes" in where else None)
    good.append(await enqueued(conn, ordering_key="k" if "lanes" in where else None))
    if "limited" in where:
        await app.queues.limit("default", max_running=1)
    if where == "suspects":
        await conn.execute("update queue_service.runs set losses = 1 where id <> %s", [good[0]])
    await Worker(app).run(once=True)
    await assert_each_has_ended(app, conn, bad, good)


async def test_a_worker_goes_on_with_runs_that_are_stored_meanwhile(app: App, conn: Connection) -> None:
    async with working(app):
        for corruption in CORRUPTIONS.values():
            run_id = await enqueued(conn, run_at=None)
            await conn.execute(f"update queue_service.runs set {corruption} where id = %s".encode(), [run_id])
            assert (await app.wait(await app.enqueue("noop", {}), timeout=10)).result == "well"


async def test_a_listing_shows_them(app: App, conn: Connection) -> None:
    bad = await corrupted(conn)
    await conn.execute("update queue_service.runs set attempts = '{\"a\": 1}', error = '5' where id = %s", [min(bad)])
    shown = {run.id: run.unreadable for run in (await fetch(conn, page())).runs}
    assert shown.keys() == bad.keys()
    assert [bad[run_id] for run_id, why in shown.items() if why is None] == ["claims"]
