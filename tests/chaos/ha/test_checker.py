"""The checker finds what it is for: each of these puts a fault of its own into this process, or into what is stored."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from queue_service import App, Run
from queue_service.db import embedded, execute
from queue_service.db.execute import Connection
from queue_service.db.hangup import HangUp
from queue_service.runs.sql import SQL
from queue_service.settings import load
from queue_service.testing import databases
from tests.chaos.ha import tasks
from tests.chaos.ha.checker import check
from tests.chaos.ha.ledger import Ledger, entries
from tests.chaos.ha.load import HELD, Client
from tests.servers.pair import Pair, made_pair, running_pair
from tests.support import eventually, lapse, one, quick_app, working

pytestmark = [pytest.mark.chaos, pytest.mark.direct("the checker looks at the server itself")]

DEADLINE = 1.0


@pytest.fixture
def ledgers(tmp_path: Path) -> Path:
    (tmp_path / "ledgers").mkdir()
    return tmp_path / "ledgers"


@asynccontextmanager
async def calling(database: str, ledgers: Path) -> AsyncIterator[Client]:
    """A client in this process, which does what it is asked to."""
    with closing(Ledger(ledgers / "client.ledger")) as book:
        book.write("begun", name="client")
        async with quick_app(database) as app:
            client = Client(app, "client", "default", book)
            yield client
            client.is_over = True
            await client.call(0)
        book.write("ended", name="client")


@contextmanager
def worker(database: str) -> Iterator[None]:
    """In a process of its own, as in the suite."""
    paces = ["--lease", "3s", "--poll-interval", "100ms", "--sweep-interval", "100ms"]
    queues = ["-q", "default:4", "-q", f"{HELD}:4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "queue_service", "worker", "-a", "tests.chaos.ha.tasks:app", *queues, *paces],
        env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait()


def words(ledgers: Path, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in entries(ledgers) if entry["kind"] == kind]


async def play(database: str, ledgers: Path) -> None:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as conn:
        await conn.execute(tasks.EFFECTS.encode())
        async with calling(database, ledgers) as client:
            with worker(database):
                for kind in ("effect", "many", "held", "turn"):
                    await getattr(client, kind)(f"the {kind}")
                await client.turn("the other turn")
                left = "(select count(*) from queue_service.runs) + (select count(*) from queue_service.turn_markers)"
                await eventually(lambda: one(conn, f"select {left} = 0"), within=60)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def story(server: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The name of a database in which all has gone well, and what clients were told: one call of each kind, and two turns."""
    ledgers = tmp_path_factory.mktemp("story")
    with databases.made(server, template) as conninfo:
        asyncio.run(play(conninfo, ledgers))
        yield str(conninfo_to_dict(conninfo)["dbname"]), ledgers


@pytest.fixture
def played(server: str, story: tuple[str, Path], ledgers: Path) -> Iterator[str]:
    """A copy of it, of which `ledgers` says what clients were told."""
    name, told = story
    shutil.copytree(told, ledgers, dirs_exist_ok=True)
    with databases.made(server, name) as conninfo:
        yield conninfo


def test_where_all_has_gone_well_it_finds_nothing(played: str, ledgers: Path) -> None:
    verdict = check(ledgers, played)
    assert verdict.is_clean, verdict
    assert verdict.counts == {"acknowledged": 7, "stored": 7, "effects": 2, "turns": 2, "told": 2, "refused": 0}


