"""The command line about schedules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from queue_service import App
from queue_service.app.sync import SyncApp
from tests.cli.test_cli import Invoke, invoke, rows, said, succeeded

__all__ = ["invoke"]

TASKS = "tests.worker.tasks_for_tests:app"


@pytest.fixture
def q(database: str) -> Iterator[SyncApp]:
    with App(database).sync as opened:
        yield opened


@pytest.fixture
def nightly(q: SyncApp) -> str:
    q.schedules.put("nightly", "report", {"n": 1}, cron="30 2 * * *", timezone="Europe/Vienna", queue="slow")
    return "nightly"


class TestAdd:
    def test_stores_a_schedule_and_says_what_it_did(self, q: SyncApp, invoke: Invoke) -> None:
        arguments = ("schedules", "add", "nightly", "report", '{"n": 1}', "--cron", "30 2 * * *", "--timezone",
                     "Europe/Vienna", "--misfire", "all", "--queue", "slow", "--priority", "5", "--expires-in", "2h")  # fmt: skip
        assert succeeded(invoke(*arguments)).stdout == "schedule nightly: added\n"
        assert succeeded(invoke(*arguments)).stdout == "schedule nightly: is like this already\n"
        assert succeeded(invoke(*arguments, "--priority", "6")).stdout == "schedule nightly: changed\n"
        found = q.schedules.get("nightly")
        assert found is not None
        assert (found.cron, found.timezone, found.misfire, found.queue) == (
            "30 2 * * *",
            "Europe/Vienna",
            "all",
            "slow",
        )
        assert (found.payload, found.priority, found.expires_in) == ({"n": 1}, 6, timedelta(hours=2))

    def test_takes_an_interval_and_the_parameters_of_a_task_of_the_app(
        self, q: SyncApp, invoke: Invoke, database: str
    ) -> None:
        arguments = ("--every", "15m", "-a", TASKS, "--database-url", database)
        succeeded(invoke("schedules", "add", "often", "double", '{"n": 1}', *arguments))
        found = q.schedules.get("often")
        assert found is not None
        assert found.every == timedelta(minutes=15)
        assert "cannot be called so" in said(invoke("schedules", "add", "x", "double", *arguments), 2)
        unknown = said(invoke("schedules", "add", "x", "doubel", "--every", "15m", "-a", TASKS), 2)
        assert "Did you mean 'double'?" in unknown

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (["--cron", "nonsense"], "five fields"),
            (["--cron", "0 0 * * *", "--timezone", "Europe/Viena"], "Did you mean 'Europe/Vienna'?"),
            ([], "either a cron expression or every="),
            (["--cron", "@daily", "--every", "5m"], "either a cron expression or every="),
            (["--every", "1500ms"], "whole seconds"),
        ],
    )
    def test_refuses_a_timing_that_means_nothing(self, invoke: Invoke, options: list[str], sentence: str) -> None:
        assert sentence in said(invoke("schedules", "add", "s", "report", *options), 2)

    @pytest.mark.parametrize("payload", ["{", "[1]", "7"])
    def test_refuses_a_payload_that_is_no_object(self, invoke: Invoke, payload: str) -> None:
        assert "payload" in said(invoke("schedules", "add", "s", "report", payload, "--cron", "@daily"), 2)


class TestReading:
    @pytest.mark.usefixtures("nightly")
    def test_list_shows_each(self, q: SyncApp, invoke: Invoke) -> None:
        q.schedules.put("often", "report", {}, every=900)
        q.schedules.pause("often")
        lines = succeeded(invoke("schedules", "list")).stdout.splitlines()
        assert lines[0].split()[:3] == ["NAME", "TASK", "QUEUE"]
        assert lines[1].startswith("nightly  report  slow     30 2 * * * Europe/Vienna  in ")
        assert lines[2].startswith("often    report  default  every 15m                 paused")

    def test_list_of_none_says_how_to_make_one(self, invoke: Invoke) -> None:
        listed = succeeded(invoke("schedules", "list"))
        assert (listed.stdout, "schedules add" in listed.stderr) == ("", True)

    def test_json_is_for_programs(self, q: SyncApp, invoke: Invoke, nightly: str) -> None:
        (listed,) = json.loads(succeeded(invoke("schedules", "list", "--json")).stdout)
        assert listed == json.loads(succeeded(invoke("schedules", "show", nightly, "--json")).stdout)
        assert (listed["name"], listed["payload"], listed["misfire"]) == ("nightly", {"n": 1}, "last")
        shown = json.loads(succeeded(invoke("schedules", "next", nightly, "--json")).stdout)
        slots = [datetime.fromisoformat(slot) for slot in shown["slots"]]
        assert slots == q.schedules.next(nightly)
        assert all((slot.hour, slot.minute) in {(2, 30), (3, 0)} for slot in slots)

    def test_show_tells_all_there_is(self, invoke: Invoke, nightly: str) -> None:
        text = succeeded(invoke("schedules", "show", nightly)).stdout
        assert "timezone         Europe/Vienna\n" in text
        assert "payload          n: 1\n" in text
        assert "last_slot" not in text

    def test_next_shows_five_in_its_own_time_zone_or_as_many_as_asked_for(
        self, q: SyncApp, invoke: Invoke, nightly: str
    ) -> None:
        lines = succeeded(invoke("schedules", "next", nightly)).stdout.splitlines()
        assert len(lines) == 5
        assert all(" 02:30:00 CET " in line or " CEST " in line for line in lines)
        q.schedules.pause(nightly)
        paused = succeeded(invoke("schedules", "next", nightly, "--count", "2"))
        assert len(paused.stdout.splitlines()) == 2
        assert "It is paused" in paused.stderr

    @pytest.mark.parametrize("verb", ["show", "next", "run"])
    def test_of_a_schedule_that_does_not_exist_fails(self, invoke: Invoke, verb: str) -> None:
        assert "There is no schedule 'nobody'" in said(invoke("schedules", verb, "nobody"), 1)


class TestActing:
    def test_run_enqueues_now(self, q: SyncApp, invoke: Invoke, nightly: str) -> None:
        q.schedules.pause(nightly)
        answer = json.loads(succeeded(invoke("schedules", "run", nightly, "--json")).stdout)
        run = q.get(answer["id"])
        assert run is not None
        assert (run.task, run.queue, (run.metadata or {})["schedule"]) == ("report", "slow", "nightly")
        assert succeeded(invoke("schedules", "run", nightly)).stdout.startswith("enqueued run ")

    def test_pause_and_resume(self, q: SyncApp, invoke: Invoke, nightly: str) -> None:
        q.schedules.put("other", "report", cron="@daily")
        assert succeeded(invoke("schedules", "pause", nightly)).stdout == "schedule nightly: paused\n"
        both = succeeded(invoke("schedules", "pause", nightly, "other")).stdout
        assert both == "schedule nightly: was paused already\nschedule other: paused\n"
        assert succeeded(invoke("schedules", "resume", nightly)).stdout == "schedule nightly: resumed\n"
        assert succeeded(invoke("schedules", "resume", nightly)).stdout == "schedule nightly: was not paused\n"
        found = q.schedules.get(nightly)
        assert found is not None
        assert found.paused_at is None
        assert found.next_at > datetime.now(UTC)

    @pytest.mark.parametrize("verb", [["pause"], ["resume"], ["delete", "--yes"]], ids=lambda verb: verb[0])
    def test_what_does_not_exist_fails_and_the_others_are_done(
        self, invoke: Invoke, nightly: str, verb: list[str]
    ) -> None:
        done = invoke("schedules", *verb, "nobody", nightly)
        assert done.exit_code == 1
        assert "schedule nobody: unknown\nschedule nightly: " in done.stdout

    def test_delete_asks_first(self, q: SyncApp, invoke: Invoke, nightly: str, database: str) -> None:
        refused = invoke("schedules", "delete", nightly, input="n\n")
        assert refused.exit_code == 1
        assert "nightly" in refused.stderr
        assert q.schedules.get(nightly) is not None
        assert "schedule nightly: deleted" in succeeded(invoke("schedules", "delete", nightly, input="y\n")).stdout
        assert rows(database, "select name from queue_service.schedules") == []
