"""Handlers in processes: what goes in and out, and what becomes of a run whose process dies or is killed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]
import pytest

from queue_service import App, Run, RunState, Worker
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError
from queue_service.worker.handlers.process_protocol import Job
from queue_service.worker.handlers.processes import BOOT
from tests.support import eventually, is_gone, one, working
from tests.worker import tasks_for_tests


@pytest.fixture
def app(app: App) -> App:
    """With the tasks that run in processes."""
    for task in tasks_for_tests.app.tasks.values():
        if task.process:
            app.tasks.add(task)
    return app


async def executed(app: App, task: str, payload: dict[str, Any], **options: Any) -> Run:
    """The run, after a worker had nothing more to do."""
    run_id = await app.enqueue(task, payload, **options)
    await Worker(app, processes=1).run(once=True)
    run = await app.get(run_id)
    assert run is not None
    return run


def error(run: Run) -> Any:
    return {} if run.error is None else run.error


async def pids(path: Path) -> list[int]:
    """The processes that `burn` named."""
    await eventually(lambda: path.exists() and path.read_text(), within=30)
    return [int(each) for each in await asyncio.to_thread(lambda: path.read_text().split())]


def started(*command: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *command], **options)


async def is_running(app: App, run_id: int) -> bool:
    run = await app.get(run_id)
    return run is not None and run.state is RunState.RUNNING


async def test_a_handler_runs_in_another_process_which_serves_the_next_run_too(app: App) -> None:
    run_ids = [await app.enqueue("where", {"n": n}) for n in range(5)]
    tally = await Worker(app, processes=1).run(once=True)
    answers = [(await app.wait(run_id, timeout=10)).result for run_id in run_ids]
    assert [answer[:3] for answer in answers] == [[n, run_id, 1] for n, run_id in enumerate(run_ids)]
    processes = {answer[3] for answer in answers}
    assert len(processes) == 1
    assert os.getpid() not in processes
    assert all(is_gone(pid) for pid in processes)
    assert (tally.succeeded, tally.failed) == (5, 0)


@pytest.mark.parametrize("value", [None, "Grüße 🐘", [1.5, {"a": None}], 10**400, "x" * 200_000, '"\\' * 60_000])
async def test_payload_and_result_arrive_as_they_were(app: App, value: Any) -> None:
    run = await executed(app, "say", {"word": "give", "value": value})
    assert (run.state, run.result, run.error) == (RunState.SUCCEEDED, value, None)


async def test_what_a_handler_says_counts_as_on_the_loop(app: App) -> None:
    snoozed = await executed(app, "say", {"word": "snooze", "value": 3_600})
    assert (snoozed.state, snoozed.failures) == (RunState.QUEUED, 0)
    assert snoozed.run_at - datetime.now(UTC) > timedelta(seconds=3_500)
    cancelled = await executed(app, "say", {"word": "cancel", "value": "no longer needed"})
    assert (cancelled.state, error(cancelled)["message"]) == (RunState.CANCELLED, "no longer needed")
    refused = await executed(app, "say", {"word": "set"})
    assert (refused.state, error(refused)["reason"]) == (RunState.FAILED, "result_refused")


async def test_what_a_handler_raises_is_described_and_its_policy_decides(app: App) -> None:
    before = datetime.now(UTC)
    busy = await executed(app, "say", {"word": "busy", "value": 3_600})
    assert (busy.state, busy.failures) == (RunState.QUEUED, 1)
    assert (error(busy)["reason"], error(busy)["type"], error(busy)["message"]) == ("raised", "Busy", "too busy")
    assert "raise errors[word](value)" in error(busy)["traceback"]
    assert timedelta(seconds=3_590) < busy.run_at - before < timedelta(seconds=3_700)
    later = await executed(app, "say", {"word": "later", "value": 7_200})
    assert timedelta(seconds=7_190) < later.run_at - before < timedelta(seconds=7_300)
    for word in ("key", "busy"):
        final = await executed(app, "say", {"word": word})
        assert (final.state, final.failures) == (RunState.FAILED, 1)
    left = await executed(app, "say", {"word": "exit"}, max_attempts=1)
    assert (left.state, error(left)["type"]) == (RunState.FAILED, "SystemExit")


@pytest.mark.parametrize(
    ("how", "said", "signal"),
    [
        ("SIGKILL", "was killed by SIGKILL (out of memory, perhaps)", "SIGKILL"),
        ("SIGSEGV", "was killed by SIGSEGV", "SIGSEGV"),
        (3, "ended with exit code 3", None),
        (0, "ended with exit code 0", None),
    ],
)
async def test_a_process_that_dies_fails_its_run_and_the_worker_goes_on(
    app: App, how: str | int, said: str, signal: str | None
) -> None:
    async with working(app, {"default": 1}, processes=1) as worker:
        run = await app.wait(await app.enqueue("die", {"how": how}), timeout=30)
        after = await app.wait(await app.enqueue("where", {}), timeout=30)
        await eventually(lambda: (worker.tally.failed, worker.tally.succeeded, worker.tally.lost) == (1, 1, 0))
    assert (run.state, run.failures, run.losses) == (RunState.FAILED, 1, 0)
    assert (error(run)["reason"], error(run).get("signal")) == ("process_died", signal)
    assert said in error(run)["message"]
    assert after.state is RunState.SUCCEEDED


@pytest.mark.parametrize("when", ["seen", "unseen"])
async def test_a_process_that_dies_while_it_is_idle_costs_no_run_a_failure(app: App, when: str) -> None:
    async with working(app, {"default": 1}, processes=1):
        first = await app.wait(await app.enqueue("where", {}), timeout=30)
        process = psutil.Process(first.result[3])
        if when == "unseen":
            # The next run is given to it, and it never looks.
            process.suspend()
            second = await app.enqueue("where", {}, max_attempts=1)
            await eventually(lambda: is_running(app, second))
            process.kill()
        else:
            process.kill()
            await eventually(lambda: is_gone(process.pid))
            second = await app.enqueue("where", {}, max_attempts=1)
        after = await app.wait(second, timeout=30)
    assert (after.state, after.attempt) == (RunState.SUCCEEDED, 1)
    assert after.result[3] != first.result[3]


async def test_a_timeout_kills_the_process_with_all_that_it_started(app: App, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    program = "import time; time.sleep(60)"
    async with working(app, {"default": 1}, processes=1):
        burning = await app.enqueue("burn", {"path": str(path), "program": program}, timeout=2)
        run = await app.wait(burning, timeout=30)
        processes = await pids(path)
        await eventually(lambda: all(is_gone(pid) for pid in processes))
        after = await app.wait(await app.enqueue("where", {}), timeout=30)
    assert (run.state, error(run)["reason"], run.failures) == (RunState.FAILED, "timeout", 1)
    assert "2 s" in error(run)["message"]
    assert after.result[3] not in processes


async def test_cancelling_a_run_kills_its_process(app: App, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with working(app, {"default": 1}, processes=1) as worker:
        burning = await app.enqueue("burn", {"path": str(path)})
        process, _ = await pids(path)
        assert await app.cancel(burning)
        run = await app.wait(burning, timeout=30)
        await eventually(lambda: is_gone(process))
        await eventually(lambda: (worker.tally.cancelled, worker.tally.failed) == (1, 0))
    assert (run.state, error(run)["reason"]) == (RunState.CANCELLED, "cancelled")


async def test_stopping_at_once_kills_the_process_and_hands_its_run_back(app: App, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with working(app, {"default": 1}, processes=1) as worker:
        burning = await app.enqueue("burn", {"path": str(path)})
        process, _ = await pids(path)
        worker.stop(now=True)
    run = await app.get(burning)
    assert run is not None
    assert (run.state, run.failures, run.losses) == (RunState.QUEUED, 0, 0)
    assert is_gone(process)


async def test_waiting_for_a_process_uses_up_none_of_the_time(app: App, tmp_path: Path) -> None:
    path = tmp_path / "turns"
    async with working(app, {"default": 4}, processes=1):
        run_ids = [await app.enqueue("nap", {"seconds": 0.7, "path": str(path)}, timeout=2.5) for _ in range(4)]
        runs = [await app.wait(run_id, timeout=30) for run_id in run_ids]
    assert {run.state for run in runs} == {RunState.SUCCEEDED}
    # One after the other: there is one process.
    assert path.read_text().split() == ["begun", "ended"] * 4
    assert len({run.result for run in runs}) == 1


async def test_there_are_as_many_processes_as_were_asked_for(app: App) -> None:
    run_ids = [await app.enqueue("nap", {"seconds": 0.3}) for _ in range(6)]
    await Worker(app, {"default": 6}, processes=2).run(once=True)
    served = Counter([(await app.wait(run_id, timeout=10)).result for run_id in run_ids])
    assert len(served) == 2


@pytest.mark.parametrize("number", [0, -1, True, 1.5, "2"])
def test_a_number_of_processes_that_is_none_is_refused(app: App, number: Any) -> None:
    with pytest.raises(ConfigError, match="processes must be a whole number from 1"):
        Worker(app, processes=number)


async def test_the_app_of_the_process_has_the_database_of_the_worker(app: App) -> None:
    run = await executed(app, "look", {})
    assert (run.state, run.result) == (RunState.SUCCEEDED, "running")


async def test_a_worker_that_is_killed_takes_its_processes_with_it(
    app: App, database: str, conn: Connection, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    await app.enqueue("burn", {"path": str(path)})
    command = ["-m", "queue_service", "worker", "-a", "tests.worker.tasks_for_tests:app"]
    worker = started(*command, "--database-url", database, stderr=subprocess.DEVNULL)
    try:
        process, _ = await pids(path)
        if sys.platform == "linux":
            # It cannot notice anything now.
            psutil.Process(process).suspend()
        assert await one(conn, "select count(*) from queue_service.runs where state = 'running'") == 1
    finally:
        worker.kill()
        worker.wait()
    await eventually(lambda: is_gone(process))


async def test_a_process_ends_in_the_middle_of_its_run_once_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    now = datetime.now(UTC)
    run = Run(
        id=1, queue="default", task="burn", state=RunState.RUNNING, payload={"path": str(path)}, attempt=1,
        failures=0, losses=0, priority=0, created_at=now, run_at=now,
    )  # fmt: skip
    job = Job(
        module="tests.worker.tasks_for_tests",
        main=None,
        main_file=None,
        run=run,
        conninfo="",
        pooler="auto",
        lent_statement_timeout=timedelta(minutes=1),
        limit=1_000,
        max_attempts=1,
        worker_id=1,
    )
    command = ["-c", BOOT, str(os.getpid()), json.dumps(sys.path)]
    process = started(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        process.stdin.flush()
        await pids(path)
        process.stdin.close()
        assert await asyncio.to_thread(process.wait, 20) == 1


PROGRAM = """
import asyncio
from queue_service import App, Worker

app = App()

@app.task(process=True)
def square(n: int) -> int:
    return n * n

async def main() -> None:
    async with app:
        run_id = await app.enqueue("square", {"n": 12})
        await Worker(app, processes=1).run(once=True)
        print((await app.get(run_id)).result)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["file", "module"])
async def test_a_task_may_be_defined_in_the_program_itself(database: str, tmp_path: Path, how: str) -> None:
    (tmp_path / "squares.py").write_text(PROGRAM)
    command = [sys.executable, "squares.py"] if how == "file" else [sys.executable, "-m", "squares"]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "144\n"), done.stderr


async def test_a_task_that_its_module_does_not_register_fails_with_a_sentence(app: App) -> None:
    app.task(name="elsewhere", process=True)(tasks_for_tests.when_it_says)
    run = await executed(app, "elsewhere", {"failures": 1, "error": None}, max_attempts=1)
    assert run.state is RunState.FAILED
    assert "registers no task 'elsewhere'" in error(run)["message"]
