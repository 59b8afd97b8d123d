from __future__ import annotations

from queue_service import App, RunState
from tests.support import working


async def test_a_run_is_executed_and_its_result_is_read(app: App) -> None:
    @app.task
    async def double(n: int) -> int:
        return 2 * n

    run_id = await app.enqueue("double", {"n": 21})
    async with working(app):
        done = await app.wait(run_id, timeout=10)
    assert (done.state, done.result, done.attempt) == (RunState.SUCCEEDED, 42, 1)
