"""The release before this one is replaced by this one, process by process, under load: real processes of both, through the
migration and back. Nothing that was acknowledged is lost, nothing is done twice that ended, and each turn has one ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest

from queue_service.client import ChatClient, Event
from queue_service.db import phases, revision, schema
from queue_service.db.execute import Connection
from tests.balancer import Balancer
from tests.chaos.test_gateway import serves
from tests.support import eventually, free_port, one, rows
from tests.upgrade.previous import PREVIOUS, installed

HERE = Path(__file__).parent
# Of each kind, by each release for each: so many before the next step.
ENOUGH = 10
SLOTS = 8
QUICK = {"LEASE": "2s", "POLL_INTERVAL": "200ms", "SWEEP_INTERVAL": "300ms", "LOG_LEVEL": "warning"}

Release = Literal["old", "new"]
CODE: dict[Release, str] = {"old": PREVIOUS, "new": revision.HEAD}
CONTRACTS = [step.revision for step in phases.steps(schema._scripts()) if step.is_contract and step.revision > PREVIOUS]

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.direct("what a program that migrates waits for are sessions of the server"),
]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python that has the release before."""
    return installed(tmp_path_factory.mktemp("previous"))


class Fleet:
    """Processes of both releases at one database. What they write is in `directory`."""

    def __init__(self, database: str, old: Path, directory: Path) -> None:
        self.directory = directory
        self.witness = directory / "witness"
        self._python: dict[Release, str] = {"old": str(old), "new": sys.executable}
        self._env = {
            **{name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}},
            **{f"QUEUE_SERVICE_{name}": value for name, value in QUICK.items()},
            "QUEUE_SERVICE_DATABASE_URL": database,
            "WITNESS": str(self.witness),
        }
        self._log = (directory / "log").open("ab")
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, release: Release, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [self._python[release], *arguments], cwd=HERE, env=self._env, stdout=self._log, stderr=self._log
        )
        self._started.append(process)
        return process

    def worker(self, release: Release, name: str) -> subprocess.Popen[bytes]:
        queues = ["-q", f"default:{SLOTS}", "--name", name]
        return self.start(release, "-m", "queue_service", "worker", "-a", "parts:app", *queues)

    def gateway(self, release: Release, port: int) -> subprocess.Popen[bytes]:
        return self.start(release, "-m", "queue_service", "gateway", "--port", str(port), "--no-page")

    def program(self, release: Release) -> subprocess.Popen[bytes]:
        """That only enqueues, and waits for some of it."""
        return self.start(release, "parts.py", release, str(self.directory))

    async def command(self, release: Release, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [self._python[release], "-m", "queue_service", *arguments]

        def call() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                command, cwd=HERE, env=self._env, capture_output=True, text=True, timeout=200, check=False
            )

        return await asyncio.to_thread(call)

    def noted(self, file: str = "witness") -> list[dict[str, Any]]:
        path = self.directory / file
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def done(self) -> Counter[tuple[str, str, str]]:
        """How often code of a revision has done what for whom."""
        return Counter((each["did"], each["by"], each["code"]) for each in self.noted() if "by" in each)

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        self._log.close()


class Person:
    """Of a conversation, behind a balancer that has each request answered by another gateway."""

    def __init__(self, name: str, address: str) -> None:
        self.chat = ChatClient(address, first_pause=0.1)
        self.name = name
        self.seen: list[Event] = []
        self.sent: list[str] = []

    async def listen(self) -> None:
        async for event in self.chat.events():
            self.seen.append(event)

    async def say(self, text: str) -> None:
        """Returns when it was answered."""
        receipt = await self.chat.send("talk", {"text": f"{self.name} says {text}"})
        self.sent.append(receipt.client_message_id)
        await eventually(lambda: receipt.client_message_id in self.answered(), within=60)

    def answered(self) -> Counter[str]:
        return Counter(each for event in self.seen if event.terminal for each in event.body["message_ids"])


