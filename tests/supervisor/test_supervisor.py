"""Real children under real signals: turns end with the child that died, and with no other."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import uvloop

from queue_service import App, Event, Outcome, Turn
from queue_service.db import channels
from queue_service.db.cluster import Cluster
from queue_service.db.execute import Connection, fetch
from queue_service.db.session import connect
from queue_service.errors import ConfigError, DeploymentDown
from queue_service.piped_process import PipedProcess
from queue_service.settings import load
from queue_service.supervisor import Supervisor, process, supervisor
from queue_service.turns import queries
from tests.support import eventually, is_heard, one, rows

CHILD = [sys.executable, str(Path(__file__).with_name("child_for_tests.py"))]
OVERDUE = "update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 minute'"
BODIES = "select kind, body from queue_service.events where stream = 's' order by seq"


def turn(message_id: str = "m", stream: str = "s") -> Turn:
    return Turn(deployment="d", message_id=message_id, stream=stream)


async def armed(app: App, message_id: str = "m", stream: str = "s", **deadlines: float) -> Turn:
    made = turn(message_id, stream)
    await app.turns.arm(made, **deadlines)
    return made


async def given(app: App, child: Supervisor, *steps: list[Any], message_id: str = "m") -> Turn:
    made = await armed(app, message_id)
    await child.send(made, list(steps))
    return made


async def ending(app: App, message_id: str = "m") -> Outcome:
    return await app.turns.wait("d", message_id, timeout=20)


def process_of(child: Supervisor) -> process.ChildProcess:
    assert child._child is not None
    return child._child


async def kinds(conn: Connection) -> list[str]:
    return [kind for kind, _ in await rows(conn, BODIES)]


# A turn that goes well


async def test_what_a_child_says_is_stored_in_the_order_it_was_said(app: App, conn: Connection) -> None:
    steps = [["delta", n] for n in range(300)]
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, *steps, ["reply", {"text": "done"}])
        outcome = await ending(app)
    assert outcome.kind == "reply"
    stored = await rows(conn, BODIES)
    assert [body for kind, body in stored if kind == "delta"] == list(range(300))
    assert stored[-1][1]["text"] == "done"


async def test_a_reply_may_end_several_turns_of_several_streams(app: App) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        for name in ("m1", "m2"):
            await child.send(await armed(app, name, f"stream of {name}"), [])
        reply = {"type": "reply", "message_ids": ["m1", "m2"], "body": {"text": "both"}}
        await given(app, child, ["say", reply], message_id="m3")
        assert [(await ending(app, name)).kind for name in ("m1", "m2")] == ["reply", "reply"]
        assert await app.turns.is_live("d", "m3")


async def test_a_child_may_fail_a_turn_with_a_code_and_an_unknown_code_ends_it_too(app: App) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        for name, code in [("m1", "provider_overloaded"), ("m2", "nonsense")]:
            line = {"type": "fail", "message_id": name, "code": code, "message": "Busy."}
            await given(app, child, ["say", line], message_id=name)
        outcomes = [await ending(app, name) for name in ("m1", "m2")]
    assert [(outcome.code, outcome.message) for outcome in outcomes] == [
        ("provider_overloaded", "Busy."),
        ("internal_error", "Busy."),
    ]


async def test_a_reply_that_is_not_quite_json_ends_its_turn(app: App) -> None:
    text = '{"type":"reply","message_ids":["m"],"body":{"lone":"\\ud83d","number":NaN}}\n'
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, ["write", text])
        outcome = await ending(app)
    assert outcome.kind == "reply"
    assert outcome.body is not None
    assert outcome.body["lone"] == "\ufffd"


async def test_events_of_some_kinds_are_delivered_too_and_one_that_cannot_be_holds_up_nothing(app: App) -> None:
    sent: list[tuple[str, str, int]] = []

    async def deliver(to: Turn, event: Event) -> None:
        sent.append((to.message_id, event.kind, event.seq))
        if event.body == "broken":
            raise RuntimeError("on purpose")

    async with Supervisor(app, "d", CHILD, deliver=deliver, grace=0.3) as child:
        events = [
            {"type": "event", "message_id": "m", "kind": kind, "body": body}
            for kind, body in [("delta", "x"), ("status", "broken"), ("card", {}), ("delta", "y")]
        ]
        await given(app, child, *[["say", event] for event in events], ["reply", {}])
        assert (await ending(app)).seq == 5
    assert sent == [("m", "status", 2), ("m", "card", 3)]


# A child that ends by itself


async def test_a_killed_child_ends_the_turns_it_was_given_and_no_others_with_the_signal_in_the_reason(app: App) -> None:
    await armed(app, "waits")
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, message_id="m2")
        await given(app, child, ["kill", "SIGKILL"], message_id="m1")
        ended = await child.wait()
        outcomes = [await ending(app, name) for name in ("m1", "m2")]
    assert (ended.reason, ended.deliberate, sorted(ended.message_ids)) == ("killed by SIGKILL", False, ["m1", "m2"])
    assert {outcome.code for outcome in outcomes} == {"worker_died"}
    assert {(outcome.body or {})["reason"] for outcome in outcomes} == {"killed by SIGKILL"}
    assert await app.turns.is_live("d", "waits")


async def test_a_kill_reaches_the_waiter_within_moments(database: str) -> None:
    taken = []
    # By looking again the waiter would find out in an hour.
    app = App(database, settings=load({f"QUEUE_SERVICE_{name}_INTERVAL": "1h" for name in ("POLL", "SWEEP")}))
    for number in range(20):
        async with app, Supervisor(app, "d", CHILD, grace=0.3) as child:
            await given(app, child, ["delta", "begun"], message_id=f"m{number}")
            stored = (
                f"select count(*) = {number * 2 + 1} from queue_service.events"  # its delta, and two of each before
            )
            await eventually(lambda: app.fetch(_scalar(stored)))  # noqa: B023
            waiting = asyncio.create_task(ending(app, f"m{number}"))
            assert child.pid is not None
            await eventually(lambda: is_heard(app, channels.EVENTS))
            begun = time.perf_counter()
            os.kill(child.pid, signal.SIGKILL)
            assert (await waiting).code == "worker_died"
            taken.append(time.perf_counter() - begun)
    print(f"\nkill to ending: p50 {statistics.median(taken) * 1e3:.1f} ms, worst {max(taken) * 1e3:.1f} ms")  # noqa: T201
    assert statistics.median(taken) < 1


def _scalar(sql: str) -> Any:
    from queue_service.db.query import Query, scalar

    return Query(sql, scalar, {})


async def test_an_exit_code_is_reported(app: App) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, ["exit", 3])
        assert (await child.wait()).reason == "exit code 3"
        outcome = await ending(app)
    assert (outcome.code, (outcome.body or {})["reason"]) == ("worker_died", "exit code 3")


async def test_a_child_that_was_never_ready_has_failed_to_start(app: App) -> None:
    async with Supervisor(app, "d", [*CHILD, "mute"], grace=0.3) as child:
        await given(app, child, ["exit", 1])
        await child.wait()
    assert (await ending(app)).code == "worker_startup_failed"


async def test_a_reply_in_the_pipe_wins_over_the_crash_behind_it(app: App) -> None:
    for number in range(10):
        async with Supervisor(app, "d", CHILD, grace=0.3) as child:
            await given(app, child, ["reply", {"n": number}], ["kill", "SIGKILL"], message_id=f"m{number}")
            assert (await child.wait()).message_ids == []
        assert (await ending(app, f"m{number}")).kind == "reply"


async def test_a_process_that_the_child_left_behind_does_not_hide_its_end(app: App) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, ["leave", 30], ["kill", "SIGKILL"])
        assert (await asyncio.wait_for(child.wait(), 25)).message_ids == ["m"]


async def test_turns_of_other_deployments_are_left_alone(app: App) -> None:
    other = Turn(deployment="other", message_id="m", stream="s")
    await app.turns.arm(other)
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, ["exit", 0])
        await child.wait()
    assert await app.turns.is_live("other", "m")


async def test_nothing_is_sent_to_a_child_that_has_ended(app: App) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, ["exit", 0])
        await child.wait()
        late = await armed(app, "late")
        with pytest.raises(DeploymentDown, match="exit code 0"):
            await child.send(late, [])
    assert await app.turns.is_live("d", "late")


# A child that is stopped


@pytest.mark.parametrize("how", [[], ["stubborn"]])
async def test_a_deliberate_stop_ends_no_turn(app: App, conn: Connection, how: list[str]) -> None:
    child = Supervisor(app, "d", [*CHILD, *how], grace=1)
    await child.start()
    await given(app, child, ["delta", "begun"])
    await eventually(lambda: kinds(conn))
    await child.stop()
    ended = await child.wait()
    assert (ended.deliberate, ended.message_ids) == (True, [])
    assert await app.turns.is_live("d", "m")
    assert await kinds(conn) == ["delta"]


async def test_a_child_that_ignores_the_stop_is_killed_after_its_grace_and_ends_no_turn(
    app: App, conn: Connection
) -> None:
    child = Supervisor(app, "d", [*CHILD, '[["ignore", "SIGTERM"]]', "stubborn"], grace=2)
    await child.start()
    await given(app, child, ["delta", "begun"])
    await eventually(lambda: kinds(conn))
    begun = time.monotonic()
    await child.stop()
    assert 2 <= time.monotonic() - begun < 20
    assert (await child.wait()).reason == "killed by SIGKILL"
    assert await app.turns.is_live("d", "m")


async def test_a_failing_kill_after_the_spawn_neither_clears_the_mark_nor_signals(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Supervisor(app, "d", [*CHILD, "stubborn"], grace=0.3)
    await child.start()
    await given(app, child)
    pid = child.pid
    assert pid is not None

    def refuse(self: Any, number: int) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patched:
        patched.setattr(PipedProcess, "signal", refuse)
        stopping = asyncio.create_task(child.stop())
        await eventually(lambda: process_of(child).is_stopping)
        assert await app.turns.is_live("d", "m")
        # It ends in its own time, as a crash would look, and it still was meant.
        os.kill(pid, signal.SIGKILL)
        await stopping
    assert (await child.wait()).deliberate
    assert await app.turns.is_live("d", "m")


async def test_a_failing_kill_of_a_running_child_signals_nothing(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child)

        def refuse(self: Any, number: int) -> None:
            raise PermissionError("not yours")

        with monkeypatch.context() as patched:
            patched.setattr(PipedProcess, "signal", refuse)
            process_of(child)._signal(signal.SIGTERM)
        assert not process_of(child).is_stopping
        await given(app, child, ["reply", {}], message_id="next")
        assert (await ending(app, "next")).kind == "reply"
        assert await app.turns.is_live("d", "m")


# A child that cannot be started


@pytest.mark.parametrize("command", [["/nonexistent/agent"], ["/etc/hostname"], ["/"], ["a\x00b"]])
async def test_a_spawn_error_ends_no_turn_says_what_to_do_and_lets_the_deployment_go(
    app: App, conn: Connection, command: list[str]
) -> None:
    await armed(app)
    child = Supervisor(app, "d", command)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"could not be started: .* Check that"):
            await child.start()
    assert await rows(conn, "select * from queue_service.deployments") == []
    assert await app.turns.is_live("d", "m")
    with pytest.raises(DeploymentDown):
        await child.send(turn(), [])
    await child.stop()


async def test_a_command_that_is_one_text_is_refused(app: App) -> None:
    with pytest.raises(ConfigError, match="is a list"):
        Supervisor(app, "d", "python agent.py")


# Signs of life


async def test_signs_of_life_extend_the_turns_of_a_child(app: App) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await eventually(lambda: process_of(child).is_ready)
        made = await armed(app, execution=2)
        # Twice as long as the deadline without a beat.
        await child.send(made, [["beat", 40, 0.1], ["reply", {}]])
        assert (await ending(app)).kind == "reply"


async def test_many_signs_of_life_are_few_statements(
    app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    extend = app.turns.extend

    async def counted(deployment: str) -> list[str]:
        calls.append(deployment)
        return await extend(deployment)

    monkeypatch.setattr(app.turns, "extend", counted)
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        begun = time.monotonic()
        await given(app, child, ["beat", 500, 0.002], ["reply", {}])
        await ending(app)
    # One when it was ready, and one after each pause.
    assert 1 <= len(calls) <= 2 + (time.monotonic() - begun) / supervisor.PULSE


async def test_a_failing_extend_is_survived_and_logged(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(deployment: str) -> list[str]:
        raise RuntimeError("no")

    monkeypatch.setattr(app.turns, "extend", broken)
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, ["beat", 10, 0.05], ["reply", {}])
        assert (await ending(app)).kind == "reply"
    assert [record.levelname for record in caplog.records if "sign of life" in record.message] == ["ERROR"]


async def test_a_stopped_process_is_found_unresponsive_by_its_deadline(app: App) -> None:
    child = Supervisor(app, "d", CHILD, grace=0.2)
    await child.start()
    made = await armed(app, execution=0.5)
    await child.send(made, [["delta", "begun"], ["kill", "SIGSTOP"], ["reply", {"text": "too late"}]])
    assert (await ending(app)).code == "worker_unresponsive"
    assert child.pid is not None
    os.kill(child.pid, signal.SIGCONT)
    await child.stop()


async def test_a_withheld_turn_is_not_extended_and_ends_with_the_providers_code(app: App) -> None:
    withhold = {"type": "withhold", "code": "provider_quota_exhausted", "reason": "429"}
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        made = await armed(app, execution=2)
        await child.send(made, [["say", withhold], ["beat", 40, 0.1]])
        outcome = await ending(app)
    assert (outcome.code, (outcome.body or {})["reason"]) == ("provider_quota_exhausted", "429")


async def test_a_turn_sent_while_its_provider_fails_is_withheld_too(app: App, conn: Connection) -> None:
    withheld = "select message_id from queue_service.turn_markers where failure_code = 'provider_overloaded' order by 1"
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, ["say", {"type": "withhold", "code": "provider_overloaded"}], message_id="m1")
        await eventually(lambda: rows(conn, withheld))
        await given(app, child, message_id="m2")
        await eventually(lambda: _equal(rows(conn, withheld), [("m1",), ("m2",)]))
        await given(app, child, ["say", {"type": "restore"}], message_id="m3")
        await eventually(lambda: _equal(rows(conn, withheld), []))


async def _equal(asked: Any, expected: object) -> bool:
    return bool(await asked == expected)


async def test_a_reply_after_the_ending_is_dropped_and_the_child_hears_of_it(
    app: App, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        made = await given(app, child, ["delta", "begun"])
        await eventually(lambda: kinds(conn))
        # In one transaction: what the child said extends the turn, and may do so at any moment.
        async with conn.transaction():
            await conn.execute(OVERDUE)
            await fetch(conn, queries.sweep(limit=1))
        await given(app, child, message_id="after")
        await child.send(made, [["reply", {"text": "late"}]])
        await eventually(lambda: _equal(one(conn, "select body from queue_service.events where kind = 'late'"), ["m"]))
    assert await kinds(conn) == ["delta", "error", "late"]
    assert (await ending(app)).code == "worker_unresponsive"
    assert any("too late" in record.message for record in caplog.records)


# A child that does not keep to the protocol


@pytest.mark.parametrize(
    "line",
    ["hello\n", "\n", "[]\n", "17\n", '{"type":"news"}\n', '{"type":"event"}\n', '{"x":1}\n', '{"type":"beat",\n', "{'a': 1}\n",
     '{"type":"event","message_id":"m","kind":"reply"}\n', '{"type":"withhold","code":"nonsense"}\n',
     '{"type":"event","message_id":"stranger","kind":"delta"}\n', '{"type":[]}\n', "\x80\n", "[" * 5000 + "\n"],
)  # fmt: skip
async def test_a_line_that_means_nothing_is_survived(
    app: App, conn: Connection, caplog: pytest.LogCaptureFixture, line: str
) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, ["write", line], ["reply", {"text": "fine"}])
        assert (await ending(app)).kind == "reply"
    assert await kinds(conn) == ["reply"]


@pytest.mark.parametrize(
    "step",
    [["write", '{"type":"reply","message_ids":"m","body":{}}\n'], ["write", '{"type":"fail"}\n'],
     ["write", '{"type":"reply","message_ids":["m"],\n'], ["flood", 5_000_000]],
)  # fmt: skip
async def test_an_answer_that_cannot_be_read_ends_the_child_with_a_reason(app: App, step: list[Any]) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, step, ["beat", 100, 0.1])
        ended = await asyncio.wait_for(child.wait(), 30)
        outcome = await ending(app)
    assert ended.reason.startswith("it wrote a")
    assert (outcome.code, (outcome.body or {})["reason"]) == ("worker_died", ended.reason)


async def test_payloads_are_not_logged(app: App, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        text = '{"type":"reply","message_ids":["m"],"body":"s3cret", oh\n'
        await given(app, child, ["write", "s3cret\n"], ["write", text])
        await child.wait()
    assert "s3cret" not in caplog.text


# Pipes that are full


async def test_a_stopped_child_with_a_full_pipe_blocks_only_its_own_sender(app: App) -> None:
    child = Supervisor(app, "d", CHILD, grace=0.3)
    await child.start()
    await given(app, child, ["kill", "SIGSTOP"])
    big = await armed(app, "big")
    sending = asyncio.create_task(child.send(big, [["delta", "x" * 4_000_000]]))
    await asyncio.sleep(0)
    async with Supervisor(app, "other", CHILD, grace=0.3) as other:
        healthy = Turn(deployment="other", message_id="m", stream="s")
        await app.turns.arm(healthy)
        await other.send(healthy, [["reply", {}]])
        assert (await app.turns.wait("other", "m", timeout=30)).kind == "reply"
    assert not sending.done()
    begun = time.monotonic()
    await child.stop()
    assert time.monotonic() - begun < 20
    with pytest.raises(DeploymentDown):
        await sending
    assert await app.turns.is_live("d", "big")


async def test_a_talkative_child_is_held_back_while_nothing_can_be_stored_and_loses_nothing(
    app: App, session: Any, conn: Connection
) -> None:
    holder = await session()
    await holder.execute("insert into queue_service.streams (stream) values ('s') on conflict do nothing")
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        async with holder.transaction():
            await holder.execute("select from queue_service.streams where stream = 's' for update")
            await given(app, child, *[["delta", "x" * 100_000]] * 150, ["reply", {}], ["kill", "SIGKILL"])
            await eventually(lambda: process_of(child)._pipes._output.is_paused)
        assert (await ending(app)).kind == "reply"
        assert (await child.wait()).message_ids == []
    assert len(await kinds(conn)) == 151


# A database that is gone


async def test_a_crash_and_a_reply_during_an_outage_are_stored_when_the_database_is_back(
    own_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    paces = {"LEASE": "20s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "100ms"}
    settings = load({f"QUEUE_SERVICE_{name}": value for name, value in paces.items()})
    async with App(own_cluster.conninfo, settings=settings) as app, Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, message_id="lost")
        answered = await armed(app, "answered")
        await asyncio.to_thread(own_cluster.stop)
        await child.send(answered, [["reply", {"text": "said in the dark"}], ["kill", "SIGKILL"]])
        await eventually(lambda: any("did not take" in record.message for record in caplog.records), within=40)
        await asyncio.to_thread(own_cluster.start)
        ended = await asyncio.wait_for(child.wait(), 60)
        conn = await connect(own_cluster.conninfo)
        stored = await rows(conn, "select message_id, kind, code from queue_service.turn_outcomes order by 1")
        await conn.close()
    assert ended.message_ids == ["lost"]
    assert stored == [("answered", "reply", None), ("lost", "error", "worker_died")]


# A supervisor that is gone


def _runs(pid: int) -> bool:
    """An orphan that nobody collects has ended all the same."""
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout  # noqa: S607
    return state.strip() not in {"", "Z"}


SUPERVISING = """
import asyncio, sys
from queue_service import App
from queue_service.supervisor import Supervisor
async def main():
    async with App(sys.argv[1]) as app, Supervisor(app, "d", sys.argv[2:]) as child:
        print(child.pid, flush=True)
        await child.wait()
