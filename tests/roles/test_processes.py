"""Workers, a gateway and the command line as they are started in earnest, each under a role of its own, in a database whose
owner is no superuser."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from psycopg.conninfo import make_conninfo

from queue_service import Turn
from queue_service.db.grants import Kind
from tests.gateway.served import TRUSTING_NOBODY, Client
from tests.roles.conftest import Make, call, grant
from tests.support import eventually, quick_app
from tests.worker.worker_process import WorkerProcess

APP = "tests.roles.tasks_for_tests:app"
# What shows something, and what changes something, with `{run}` for a run that has failed.
READS = (
    "db check --accept fsync --accept full-page-writes", "db current", "markers list", "markers show dep m1", "queues list", "runs list", "runs show {run}", "runs why {run}",
    "schedules list", "schedules next hourly", "schedules show hourly", "workers list",
)  # fmt: skip
CHANGES = (
    "enqueue double {{}}", "markers discharge dep m1 --yes", "markers fail dep m1 --code worker_died --yes", "markers sweep", "queues limit q --max-running 1",
    "queues pause q", "queues purge q --yes", "queues resume q", "runs cancel {run}", "runs delete {run} --yes", "runs retry {run}",
    "schedules add x double --every 60", "schedules delete hourly --yes", "schedules pause hourly", "schedules resume nightly",
    "schedules run hourly",
)  # fmt: skip


@pytest.fixture
def conninfo(owned: str, role: Make) -> dict[str, str]:
    """The database under a role of each kind."""
    found = {}
    for kind in Kind:
        name = role(kind.value)
        grant(owned, name, kind.value)
        found[kind.value] = make_conninfo(owned, user=name)
    return found


@pytest.fixture
def gateway(conninfo: dict[str, str]) -> Iterator[str]:
    """The address of a gateway under its role."""
    child = subprocess.Popen(
        [sys.executable, "-m", "queue_service", "gateway", "-a", APP, "--port", "0"],
        env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": conninfo["gateway"]}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stderr is not None
    try:
        yield next(found[0] for line in child.stderr if (found := re.search(r"http://127.0.0.1:\d+", line)))
    finally:
        child.terminate()
        said = child.stderr.read()
        child.wait()
        child.stderr.close()
    assert child.returncode == 0
    assert "permission denied" not in said


@pytest.fixture
def workers(conninfo: dict[str, str]) -> Iterator[list[WorkerProcess]]:
    made = [WorkerProcess(conninfo["worker"], "-a", APP) for _ in range(2)]
    yield made
    for each in made:
        each.end()


@pytest.mark.slow
async def test_processes_each_under_its_role_do_what_the_demo_does(
    conninfo: dict[str, str], workers: list[WorkerProcess], gateway: str, tmp_path: Path
) -> None:
    for worker in workers:
        await worker.started()
        await worker.says("/readyz", 200)
    begun = tmp_path / "begun"
    async with quick_app(conninfo["app"]) as app, quick_app(conninfo["enqueuer"]) as elsewhere:
        ids = [
            *await elsewhere.enqueue_many("double", [{"n": n} for n in range(50)]),
            await elsewhere.enqueue("double", {"n": 50}, ordering_key="k"),
        ]
        held = await app.enqueue("hold_at_first", {"begun": str(begun)})
        await eventually(begun.exists, within=60)
        # The one that works on it is killed, and the other one takes it over.
        (holder,) = [each for each in await asyncio.to_thread(roster, conninfo["observer"]) if each[1]]
        next(each for each in workers if each.events("worker started")[0]["worker_id"] == holder[0]).signal(
            signal.SIGKILL
        )
        assert (await app.wait(held, timeout=60)).result == 2
        assert [run.result for run in await app.wait_many(ids, timeout=60)] == [2 * n for n in range(51)]
        await app.turns.dispatch(Turn(deployment="dep", message_id="m1", stream="s"), "agent_turn", {"text": "hi"})
        assert (await app.turns.wait("dep", "m1", timeout=60)).kind == "reply"
    async with httpx2.AsyncClient(base_url=gateway, timeout=60, verify=TRUSTING_NOBODY) as http:
        ann = Client(http)
        async with ann.connected("?stream=ann") as (stream, connection_id):
            message = {"stream": "ann", "client_message_id": "m1", "body": {"text": "hello"}}
            assert (await ann.post("send", connection_id, message)).status_code == 202
            kinds = [(await stream.event())["kind"] for _ in range(3)]
            assert kinds == ["message", "delta", "reply"]
            assert (await ann.post("close", connection_id, {"stream": "ann"})).status_code == 200
    for worker in workers:
        assert "permission denied" not in "".join(worker.lines)


def roster(conninfo: str) -> list[tuple[int, int]]:
    """Who works, and how many runs each holds, as an observer sees it."""
    shown = call(conninfo, "workers", "list", "--json")
    assert shown.exit_code == 0, shown.output
    return [(each["id"], each["holds"]) for each in json.loads(shown.stdout)]


@pytest.fixture
def failed_run(owned: str) -> int:
    """In a database with a schedule and a turn."""

    async def prepare() -> int:
        async with quick_app(owned) as app:
            await app.schedules.put("hourly", "double", {"n": 1}, cron="0 * * * *")
            await app.schedules.put("nightly", "double", {"n": 1}, cron="0 3 * * *")
            await app.schedules.pause("nightly")
            await app.turns.arm(Turn(deployment="dep", message_id="m1", stream="s"))
            run_id = await app.enqueue("double", {})
            await app.cancel(run_id)
            return run_id

    return asyncio.run(prepare())


def test_an_observer_reads_with_every_command_and_changes_nothing(conninfo: dict[str, str], failed_run: int) -> None:
    for words in READS:
        shown = call(conninfo["observer"], *words.format(run=failed_run).split())
        assert shown.exit_code == 0, (words, shown.output)
    for words in CHANGES:
        refused = call(conninfo["observer"], *words.format(run=failed_run).split())
        assert refused.exit_code == 1, (words, refused.output)
        assert "permission denied for" in refused.output, words
        assert "db grants --role" in refused.output, words


def test_an_app_changes_with_every_command(conninfo: dict[str, str], failed_run: int) -> None:
    for words in (*READS, *CHANGES):
        if words not in {"workers list", "runs why {run}"}:
            done = call(conninfo["app"], *words.format(run=failed_run).split())
            assert "permission denied" not in done.output, (words, done.output)


def test_an_enqueuer_enqueues_from_the_command_line(conninfo: dict[str, str]) -> None:
    assert call(conninfo["enqueuer"], "enqueue", "double", '{"n": 1}').exit_code == 0
    assert call(conninfo["enqueuer"], "runs", "list").exit_code == 1