@pytest.fixture
def fleet(empty_database: str, old: Path, tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet(empty_database, old, tmp_path)
    try:
        yield running
    finally:
        running.end()
        sys.stdout.write((tmp_path / "log").read_text()[-6_000:])


@pytest.fixture
async def look(empty_database: str) -> AsyncIterator[Connection]:
    """A session of the test's own, of neither release."""
    async with await psycopg.AsyncConnection.connect(empty_database, autocommit=True) as conn:
        yield conn  # type: ignore[misc]


async def joined(look: Connection, *names: str) -> None:
    there = "select count(*) = %s from queue_service.workers where name = any(%s)"
    await eventually(lambda: one(look, there, len(names), list(names)), within=60)


async def at(look: Connection) -> str:
    return str(await one(look, "select version_num from queue_service.alembic_version"))


async def more(fleet: Fleet, *what: tuple[str, str, str]) -> None:
    """Until this was done by such code for such a program, some times more than by now."""
    before = fleet.done()
    await eventually(lambda: all(fleet.done()[each] >= before[each] + ENOUGH for each in what), within=120)


async def killed(fleet: Fleet, look: Connection, victim: subprocess.Popen[bytes]) -> set[int]:
    """Kill this worker, and return what it had in its hands when all of that was given back."""
    gate = fleet.directory / f"gate of {victim.pid}"
    # More than the others have room for.
    await look.execute(
        "insert into queue_service.runs (queue, task, payload) "
        "select 'default', 'hold', jsonb_build_object('gate', %s::text) from generate_series(1, %s)",
        [str(gate), 3 * SLOTS],
    )

    def in_hand() -> set[int]:
        at_gate = [each for each in fleet.noted() if each["did"] == "held" and each["gate"] == str(gate)]
        return {each["run"] for each in at_gate if each["pid"] == victim.pid}

    await eventually(in_hand, within=60)
    victim.kill()
    await asyncio.to_thread(victim.wait)
    gate.touch()
    held = in_hand()
    lost = "select count(*) = %s from queue_service.runs where id = any(%s) and state = 'queued' and losses = 1"
    over = "select count(*) from queue_service.finished_runs where id = any(%s) and losses = 1"

    async def are_given_back() -> bool:
        return bool(await one(look, lost, len(held) - int(await one(look, over, list(held))), list(held)))

    await eventually(are_given_back, within=60)
    return held


async def ended(fleet: Fleet, held: set[int], code: str) -> None:
    """Until code of this revision has ended them."""

    def are_ended() -> bool:
        again = [each for each in fleet.noted() if each["did"] == "held" and each["attempt"] > 1]
        return held <= {each["run"] for each in again if each["code"] == code}

    await eventually(are_ended, within=60)


async def test_a_fleet_is_replaced_process_by_process_through_a_migration_and_back(
    fleet: Fleet, look: Connection
) -> None:
    ports = [free_port(), free_port()]
    assert (await fleet.command("old", "db", "migrate")).returncode == 0
    assert await at(look) == PREVIOUS
    first, second = fleet.worker("old", "old 1"), fleet.worker("old", "old 2")
    fleet.gateway("old", ports[0])
    programs = {"old": fleet.program("old")}
    await joined(look, "old 1", "old 2")
    await eventually(lambda: serves(ports[0]), within=60)
    async with contextlib.AsyncExitStack() as stack:
        balancer = await stack.enter_async_context(Balancer(ports).open())
        people = [Person(name, balancer.address) for name in ("Ada", "Bob")]
        for person in people:
            await stack.enter_async_context(person.chat)
            await person.chat.connect({"talk": 0})
            listening = asyncio.create_task(person.listen())
            stack.callback(listening.cancel)
        await asyncio.gather(*(person.say("hello") for person in people))
        await more(fleet, ("ended", "old", PREVIOUS), ("turn", "old", PREVIOUS))

        await expanded_beside_the_old(fleet, look)
        await asyncio.gather(*(person.say("it is expanded") for person in people))

        third = fleet.worker("new", "new 1")
        fleet.gateway("new", ports[1])
        programs["new"] = fleet.program("new")
        await joined(look, "new 1")
        await eventually(lambda: serves(ports[1]), within=60)
        both = [(did, by, code) for did in ("ended", "turn") for by in CODE for code in CODE.values()]
        await more(fleet, *both)
        await both_gateways_are_asked(balancer, ports, people)

        # What a killed worker of either release had is given back while only workers of the other one live. 0021 begins it
        # again in a process of its own, which does not start on this schema: a new worker does.
        held = await killed(fleet, look, third)
        fleet.worker("new", "new 2")
        fleet.worker("new", "new 3")
        await joined(look, "new 2", "new 3")
        await ended(fleet, held, revision.HEAD)
        (fleet.directory / "stop.old").touch()
        assert await asyncio.to_thread(programs["old"].wait, 120) == 0
        first.terminate()
        assert await asyncio.to_thread(first.wait, 60) == 0
        await ended(fleet, await killed(fleet, look, second), revision.HEAD)

        await replaced_gateway(fleet, ports, people)
        await contracted(fleet, look)
        await more(fleet, ("ended", "new", revision.HEAD), ("turn", "new", revision.HEAD))
        await asyncio.gather(*(person.say("goodbye") for person in people))

        (fleet.directory / "stop").touch()
        assert await asyncio.to_thread(programs["new"].wait, 120) == 0
        await eventually(lambda: nothing_is_left(look), within=60)
        head = await one(look, "select head from queue_service.streams where stream = 'talk'")
        await eventually(lambda: all(of_talk(person)[-1:] == [head] for person in people), within=60)
    await all_is_told_once(fleet, look, people)
    await back_again(fleet, look)


async def expanded_beside_the_old(fleet: Fleet, look: Connection) -> None:
    """The new release migrates as far as the old one goes on, and no further, whatever it is asked."""
    done = await fleet.command("new", "db", "migrate")
    assert done.returncode == 0, done.stderr
    assert await at(look) == revision.OLDEST
    if CONTRACTS:
        refused = await fleet.command("new", "db", "migrate", "--to", "head")
        for said in (done.stderr, refused.stderr):
            assert f"Revision {CONTRACTS[0]} takes away" in said
            assert "worker old 1" in said
            assert "worker old 2" in said
        assert refused.returncode == 2
    current = await fleet.command("new", "db", "current", "--json")
    assert (current.returncode, json.loads(current.stdout)["works"]) == (0, True)
    # Those that are at work go on; those that would start now do not. A newer release goes on and starts.
    late = await fleet.command("old", "worker", "-a", "parts:app", "--once")
    assert late.returncode == 4, late.stderr


async def both_gateways_are_asked(balancer: Balancer, ports: list[int], people: list[Person]) -> None:
    for word in ("one", "two", "three"):
        await asyncio.gather(*(person.say(word) for person in people))
        for person in people:
            # The gateway that is asked is not always the one that has the connection: then it asks the other.
            await person.chat.watch(f"more of {person.name} {word}")
    assert {*balancer.ports("/watch")} == {*ports}


async def replaced_gateway(fleet: Fleet, ports: list[int], people: list[Person]) -> None:
    """The old gateway ends, with its connections, and its clients are at the other one."""
    (old,) = [each for each in fleet._started if "gateway" in each.args and str(ports[0]) in each.args]  # type: ignore[operator]
    old.terminate()
    assert await asyncio.to_thread(old.wait, 60) in {0, -signal.SIGTERM}
    await asyncio.gather(*(person.say("the old gateway is gone") for person in people))


async def contracted(fleet: Fleet, look: Connection) -> None:
    """When the old ones are gone, and nobody takes the killed one for alive any more."""

    async def is_done() -> bool:
        done = await fleet.command("new", "db", "migrate", "--to", "head")
        assert done.returncode == 0 or "old" in done.stderr, done.stderr
        return done.returncode == 0

    await eventually(is_done, within=60)
    assert await at(look) == revision.HEAD


async def nothing_is_left(look: Connection) -> bool:
    live = "select not exists (select from queue_service.runs) and not exists (select from queue_service.turn_markers)"
    return bool(await one(look, live))


def of_talk(person: Person) -> list[int]:
    return [event.seq for event in person.seen if event.stream == "talk"]


async def all_is_told_once(fleet: Fleet, look: Connection, people: list[Person]) -> None:
    acknowledged = [each for by in CODE for each in fleet.noted(f"acknowledged.{by}")]
    ids = [each["run"] for each in acknowledged]
    finished = dict(await rows(look, "select id, state from queue_service.finished_runs"))
    assert len(ids) == len({*ids})
    assert {*ids} - {*finished} == set(), "acknowledged, and lost"
    assert {*finished.values()} == {"succeeded"}
    assert await one(look, "select count(*) = count(distinct id) from queue_service.finished_runs")
    begun = Counter((each["run"], each["attempt"]) for each in fleet.noted() if each["did"] == "begun")
    assert {*begun.values()} == {1}, "a claim was given to two"

    turns = {each["turn"] for each in acknowledged if "turn" in each} | {
        each for person in people for each in person.sent
    }
    outcomes = dict(await rows(look, "select message_id, kind from queue_service.turn_outcomes"))
    endings = dict(
        await rows(
            look,
            "select message_id, count(*) from queue_service.events, jsonb_array_elements_text(body -> 'message_ids') as "
            "message_id where terminal group by 1",
        )
    )
    assert {turn: (outcomes.get(turn), endings.get(turn)) for turn in turns} == dict.fromkeys(turns, ("reply", 1))
    assert {*endings.values()} == {1}
    assert {each["told"] for each in acknowledged if "told" in each} == {"reply"}
    assert {each["wait"] == each["run"] for each in acknowledged if "wait" in each} == {True}
    gaps = "select stream from queue_service.events group by stream having count(*) <> max(seq) or min(seq) <> 1"
    assert await rows(look, gaps) == []
    for person in people:
        assert of_talk(person) == list(range(1, len(of_talk(person)) + 1))
        assert person.answered() >= Counter(person.sent)
        assert {*person.answered().values()} == {1}
    lanes = defaultdict(list)
    for each in fleet.noted():
        if each["did"] == "ended" and each["key"]:
            lanes[each["key"]].append(each["run"])
    assert len(lanes) > 1
    for key, order in lanes.items():
        # What was done, and lost before that was stored, is done again, and no other run of the lane came between.
        assert list(dict.fromkeys(order)) == sorted({*order}), key


async def back_again(fleet: Fleet, look: Connection) -> None:
    """To the old release: nobody is at work, the schema goes back, and the old one works on all that is there."""
    for each in fleet._started:
        each.terminate()
    for each in fleet._started:
        await asyncio.to_thread(each.wait, 60)
    kept = await one(look, "select count(*) from queue_service.finished_runs")
    done = await fleet.command("new", "db", "migrate", "--to", PREVIOUS, "--yes")
    assert done.returncode == 0, done.stderr
    assert await at(look) == PREVIOUS
    assert (await fleet.command("old", "db", "check")).returncode == 0
    assert (await fleet.command("old", "enqueue", "work", json.dumps({"by": "old"}))).returncode == 0
    worked = await fleet.command("old", "worker", "-a", "parts:app", "--once")
    assert worked.returncode == 0, worked.stderr
    assert await one(look, "select count(*) from queue_service.finished_runs") == kept + 1