_RUN = "from queue_service.finished_runs where payload ->> 'uid' = 'the held'"
_COPY = f"""
create temporary table copied as select * {_RUN};
update copied set id = id + 1000;
insert into queue_service.finished_runs select * from copied
"""
_UNHEARD = """
create temporary table copied as select * from queue_service.finished_runs where payload ->> 'uid' = 'the turn';
update copied set id = id + 1000, payload = '{"uid": "nobody heard of it"}';
insert into queue_service.finished_runs select * from copied
"""
_END_AGAIN = """
with next as (update queue_service.streams set head = head + 1 where stream = 'stream the turn' returning head)
insert into queue_service.events (stream, seq, kind, terminal, body)
select 'stream the turn', head, 'error', true, '{"code": "worker_died"}' from next
"""
TAMPERED = {
    "a run that is gone": (f"delete {_RUN}", "lost"),
    "a turn's run that is gone": (_RUN.replace("the held", "the turn").join(["delete ", ""]), "lost"),
    "a run under another id than its client was given": (
        f"update queue_service.finished_runs set id = id + 1000 {_RUN[_RUN.index('where') :]}",
        "lost",
    ),
    "an effect that is gone": ("delete from ha_effects where name = 'ending'", "lost"),
    "a step that is gone": ("delete from ha_effects where name = 'step'", "lost"),
    "a run that is there twice": (_COPY, "doubled"),
    "the id of a run that has ended is in use": (
        f"insert into queue_service.runs (id, queue, task, payload) select id, queue, task, '{{}}' {_RUN}",
        "doubled",
    ),
    "an effect that counts twice": ("insert into ha_effects select * from ha_effects where name = 'step'", "doubled"),
    "an effect of no run": ("insert into ha_effects values ('nobody', 'ending', 1, 1)", "doubled"),
    "a second ending": (_END_AGAIN, "endings"),
    "no ending": ("delete from queue_service.events where stream = 'stream the turn' and terminal", "endings"),
    "no ending of a turn that was stored and not acknowledged": (_UNHEARD, "endings"),
    "another ending": (
        "update queue_service.events set body = '{\"text\": \"no\"}' where stream = 'stream the turn' and terminal",
        "endings",
    ),
    "another outcome": (
        "update queue_service.turn_outcomes set kind = 'error', code = 'timeout' where message_id = 'the turn'",
        "endings",
    ),
    "a gap in a stream": ("delete from queue_service.events where stream = 'stream the turn' and seq = 1", "endings"),
    "a run that failed": (
        f"update queue_service.finished_runs set state = 'failed' {_RUN[_RUN.index('where') :]}",
        "odd",
    ),
    "a run that has not ended": (
        "insert into queue_service.runs (queue, task, payload) values ('q', 't', '{}')",
        "odd",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_it_finds(what: str, played: str, ledgers: Path) -> None:
    done, kind = TAMPERED[what]
    with psycopg.connect(played, autocommit=True) as conn:
        conn.execute(done.encode())
    verdict = check(ledgers, played)
    assert getattr(verdict, kind), verdict


@pytest.mark.parametrize("what", ["a waiter who was told nothing", "a waiter who was told something else"])
def test_it_finds_in_what_clients_were_told(what: str, played: str, ledgers: Path) -> None:
    path = ledgers / "client.ledger"
    told = next(line for line in path.read_text().splitlines(keepends=True) if '"told"' in line and "the turn" in line)
    other = "" if what.endswith("nothing") else told.replace('"text": "the turn"', '"text": "no"')
    path.write_text(path.read_text().replace(told, other))
    assert check(ledgers, played).endings


def test_it_finds_a_client_that_died_and_an_error_that_is_no_outage(played: str, ledgers: Path) -> None:
    book = Ledger(ledgers / "other.ledger")
    book.write("begun", name="other")
    book.write("odd", why="KeyError: 1")
    book.close()
    assert check(ledgers, played).odd == ["KeyError: 1", "client other did not end"]


# The three faults


@pytest.fixture
def pair() -> Iterator[Pair]:
    with made_pair(embedded.programs()) as made, running_pair(made, embedded.programs()) as running:
        yield running


@pytest.mark.parametrize("cancels", [False, True], ids=["as it is", "cancel on deadline"])
async def test_a_client_that_cancels_what_waits_for_the_standby_is_found(
    pair: Pair, ledgers: Path, monkeypatch: pytest.MonkeyPatch, cancels: bool
) -> None:
    """It has the server end the commit's wait at its deadline, and believes what a repeat is answered."""

    def hang_up(conn: Any, _seconds: float, *, may_cancel: bool) -> HangUp:
        return HangUp(conn, DEADLINE, may_cancel=cancels or may_cancel)

    with psycopg.connect(pair.primary.conninfo, autocommit=True) as conn:
        conn.execute(tasks.EFFECTS.encode())
    async with calling(pair.conninfo, ledgers) as client:
        await client.held("before")
        monkeypatch.setattr(execute, "HangUp", hang_up)
        pair.stall()
        calling_on = asyncio.create_task(client.held("meanwhile"))
        if cancels:
            await asyncio.wait_for(calling_on, 60)
        else:
            await eventually(lambda: len(words(ledgers, "refused")) >= 3, within=60)
            assert not calling_on.done()
        await asyncio.to_thread(pair.fail_over)
        await asyncio.wait_for(calling_on, 60)
    verdict = check(ledgers, pair.primary.conninfo)
    assert verdict.lost == (["run meanwhile is not there"] if cancels else [])
    assert verdict.doubled == []


@pytest.mark.parametrize("fenced", [True, False], ids=["as it is", "a fence dropped"])
async def test_a_worker_whose_fence_was_dropped_is_found(
    database: str, conn: Connection, ledgers: Path, monkeypatch: pytest.MonkeyPatch, fenced: bool
) -> None:
    """It stalls in the transaction that ends its run, loses the run, and goes on: it takes its claim for held."""
    await conn.execute(tasks.EFFECTS)
    begun, go_on = asyncio.Event(), asyncio.Event()
    # It would notice by itself, much later.
    app = App(database, settings=load({"QUEUE_SERVICE_LEASE": "1h", "QUEUE_SERVICE_SWEEP_INTERVAL": "1h"}))

    @app.task
    async def effect(run: Run, uid: str) -> None:
        async with run.transaction() as lent:
            await lent.execute(tasks.LEAVE, [uid, "ending", run.id, run.attempt])
            begun.set()
            await go_on.wait()

    # With one slot, which is taken: it does not claim the run again.
    async with app, calling(database, ledgers) as client, working(app, {"default": 1}):
        await client.effect("run")
        await asyncio.wait_for(begun.wait(), 60)
        await lapse(conn)
        with worker(database):
            await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"), within=60)
        if not fenced:
            monkeypatch.setitem(SQL.texts, "finish", unfenced(SQL.texts["finish"]))
        go_on.set()
    verdict = check(ledgers, database)
    assert verdict.doubled == ([] if fenced else ["the ending of run run counts 2 times"])
    assert verdict.lost == []


def unfenced(finish: str) -> str:
    """The statement, with the answer that every claim was still held."""
    head, insert, tail = finish.rpartition("insert into queue_service.finished_runs")
    every = "select held.id, held.attempt from unnest(%(ids)s::bigint[], %(attempts)s::integer[]) as held (id, attempt)"
    return f"{head.rstrip()}, stored as ({insert}{tail}) {every}"


@pytest.mark.parametrize("twice", [False, True], ids=["as it is", "an ending written twice"])
async def test_a_worker_that_writes_an_ending_twice_is_found(
    database: str, conn: Connection, ledgers: Path, twice: bool
) -> None:
    """It does not ask whether the turn is still owed one."""
    await conn.execute(tasks.EFFECTS)
    app = quick_app(database)

    @app.task
    async def answer(run: Run, uid: str) -> None:
        assert run.turn is not None
        for _ in range(2):
            if not await app.turns.commit_reply(run.turn.deployment, [uid], {"text": uid}) and twice:
                await conn.execute(_END_AGAIN.replace("the turn", uid))

    async with app, calling(database, ledgers) as client, working(app):
        await client.turn("turn")
        await eventually(lambda: words(ledgers, "told"), within=60)
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"), within=60)
    verdict = check(ledgers, database)
    assert verdict.endings[:1] == (["turn turn has 2 endings in its stream"] if twice else [])
