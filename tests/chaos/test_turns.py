"""Agents, workers and sweepers are killed and frozen under load: every turn gets one ending, and its stream no gap."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from queue_service import App, Event, Run, Supervisors, Turn
from queue_service.db.execute import Connection
from queue_service.errors import DatabaseUnavailable
from queue_service.supervisor.child import Conversation, serve
from tests.support import eventually, one, rows

TURNS = int(os.environ.get("QUEUE_SERVICE_CHAOS_TURNS", "200"))
# Any worker may claim a turn of any deployment, and one of them at a time has its agent.
WORKERS, DEPLOYMENTS, STREAMS, SWEEPERS = 3, 6, 12, 2
AT_ONCE = 40
ADMISSION, EXECUTION = 15.0, 4.0
BETWEEN_FAULTS = 0.4

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(120 + TURNS // 4)]

app = App(os.environ.get("QUEUE_SERVICE_DATABASE_URL", "postgresql:///unused"))
supervisors = Supervisors(app, [sys.executable, "-m", "tests.chaos.test_turns", "agent"])


# In the workers


@app.task(queue="agents")
async def agent_turn(run: Run) -> Any:
    return await supervisors.take(run, {})


# In the agents


async def _answer(conversation: Conversation) -> Mapping[str, Any]:
    for number in range(random.randint(0, 5)):
        await conversation.event("delta", {"of": conversation.turn.message_id, "n": number})
        await asyncio.sleep(random.uniform(0, 0.2))  # the work of the agent
    return {"text": "done"}


# In the sweepers


async def _sweep() -> None:
    async with app:
        while True:
            with contextlib.suppress(DatabaseUnavailable):
                await app.turns.sweep()
            await asyncio.sleep(0.1)  # the pace of a sweeper, which is what is killed


# In the test


class Processes:
    """Workers and sweepers, each replaced when it is killed, and the agents that the workers started."""

    def __init__(self, database: str, dice: random.Random) -> None:
        self._database = database
        self._dice = dice
        self.faults: Counter[str] = Counter()
        self._workers = [self._worker(number) for number in range(WORKERS)]
        self._sweepers = [self._sweeper() for _ in range(SWEEPERS)]

    def disturb(self) -> None:
        match self._dice.choices(["agent", "worker", "sweeper"], [8, 1, 1])[0]:
            case "agent":
                if agents := self._agents():
                    self._hit(self._dice.choice(agents), "agent")
            case "worker":
                number = self._dice.randrange(WORKERS)
                if self._hit(self._workers[number], "worker"):
                    self._workers[number].wait()
                    self._workers[number] = self._worker(number)
            case _:
                number = self._dice.randrange(SWEEPERS)
                if self._hit(self._sweepers[number], "sweeper"):
                    self._sweepers[number].wait()
                    self._sweepers[number] = self._sweeper()

    def end(self) -> None:
        for process in (*self._agents(), *self._workers, *self._sweepers):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in (*self._workers, *self._sweepers):
            process.wait()

    def _hit(self, victim: Any, name: str) -> bool:
        """Kill it or freeze it for a while. True: it was killed."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._dice.random() < 0.6:
                victim.kill()
                self.faults[f"{name}s killed"] += 1
                return True
            victim.send_signal(signal.SIGSTOP)
            asyncio.get_running_loop().call_later(self._dice.uniform(0.2, 3.0), _thaw, victim)
            self.faults[f"{name}s frozen"] += 1
        return False

    def _agents(self) -> list[Any]:
        found = []
        for worker in self._workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(worker.pid).children()
        return found

    def _worker(self, number: int) -> subprocess.Popen[bytes]:
        paces = ["--lease", "3s", "--poll-interval", "100ms", "--sweep-interval", "200ms", "--max-losses", "100"]
        command = [
            "-m",
            "queue_service",
            "worker",
            "-a",
            "tests.chaos.test_turns:app",
            "-q",
            "agents:20",
            "--name",
            f"worker {number}",
        ]
        return self._started([*command, *paces, "--database-url", self._database, "--log-level", "error"])

    def _sweeper(self) -> subprocess.Popen[bytes]:
        return self._started(["-m", "tests.chaos.test_turns", "sweep"])

    def _started(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        env = {**os.environ, "QUEUE_SERVICE_DATABASE_URL": self._database}
        return subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL, env=env)


def _thaw(victim: Any) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        victim.send_signal(signal.SIGCONT)


async def _followed(client: App, stream: str, endings: int) -> list[Event]:
    """All that a follower sees up to the last ending."""
    seen: list[Event] = []
    async for event in client.events.follow(stream):
        seen.append(event)
        endings -= event.terminal
        if not endings:
            break
    return seen


async def _dispatched(client: App, number: int, slots: asyncio.Semaphore) -> None:
    at = number % STREAMS
    turn = Turn(deployment=f"d{at % DEPLOYMENTS}", message_id=f"m{number}", stream=f"s{at}")
    async with slots:
        await client.turns.dispatch(turn, "agent_turn", {}, max_attempts=100, admission=ADMISSION, execution=EXECUTION)
        await eventually(lambda: client.turns.outcome(turn.deployment, turn.message_id), within=60)


async def test_every_turn_gets_one_ending_whatever_is_killed(database: str, conn: Connection) -> None:
    seed = random.SystemRandom().randrange(10**6)
    dice = random.Random(seed)
    begun = time.monotonic()
    processes = Processes(database, dice)
    client = App(database)
    client.task(queue="agents")(agent_turn.function)
    try:
        async with client, asyncio.TaskGroup() as group:
            share = Counter(number % STREAMS for number in range(TURNS))
            followers = [group.create_task(_followed(client, f"s{at}", share[at])) for at in sorted(share)]
            slots = asyncio.Semaphore(AT_ONCE)
            turns = [group.create_task(_dispatched(client, number, slots)) for number in range(TURNS)]
            while not all(turn.done() for turn in turns):
                processes.disturb()
                await asyncio.wait(turns, timeout=BETWEEN_FAULTS)
    finally:
        processes.end()

    outcomes = await rows(conn, "select message_id, stream, seq, kind, code from queue_service.turn_outcomes")
    ended = Counter(kind if code is None else code for *_, kind, code in outcomes)
    terminal = [
        (e.body["message_ids"], e.stream, e.seq, e.kind) for each in followers for e in each.result() if e.terminal
    ]
    print(  # noqa: T201 - the counts are what this is about
        f"\nseed {seed} | turns {TURNS} | {dict(processes.faults)} | endings {dict(ended)} | "
        f"events {sum(len(each.result()) for each in followers)} | {time.monotonic() - begun:.1f} s"
    )
    assert len(outcomes) == len(terminal) == TURNS
    assert sorted(terminal) == sorted(
        ([message_id], stream, seq, kind) for message_id, stream, seq, kind, _ in outcomes
    )
    assert await one(conn, "select count(*) from queue_service.events where terminal") == TURNS
    assert await one(conn, "select count(*) from queue_service.turn_markers") == 0
    for each in followers:
        assert [event.seq for event in each.result()] == list(range(1, len(each.result()) + 1))
    assert set(ended) <= {"reply", "worker_died", "worker_startup_failed", "worker_unresponsive"}
    # The faults hit turns, and not all of them.
    assert 0 < ended["reply"] < TURNS


if __name__ == "__main__":
    asyncio.run(serve(_answer, beat=0.3) if sys.argv[1] == "agent" else _sweep())
