"""What a worker tells its log when it is asked: by SIGUSR1, or by `dump`."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from queue_service import App, Run, Worker
from queue_service.db.execute import Connection
from queue_service.worker import dump
from tests.support import eventually, rows, working
from tests.worker.conftest import Observe
from tests.worker.worker_process import WorkerProcess

SAID_TO_NOBODY = "nobody-should-read-this"


async def logged_run(worker: WorkerProcess, task: str) -> dict[str, Any]:
    def logged() -> dict[str, Any] | None:
        return next((each for each in worker.events("a run") if each["task"] == task), None)

    return await eventually(logged, within=20)


async def test_sigusr1_tells_of_each_run_where_it_is_and_no_payload(
    database: str, conn: Connection, observe: Observe, tmp_path: Path
) -> None:
    worker = await observe(database, "--processes", "1")
    places = {name: tmp_path / f"{SAID_TO_NOBODY} {name}" for name in ("hold", "hold_thread", "nap")}
    for place in places.values():
        place.mkdir()
    async with App(database) as app:
        run_ids = {name: await app.enqueue(name, {"directory": str(places[name])}) for name in ("hold", "hold_thread")}
        run_ids["nap"] = await app.enqueue("nap", {"seconds": 60, "path": str(places["nap"] / "started")})
    await eventually(lambda: all((place / "started").exists() for place in places.values()), within=30)
    worker.signal(signal.SIGUSR1)
    waiting, thread, process = [await logged_run(worker, name) for name in places]
    assert [each["run_id"] for each in (waiting, thread, process)] == list(run_ids.values())
    assert {(each["queue"], each["attempt"], each["level"]) for each in (waiting, thread, process)} == {
        ("default", 1, "warning")
    }
    assert all(0 <= each["seconds"] < 60 for each in (waiting, thread, process))
    assert waiting["where"] == "event loop, waiting"
    assert "await asyncio.sleep(0.01)" in waiting["stack"]
    assert "_slot" not in waiting["stack"]
    assert thread["where"] == "thread"
    assert "in hold_thread" in thread["stack"]
    assert process["where"] == "process"
    assert process["pid"] not in {worker.process.pid, None}
    # And what is no run: its own threads, and its own tasks.
    await eventually(lambda: any("await self.once()" in each["stack"] or "claimer" in each["stack"]
                                 for each in worker.events("a task of the event loop")))  # fmt: skip
    assert any(each["thread_name"] == "queue_service keeper" for each in worker.events("a thread"))
    assert worker.events("what this worker does")[0]["runs"] == 3
    assert SAID_TO_NOBODY not in "".join(worker.lines)
    # The worker goes on, and tells again.
    worker.signal(signal.SIGUSR1)
    await eventually(lambda: len(worker.events("what this worker does")) == 2)
    assert worker.process.poll() is None
    for name in ("hold", "hold_thread"):
        (places[name] / "release").touch()
    await eventually(
        lambda: rows(conn, "select id from queue_service.finished_runs where id = any(%s)", list(run_ids.values())[:2])
    )


async def test_sigusr1_tells_where_a_blocked_event_loop_is(database: str, observe: Observe, tmp_path: Path) -> None:
    worker = await observe(database)
    path = tmp_path / "grind"
    async with App(database) as app:
        run_id = await app.enqueue("grind", {"path": str(path), "rounds": 50_000_000})
    await eventually(lambda: any("loop is blocked" in line for line in worker.lines), within=30)
    worker.signal(signal.SIGUSR1)
    logged = await logged_run(worker, "grind")
    assert "ended" not in path.read_text()
    assert (logged["run_id"], logged["where"]) == (run_id, "event loop, at work")
    assert "hashlib.pbkdf2_hmac" in logged["stack"]
    assert "executor.py" not in logged["stack"]


async def test_many_runs_are_listed_from_the_longest(
    app: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "MAX_LOGGED", 3)
    begun: list[int] = []

    @app.task
    async def wait(n: int) -> None:
        begun.append(n)
        await asyncio.Event().wait()

    async with working(app, {"default": 10}) as worker:
        first = [await app.enqueue("wait", {"n": n}) for n in range(2)]
        await eventually(lambda: len(begun) == 2)
        await app.enqueue_many("wait", [{"n": n} for n in range(2, 6)])
        await eventually(lambda: len(begun) == 6)
        await asyncio.to_thread(worker.dump)
        worker.stop(now=True)
    logged = [vars(record) for record in caplog.records if record.getMessage() == "a run"]
    assert len(logged) == 3
    assert {each["run_id"] for each in logged} > set(first)
    (head,) = [vars(record) for record in caplog.records if record.getMessage() == "what this worker does"]
    assert (head["runs"], head["shown"]) == (6, 3)


async def test_a_batch_is_announced_once(app: App, caplog: pytest.LogCaptureFixture) -> None:
    begun = asyncio.Event()

    @app.task(batch=10)
    async def wait(runs: list[Run]) -> None:
        begun.set()
        await asyncio.Event().wait()

    first, *_ = await app.enqueue_many("wait", [{"n": n} for n in range(4)])
    async with working(app, {"default": 1}) as worker:
        await begun.wait()
        worker.dump()
        worker.stop(now=True)
    (logged,) = [vars(record) for record in caplog.records if record.getMessage() == "a run"]
    assert (logged["run_id"], logged["together"], logged["where"]) == (first, 4, "event loop, waiting")
    assert "asyncio.Event().wait()" in logged["stack"]


async def test_a_thread_that_was_given_up_is_reported_with_its_run(app: App, caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    @app.task(timeout=0.5)
    def stays() -> None:
        release.wait()

    try:
        async with working(app) as worker:
            run = await app.wait(await app.enqueue("stays", {}, max_attempts=1), timeout=20)
            worker.dump()
    finally:
        release.set()
    (logged,) = [vars(each) for each in caplog.records if each.getMessage() == "a thread whose handler was given up"]
    assert (logged["run_id"], logged["task"]) == (run.id, "stays")
    assert "release.wait()" in logged["stack"]


async def test_a_worker_that_does_not_run_says_so(app: App, caplog: pytest.LogCaptureFixture) -> None:
    Worker(app).dump()
    assert [record.getMessage() for record in caplog.records] == ["this worker does not run"]


def test_what_fails_to_tell_does_not_end_the_watch(caplog: pytest.LogCaptureFixture) -> None:
    called = threading.Semaphore(0)

    def fail() -> None:
        called.release()
        raise RuntimeError("a mistake")

    with dump.on_signal(signal.SIGUSR1, fail):
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR1)
            assert called.acquire(timeout=10)
    assert "what this worker does cannot be logged" in caplog.messages