asyncio.run(main())
"""
AGENT = """
import asyncio
from queue_service.supervisor.child import serve
async def echo(conversation):
    await conversation.event("delta", {"text": "..."})
    print("for standard error")
    if conversation.turn.payload == "raise":
        raise RuntimeError("on purpose")
    if conversation.turn.payload == "linger":
        await asyncio.sleep(0.3)  # the work of its handler
    return {"text": conversation.turn.payload}
asyncio.run(serve(echo, beat=0.05))
"""


@pytest.mark.parametrize("command", [CHILD, [sys.executable, "-c", AGENT]], ids=["stdin", "library"])
async def test_a_child_does_not_outlive_a_killed_supervisor(database: str, command: list[str]) -> None:
    supervising = subprocess.Popen([sys.executable, "-c", SUPERVISING, database, *command], stdout=subprocess.PIPE)  # noqa: ASYNC220
    assert supervising.stdout is not None
    with supervising.stdout as printed:
        pid = int(await asyncio.to_thread(printed.readline))
    assert _runs(pid)
    supervising.kill()
    supervising.wait()
    await eventually(lambda: not _runs(pid), within=30)


async def test_a_cancelled_supervisor_takes_its_child_along_and_ends_no_turn(app: App) -> None:
    child = Supervisor(app, "d", CHILD, grace=0.3)
    await child.start()
    await given(app, child)
    pid, life = child.pid, child._life
    assert pid is not None
    assert life is not None
    life.cancel()
    with pytest.raises(asyncio.CancelledError):
        await life
    # Its end has been waited for: a loop that ended now would leave nothing behind.
    assert not _runs(pid)
    assert process_of(child)._pipes._process.returncode == -signal.SIGTERM
    assert await app.turns.is_live("d", "m")


async def test_whoever_signals_a_child_leaves_its_exit_status_to_whom_waits_for_it(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Supervisor(app, "d", CHILD)
    await child.start()

    def taken(_: subprocess.Popen[bytes]) -> None:
        raise AssertionError("a status that is taken here is missing there")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "poll", taken)
        process_of(child)._pipes.signal(signal.SIGKILL)
        assert (await child.wait()).reason == "killed by SIGKILL"
        with pytest.raises(ProcessLookupError):
            process_of(child)._pipes.signal(signal.SIGKILL)


@pytest.mark.parametrize("again", [False, True], ids=["cancelled once", "cancelled again"])
async def test_a_cancelled_supervisor_lets_go_of_a_child_that_it_cannot_kill(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, again: bool
) -> None:
    child = Supervisor(app, "d", [*CHILD, "stubborn"], grace=0.3)
    await child.start()
    await given(app, child)
    pid, life = child.pid, child._life
    assert pid is not None and life is not None
    refused = asyncio.Event()

    def refuse(self: Any, number: int) -> None:
        refused.set()
        raise PermissionError("not yours")

    monkeypatch.setattr(PipedProcess, "signal", refuse)
    monkeypatch.setattr(process, "EXIT_SECONDS", 3_600.0 if again else 0.01)
    life.cancel()
    await refused.wait()
    if again:
        life.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(life, 20)
    assert [record.__dict__["pid"] for record in caplog.records if "still runs" in record.message] == [pid] * (
        not again
    )
    # Its pipes are closed, and so it ends by itself.
    await eventually(lambda: not _runs(pid))
    assert await app.turns.is_live("d", "m")


# The library's own child


async def test_a_child_in_python_answers_fails_and_stops_in_good_order(app: App, conn: Connection) -> None:
    async with Supervisor(app, "d", [sys.executable, "-c", AGENT]) as child:
        for payload in ("hello", "raise", "linger"):
            await child.send(await armed(app, payload), payload)
        outcomes = [await ending(app, name) for name in ("hello", "raise")]
        # What is under way when it is asked to stop is finished first.
        await child.stop()
        assert (await child.wait()).reason == "exit code 0"
    assert [(outcome.kind, outcome.code) for outcome in outcomes] == [("reply", None), ("error", "internal_error")]
    assert (await ending(app, "linger")).kind == "reply"
    assert "RuntimeError" in json.dumps(outcomes[1].body)


async def test_a_child_that_ends_because_it_was_asked_to_is_not_killed_by_the_signal_that_says_so_too(
    tmp_path: Path,
) -> None:
    program = "\n".join([
        AGENT, "import pathlib, time", "print('over', flush=True)",
        f"while not pathlib.Path({str(tmp_path / 'go_on')!r}).exists(): time.sleep(0.01)",
    ])  # fmt: skip
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin is not None and child.stderr is not None
    child.stdin.write(b'{"type":"stop"}\n')
    assert await child.stderr.readline() == b"over\n"
    child.terminate()
    (tmp_path / "go_on").touch()
    await child.communicate()
    assert child.returncode == 0


def test_a_supervisor_works_on_the_other_event_loop_too(database: str) -> None:
    async def crash() -> str:
        async with App(database) as app, Supervisor(app, "d", CHILD, grace=0.3) as child:
            await given(app, child, ["delta", "x" * 1_000_000], ["kill", "SIGKILL"])
            return (await child.wait()).reason

    async def stop() -> str:
        async with App(database) as app:
            async with Supervisor(app, "d", [sys.executable, "-c", AGENT]) as child:
                await given(app, child, message_id="m2")
                await ending(app, "m2")
            return (await child.wait()).reason

    assert [uvloop.run(each()) for each in (crash, stop)] == ["killed by SIGKILL", "exit code 0"]


# The example


async def test_the_example_holds_its_conversation_and_shows_the_crash(database: str) -> None:
    root = Path(__file__).parents[2]
    finished = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "examples/agent.py"],
        cwd=root, env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "(worker_died, killed by SIGKILL; " in finished.stdout
    assert finished.stdout.rstrip().endswith("reply: You said: Are you back?")
