"""A right that is missing hurts what needs it, is named, and is enough once it is granted: no process ends of it."""

from __future__ import annotations

import asyncio

import pytest
from psycopg.conninfo import make_conninfo

from queue_service import RunState, Worker
from queue_service.errors import DatabaseRefused
from queue_service.services.pruner import Pruner
from tests.roles.conftest import Make, execute, grant
from tests.support import eventually, quick_app, working


@pytest.fixture
def worker_role(owned: str, role: Make) -> str:
    made = role("worker")
    grant(owned, made, "worker")
    return made


async def test_a_worker_that_may_not_delete_steps_works_and_prunes_the_rest(
    owned: str, worker_role: str, caplog: pytest.LogCaptureFixture
) -> None:
    execute(owned, "revoke delete on queue_service.steps from {}", worker_role)
    async with quick_app(make_conninfo(owned, user=worker_role)) as app:

        @app.task
        async def noop() -> str:
            return "well"

        await app.events.append("s", "delta", {})
        execute(owned, "update queue_service.events set created_at = clock_timestamp() - interval '30 days'")
        with pytest.raises(DatabaseRefused, match=r"permission denied for table steps.*db grants --role"):
            await Pruner(app.pool, retention=app.settings.retention).once()
        assert await app.events.read("s") == []
        async with working(app) as worker:
            await eventually(lambda: "pruner" in failing(worker))
            assert (await app.wait(await app.enqueue("noop", {}), timeout=30)).result == "well"
    assert any("permission denied for table steps" in why for why in reasons(caplog))


def reasons(caplog: pytest.LogCaptureFixture, service: str | None = None) -> list[str]:
    """What the log gives as reasons, of one service or of all. Several may lack the same right."""
    return [
        str(getattr(record, "why", ""))
        for record in caplog.records
        if service is None or getattr(record, "service", None) == service
    ]


def failing(worker: Worker) -> list[str]:
    """Its services that fail."""
    return [] if worker._parts is None else [each.name for each in worker._parts.services if not each.condition.is_well]


async def test_what_a_worker_may_not_end_ends_once_it_may(
    owned: str, worker_role: str, caplog: pytest.LogCaptureFixture
) -> None:
    execute(owned, "revoke insert on queue_service.finished_runs from {}", worker_role)
    async with quick_app(make_conninfo(owned, user=worker_role)) as app:

        @app.task
        async def noop() -> str:
            return "well"

        async with working(app):
            run_id = await app.enqueue("noop", {})
            await eventually(
                lambda: any("denied for table finished_runs" in why for why in reasons(caplog, "finisher"))
            )
            found = await app.get(run_id)
            assert found is not None
            assert found.state in {RunState.RUNNING, RunState.QUEUED}
            await asyncio.to_thread(grant, owned, worker_role, "worker")
            assert (await app.wait(run_id, timeout=60)).state is RunState.SUCCEEDED


@pytest.mark.parametrize("is_asked", [True, False])
async def test_a_worker_that_may_not_end_its_runs_stops_all_the_same_and_others_take_them(
    is_asked: bool, owned: str, worker_role: str, caplog: pytest.LogCaptureFixture
) -> None:
    execute(owned, "revoke insert on queue_service.finished_runs from {}", worker_role)
    async with quick_app(owned) as owner, quick_app(make_conninfo(owned, user=worker_role)) as app:
        for each in (owner, app):
            each.task(name="noop")(lambda: "well")
        run_id = await owner.enqueue("noop", {})
        worker = Worker(app)
        running = asyncio.create_task(worker.run())
        await eventually(lambda: any("denied for table finished_runs" in why for why in reasons(caplog, "finisher")))
        worker.stop(now=is_asked)
        tally = await asyncio.wait_for(running, 20)
        assert tally.succeeded == 0
        (left,) = [record for record in caplog.records if "taken over when their leases lapse" in record.getMessage()]
        assert (left.run_ids, left.levelname) == ([run_id], "ERROR")  # type: ignore[attr-defined]
        assert "denied for table finished_runs" in left.why  # type: ignore[attr-defined]
        async with working(owner):
            assert (await owner.wait(run_id, timeout=60)).result == "well"
