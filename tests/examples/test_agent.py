"""The agent of the examples, in two worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from queue_service import App, Turn
from queue_service.db.execute import Connection
from tests.support import eventually, one, rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_workers(database: str) -> Iterator[None]:
    command = [sys.executable, "-m", "queue_service", "worker", "-a", "agent:app", "-q", "agent:10"]
    paces = ["--poll-interval", "100ms", "--sweep-interval", "200ms", "--lease", "5s", "--log-level", "error"]
    env = {**os.environ, "QUEUE_SERVICE_DATABASE_URL": database, "PYTHONPATH": str(ROOT / "examples")}
    workers = [subprocess.Popen([*command, *paces], env=env, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
        codes = [worker.wait(30) for worker in workers]
    assert codes == [0, 0]


async def test_a_message_that_crashes_its_agent_takes_no_other_with_it(
    database: str, conn: Connection, two_workers: None
) -> None:
    async with App(database) as app:
        app.task(name="agent_turn")(lambda text: text)
        long = " ".join(["word"] * 10)
        for conversation in ("a", "b"):
            # In one conversation a crash is between two that are answered; in the other all are.
            for number, text in enumerate([long, "crash" if conversation == "a" else long, "Are you back?"]):
                turn = Turn(deployment=f"agent of {conversation}", message_id=f"m{number}", stream=conversation)
                await app.turns.dispatch(turn, "agent_turn", {"text": text}, queue="agent", ordering_key=conversation)
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.turn_markers"), within=60)
    outcomes = await rows(conn, "select stream, message_id, kind, code from queue_service.turn_outcomes order by 1, 2")
    assert outcomes == [
        ("a", "m0", "reply", None), ("a", "m1", "error", "worker_died"), ("a", "m2", "reply", None),
        ("b", "m0", "reply", None), ("b", "m1", "reply", None), ("b", "m2", "reply", None),
    ]  # fmt: skip
    reasons = "select body ->> 'reason' from queue_service.events where kind = 'error'"
    assert await rows(conn, reasons) == [("killed by SIGKILL",)]
    # One agent at a time, and so one turn after the other, each with all of its words and no other's.
    words = "select count(*) from queue_service.events where kind = 'delta' group by stream order by stream"
    assert await rows(conn, words) == [(13,), (23,)]
