"""A handler's transaction on a connection of its own, whatever that session is set to."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from queue_service import App, HandedOn, Retry, Run, Turn, Worker
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError
from queue_service.runs.model import RunState
from tests.db.test_borrowed_everywhere import ODD
from tests.support import one

TURN = Turn(deployment="dep", message_id="m", stream="talk")


@pytest.mark.parametrize("result", [{"text": "ü"}, HandedOn("dep")], ids=["a result", "handed on"])
@pytest.mark.parametrize("is_async", [True, False], ids=["coroutine", "thread"])
async def test_its_settings_change_nothing_and_stay_as_they_are(
    app: App, database: str, conn: Connection, is_async: bool, result: Any
) -> None:
    kept: list[bool] = []
    # At its isolation it may meet a conflict with what the worker writes meanwhile, and is then tried again.
    again = Retry(max_attempts=5, base=0)
    query = "select name, setting from pg_settings where name not like 'plpgsql.%' order by name"
    if is_async:

        @app.task(name="spend", retry=again)
        async def spend(run: Run) -> None:
            async with await psycopg.AsyncConnection.connect(database, options=ODD, autocommit=True) as mine:
                before = await (await mine.execute(query)).fetchall()
                async with (spending := run.transaction(mine)):
                    spending.result = result
                kept.append(await (await mine.execute(query)).fetchall() == before)
    else:

        @app.task(name="spend", retry=again)
        def spend_in_a_thread(run: Run) -> None:
            with psycopg.connect(database, options=ODD, autocommit=True) as mine:
                before = mine.execute(query).fetchall()
                with (spending := run.transaction(mine)):
                    spending.result = result
                kept.append(mine.execute(query).fetchall() == before)

    run_id = await app.turns.dispatch(TURN, "spend", {}, ordering_key="lane")
    await Worker(app).run(once=True)
    run = await app.get(run_id)
    assert run is not None
    assert (run.state, kept) == (RunState.SUCCEEDED, [True]), run.error
    is_owed = await one(conn, "select count(*) from queue_service.turn_markers") == 1
    assert is_owed is isinstance(result, HandedOn)


async def test_one_that_cannot_be_used_is_refused_before_the_block_begins(app: App, database: str) -> None:
    refusals: list[str] = []

    def refused(run: Run, mine: psycopg.Connection[Any]) -> None:
        with mine, pytest.raises(ConfigError) as caught, run.transaction(mine):
            pytest.fail("the block was entered")
        refusals.append(str(caught.value))

    @app.task
    def spend(run: Run) -> None:
        refused(run, psycopg.connect(database, client_encoding="latin1"))
        read_only = psycopg.connect(database)
        read_only.read_only = True
        refused(run, read_only)
        closed = psycopg.connect(database)
        closed.close()
        refused(run, closed)

    run_id = await app.enqueue("spend", {})
    await asyncio.wait_for(Worker(app).run(once=True), 20)
    assert (await app.wait(run_id, timeout=10)).error is None
    latin, reading, closed = refusals
    assert "client_encoding" in latin
    assert "read only" in reading
    assert "is closed" in closed
