"""What a worker answers to probes: while all is well, while the database is gone, and while it is stuck or stops."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psycopg
import pytest

from queue_service import App, Worker
from queue_service.db import revision, session
from queue_service.db.cluster import Cluster
from queue_service.db.execute import Connection
from queue_service.db.session import connect
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.settings import load
from queue_service.worker import endpoint, health
from queue_service.worker.endpoint import Endpoint, HttpAnswer
from tests.support import eventually, one, rows, service, working
from tests.worker.conftest import Observe
from tests.worker.worker_process import Response, ask

REVISION = "update queue_service.alembic_version set version_num = %s"


@contextlib.asynccontextmanager
async def probed(app: App, **options: Any) -> AsyncIterator[tuple[Worker, Callable[[str], Awaitable[Response]]]]:
    """A worker in this process, and what asks it."""
    async with working(app, health_port=0, **options) as worker:
        url = worker.health_url
        assert url is not None
        assert (await ask(url, "/livez")).status == 200
        yield worker, lambda path: ask(url, path)


async def answers(asked: Callable[[], Awaitable[Response]], status: int, **checks: str) -> Response:
    """The first answer of this status whose checks begin so."""

    async def right() -> Response | None:
        response = await asked()
        found = response.status == status and all(response.checks[name].startswith(why) for name, why in checks.items())
        return response if found else None

    return await eventually(right, within=30)


def refused(database: str, *arguments: str, **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "queue_service", *arguments], env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database, **env},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


# Well


async def test_a_worker_that_is_well_is_live_and_ready(database: str, observe: Observe) -> None:
    worker = await observe(database, "--name", "here")
    ready = await worker.says("/readyz", 200)
    await answers(lambda: ask(worker.url, "/readyz"), 200, notices="ok")
    assert ready.headers["content-type"] == "application/json"
    assert ready.body["worker"] == "here"
    assert set(ready.checks) == {"claiming", "database", "notices"}
    live = await ask(worker.url, "/livez?verbose")
    assert (live.status, live.body) == (200, {"status": "ok", "worker": "here", "checks": {"claiming": "ok"}})
    head = await ask(worker.url, "/readyz", verb="HEAD")
    assert (head.status, head.body) == (200, "")
    assert int(head.headers["content-length"]) > 0


async def test_without_a_port_nothing_listens(app: App) -> None:
    async with working(app) as worker:
        assert worker.health_url is None


async def test_probes_do_not_load_the_database(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    fetch = app.pool.fetch

    async def counted(query: Any, **options: Any) -> Any:
        looks.extend([query] if query is revision.SCHEMA else [])
        return await fetch(query, **options)

    monkeypatch.setattr(app.pool, "fetch", counted)
    monkeypatch.setattr(health, "FRESH_SECONDS", 60.0)
    async with probed(app) as (_, asked):
        responses = await asyncio.gather(*(asked("/readyz") for _ in range(30)), *(asked("/livez") for _ in range(30)))
    assert {each.status for each in responses} == {200}
    assert len(looks) == 1


# The database


async def test_an_outage_of_the_database_is_not_ready_and_live(own_cluster: Cluster, observe: Observe) -> None:
    worker = await observe(own_cluster.conninfo)
    await worker.says("/readyz", 200)
    await asyncio.to_thread(own_cluster.stop)
    down = await worker.says("/readyz", 503)
    assert down.body["status"] == "failing"
    assert str(own_cluster.conninfo) not in str(down.body)
    # Until the claim loop has noticed too, and afterwards.
    await answers(lambda: ask(worker.url, "/readyz"), 503, claiming="claims have not gone through for ")
    assert (await ask(worker.url, "/livez")).status == 200
    await asyncio.to_thread(own_cluster.start)
    back = await worker.says("/readyz", 200, within=60)
    assert back.checks["claiming"] == "ok"


async def test_an_outage_is_no_stuck_loop_however_long_it_takes(
    own_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "STUCK", 4.0)
    monkeypatch.setattr("queue_service.worker.claimer.MAX_PAUSE", 0.5)
    settings = load({"QUEUE_SERVICE_POLL_INTERVAL": "100ms"})
    async with App(own_cluster.conninfo, settings=settings) as app, probed(app) as (worker, asked):
        await asyncio.to_thread(own_cluster.stop)
        assert worker._parts is not None
        claimer = service(worker._parts.services, "claimer")
        await eventually(lambda: claimer.failing_since is not None)
        lost = claimer.failing_since
        assert lost is not None
        while asyncio.get_running_loop().time() < lost + 5.0:
            assert (await asked("/livez")).status == 200
        assert claimer.failing_since == lost
        await asyncio.to_thread(own_cluster.start)
        assert (await answers(lambda: asked("/readyz"), 200)).checks["claiming"] == "ok"


async def test_a_connection_that_broke_in_the_pool_is_no_outage(
    database: str, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(health, "PROBE_SECONDS", 20.0)
    settings = load({"QUEUE_SERVICE_POOL_SIZE": "1", "QUEUE_SERVICE_SWEEP_INTERVAL": "1h"})
    async with App(database, settings=settings) as app, probed(app) as (_, asked):
        await answers(lambda: asked("/readyz"), 200, notices="ok")
        terminated = await one(
            conn,
            "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity "
            "where datname = current_database() and application_name = 'queue_service' and pid <> pg_backend_pid()",
        )
        assert terminated
        assert (await asked("/readyz")).checks["database"] == "ok"


async def test_what_is_wrong_with_the_database_is_for_the_log_once(
    app: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, where = app.pool.fetch, "at db.internal as someone"

    async def lost(query: Any, **options: Any) -> Any:
        if query is revision.SCHEMA:
            raise DatabaseUnavailable(where)
        return await fetch(query, **options)

    monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
    async with probed(app) as (_, asked):
        for _ in range(2):
            monkeypatch.setattr(app.pool, "fetch", lost)
            for _ in range(3):
                response = await asked("/readyz")
                assert (response.status, response.checks["claiming"]) == (503, "ok")
                assert where not in str(response.body)
            monkeypatch.setattr(app.pool, "fetch", fetch)
            assert (await asked("/readyz")).status == 200
    assert [vars(each)["why"] for each in caplog.records if "no database" in each.getMessage()] == [where, where]


async def test_a_pool_that_is_busy_is_no_outage(database: str) -> None:
    settings = load({"QUEUE_SERVICE_POOL_SIZE": "1", "QUEUE_SERVICE_POLL_INTERVAL": "100ms"})
    async with App(database, settings=settings) as app, probed(app) as (_, asked):
        async with app.pool.connection():
            busy = await answers(lambda: asked("/readyz"), 200, database="no connection of the pool was free")
            assert busy.body["status"] == "degraded"
        await answers(lambda: asked("/readyz"), 200, database="ok")


async def test_a_newer_schema_is_worked_on_until_it_takes_older_code_no_more_and_an_older_one_is_not(
    app: App, conn: Connection
) -> None:
    async with probed(app) as (_, asked):
        await conn.execute(REVISION, ["9999"])
        newer = await answers(lambda: asked("/readyz"), 200, database="the schema is at revision 9999, newer")
        assert newer.body["status"] == "ok"
        await conn.execute("update queue_service.alembic_version set oldest_code = '9998'")
        await answers(
            lambda: asked("/readyz"), 503, database="the schema is at revision 9999, which takes revision 9998"
        )
        await conn.execute("update queue_service.alembic_version set oldest_code = '0013'")
        await conn.execute(REVISION, ["0001"])
        await answers(lambda: asked("/readyz"), 503, database="the schema is at revision 0001, and this version needs")
        await conn.execute("alter table queue_service.alembic_version rename to gone")
        await answers(lambda: asked("/readyz"), 503, database="the schema is at revision None")
        assert (await asked("/livez")).status == 200


async def test_a_server_that_stops_right_after_the_handshake_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = asyncio.Event()

    async def greet_and_say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int.from_bytes(await reader.readexactly(4))
        await reader.readexactly(length - 4)
        # AuthenticationOk, and ReadyForQuery.
        writer.write(b"R\0\0\0\x08\0\0\0\0" + b"Z\0\0\0\x05I")
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    monkeypatch.setattr(session, "DEADLINE", 0.3)
    async with await asyncio.start_server(greet_and_say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(DatabaseUnavailable, match="did not answer within"):
            async with asyncio.timeout(20):
                await connect(f"host=127.0.0.1 port={port} user=me dbname=x sslmode=disable gssencmode=disable")
        await left.wait()


# Notices


async def test_a_worker_that_hears_no_notices_is_ready_and_says_so(
    database: str, server: str, conn: Connection, observe: Observe
) -> None:
    worker = await observe(database)
    await answers(lambda: ask(worker.url, "/readyz"), 200, notices="ok")
    run = "insert into queue_service.runs (queue, task, payload) values ('default', 'double', '{\"n\": 1}')"
    finished = "select count(*) from queue_service.finished_runs"
    # Its connections are open then, all but the one that is cut.
    await conn.execute(run.encode())
    await eventually(lambda: one(conn, f"select ({finished}) = 1"))
    name = await one(conn, "select current_database()")
    cut = (
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = %s and application_name like %s"
    )
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f'alter database "{name}" allow_connections false'.encode())
        admin.execute(cut, [name, "queue_service listener"])
        deaf = await answers(lambda: ask(worker.url, "/readyz"), 200, notices="not heard: runs are found by polling")
        assert deaf.body["status"] == "degraded"
        # And so they are.
        await conn.execute(run.encode())
        await eventually(lambda: one(conn, f"select ({finished}) = 2"))
        admin.execute(f'alter database "{name}" allow_connections true'.encode())
    await answers(lambda: ask(worker.url, "/readyz"), 200, notices="ok")


# Stuck, and stopping


async def test_a_blocked_event_loop_answers_nothing(
    database: str, conn: Connection, observe: Observe, tmp_path: Path
) -> None:
    worker = await observe(database)
    async with App(database) as app:
        await app.enqueue("clog", {"directory": str(tmp_path)})
        await eventually((tmp_path / "started").exists, within=30)
        with pytest.raises(TimeoutError):
            await ask(worker.url, "/livez", timeout=0.5)
        code, said = await asyncio.to_thread(
            refused, database, "probe", "--live", "--url", worker.url, "--timeout", "200ms"
        )
        assert (code, "event loop may be blocked" in said) == (1, True), said
    (tmp_path / "release").touch()
    assert (await worker.says("/livez", 200)).body["status"] == "ok"


async def test_probes_are_answered_again_whatever_has_gone_wrong_in_one(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with probed(app) as (worker, asked):
        with monkeypatch.context() as broken:
            broken.setattr(endpoint, "_head", lambda _answer: 1 / 0)
            for _ in range(3):
                with pytest.raises((OSError, http.client.HTTPException)):
                    await asked("/livez")
        assert (await asked("/readyz")).status == 200
        # And where the whole service fails.
        assert worker._parts is not None
        (service,) = [each for each in worker._parts.services if each.name == "health"]
        with monkeypatch.context() as broken:
            broken.setattr(asyncio, "start_server", lambda *_, **__: 1 / 0)
            assert service.task is not None
            service.task.cancel()
            await eventually(lambda: service.failing_since is not None)

        async def is_answered() -> bool:
            return (await asked("/readyz")).status == 200

        await eventually(is_answered)


async def test_a_claim_loop_that_is_stuck_is_neither_live_nor_ready(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    async with probed(app) as (worker, asked):
        assert (await asked("/livez")).status == 200
        monkeypatch.setattr(health, "STUCK", 0.5)
        assert worker._parts is not None
        claimer, release = worker._parts.claimer, asyncio.Event()
        monkeypatch.setattr(claimer, "_pass", lambda _longest: release.wait())
        stuck = await answers(lambda: asked("/livez"), 503, claiming="the claim loop is stuck")
        assert stuck.body["status"] == "failing"
        assert (await asked("/readyz")).status == 503
        monkeypatch.undo()
        release.set()
        await answers(lambda: asked("/livez"), 200)


async def test_a_worker_that_stops_is_live_and_not_ready_until_its_handlers_have_ended(
    database: str, conn: Connection, observe: Observe, tmp_path: Path
) -> None:
    worker = await observe(database)
    async with App(database) as app:
        await app.enqueue("hold", {"directory": str(tmp_path)})
        await eventually((tmp_path / "started").exists)
    worker.signal(signal.SIGTERM)
    stopping = await worker.says("/readyz", 503)
    assert stopping.checks["claiming"] == "the worker is stopping, and claims nothing more"
    assert (await ask(worker.url, "/livez")).status == 200
    (tmp_path / "release").touch()
    assert await asyncio.to_thread(worker.process.wait, 30) == 0
    with pytest.raises(ConnectionRefusedError):
        await ask(worker.url, "/livez")
    assert await one(conn, "select state from queue_service.finished_runs") == "succeeded"


async def test_a_worker_that_takes_long_to_stop_is_not_stuck(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    @app.task
    async def hold() -> None:
        begun.set()
        await release.wait()

    patient = dataclasses.replace(app.settings, drain_timeout=timedelta(minutes=1))
    async with probed(app, settings=patient) as (worker, asked):
        await app.enqueue("hold", {})
        await begun.wait()
        worker.stop()
        monkeypatch.setattr(health, "STUCK", 0.2)
        assert worker._parts is not None
        claimer = worker._parts.claimer
        await eventually(lambda: claimer.is_stopping)
        await eventually(lambda: time.monotonic() - claimer.last_pass > 1.0)
        assert (await asked("/livez")).status == 200
        assert (await asked("/readyz")).status == 503
        release.set()


# The port


async def test_a_port_that_is_taken_keeps_a_worker_from_starting(app: App, conn: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: Address already in use"):
            await Worker(app, health_port=port).run()
        code, said = await asyncio.to_thread(
            refused, app.conninfo, "worker", "-a", "tests.worker.tasks_for_tests:app", "--health-port", str(port)
        )
    assert (code, "Stop what listens there" in said) == (2, True), said
    assert await rows(conn, "select id from queue_service.workers") == []


async def test_a_worker_may_run_again_on_the_same_port(app: App) -> None:
    async with probed(app) as (worker, asked):
        assert (await asked("/livez")).status == 200
        port = int(str(worker.health_url).rpartition(":")[2])
    again = Worker(app, health_port=port)
    assert (await again.run(once=True)).failed == 0


@pytest.mark.parametrize("port", [-1, 70_000, 1.5, True, "80"])
async def test_ports_that_make_no_sense_are_refused(app: App, port: Any) -> None:
    with pytest.raises(ConfigError, match="health_port"):
        Worker(app, health_port=port)


# Whoever asks


@contextlib.asynccontextmanager
async def answering(**paths: Callable[[], Awaitable[HttpAnswer]]) -> AsyncIterator[Endpoint]:
    open_ = Endpoint("127.0.0.1", 0)
    running = asyncio.create_task(open_.run({f"/{path}": answer for path, answer in paths.items()}))
    yield open_
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    open_.close()


async def fine() -> HttpAnswer:
    return HttpAnswer(HTTPStatus.OK, b"fine")


async def said(open_: Endpoint, request: bytes) -> bytes:
    """All that comes back."""
    reader, writer = await asyncio.open_connection(*open_.url.removeprefix("http://").split(":"))
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /fine HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"GET /fine HTTP/1.0\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"GET /fine?a=1 HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK"),
        (b"POST /fine HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 405 Method Not Allowed"),
        (b"GET /other HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 Not Found"),
        (b"GET /fine\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"\xff\xfe\x00 \r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET /fine HTTP/2.0\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
        (b"GET /fine HTTP/1.1\r\n" + b"X: " + b"y" * 20_000, b"HTTP/1.1 431 Request Header Fields Too Large"),
        (b"", b""),
    ],
)
async def test_what_is_asked_is_answered_once_and_the_connection_closed(
    request_: bytes, status: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "CONNECTION_SECONDS", 1.0)
    async with answering(fine=fine) as open_:
        answer = await said(open_, request_)
    assert answer.partition(b"\r\n")[0] == status
    assert (b"Connection: close" in answer) == bool(status)


async def test_connections_that_say_nothing_keep_no_probe_out_and_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with answering(fine=fine) as open_:
        silent = [asyncio.create_task(said(open_, b"GET /fi")) for _ in range(endpoint.MAX_CONNECTIONS + 20)]
        await eventually(lambda: sum(each.done() for each in silent) >= 20)
        for _ in range(5):
            assert (await ask(open_.url, "/fine")).status == 200
        monkeypatch.setattr(endpoint, "CONNECTION_SECONDS", 0.2)
        assert await said(open_, b"GET /fi") == b""
        assert not all(each.done() for each in silent)
    for each in silent:
        with contextlib.suppress(ConnectionError):
            assert await each == b""


async def test_an_answer_that_breaks_is_logged_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> HttpAnswer:
        raise KeyError("a mistake")

    async with answering(fine=fine, broken=broken) as open_:
        assert (await ask(open_.url, "/broken")).status == 500
        assert (await ask(open_.url, "/fine")).status == 200
    assert [record.getMessage() for record in caplog.records] == ["a probe could not be answered"]


# queue-service probe


async def test_probe_says_what_the_worker_says(database: str, observe: Observe) -> None:
    worker = await observe(database)
    await answers(lambda: ask(worker.url, "/readyz"), 200, notices="ok")
    port = worker.url.rpartition(":")[2]

    def probe(*arguments: str, **env: str) -> tuple[int, str]:
        return refused("postgresql://127.0.0.1:1/nowhere", "probe", *arguments, **env)

    assert await asyncio.to_thread(probe, "--port", port) == (0, f"ready: {worker.url}/readyz says ok\n")
    assert await asyncio.to_thread(probe, "--live", QUEUE_SERVICE_HEALTH_PORT=port) == (
        0, f"live: {worker.url}/livez says ok\n",
    )  # fmt: skip
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(REVISION, ["0001"])
    await worker.says("/readyz", 503)
    code, line = await asyncio.to_thread(probe, "--url", f"{worker.url}/")
    assert code == 1
    assert line == (
        f"Error: not ready: {worker.url}/readyz answered 503: database: the schema is at revision 0001, and this version "
        f"needs {revision.OLDEST}\n"
    )
    code, shown = await asyncio.to_thread(probe, "--json", "--port", port)
    assert (code, '"status": 503' in shown, '"ok": false' in shown) == (1, True, True)


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        ([], 2, "Which worker?"),
        (["--ready", "--live", "--port", "1"], 2, "one thing at a time"),
        (["--url", "https://127.0.0.1"], 2, "plain HTTP"),
        (["--url", "127.0.0.1:80"], 2, "http://HOST:PORT"),
        (["--url", "http://127.0.0.1:x"], 2, "http://HOST:PORT"),
        (["--port", "1"], 1, "is not listened to"),
        (["--url", "http://host.invalid"], 1, "could not be asked"),
    ],
)
def test_probe_that_cannot_ask_says_why(arguments: list[str], code: int, why: str) -> None:
    found, said = refused("postgresql://127.0.0.1:1/nowhere", "probe", *arguments)
    assert (found, why in said) == (code, True), said
    assert len(said.splitlines()) == 1


async def test_probe_takes_nothing_for_well_that_is_not_a_worker() -> None:
    async with answering(readyz=fine) as open_:
        code, line = await asyncio.to_thread(refused, "", "probe", "--url", open_.url)
    assert code == 1
    assert "answered 200, and nothing that a worker says" in line
    assert http.client.responses[200] == "OK"
