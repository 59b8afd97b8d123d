"""What others wrote reaches no terminal as more than text, whichever command shows it."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta

import pytest
from click.testing import CliRunner, Result

from queue_service import App, Run, Turn, TurnFailure, Worker
from queue_service.cli import cli, render
from queue_service.roster import queries as roster
from tests.unit.test_printable import obeyed

EVIL = "\x1b[2J\x1b]0;owned\x07\u202e\u2028\x9b\x7f"


@pytest.fixture
def run_id(database: str) -> int:
    """A failed run, a queue, a worker, a turn and a schedule, all with the name of EVIL."""

    async def make() -> int:
        async with App(database) as app:

            @app.task(name=EVIL, queue=EVIL)
            async def fail(run: Run, text: str) -> None:
                raise ValueError(text)

            await app.schedules.put(EVIL, EVIL, {"text": EVIL}, every=timedelta(hours=1))
            turn = Turn(
                deployment=EVIL, message_id=EVIL, stream=EVIL, platform="api", user_id=EVIL, metadata={"x": EVIL}
            )
            await app.turns.arm(turn)
            await app.turns.arm(Turn(deployment="dep", message_id="ended", stream="s", platform="api"))
            await app.turns.fail("dep", "ended", TurnFailure("rejected", EVIL, EVIL))
            run_id = await app.enqueue(EVIL, {"text": EVIL}, max_attempts=1, metadata={"x": EVIL}, ordering_key=EVIL)
            await app.enqueue(EVIL, {"text": EVIL}, delay=3_600)
            await Worker(app, {EVIL: 1}, name=EVIL).run(once=True)
            # One that has stopped is not in the list any more.
            await app.fetch(roster.join(EVIL, EVIL, "{}"))
            return run_id

    return asyncio.run(make())


COMMANDS = [
    ["runs", "list"], ["runs", "show", "ID"], ["runs", "why", "ID"], ["queues", "list"], ["workers", "list"],
    ["markers", "list"], ["markers", "show", EVIL, EVIL], ["markers", "show", "dep", "ended"], ["schedules", "list"],
    ["schedules", "show", EVIL],
]  # fmt: skip


def call(database: str, *arguments: str) -> Result:
    found = CliRunner().invoke(cli, arguments, env={"QUEUE_SERVICE_DATABASE_URL": database}, prog_name="queue-service")
    assert found.exit_code == 0, found.output
    return found


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_no_command_lets_data_reach_the_terminal(command: list[str], run_id: int, database: str) -> None:
    arguments = [str(run_id) if each == "ID" else each for each in command]
    shown, as_json = call(database, *arguments).output, call(database, *arguments, "--json").stdout
    assert obeyed(shown) | obeyed(as_json) <= {"\n"}
    # It was there to be shown.
    assert r"\x1b]0;owned" in shown
    assert r"\u001b]0;owned" in as_json


def test_json_says_what_is_there(run_id: int, database: str) -> None:
    assert json.loads(call(database, "runs", "show", str(run_id), "--json").stdout)["payload"] == {"text": EVIL}


def test_raw_prints_it_as_it_is(run_id: int, database: str) -> None:
    shown = call(database, "runs", "list", "--raw").stdout
    assert "\x1b[2J" in shown


def test_a_line_break_in_data_makes_no_second_row(database: str) -> None:
    async def make() -> None:
        async with App(database) as app:
            await app.enqueue("noop\n99  faked", {})

    asyncio.run(make())
    assert len(call(database, "runs", "list").stdout.splitlines()) == 2


def test_a_line_break_in_data_makes_no_second_field(database: str) -> None:
    forged = "noop\nstate            succeeded"

    async def make() -> int:
        async with App(database) as app:
            return await app.enqueue(forged, {})

    shown = call(database, "runs", "show", str(asyncio.run(make()))).stdout
    assert [line for line in shown.splitlines() if line.startswith("state ")] == ["state            queued"]
    why = call(database, "runs", "why", "1").stdout
    assert len(why.splitlines()) == 1


@pytest.mark.parametrize("err", [False, True], ids=["stdout", "stderr"])
def test_what_is_printed_as_one_line_is_one_line(err: bool, capsys: pytest.CaptureFixture[str]) -> None:
    render.echo("a\nb\rc\td", err=err)
    assert "".join(capsys.readouterr()) == "a\\nb\\rc\td\n"


def test_an_error_that_quotes_data_is_escaped(database: str) -> None:
    refused = CliRunner().invoke(
        cli, ["schedules", "run", EVIL], env={"QUEUE_SERVICE_DATABASE_URL": database}, prog_name="queue-service"
    )
    assert refused.exit_code != 0
    assert r"\x1b]0;owned" in refused.output
    assert obeyed(refused.output) <= {"\n"}


def test_an_unknown_option_is_escaped() -> None:
    refused = CliRunner().invoke(cli, [f"--{EVIL}"], prog_name="queue-service")
    assert refused.exit_code == 2
    assert r"\x1b]0;owned" in refused.output
    assert obeyed(refused.output) <= {"\n"}
