"""The command line about turns: `markers`, and why a run is where it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service import App, Turn, TurnFailure
from queue_service.app.sync import SyncApp
from tests.cli.test_cli import Invoke, invoke, rows, said, succeeded

__all__ = ["invoke"]


@pytest.fixture
def q(database: str) -> Iterator[SyncApp]:
    with App(database).sync as opened:
        yield opened


def turn(message_id: str = "m1", **fields: Any) -> Turn:
    return Turn(**{"deployment": "dep-1", "message_id": message_id, "stream": "conv-1"} | fields)


def lapse(database: str, message_id: str) -> None:
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute(
            "update queue_service.turn_markers set deadline = clock_timestamp() - interval '90 s' where message_id = %s",
            [message_id],
        )


class TestList:
    def test_shows_what_is_owed_and_how_much_of_it_is_overdue(self, q: SyncApp, invoke: Invoke, database: str) -> None:
        for message_id in ("m1", "m2", "m3"):
            q.turns.arm(turn(message_id))
        q.turns.extend("dep-1")
        q.turns.withhold("dep-1", "provider_overloaded")
        q.turns.arm(turn("m4"))
        lapse(database, "m4")
        listed = succeeded(invoke("markers", "list"))
        shown = [line.split()[:3] for line in listed.stdout.splitlines()[1:]]
        assert shown[0] == ["dep-1", "m4", "conv-1"]
        assert sorted(shown) == [["dep-1", f"m{number}", "conv-1"] for number in range(1, 5)]
        assert "waits to be taken up, OVERDUE" in listed.stdout
        assert "withheld: provider_overloaded" in listed.stdout
        assert "4 turns owed an ending, 1 overdue, the oldest for 9" in listed.stderr

    def test_gives_json_to_programs(self, q: SyncApp, invoke: Invoke, database: str) -> None:
        q.turns.arm(turn("m1", organization_id="acme"))
        lapse(database, "m1")
        answer = json.loads(succeeded(invoke("markers", "list", "--json")).stdout)
        assert (answer["owed"], answer["overdue"]) == (1, 1)
        assert answer["oldest_overdue"].startswith("PT9")
        (marker,) = answer["markers"]
        assert (marker["message_id"], marker["organization_id"], marker["overdue"]) == ("m1", "acme", True)

    def test_is_narrowed_by_its_options(self, q: SyncApp, invoke: Invoke, database: str) -> None:
        q.turns.arm(turn("m1"))
        q.turns.arm(turn("m2", deployment="other", stream="there", platform="slack", organization_id="acme"))
        lapse(database, "m2")
        narrowed = [
            ["--deployment", "other"], ["--stream", "there"], ["--platform", "slack"], ["--organization-id", "acme"],
            ["--overdue"], ["--limit", "1"],
        ]  # fmt: skip
        for options in narrowed:
            answer = json.loads(succeeded(invoke("markers", "list", "--json", *options)).stdout)
            assert [marker["message_id"] for marker in answer["markers"]] == ["m2"], options
        by_variable = invoke("markers", "list", "--json", QUEUE_SERVICE_MARKERS_LIST_DEPLOYMENT="dep-1")
        assert [marker["message_id"] for marker in json.loads(by_variable.stdout)["markers"]] == ["m1"]

    def test_says_that_nothing_is_owed(self, invoke: Invoke) -> None:
        listed = succeeded(invoke("markers", "list"))
        assert listed.stdout == ""
        assert "No turns match." in listed.stderr
        assert "0 turns owed an ending, none overdue." in listed.stderr


class TestShow:
    def test_says_what_a_turn_awaits(self, q: SyncApp, invoke: Invoke) -> None:
        q.turns.arm(turn(), admission=timedelta(minutes=5))
        shown = succeeded(invoke("markers", "show", "dep-1", "m1")).stdout
        assert "waits for a worker's first sign of life, until " in shown.splitlines()[0]
        assert "admission        5m" in shown
        answer = json.loads(succeeded(invoke("markers", "show", "dep-1", "m1", "--json")).stdout)
        assert (answer["marker"]["message_id"], answer["outcome"]) == ("m1", None)
        assert answer["why"].startswith("Armed ")

    def test_says_how_a_turn_ended(self, q: SyncApp, invoke: Invoke) -> None:
        q.turns.arm(turn())
        q.turns.commit_reply("dep-1", ["m1"], {"text": "hi"})
        shown = succeeded(invoke("markers", "show", "dep-1", "m1")).stdout
        assert shown.startswith("Answered ")
        assert "reply, event 1 of stream conv-1." in shown.splitlines()[0]
        answer = json.loads(succeeded(invoke("markers", "show", "dep-1", "m1", "--json")).stdout)
        assert (answer["marker"], answer["outcome"]["body"]["text"]) == (None, "hi")

    def test_of_an_unknown_turn_fails(self, invoke: Invoke) -> None:
        assert "There is no turn 'm1' of deployment 'dep-1'" in said(invoke("markers", "show", "dep-1", "m1"), 1)


class TestEnding:
    def test_sweep_ends_what_is_overdue_and_says_how_many(self, q: SyncApp, invoke: Invoke, database: str) -> None:
        q.turns.arm(turn("m1"))
        q.turns.arm(turn("m2"))
        lapse(database, "m1")
        assert succeeded(invoke("markers", "sweep")).stdout == "ended 1 turn\n"
        assert succeeded(invoke("markers", "sweep")).stdout == "ended 0 turns\n"
        assert q.turns.is_live("dep-1", "m2")

    def test_sweep_fails_where_a_turn_cannot_be_ended_and_ends_the_others(
        self, q: SyncApp, invoke: Invoke, database: str
    ) -> None:
        for message_id in ("m1", "m2", "m3"):
            q.turns.arm(turn(message_id))
            lapse(database, message_id)
        with psycopg.connect(database, autocommit=True) as conn:
            conn.execute(
                "alter table queue_service.turn_outcomes add constraint refused check (message_id <> 'm2') not valid"
            )
        result = invoke("markers", "sweep")
        assert result.exit_code == 1
        assert "2 were ended, and the database refuses to end m2 of deployment dep-1: " in result.stderr
        assert [
            message_id for (message_id,) in rows(database, "select message_id from queue_service.turn_markers")
        ] == ["m2"]

    def test_sweep_fails_where_it_is_not_allowed(self, q: SyncApp, invoke: Invoke, database: str) -> None:
        q.turns.arm(turn("m1"))
        lapse(database, "m1")
        # Roles are of the whole server, which other tests use as well.
        role = f"of_{conninfo_to_dict(database)['dbname']}"
        with psycopg.connect(database, autocommit=True) as conn:
            conn.execute(f"create role {role} login".encode())
            conn.execute(f"grant usage on schema queue_service to {role}".encode())
            conn.execute(f"grant select, insert, update on all tables in schema queue_service to {role}".encode())
            try:
                result = invoke("markers", "sweep", "--database-url", make_conninfo(database, user=role))
            finally:
                conn.execute(f"drop owned by {role}".encode())
                conn.execute(f"drop role {role}".encode())
        assert (result.exit_code, result.stdout) == (1, "")
        assert "permission denied" in result.stderr

    def test_fail_ends_the_turns_it_names(self, q: SyncApp, invoke: Invoke) -> None:
        for message_id in ("m1", "m2", "m3"):
            q.turns.arm(turn(message_id))
        done = invoke("markers", "fail", "dep-1", "m1", "m2", "--code", "cancelled", "--message", "Stopped.", "--yes")
        assert succeeded(done).stdout == "turn m1: ended with cancelled\nturn m2: ended with cancelled\n"
        outcome = q.turns.outcome("dep-1", "m2")
        assert outcome is not None
        assert (outcome.code, outcome.message) == ("cancelled", "Stopped.")
        assert q.turns.is_live("dep-1", "m3")

    def test_fail_ends_every_turn_of_a_deployment_if_asked_to(self, q: SyncApp, invoke: Invoke) -> None:
        for message_id in ("m1", "m2"):
            q.turns.arm(turn(message_id))
        done = succeeded(invoke("markers", "fail", "dep-1", "--all", "--code", "worker_died", "--yes"))
        assert len(done.stdout.splitlines()) == 2
        again = succeeded(invoke("markers", "fail", "dep-1", "--all", "--code", "worker_died", "--yes"))
        assert "No turn of deployment dep-1 is owed an ending." in again.stderr

    def test_discharge_ends_turns_without_an_event(self, q: SyncApp, invoke: Invoke) -> None:
        q.turns.arm(turn())
        assert succeeded(invoke("markers", "discharge", "dep-1", "m1", "--yes")).stdout == "turn m1: discharged\n"
        outcome = q.turns.outcome("dep-1", "m1")
        assert outcome is not None
        assert outcome.kind == "discharged"
        assert q.events.head("conv-1") == 0

    @pytest.mark.parametrize("verb", [["fail", "--code", "cancelled"], ["discharge"]], ids=["fail", "discharge"])
    def test_of_a_turn_that_has_ended_or_never_was_fails_and_ends_the_others(
        self, q: SyncApp, invoke: Invoke, verb: list[str]
    ) -> None:
        for message_id in ("m1", "m2"):
            q.turns.arm(turn(message_id))
        q.turns.fail("dep-1", "m1", TurnFailure("timeout"))
        done = invoke("markers", *verb, "dep-1", "m1", "m2", "--yes")
        assert done.exit_code == 1
        assert "turn m1: no. Failed " in done.stdout
        assert not q.turns.is_live("dep-1", "m2")
        assert "There is no turn 'm9'" in said(invoke("markers", *verb, "dep-1", "m9", "--yes"), 1)

    @pytest.mark.parametrize(
        "verb",
        [["fail", "dep-1", "m1", "--code", "cancelled"], ["fail", "dep-1", "--all", "--code", "cancelled"],
         ["discharge", "dep-1", "m1"]],
    )  # fmt: skip
    def test_asks_first(self, q: SyncApp, invoke: Invoke, verb: list[str]) -> None:
        q.turns.arm(turn())
        refused = invoke("markers", *verb, input="n\n")
        assert refused.exit_code == 1
        assert "deployment dep-1" in refused.stderr
        assert refused.stdout.strip() in {"", "n"}
        assert q.turns.is_live("dep-1", "m1")
        succeeded(invoke("markers", *verb, input="y\n"))
        assert not q.turns.is_live("dep-1", "m1")

    @pytest.mark.parametrize(
        "arguments",
        [["dep-1", "--code", "cancelled"], ["dep-1", "m1", "--all", "--code", "cancelled"], ["dep-1", "m1"],
         ["dep-1", "m1", "--code", "made_up"]],
    )  # fmt: skip
    def test_fail_needs_to_know_which_turns_and_why(self, invoke: Invoke, arguments: list[str]) -> None:
        assert invoke("markers", "fail", *arguments, "--yes").exit_code == 2


class TestWhy:
    def test_a_run_is_queued_and_which_turn_it_works_on(self, q: SyncApp, invoke: Invoke) -> None:
        run_id = q.turns.dispatch(turn(), "agent_turn", {}, queue="agents")
        text = succeeded(invoke("runs", "why", str(run_id))).stdout
        assert "no live worker works on queue agents" in text
        assert "It works on turn m1 of deployment dep-1, whose deadline is " in text
        q.queues.pause("agents")
        assert "queue agents was paused " in succeeded(invoke("runs", "why", str(run_id))).stdout
        answer = json.loads(succeeded(invoke("runs", "why", str(run_id), "--json")).stdout)
        assert (answer["id"], answer["state"]) == (run_id, "queued")
        assert answer["why"].startswith("Queued, and due since ")

    def test_a_run_is_scheduled(self, q: SyncApp, invoke: Invoke) -> None:
        run_id = q.enqueue("noop", {}, delay=7_210)
        assert succeeded(invoke("runs", "why", str(run_id))).stdout.startswith("Scheduled for ")

    def test_a_run_is_running(self, q: SyncApp, invoke: Invoke, database: str) -> None:
        run_id = q.enqueue("noop", {})
        rows(
            database,
            "with worker as (insert into queue_service.workers (name, version, revision, queues) "
            "values ('host:1', '1', '9999', '{}') returning id), lease as (insert into queue_service.leases (worker_id, expires_at, run_ids) "
            "select id, now() + interval '1 m', array[%s::bigint] from worker returning id) "
            "update queue_service.runs set state = 'running', attempt = 1, claimed_at = now(), lease_id = lease.id from lease",
            run_id,
        )
        assert "(host:1), which was heard of " in succeeded(invoke("runs", "why", str(run_id))).stdout

    def test_a_run_ended(self, q: SyncApp, invoke: Invoke) -> None:
        run_id = q.enqueue("noop", {})
        q.cancel(run_id)
        assert succeeded(invoke("runs", "why", str(run_id))).stdout.startswith("Ended cancelled ")

    def test_an_unknown_run_is_not_anywhere(self, invoke: Invoke) -> None:
        assert "There is no run 77" in said(invoke("runs", "why", "77"), 1)
