"""Behind a pgbouncer that others use too: everything works, and they find its sessions as they would without us."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from queue_service import App, Run, Turn
from queue_service.cli import cli
from queue_service.settings import load
from queue_service.worker import lag
from tests.every_part import use_all
from tests.pooler import Pooler, pooling
from tests.support import eventually, one, rows, working

POOL = 6
MANY = int(os.environ.get("QUEUE_SERVICE_POOLER_RUNS", "1000"))
# Of the whole server, or of one moment.
_TELLING = """
select name, setting from pg_settings where name not in ('in_hot_standby', 'transaction_isolation') and name not like 'plpgsql.%'
"""


@pytest.fixture
def transactions(server: str) -> Iterator[Pooler]:
    """A pooler of transactions."""
    with pooling(server, size=POOL) as running:
        yield running


class Stranger:
    """Another program that uses the same pool: it takes all sessions of it at once, and looks at each."""

    def __init__(self, pooled: str, direct: str) -> None:
        self._pooled = pooled
        self.looks = 0
        with psycopg.connect(direct, autocommit=True, application_name="stranger") as alone:
            self._usual: dict[str, str] = dict(alone.execute(_TELLING).fetchall())

    def look(self) -> None:
        with ExitStack() as stack:
            seen = set()
            for _ in range(POOL):
                conn = psycopg.connect(self._pooled, prepare_threshold=None, application_name="stranger")
                stack.callback(conn.close)
                settings: dict[str, str] = dict(conn.execute(_TELLING).fetchall())
                changed = {name: value for name, value in settings.items() if self._usual[name] != value}
                assert changed == {}, "a session has settings that are not the stranger's"
                assert conn.execute("select name, statement from pg_prepared_statements").fetchall() == []
                assert conn.execute("select pg_listening_channels()").fetchall() == []
                (pid, locks), *_ = conn.execute(
                    "select pg_backend_pid(), array(select mode from pg_locks where locktype = 'advisory' "
                    "and pid = pg_backend_pid())"
                ).fetchall()
                assert locks == []
                # As long as the transaction goes on, the session is nobody else's.
                seen.add(pid)
            assert len(seen) == POOL
        self.looks += 1

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look again and again, for the length of the block."""
        end = threading.Event()

        def repeat() -> None:
            while not end.is_set():
                self.look()

        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(repeat)
            try:
                yield
            finally:
                end.set()
            looking.result()


def call(pooled: str, *arguments: str) -> str:
    result = CliRunner().invoke(cli, [*arguments, "--database-url", pooled], prog_name="queue-service")
    assert result.exit_code == 0, (arguments, result.output)
    return result.stdout


def use_every_command(pooled: str) -> None:
    """Those that take no time."""
    kept, gone = (json.loads(call(pooled, "enqueue", "echo", '{"n": 1}', "--json"))["id"] for _ in range(2))
    call(pooled, "schedules", "add", "daily", "echo", '{"n": 1}', "--cron", "0 0 * * *")
    for words in ("pause daily", "resume daily", "show daily", "next daily", "run daily", "list", "delete daily --yes"):
        call(pooled, "schedules", *words.split())
    for words in ("pause q", "resume q", "limit q --max-running 3", "list", "purge q --yes"):
        call(pooled, "queues", *words.split())
    for words in (f"show {kept}", f"why {kept}", "list", f"cancel {gone}", f"retry {gone}", f"delete {gone} --yes"):
        call(pooled, "runs", *words.split())
    for words in ("list", "sweep", "show dep m1"):
        call(pooled, "markers", *words.split())
    call(pooled, "workers", "list")
    call(pooled, "db", "current")


def _wait_for_a_line(process: subprocess.Popen[str], *lines: str) -> None:
    assert process.stderr is not None
    assert any(any(each in line for each in lines) for line in process.stderr), "it ended"


@contextmanager
def processes(pooled: str) -> Iterator[None]:
    """A worker and a gateway as the command line starts them. What they log is no error."""
    env = {**os.environ, "QUEUE_SERVICE_DATABASE_URL": pooled, "QUEUE_SERVICE_SWEEP_INTERVAL": "100ms"}
    own: dict[str, Any] = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    commands = (["worker", "-q", "elsewhere", "-a", "tests.worker.tasks_for_tests:app"], ["gateway", "--port", "0"])
    started = [subprocess.Popen([sys.executable, "-m", "queue_service", *words], **own) for words in commands]
    try:
        for process in started:
            _wait_for_a_line(process, "worker started", "gateway on")
        yield
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    assert not any(f'"{level}"' in text for level in ("error", "warning") for text in ends), ends


