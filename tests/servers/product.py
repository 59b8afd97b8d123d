"""All that the product does, on one database, in one pass: what a setting of the server, the role or the database may break."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from click.testing import CliRunner

from queue_service import App, Deliveries, HandedOn, Retry, Run, RunState, Snooze, Turn, Worker
from queue_service.cli import cli
from queue_service.db.execute import Connection
from queue_service.db.session import connect
from queue_service.services.pruner import Pruner
from queue_service.settings import load
from tests.support import one

TEXT = "naïve ☃ 🦀 \\ ' \" {NULL}"
QUICK = {"LEASE": "30s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "1h", "ADMISSION": "90s", "TOTAL": "25h"}
QUEUES = {"default": 20, "thread_response": 5}
NEVER_TAKEN = Turn(deployment="dep-1", message_id="lapsed", stream="conv-2")


class Product:
    """`work` does all there is to do, and `check` says whether it came out right."""

    def __init__(self, conninfo: str, **settings: str) -> None:
        quick = {f"QUEUE_SERVICE_{name}": value for name, value in {**QUICK, **settings}.items()}
        self._settings = settings
        self._conninfo = conninfo
        self.app = App(conninfo, settings=load(quick))
        self.ordered: list[int] = []
        self.shown: list[Any] = []
        self._runs: dict[str, int] = {}
        self._define()

    async def go_through(self) -> None:
        async with self.app:
            await self.work()
            await self.check()
        await asyncio.to_thread(self.command_line)

    def _define(self) -> None:
        app = self.app

        @app.task(retry=Retry(max_attempts=5, base=0))
        async def plain(run: Run, text: str) -> Any:
            if run.attempt == 1:
                raise ValueError(text)
            if run.attempt == 2:
                return Snooze(0)
            run.progress(0.5, text)
            return {"text": await run.step("once", lambda: text), "metadata": run.metadata}

        @app.task(batch=10)
        async def many(runs: list[Run]) -> None:
            assert {run.payload["text"] for run in runs} == {TEXT}

        @app.task()
        async def laned(n: int) -> None:
            self.ordered.append(n)

        @app.task()
        async def answer(run: Run) -> None:
            assert run.turn is not None
            await app.events.append(run.turn.stream, "delta", {"text": TEXT})
            await app.turns.commit_reply("dep-1", [run.turn.message_id], {"text": TEXT})

        @app.task()
        async def hand_on(to: int | None) -> HandedOn:
            return HandedOn("dep-1" if to is None else to)

        self._deliveries = Deliveries(app)
        self._deliveries.register("chat", self)

    async def handle_completion(self, delivery: Any) -> None:
        self.shown.append(delivery.event.body["text"])

    handle_delta = handle_status = handle_error = handle_ephemeral = handle_completion

    async def work(self) -> None:
        app = self.app
        enqueue, dispatch = app.enqueue, app.turns.dispatch
        self._runs["plain"] = await enqueue("plain", {"text": TEXT}, metadata={"text": TEXT}, singleton_key=TEXT)
        self._runs["later"] = await enqueue("laned", {"n": 9}, run_at=datetime(2999, 1, 2, 3, 4, 5, tzinfo=UTC))
        await app.enqueue_many("many", [{"text": TEXT}] * 3, delay=timedelta(0), metadata={"text": TEXT})
        for n in range(3):
            await enqueue("laned", {"n": n}, ordering_key=TEXT, expires_in=timedelta(hours=1))
        await app.queues.limit("default", max_running=50)
        await app.schedules.put("daily", "laned", {"n": 7}, cron="0 9 * * *", misfire="last")
        await app.schedules.put("hourly", "answer", every=timedelta(hours=1), turn=turn("tick", stream="conv-3"))
        await dispatch(turn("m1", stream="conv-1", platform="chat", channel_id="c1"), "answer", {})
        heir = await enqueue("answer", {}, queue="heirs")
        await dispatch(turn("m2", stream="conv-4"), "hand_on", {"to": heir})
        await dispatch(turn("m3", stream="conv-5"), "hand_on", {"to": None})
        await app.turns.send(turn("m4", stream="conv-6"), "answer", {})
        await app.turns.arm(NEVER_TAKEN)
        await app.turns.arm(turn("silent", stream="conv-7"))
        await app.turns.arm(turn("slow", stream="conv-8"))
        await dispatch(turn("queued", stream="conv-9"), "laned", {"n": 1}, queue="none")
        conn = await connect(self._conninfo, application="test")
        try:
            await _backdate(conn)
            await Worker(app, QUEUES).run(once=True)
            await Worker(app, {"heirs": 1}).run(once=True)
            await app.turns.sweep()
            await Pruner(app.pool, retention=timedelta(days=1), retention_failed=timedelta(days=2)).once()
        finally:
            await conn.close()

    async def check(self) -> None:
        await self._check_runs()
        await self._check_turns()
        follower = self.app.events.follow("conv-1")
        followed = [await anext(follower), await anext(follower)]
        await follower.aclose()
        assert [event.kind for event in followed] == ["delta", "reply"]
        assert followed[0].body == {"text": TEXT}
        assert self.shown == [TEXT]

    async def _check_runs(self) -> None:
        run = await self.app.wait(self._runs["plain"], timeout=10)
        assert (run.state, run.result) == (RunState.SUCCEEDED, {"text": TEXT, "metadata": {"text": TEXT}})
        assert run.unreadable is None
        assert [attempt.attempt for attempt in run.attempts] == [1, 3]
        assert (run.attempts[0].error or {})["message"] == TEXT
        now = datetime.now(UTC)
        for at in (run.created_at, run.run_at, run.finished_at, run.attempts[0].ended_at, run.attempts[1].claimed_at):
            assert at is not None
            assert now - timedelta(minutes=5) < at < now + timedelta(minutes=5)
        later = await self.app.get(self._runs["later"])
        assert later is not None
        assert later.run_at == datetime(2999, 1, 2, 3, 4, 5, tzinfo=UTC)
        assert [n for n in self.ordered if n != 7] == [0, 1, 2]
        assert self.ordered.count(7) == 1
        for name in ("daily", "hourly"):
            schedule = await self.app.schedules.get(name)
            assert schedule is not None
            assert schedule.last_run_id is not None
            fired = await self.app.get(schedule.last_run_id)
            assert fired is not None
            assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", (fired.metadata or {})["slot"])

    async def _check_turns(self) -> None:
        reasons = {}
        for message_id in ("m1", "m2", "m4", "lapsed", "silent", "slow", "queued"):
            ended = await self.app.turns.outcome("dep-1", message_id)
            assert ended is not None, message_id
            reasons[message_id] = (ended.body or {}).get("reason", ended.kind)
        begins = reasons.pop("queued")
        assert reasons == {
            "m1": "reply", "m2": "reply", "m4": "reply", "lapsed": "No worker took it up within 00:01:30.",
            "silent": "No sign of life for 00:01:00.", "slow": "It was not answered within 25:00:00 as a whole.",
        }  # fmt: skip
        assert re.fullmatch(r"It is to begin at 2999-01-02 03:04:05\+00\.", begins), begins
        live = {marker.message_id for marker in await self.app.turns.list()}
        assert live == {"m3"}

    def command_line(self) -> None:
        environment = {f"QUEUE_SERVICE_{name}": value for name, value in self._settings.items()}
        environment["QUEUE_SERVICE_DATABASE_URL"] = self._conninfo
        for arguments in (["runs", "list", "--json"], ["db", "current", "--json"], ["schedules", "list", "--json"]):
            called = CliRunner().invoke(cli, arguments, env=environment)
            assert called.exit_code == 0, called.output
            assert json.loads(called.stdout)


def turn(message_id: str, *, stream: str, platform: str = "api", channel_id: str | None = None) -> Turn:
    return Turn(
        deployment="dep-1", message_id=message_id, stream=stream, platform=platform, channel_id=channel_id,
        metadata={"text": TEXT},
    )  # fmt: skip


async def _backdate(conn: Connection) -> None:
    """Deadlines have passed, slots have come, and what is kept for some time is older than that."""
    await conn.execute(
        "update queue_service.schedules set next_at = next_at - interval '1 day';"
        "update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 second'"
        " where message_id in ('lapsed', 'silent', 'slow', 'queued');"
        "update queue_service.turn_markers set admitted_at = armed_at where message_id = 'silent';"
        "update queue_service.turn_markers set armed_at = now() - interval '25 hours 1 second',"
        " ends_by = now() - interval '1 second' where message_id = 'slow';"
        "update queue_service.runs set run_at = '2999-01-02 03:04:05Z' where queue = 'none';"
        "insert into queue_service.steps (run_id, created_at, attempt, name, result)"
        " select 0, clock_timestamp() - interval '2 days' + n * interval '1 microsecond', 1, n::text, '0'"
        " from generate_series(1, 1500) as n"
    )
    assert await one(conn, "select count(*) from queue_service.steps") == 1500