@pytest.mark.timeout(300)
def test_a_stranger_on_the_same_pool_sees_nothing_of_us_while_all_parts_work_and_afterwards(
    empty_database: str, server: str, transactions: Pooler
) -> None:
    pooled = transactions.before(empty_database)
    stranger = Stranger(pooled, empty_database)
    with stranger.looking():
        call(pooled, "db", "migrate")
        with processes(pooled):
            used = asyncio.run(use_all(pooled))
            use_every_command(pooled)
    assert used == {"states": {"succeeded"}, "outcome": "reply", "event": "delta"}
    looks = stranger.looks
    stranger.look()
    assert looks > 3


@pytest.fixture
def quick() -> Any:
    return load({"QUEUE_SERVICE_POLL_INTERVAL": "50ms", "QUEUE_SERVICE_SWEEP_INTERVAL": "100ms"})


def register_tasks(app: App) -> None:
    """One of each kind."""

    @app.task
    async def plain(n: int) -> int:
        return n

    @app.task
    def in_a_thread(n: int) -> int:
        return n

    @app.task(batch=50)
    async def together(runs: list[Run]) -> list[object]:
        return [run.payload["n"] for run in runs]

    @app.task
    async def pay(run: Run) -> None:
        async with run.transaction() as own:
            await own.execute("insert into public.paid values (%s)", [run.id])

    @app.task
    async def by_steps(run: Run, n: int) -> list[int]:
        async def twice(given: int) -> int:
            return 2 * given

        return [await run.step(str(step), twice, n + step) for step in range(3)]

    @app.task
    async def answer(run: Run) -> None:
        assert run.turn is not None
        await app.events.append(run.turn.stream, "delta", {"text": "Hel"})
        await app.turns.commit_reply(run.turn.deployment, [run.turn.message_id], {"text": "Hello"})


@pytest.mark.timeout(300)
async def test_everything_that_a_worker_ends_is_ended_without_an_error(
    direct: str, transactions: Pooler, quick: Any, caplog: pytest.LogCaptureFixture, conn: Any
) -> None:
    app = App(transactions.before(direct), settings=quick)
    register_tasks(app)
    await conn.execute("create table public.paid (run bigint)")
    few = MANY // 10
    async with app:
        for n in range(5):
            await app.schedules.put(f"often {n}", "plain", {"n": n}, every=timedelta(seconds=1))
        async with working(app, {"default": 20}):
            ids = await app.enqueue_many("plain", [{"n": n} for n in range(MANY)])
            for lane in range(5):
                ids += await app.enqueue_many("plain", [{"n": n} for n in range(few // 5)], ordering_key=f"lane {lane}")
            for task in ("in_a_thread", "together", "by_steps"):
                ids += await app.enqueue_many(task, [{"n": n} for n in range(few)])
            paid = await app.enqueue_many("pay", [{}] * few)
            turns = [Turn(deployment=f"dep-{n}", message_id="m", stream=f"conv-{n}") for n in range(few)]
            await asyncio.gather(*(app.turns.dispatch(turn, "answer", {}) for turn in turns))
            alone = await asyncio.gather(*(app.enqueue("plain", {"n": n}) for n in range(few)))
            done = await asyncio.gather(*(app.wait(run_id, timeout=200) for run_id in [*ids, *paid, *alone]))
            outcomes = await asyncio.gather(*(app.turns.wait(turn.deployment, "m", timeout=200) for turn in turns))
            fired = "select count(distinct schedule) = 5 from queue_service.schedule_slots where run_id is not null"
            await eventually(lambda: one(conn, fired))
    failed = [each for each in done if each.failures or each.losses or each.state != "succeeded"]
    assert [(each.task, each.error, each.attempts) for each in failed] == []
    assert {each.kind for each in outcomes} == {"reply"}
    assert sorted(run for (run,) in await rows(conn, "select run from public.paid")) == sorted(paid)
    # Of a loop that got no time a busy machine is to blame.
    said = [record for record in caplog.records if record.levelno >= logging.WARNING and record.name != lag.__name__]
    assert [(record.getMessage(), record.exc_info) for record in said] == []


async def test_behind_a_pooler_of_sessions_notices_are_heard_and_a_stranger_finds_his_settings(
    direct: str, server: str
) -> None:
    settings = load({"QUEUE_SERVICE_POOLER": "session", "QUEUE_SERVICE_POLL_INTERVAL": "1m"})
    with pooling(server, mode="session", size=20) as sessions:
        stranger = Stranger(sessions.before(direct), direct)
        app = App(sessions.before(direct), settings=settings)

        @app.task
        async def plain() -> None: ...

        async with app, working(app):
            async with app.pool.connection() as conn:
                assert not conn.is_pooled
                assert (await rows(conn, "show enable_seqscan")) == [("off",)]
            # Each of them would wait for the poll.
            for _ in range(5):
                done = await app.wait(await app.enqueue("plain", {}), timeout=20)
                assert done.state == "succeeded"
        await asyncio.to_thread(stranger.look)
