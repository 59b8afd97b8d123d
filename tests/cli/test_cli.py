"""The command line: every command, its options, its exit codes, and what it says when something is wrong."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import make_conninfo

from queue_service import App, __version__
from queue_service.cli import COMMANDS, cli, options, render
from queue_service.cli import runs as runs_commands
from queue_service.db import embedded, revision
from queue_service.db.cluster import Cluster
from queue_service.runs import walks
from queue_service.worker.worker import Worker

Invoke = Callable[..., Result]

UNREACHABLE = "postgresql://127.0.0.1:1/nowhere"
TASKS = "tests.worker.tasks_for_tests:app"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of this test's own, which is also taken off the path again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


def call(*arguments: str, input: str | None = None, **environment: str) -> Result:  # noqa: A002
    return CliRunner().invoke(cli, arguments, input=input, env=environment, prog_name="queue-service")


@pytest.fixture
def invoke(database: str) -> Invoke:
    """Calls the command line on the test's database."""

    def invoked(*arguments: str, input: str | None = None, **environment: str) -> Result:  # noqa: A002
        return call(*arguments, input=input, QUEUE_SERVICE_DATABASE_URL=database, **environment)

    return invoked


def process(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own. One that hangs is interrupted, so that it puts away what it started."""
    command = [sys.executable, "-m", "queue_service", *arguments]
    with subprocess.Popen(
        command, env={**os.environ, **environment}, cwd=cwd, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as started:  # fmt: skip
        try:
            out, errors = started.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            started.send_signal(signal.SIGINT)
            out, errors = started.communicate(timeout=30)
            pytest.fail(f"{arguments} hung. It said:\n{out}\n{errors}")
        return subprocess.CompletedProcess(command, started.returncode, out, errors)


def rows(database: str, query: str, *params: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(database, autocommit=True) as conn:
        cursor = conn.execute(query.encode(), params or None)
        return cursor.fetchall() if cursor.description else []


def succeeded(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def said(result: Result, code: int) -> str:
    """What a failed command said: a sentence, without a traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert "Error: " in result.stderr
    return result.stderr


def new_id(result: Result) -> int:
    answer = json.loads(succeeded(result).stdout)
    assert isinstance(answer["id"], int)
    return answer["id"]


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(below, (*path, name))
    else:
        yield path, command


EVERY_COMMAND = dict(commands(cli))


# Help


def test_every_command_is_there() -> None:
    assert {" ".join(path) for path in EVERY_COMMAND} == {
        "config show", "db check", "db current", "db grants", "db migrate", "db psql", "db rls disable", "db rls enable", "db sql", "db start", "db stop", "db url",
        "demo", "enqueue", "gateway", "markers discharge", "markers fail", "markers list", "markers show", "markers sweep", "probe", "queues limit", "queues list", "queues pause", "queues purge", "queues resume", "runs cancel", "runs delete", "runs list",
        "runs retry", "runs show", "runs why", "schedules add", "schedules delete", "schedules list", "schedules next",
        "schedules pause", "schedules resume", "schedules run", "schedules show", "version", "worker", "workers list",
    }  # fmt: skip


def test_the_help_names_every_command_and_the_exit_codes() -> None:
    text = succeeded(call("--help")).stdout
    assert all(re.search(rf"^  {name}\s+\S", text, re.MULTILINE) for name in COMMANDS)
    assert "0 ok, 1 failed, 2 usage, 3 database unreachable, 4 schema behind, 5 runs failed" in re.sub(
        r"\s+", " ", text
    )
    assert succeeded(call("-h")).stdout == text


@pytest.mark.parametrize("path", EVERY_COMMAND, ids=" ".join)
def test_every_option_shows_its_variable(path: tuple[str, ...]) -> None:
    text = re.sub(r"\s+", " ", succeeded(call(*path, "--help")).stdout)
    options = [each for each in EVERY_COMMAND[path].params if isinstance(each, click.Option) and not each.hidden]
    assert options
    entries = re.split(r" (?=-\w, --|--)", text)
    for option in options:
        name = option.opts[-1]
        mine = [entry for entry in entries if re.search(rf"{re.escape(name)}\b(?!-)", entry.split(" [env")[0])]
        assert any(re.search(r"\[env var: QUEUE_SERVICE_[A-Z_]+", entry) for entry in mine), (name, mine)


@pytest.mark.parametrize("path", EVERY_COMMAND, ids=" ".join)
def test_every_command_says_what_it_does(path: tuple[str, ...]) -> None:
    assert EVERY_COMMAND[path].help


def test_the_variables_that_are_shown_work(invoke: Invoke) -> None:
    for n in range(3):
        succeeded(invoke("enqueue", "double", f'{{"n": {n}}}'))
    listed = invoke("runs", "list", "--json", QUEUE_SERVICE_RUNS_LIST_LIMIT="2")
    assert len(json.loads(succeeded(listed).stdout)) == 2
    shown = re.search(
        r"--json +Print JSON.*?env\s+var:\s+(\w+)", succeeded(call("enqueue", "--help")).stdout, re.DOTALL
    )
    assert shown is not None
    queued = invoke("enqueue", "double", **{"QUEUE_SERVICE_ENQUEUE_QUEUE": "elsewhere", shown[1]: "true"})
    shown = json.loads(succeeded(invoke("runs", "show", str(new_id(queued)), "--json")).stdout)
    assert shown["queue"] == "elsewhere"


def test_an_option_comes_before_its_variable(invoke: Invoke) -> None:
    shown = invoke("enqueue", "double", "--queue", "mine", "--json", QUEUE_SERVICE_ENQUEUE_QUEUE="theirs")
    run = json.loads(succeeded(invoke("runs", "show", str(new_id(shown)), "--json")).stdout)
    assert run["queue"] == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"], ["runs", "nonsense"], ["runs", "list", "--nonsense"], ["runs", "list", "--state", "nonsense"],
        ["runs", "list", "--limit", "0"], ["runs", "show"], ["runs", "show", "x"], ["enqueue"],
        ["enqueue", "t", "--delay", "soon"], ["enqueue", "t", "--run-at", "noon"], ["enqueue", "t", "--priority", "x"],
        ["enqueue", "t", "--on-conflict", "x"], ["queues", "pause"], ["worker", "--lease", "soon"],
        ["demo", "/nonexistent/directory"], ["runs", "list", "--log-level", "loud"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_usage_that_makes_no_sense_exits_with_two(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output


# version, config


def test_a_run_is_shown_with_how_far_it_is(invoke: Invoke, database: str) -> None:
    run_id = new_id(invoke("enqueue", "double", '{"n": 1}', "--queue", "mine", "--json"))
    with psycopg.connect(database) as conn:
        report = """update queue_service.runs set progress = '{"value": 0.4, "note": "indexing", "at": "2026-01-01T00:00:00Z"}'"""
        conn.execute(report)
    shown = succeeded(invoke("runs", "show", str(run_id))).stdout
    assert "progress         40% indexing (" in shown
    assert json.loads(succeeded(invoke("runs", "show", str(run_id), "--json")).stdout)["progress"]["value"] == 0.4
    with psycopg.connect(database) as conn:
        conn.execute("insert into queue_service.leases (worker_id, expires_at, run_ids) values (1, 'infinity', '{}')")
        conn.execute(
            "update queue_service.runs set state = 'running', lease_id = (select max(id) from queue_service.leases)"
        )
    assert "40% indexing" in succeeded(invoke("runs", "list")).stdout


def test_a_run_is_shown_with_its_steps(invoke: Invoke, database: str) -> None:
    run_id = new_id(invoke("enqueue", "double", '{"n": 1}', "--queue", "mine", "--json"))
    assert "STEP" not in succeeded(invoke("runs", "show", str(run_id))).stdout
    assert json.loads(succeeded(invoke("runs", "show", str(run_id), "--json")).stdout)["steps"] == []
    with psycopg.connect(database) as conn:
        add = "insert into queue_service.steps (run_id, name, attempt, result) values (%s, %s, %s, %s::jsonb)"
        conn.execute(add, [run_id, "charge", 1, '{"paid": 30}'])
        conn.execute(add, [run_id, "mail\n\x1b[2J", 2, "9" * 5_000])
    shown = succeeded(invoke("runs", "show", str(run_id))).stdout
    assert re.search(r"^STEP +ATTEMPT +DONE +RESULT$", shown, re.MULTILINE)
    assert re.search(r"^charge +1 +.* ago +\{\"paid\":30\}$", shown, re.MULTILINE)
    assert re.search(r"^mail\\n\\x1b\[2J +2 .* ago +unreadable: ", shown, re.MULTILINE)
    as_json = json.loads(succeeded(invoke("runs", "show", str(run_id), "--json")).stdout)
    assert as_json["payload"] == {"n": 1}
    assert [(step["name"], step["attempt"], step["result"]) for step in as_json["steps"]] == [
        ("charge", 1, {"paid": 30}), ("mail\n\x1b[2J", 2, None),
    ]  # fmt: skip


def test_version() -> None:
    assert succeeded(call("version")).stdout == f"queue_service {__version__}, schema {revision.HEAD}\n"
    assert json.loads(succeeded(call("version", "--json")).stdout) == {"version": __version__, "schema": revision.HEAD}


def test_config_show_masks_passwords() -> None:
    url = "postgresql://me:secretive@db.example/app?sslpassword=secretive2"
    for arguments in (["config", "show"], ["config", "show", "--json"], ["config", "show", "--database-url", url]):
        result = succeeded(call(*arguments, QUEUE_SERVICE_DATABASE_URL=url))
        assert "secretive" not in result.output
        assert "***" in result.stdout
        assert "db.example" in result.stdout


def test_config_show_says_what_is_in_force_and_who_said_so() -> None:
    environment = {"QUEUE_SERVICE_LEASE": "90s", "QUEUE_SERVICE_POOL_SIZE": "7", "DATABASE_URL": "postgresql://host/db"}
    text = succeeded(call("config", "show", **environment)).stdout
    assert re.search(r"^lease +90s +QUEUE_SERVICE_LEASE +how long", text, re.MULTILINE)
    assert "(DATABASE_URL)" in text
    shown = json.loads(succeeded(call("config", "show", "--json", **environment)).stdout)
    assert (shown["lease"], shown["pool_size"]) == ("90s", 7)
    assert set(shown) > {"data_dir", "poll_interval", "retention", "log_level", "drain_timeout"}


def test_config_show_follows_the_options(here: Path) -> None:
    shown = json.loads(succeeded(call("config", "show", "--json", "--log-level", "debug")).stdout)
    assert shown["log_level"] == "debug"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LEASE", "soon"),
        ("POOL_SIZE", "many"),
        ("POOL_SIZE", "0"),
        ("LEASE", "1ms"),
        ("DATABASE_URL", "mysql://x/y"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(variable: str, value: str) -> None:
    text = said(call("config", "show", **{f"QUEUE_SERVICE_{variable}": value}), 2)
    assert variable.lower() in text.lower()


def test_a_url_that_cannot_be_read_is_not_repeated_with_its_password() -> None:
    text = said(call("runs", "list", QUEUE_SERVICE_DATABASE_URL="postgresql://me:secretive@[host/db"), 2)
    assert "secretive" not in text


# db

# What servers of tests are set to, and others should not be.
OF_TESTS = ("--accept", "fsync", "--accept", "full-page-writes")


@pytest.mark.direct("check also looks at the settings of the role there")
def test_migrate_current_and_check_on_an_empty_database(empty_database: str) -> None:
    on = {"QUEUE_SERVICE_DATABASE_URL": empty_database}
    before = call("db", "current", **on)
    assert (before.exit_code, "none" in before.stdout) == (4, True)
    assert json.loads(call("db", "current", "--json", **on).stdout) == {
        "have": None, "want": revision.HEAD, "oldest": revision.OLDEST, "oldest_code": None, "works": False,
    }  # fmt: skip
    assert f"none -> {revision.HEAD}" in succeeded(call("db", "migrate", **on)).stdout
    assert f"{revision.HEAD} -> {revision.HEAD}" in succeeded(call("db", "migrate", **on)).stdout
    assert revision.HEAD in succeeded(call("db", "current", **on)).stdout
    assert succeeded(call("db", "check", *OF_TESTS, **on)).stdout == ""
    assert (
        json.loads(process("db", "check", "--json", *OF_TESTS, QUEUE_SERVICE_DATABASE_URL=empty_database).stdout)[
            "difference"
        ]
        is None
    )
    succeeded(call("enqueue", "double", '{"n": 1}', **on))


def test_migrate_goes_down_and_up_again(empty_database: str) -> None:
    on = {"QUEUE_SERVICE_DATABASE_URL": empty_database}
    succeeded(call("db", "migrate", "--to", revision.HEAD, **on))
    assert f"{revision.HEAD} -> none" in succeeded(call("db", "migrate", "--to", "base", "--yes", **on)).stdout
    assert call("db", "current", **on).exit_code == 4
    succeeded(call("db", "migrate", **on))


@pytest.mark.parametrize("target", ["nonsense", "00021", "002", "0021x", "9999", "+1", "-1"])
def test_migrate_to_a_revision_that_is_not_there_is_refused(invoke: Invoke, target: str) -> None:
    assert f"There is no revision '{target}'" in said(invoke("db", "migrate", "--to", target), 2)


def test_check_exits_with_four_where_the_schema_is_behind(empty_database: str) -> None:
    on = {"QUEUE_SERVICE_DATABASE_URL": empty_database}
    assert "queue-service db migrate" in said(call("db", "check", **on), 4)
    succeeded(call("db", "migrate", "--to", "0001", "--yes", **on))
    assert "queue-service db migrate" in said(call("db", "check", **on), 4)


@pytest.mark.direct("pgbouncer refuses options in the start-up packet")
@pytest.mark.parametrize("arguments", [["db", "migrate"], ["db", "current"], ["runs", "list"], ["enqueue", "t"]])
def test_a_user_who_may_not_reads_who_may(database: str, arguments: list[str]) -> None:
    with psycopg.connect(database, autocommit=True) as admin:
        name = f"stranger_{admin.info.dbname}"
        admin.execute(f'create role "{name}" login')
        try:
            # As a role that the session has; a password would need a server that asks for one.
            text = said(call(*arguments, "--database-url", make_conninfo(database, options=f"-c role={name}")), 1)
        finally:
            admin.execute(f'drop role "{name}"')
    assert "permission denied" in text
    assert "To migrate, connect as that owner" in text
    assert "LINE 1" not in text


def test_ctrl_c_belongs_to_psql(tmp_path: Path) -> None:
    psql = tmp_path / "psql"
    psql.write_text(
        f"#!{sys.executable}\nimport signal\nheard = []\nsignal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        "print('ready', flush=True)\nline = input()\nprint(line, len(heard))\nraise SystemExit(7)\n"
    )
    psql.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-m", "queue_service", "db", "psql", "--database-url", UNREACHABLE],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, start_new_session=True, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as started:  # fmt: skip
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        os.killpg(started.pid, signal.SIGINT)
        out, errors = started.communicate("goes on\n", timeout=30)
    assert (out, errors, started.returncode) == ("goes on 1\n", "", 7)


def test_check_exits_with_one_where_a_table_differs(database: str, invoke: Invoke) -> None:
    rows(database, "alter table queue_service.runs add column surprise text")
    assert "surprise" in said(invoke("db", "check"), 1)


def test_sql_prints_what_makes_a_schema(empty_database: str) -> None:
    printed = process("db", "sql")
    assert printed.returncode == 0, printed.stderr
    assert "create table queue_service.runs" in printed.stdout
    psql = [str(embedded.programs() / "psql"), empty_database, "-v", "ON_ERROR_STOP=1", "-q", "-f", "-"]
    applied = subprocess.run(psql, input=printed.stdout, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, applied.stderr
    assert call("db", "current", QUEUE_SERVICE_DATABASE_URL=empty_database).exit_code == 0


def test_url_is_printed_without_its_password() -> None:
    text = succeeded(call("db", "url", "--database-url", "postgresql://me:secretive@host:99/name")).stdout
    assert "secretive" not in text
    assert "host=host" in text
    assert "port=99" in text


def test_a_server_that_is_not_ours_is_neither_started_nor_stopped() -> None:
    for verb in ("start", "stop"):
        assert "not ours" in said(call("db", verb, "--database-url", UNREACHABLE), 2)


def test_the_embedded_server_is_started_used_and_stopped(tmp_path: Path) -> None:
    place = f"file:{tmp_path}/postgres"
    cluster = Cluster(tmp_path / "postgres", embedded.programs())
    assert "was not running" in succeeded(call("db", "stop", "--database-url", place)).stdout
    try:
        started = process("db", "start", "--database-url", place)
        assert started.returncode == 0, started.stderr
        assert cluster.is_running()
        url = started.stdout.strip()
        assert url.startswith("postgresql:")
        assert succeeded(call("db", "url", "--database-url", place)).stdout.strip() == url
        assert "none -> " in succeeded(call("db", "migrate", "--database-url", place)).stdout
        assert cluster.is_running()
        # The URL is good for any program, and leads to the same server.
        succeeded(call("enqueue", "double", '{"n": 1}', "--database-url", url))
        listed = succeeded(call("runs", "list", "--json", "--database-url", place)).stdout
        assert [run["task"] for run in json.loads(listed)] == ["double"]
        assert cluster.is_running()
        asked = process("db", "psql", "--database-url", place, "--", "-Atc", "select count(*) from queue_service.runs")
        assert (asked.returncode, asked.stdout) == (0, "1\n")
        assert "stopped" in succeeded(call("db", "stop", "--database-url", place)).stdout
        assert not cluster.is_running()
    finally:
        cluster.stop()


# enqueue


def test_enqueue_stores_one_run_with_all_its_options(invoke: Invoke) -> None:
    options = [
        "--queue", "q", "--priority", "7", "--run-at", "2031-02-03T04:05:06+00:00", "--expires-in", "1h",
        "--singleton-key", "s", "--ordering-key", "o", "--max-attempts", "9", "--retry-delay", "1500ms",
        "--timeout", "2m", "--organization-id", "acme",
    ]  # fmt: skip
    run_id = new_id(invoke("enqueue", "some.task", '{"a": [1, null, "ü"]}', *options, "--json"))
    run = json.loads(succeeded(invoke("runs", "show", str(run_id), "--json")).stdout)
    assert run["payload"] == {"a": [1, None, "ü"]}
    kept = ("queue", "priority", "singleton_key", "ordering_key", "max_attempts", "organization_id", "task", "state")
    assert [run[name] for name in kept] == ["q", 7, "s", "o", 9, "acme", "some.task", "queued"]
    assert (run["run_at"], run["expires_at"]) == ("2031-02-03T04:05:06Z", "2031-02-03T05:05:06Z")
    assert (run["retry_delay"], run["timeout"]) == ("PT1.5S", "PT120S")


def test_enqueue_prints_the_id_and_takes_an_empty_payload(invoke: Invoke) -> None:
    text = succeeded(invoke("enqueue", "some.task")).stdout
    assert re.fullmatch(r"enqueued run \d+\n", text)


def test_enqueue_with_a_delay_is_due_later(invoke: Invoke) -> None:
    succeeded(invoke("enqueue", "some.task", "--delay", "1h"))
    (queue,) = json.loads(succeeded(invoke("queues", "list", "--json")).stdout)
    assert (queue["due"], queue["later"]) == (0, 1)


def test_a_taken_singleton_key_is_returned_replaced_or_reported(invoke: Invoke) -> None:
    first = new_id(invoke("enqueue", "t", '{"n": 1}', "--singleton-key", "s", "--json"))
    assert new_id(invoke("enqueue", "t", '{"n": 2}', "--singleton-key", "s", "--json")) == first
    assert "live" in said(invoke("enqueue", "t", "--singleton-key", "s", "--on-conflict", "raise"), 1)
    replaced = invoke("enqueue", "t", '{"n": 3}', "--singleton-key", "s", "--on-conflict", "replace", "--json")
    assert new_id(replaced) == first
    assert json.loads(invoke("runs", "show", str(first), "--json").stdout)["payload"] == {"n": 3}


def test_json_lines_from_standard_input_are_all_enqueued(invoke: Invoke) -> None:
    lines = "".join(f'{{"n": {n}}}\n' for n in range(6_000)) + "\n  \n"
    answer = succeeded(invoke("enqueue", "double", "-", "--queue", "many", "--json", input=lines))
    assert json.loads(answer.stdout) == {"count": 6_000}
    assert "enqueued 2 runs" in succeeded(invoke("enqueue", "double", "-", input='{"n": 1}\n{"n": 2}')).stdout
    depths = {each["name"]: each["due"] for each in json.loads(invoke("queues", "list", "--json").stdout)}
    assert depths == {"many": 6_000, "default": 2}


def test_a_line_that_is_not_json_is_named_and_nothing_is_enqueued(database: str, invoke: Invoke) -> None:
    text = said(invoke("enqueue", "double", "-", input='{"n": 1}\n\n{"n": 2\n{"n": 3}\n'), 2)
    assert "Line 3" in text
    assert "Line 2" in said(invoke("enqueue", "double", "-", input='{"n": 1}\n[1]\n'), 2)
    assert rows(database, "select id from queue_service.runs") == []


def test_a_bad_line_after_many_says_what_is_enqueued_already(database: str, invoke: Invoke) -> None:
    lines = "\n" + '{"n": 1}\n' * 6_000
    printed = said(invoke("enqueue", "double", "-", input=lines + "nonsense\n"), 2)
    ((count,),) = rows(database, "select count(*) from queue_service.runs")
    assert count == 5_000
    assert "The lines up to 5,001 are enqueued, 5,000 runs: leave them out the next time.\n" in printed
    assert "Line 6002 is not JSON" in printed


@pytest.mark.parametrize("payload", ["{", "[]", "1", '"text"', "null", '{"a": NaN}', "{'a': 1}"])
def test_a_payload_that_is_no_object_is_refused(invoke: Invoke, payload: str) -> None:
    assert "payload" in said(invoke("enqueue", "double", payload), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["t", "--delay", "1s", "--run-at", "2031-01-01T00:00:00Z"], ["t", "--run-at", "2031-01-01T00:00:00"], [""],
        ["t", "--priority", "40000"], ["t", "--max-attempts", "0"], ["t", "-", "--singleton-key", "s"],
    ],
)  # fmt: skip
def test_options_that_contradict_are_refused(invoke: Invoke, arguments: list[str]) -> None:
    said(invoke("enqueue", *arguments, input="{}\n"), 2)


def test_a_task_that_the_app_does_not_know_is_refused_with_the_nearest(invoke: Invoke) -> None:
    text = said(invoke("enqueue", "doubel", "-a", TASKS), 2)
    assert "Did you mean 'double'?" in text


def test_a_payload_that_does_not_fit_the_task_is_refused(database: str) -> None:
    known = ["-a", TASKS, "--database-url", database]
    assert "double" in said(call("enqueue", "double", '{"m": 1}', *known), 2)
    assert "double" in said(call("enqueue", "double", "-", *known, input='{"n": 1}\n{"m": 1}\n'), 2)


# runs


async def _work(database: str, *payloads: dict[str, Any]) -> list[int]:
    """The ids of new runs, once a worker of this process had nothing more to do."""
    async with App(database) as app:

        @app.task
        async def vary(well: bool) -> str:
            if not well:
                raise RuntimeError("it was to be")
            return "done"

        ids = await app.enqueue_many("vary", payloads, max_attempts=1)
        await Worker(app).run(once=True)
        return ids


def finish(database: str, count: int, *, well: bool) -> list[int]:
    return asyncio.run(_work(database, *[{"well": well}] * count))


def test_runs_are_listed_newest_first_page_by_page_and_filtered(database: str, invoke: Invoke) -> None:
    good = finish(database, 3, well=True)
    bad = finish(database, 2, well=False)
    queued = new_id(invoke("enqueue", "other", "--queue", "elsewhere", "--json"))

    def listed(*arguments: str) -> list[int]:
        return [run["id"] for run in json.loads(succeeded(invoke("runs", "list", "--json", *arguments)).stdout)]

    everything = [queued, *reversed(bad), *reversed(good)]
    assert listed() == everything
    assert listed("--state", "succeeded") == [*reversed(good)]
    assert listed("--state", "failed") == [*reversed(bad)]
    assert listed("--state", "queued") == listed("--queue", "elsewhere") == listed("--task", "other") == [queued]
    assert listed("--limit", "2") == everything[:2]
    assert listed("--limit", "2", "--before", str(everything[1])) == everything[2:4]
    assert listed("--task", "nothing") == []
    table = succeeded(invoke("runs", "list", "--limit", "3"))
    assert table.stdout.splitlines()[0].split()[:4] == ["ID", "STATE", "QUEUE", "TASK"]
    assert f"--before {everything[2]}" in table.stderr
    assert "raised: it was to be" in table.stdout
    assert "No runs match" in invoke("runs", "list", "--task", "nothing").stderr


def test_show_tells_everything_about_a_run(database: str, invoke: Invoke) -> None:
    (run_id,) = finish(database, 1, well=False)
    text = succeeded(invoke("runs", "show", str(run_id))).stdout
    assert re.search(r"^state +failed$", text, re.MULTILINE)
    assert "RuntimeError" in text
    run = json.loads(succeeded(invoke("runs", "show", str(run_id), "--json")).stdout)
    assert (run["id"], run["state"], run["error"]["reason"]) == (run_id, "failed", "raised")
    assert "no run 999999" in said(invoke("runs", "show", "999999"), 1)


def test_show_tells_of_each_attempt(database: str, invoke: Invoke) -> None:
    (run_id,) = finish(database, 1, well=False)
    succeeded(invoke("runs", "retry", str(run_id)))
    asyncio.run(_work(database))
    text = succeeded(invoke("runs", "show", str(run_id))).stdout
    table = text[text.index("ATTEMPT") :].splitlines()
    assert table[0].split() == ["ATTEMPT", "WORKER", "BEGAN", "TOOK", "WHAT"]
    assert [row.split(maxsplit=1)[0] for row in table[1:]] == ["1", "2"]
    assert all(row.endswith("raised: it was to be") for row in table[1:])
    run = json.loads(succeeded(invoke("runs", "show", str(run_id), "--json")).stdout)
    assert [(each["attempt"], each["error"]["reason"]) for each in run["attempts"]] == [(1, "raised"), (2, "raised")]
    queued = new_id(invoke("enqueue", "other", "--json"))
    assert "ATTEMPT" not in succeeded(invoke("runs", "show", str(queued))).stdout
    assert json.loads(succeeded(invoke("runs", "show", str(queued), "--json")).stdout)["attempts"] == []


def test_retry_queues_again_what_failed_and_nothing_else(database: str, invoke: Invoke) -> None:
    (bad,) = finish(database, 1, well=False)
    (good,) = finish(database, 1, well=True)
    assert f"run {bad}: queued again" in succeeded(invoke("runs", "retry", str(bad))).stdout
    result = invoke("runs", "retry", str(good), "999999")
    assert result.exit_code == 1
    assert f"run {good}: has not failed" in result.stdout
    run = json.loads(invoke("runs", "show", str(bad), "--json").stdout)
    assert (run["state"], run["failures"]) == ("queued", 0)


def test_retry_queues_again_all_that_fit(database: str, invoke: Invoke) -> None:
    bad = finish(database, 3, well=False)
    finish(database, 1, well=True)
    assert (
        succeeded(invoke("runs", "retry", "--state", "failed", "--dry-run")).stdout == "3 runs would be queued again\n"
    )
    assert succeeded(invoke("runs", "retry", "--queue", "elsewhere")).stdout == "0 runs queued again\n"
    first = invoke("runs", "retry", "--task", "vary", "--since", "1h", "--limit", "2", "--json")
    assert json.loads(succeeded(first).stdout) == {"runs": 2, "skipped": 0, "dry_run": False}
    assert rows(database, "select id from queue_service.runs order by id") == [(bad[0],), (bad[1],)]
    assert succeeded(invoke("runs", "retry", "--state", "failed")).stdout == "1 runs queued again\n"
    assert rows(database, "select count(*) from queue_service.finished_runs") == [(1,)]


def test_retry_tells_of_those_whose_singleton_key_is_held(database: str, invoke: Invoke) -> None:
    first = new_id(invoke("enqueue", "other", "--singleton-key", "k", "--json"))
    succeeded(invoke("runs", "cancel", str(first)))
    succeeded(invoke("enqueue", "other", "--singleton-key", "k"))
    printed = succeeded(invoke("runs", "retry", "--state", "cancelled")).stdout
    assert printed == "0 runs queued again; 1 skipped: a live run holds their singleton key\n"


@pytest.mark.parametrize(
    "arguments", [[], ["1", "--state", "failed"], ["1", "--dry-run"], ["1", "--json"], ["--limit", "3"]], ids=" ".join
)
def test_retry_wants_either_ids_or_a_filter(invoke: Invoke, arguments: list[str]) -> None:
    assert "by their ids" in said(invoke("runs", "retry", *arguments), 2)


def test_a_count_that_went_no_further_says_so() -> None:
    assert [render.count(number) for number in (0, 50_000, 50_001)] == ["0", "50,000", "50,000+"]


def test_a_list_that_takes_too_long_stops_and_says_where_to_go_on(
    database: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [new_id(invoke("enqueue", "rare" if n in {0, 3} else "other", "--json")) for n in range(5)]
    moments = itertools.count()
    monkeypatch.setattr(runs_commands, "time", SimpleNamespace(monotonic=lambda: float(next(moments))))
    monkeypatch.setattr(walks, "page", functools.partial(walks.page, scan_limit=1))
    first = succeeded(invoke("runs", "list", "--task", "rare", "--json"))
    assert [run["id"] for run in json.loads(first.stdout)] == [ids[3]]
    assert f"--before {ids[2]}" in first.stderr
    assert "QUEUE_SERVICE_READ_TIMEOUT" in first.stderr
    rest = succeeded(invoke("runs", "list", "--task", "rare", "--json", "--before", str(ids[2])))
    assert [run["id"] for run in json.loads(rest.stdout)] == [ids[0]]


READS: list[list[str]] = [
    ["runs", "list"], ["runs", "show", "1"], ["runs", "why", "1"], ["queues", "list"], ["workers", "list"],
    ["markers", "list"], ["markers", "show", "d", "m"], ["schedules", "list"], ["schedules", "show", "s"],
    ["schedules", "next", "s"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", READS, ids=" ".join)
def test_a_read_gives_up_in_time_and_says_what_to_do(database: str, invoke: Invoke, arguments: list[str]) -> None:
    tables = ("runs", "leases", "workers", "turn_markers", "schedules")
    with psycopg.connect(database) as busy:
        busy.execute(f"lock table {', '.join(f'queue_service.{table}' for table in tables)}".encode())
        text = said(invoke(*arguments, QUEUE_SERVICE_READ_TIMEOUT="50ms"), 3)
    assert "within 50ms" in text
    assert "QUEUE_SERVICE_READ_TIMEOUT=" in text


def test_cancel_ends_queued_runs_and_tells_of_the_others(database: str, invoke: Invoke) -> None:
    (over,) = finish(database, 1, well=True)
    first, second = (new_id(invoke("enqueue", "other", "--json")) for _ in range(2))
    result = invoke("runs", "cancel", str(first), str(over), str(second))
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"run {first}: cancelled", f"run {over}: is not live", f"run {second}: cancelled",
    ]  # fmt: skip
    states = rows(database, "select state from queue_service.finished_runs where id = any(%s)", [first, second])
    assert states == [("cancelled",), ("cancelled",)]


def test_delete_asks_first_and_forgets_for_good(database: str, invoke: Invoke) -> None:
    (over,) = finish(database, 1, well=True)
    queued = new_id(invoke("enqueue", "other", "--json"))
    assert invoke("runs", "delete", str(over), input="n\n").exit_code == 1
    succeeded(invoke("runs", "show", str(over)))
    assert "deleted" in succeeded(invoke("runs", "delete", str(over), input="y\n")).stdout
    succeeded(invoke("runs", "delete", "--yes", str(queued)))
    assert json.loads(invoke("runs", "list", "--json").stdout) == []
    assert invoke("runs", "delete", "--yes", str(queued)).exit_code == 1


# queues, workers


def test_queues_are_listed_paused_and_resumed(invoke: Invoke) -> None:
    assert "No queue" in succeeded(invoke("queues", "list")).stderr
    assert json.loads(invoke("queues", "list", "--json").stdout) == []
    succeeded(invoke("enqueue", "t", "--queue", "busy"))
    assert "queue busy: paused" in succeeded(invoke("queues", "pause", "busy")).stdout
    assert "was paused already" in succeeded(invoke("queues", "pause", "busy")).stdout
    (queue,) = json.loads(succeeded(invoke("queues", "list", "--json")).stdout)
    assert (queue["name"], queue["due"], queue["running"]) == ("busy", 1, 0)
    assert queue["paused_at"] is not None
    assert re.search(r"^busy +1 +0 +0 ", succeeded(invoke("queues", "list")).stdout, re.MULTILINE)
    assert "queue busy: resumed" in succeeded(invoke("queues", "resume", "busy")).stdout
    assert "was not paused" in succeeded(invoke("queues", "resume", "busy")).stdout
    (queue,) = json.loads(succeeded(invoke("queues", "list", "--json")).stdout)
    assert queue["paused_at"] is None
    succeeded(invoke("queues", "pause", "busy", "--for", "2h"))
    (queue,) = json.loads(succeeded(invoke("queues", "list", "--json")).stdout)
    assert queue["resumes_at"] > queue["paused_at"]
    assert invoke("queues", "pause", "busy", "--for", "2h", "--until", "2999-01-01T00:00:00Z").exit_code == 2


@pytest.mark.parametrize("until", ["2030-01-01T00:00:00", "2020-01-01T00:00:00Z"])
def test_a_pause_until_a_time_that_is_none_or_has_passed_is_refused(invoke: Invoke, until: str) -> None:
    succeeded(invoke("queues", "pause", "busy"))
    assert "until=20" in said(invoke("queues", "pause", "busy", "--until", until), 2)
    (queue,) = json.loads(succeeded(invoke("queues", "list", "--json")).stdout)
    assert queue["paused_at"] is not None
    assert queue["resumes_at"] is None


def test_a_queue_is_limited_and_shows_its_limits(invoke: Invoke) -> None:
    assert (
        "queue mail: limits set"
        in succeeded(
            invoke("queues", "limit", "mail", "--max-running", "10", "--rate", "100/1m", "--burst", "5")
        ).stdout
    )
    again = invoke("queues", "limit", "mail", "--max-running", "10", "--rate", "100/60s", "--burst", "5")
    assert "had these limits already" in succeeded(again).stdout
    (queue,) = json.loads(succeeded(invoke("queues", "list", "--json")).stdout)
    assert (queue["max_running"], queue["rate"], queue["period"], queue["burst"]) == (10, 100, "PT60S", 5)
    assert "10 running, 100 in 60 s, 5 at once" in succeeded(invoke("queues", "list")).stdout
    succeeded(invoke("queues", "limit", "mail", "--max-running-per-key", "3"))
    assert "3 of a key" in succeeded(invoke("queues", "list")).stdout
    succeeded(invoke("queues", "limit", "mail", "--none"))
    (queue,) = json.loads(succeeded(invoke("queues", "list", "--json")).stdout)
    assert {queue[name] for name in ("max_running", "max_running_per_key", "rate", "period", "burst")} == {None}


@pytest.mark.parametrize(
    "arguments",
    [[], ["--none", "--rate", "1/1s"], ["--rate", "100"], ["--rate", "x/1s"], ["--rate", "1/soon"], ["--burst", "5"],
     ["--max-running", "0"]],
    ids=" ".join,
)  # fmt: skip
def test_a_limit_that_makes_no_sense_is_refused(invoke: Invoke, arguments: list[str]) -> None:
    result = invoke("queues", "limit", "mail", *arguments)
    assert result.exit_code == 2, result.output
    assert json.loads(invoke("queues", "list", "--json").stdout) == []


def test_a_queue_is_purged_once_that_is_confirmed(invoke: Invoke) -> None:
    for _ in range(3):
        succeeded(invoke("enqueue", "t", "--queue", "busy"))
    assert invoke("queues", "purge", "busy").exit_code == 1
    assert "queue busy: 3 runs forgotten" in succeeded(invoke("queues", "purge", "busy", "--yes")).stdout
    assert "queue busy: 0 runs forgotten" in succeeded(invoke("queues", "purge", "busy", "--yes")).stdout


def test_workers_are_listed_with_what_they_hold(database: str, invoke: Invoke) -> None:
    assert "No worker is running" in succeeded(invoke("workers", "list")).stderr
    rows(
        database,
        """
        insert into queue_service.workers (name, version, revision, queues, seen_at)
        values ('here', '1', '9999', '{"a": 3}', clock_timestamp()),
               ('gone', '1', '9999', '{}', clock_timestamp() - interval '1 h')
        """,
    )
    rows(
        database,
        """
        with lease as (
            insert into queue_service.leases (worker_id, expires_at, run_ids)
            select min(id), clock_timestamp() + interval '1 min', array[101, 102] from queue_service.workers returning id
        )
        insert into queue_service.runs (id, queue, task, payload, state, lease_id)
        select unnest(array[101, 102]), 'a', 't', '{}', 'running', lease.id from lease
        """,
    )
    here, gone = json.loads(succeeded(invoke("workers", "list", "--json")).stdout)
    assert (here["name"], here["queues"], here["holds"], here["is_alive"]) == ("here", {"a": 3}, 2, True)
    assert (gone["name"], gone["holds"], gone["is_alive"]) == ("gone", 0, False)
    table = succeeded(invoke("workers", "list")).stdout
    assert re.search(r"here +yes +- +2 +a:3", table)
    assert re.search(r"gone +NO", table)


# worker and -a


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("tests.worker.tasks_for_tests", "names no App"),
        ("tests.worker.tasks_for_tests:", "names no App"),
        ("tests.worker.nowhere:app", "no module 'tests.worker.nowhere'"),
        ("nowhere.at_all:app", "no module 'nowhere'"),
        ("tests.worker.tasks_for_tests:ap", "Did you mean 'app'?"),
        ("tests.support:app", "It has no App at all"),
        ("json:dumps", "no App"),
        (":app", "names no App"),
        ("./tasks.py:app", "names no App"),
    ],
)
def test_an_app_that_cannot_be_found_is_named(invoke: Invoke, path: str, says: str) -> None:
    for command in (["worker", "-a", path], ["enqueue", "double", "-a", path]):
        assert says in said(invoke(*command), 2)


def test_an_app_is_needed_and_its_variable_is_named(invoke: Invoke) -> None:
    assert "QUEUE_SERVICE_APP" in said(invoke("worker"), 2)


def test_an_error_inside_the_apps_module_is_reported_in_one_sentence(invoke: Invoke, here: Path) -> None:
    (here / "broken_for_tests.py").write_text("import not_installed_for_tests\n")
    (here / "raising_for_tests.py").write_text("raise RuntimeError('while it was imported')\n")
    assert "not_installed_for_tests" in said(invoke("worker", "-a", "broken_for_tests:app"), 1)
    assert "while it was imported" in said(invoke("worker", "-a", "raising_for_tests:app"), 1)


@pytest.mark.parametrize("queue", ["default:x", "default:0", "default:-1", "default:", ":5", "default:10000000"])
def test_a_concurrency_that_makes_no_sense_is_refused(database: str, queue: str) -> None:
    finished = process("worker", "-a", TASKS, "--once", "-q", queue, "--database-url", database)
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_queue_that_is_named_twice_is_refused(invoke: Invoke) -> None:
    assert "queue a twice" in said(invoke("worker", "-a", TASKS, "--once", "-q", "a", "-q", "b", "-q", "a:3"), 2)


def test_a_worker_takes_its_app_from_the_working_directory(database: str, tmp_path: Path) -> None:
    (tmp_path / "my_tasks.py").write_text(
        textwrap.dedent(
            """
            from queue_service import App
            app = App()

            @app.task(queue="of the task")
            def shout(text: str) -> str:
                return text.upper()
            """
        )
    )
    on = {"QUEUE_SERVICE_DATABASE_URL": database}
    enqueued = process("enqueue", "shout", '{"text": "hello"}', "-a", "my_tasks:app", cwd=tmp_path, **on)
    assert enqueued.returncode == 0, enqueued.stderr
    worked = process("worker", "--once", cwd=tmp_path, QUEUE_SERVICE_APP="my_tasks:app", **on)
    assert worked.returncode == 0, worked.stderr
    assert rows(database, "select queue, result from queue_service.finished_runs") == [("of the task", "HELLO")]


def test_a_worker_works_on_the_queues_it_is_given_and_no_others(database: str) -> None:
    for queue in ("a", "b:2", "default"):
        rows(
            database, "insert into queue_service.runs (queue, task, payload) values (%s, 'double', '{\"n\": 1}')", queue
        )
    worked = process("worker", "-a", TASKS, "--once", "-q", "a", "-q", "b:2:3", "--database-url", database)
    assert worked.returncode == 0, worked.stderr
    assert rows(database, "select queue from queue_service.finished_runs order by queue") == [("a",), ("b:2",)]
    assert "b:2 (3 at once)" in worked.stderr


def test_once_exits_with_five_if_the_database_refused_a_result(database: str, tmp_path: Path) -> None:
    (tmp_path / "odd_tasks.py").write_text(
        textwrap.dedent(
            """
            import msgspec
            from queue_service import App
            app = App()

            @app.task
            async def odd():
                return msgspec.Raw(b"{this is no JSON")
            """
        )
    )
    rows(database, "insert into queue_service.runs (queue, task, payload) values ('default', 'odd', '{}')")
    worked = process("worker", "-a", "odd_tasks:app", "--once", "--database-url", database, cwd=tmp_path)
    assert rows(database, "select state from queue_service.finished_runs") == [("failed",)]
    assert worked.returncode == 5, worked.stderr


def test_a_log_in_json_is_one_object_a_line_on_standard_error(database: str) -> None:
    worked = process(
        "worker", "-a", TASKS, "--once", "--database-url", database, "--log-format", "json", "--name", "me"
    )
    assert worked.returncode == 0
    assert worked.stdout == ""
    events = [json.loads(line) for line in worked.stderr.splitlines() if line.startswith("{")]
    assert events[0]["event"] == "worker started"
    assert {event["level"] for event in events} == {"info"}
    quiet = process("worker", "-a", TASKS, "--once", "--database-url", database, "--log-level", "error")
    assert "worker started" not in quiet.stderr


# Errors


NEEDS_A_DATABASE: list[list[str]] = [
    ["db", "migrate"], ["db", "current"], ["db", "check"], ["enqueue", "t"], ["runs", "list"], ["runs", "show", "1"],
    ["runs", "retry", "1"], ["runs", "cancel", "1"], ["runs", "delete", "--yes", "1"], ["queues", "list"],
    ["queues", "limit", "q", "--none"], ["queues", "pause", "q"], ["queues", "resume", "q"], ["workers", "list"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", [*NEEDS_A_DATABASE, ["worker", "-a", TASKS, "--once"]], ids=" ".join)
def test_a_server_out_of_reach_exits_with_three(arguments: list[str]) -> None:
    text = said(call(*arguments, "--database-url", UNREACHABLE), 3)
    assert "cannot be reached" in text or "migration stopped" in text


@pytest.mark.parametrize("arguments", [each for each in NEEDS_A_DATABASE if each[0] != "db"], ids=" ".join)
def test_a_database_without_a_schema_exits_with_four_and_the_fix(empty_database: str, arguments: list[str]) -> None:
    assert "queue-service db migrate" in said(call(*arguments, "--database-url", empty_database), 4)


def test_debug_shows_the_traceback_and_keeps_the_exit_code() -> None:
    for shown in (
        process("runs", "list", "--database-url", UNREACHABLE, "--debug"),
        process("runs", "list", "--database-url", UNREACHABLE, QUEUE_SERVICE_DEBUG="1"),
    ):
        assert shown.returncode == 3
        assert "Traceback" in shown.stderr
        assert "Error: The database cannot be reached" in shown.stderr


def test_which_database_is_used_is_said_on_standard_error(invoke: Invoke) -> None:
    result = succeeded(invoke("runs", "list", "--json"))
    assert result.stderr.startswith("database: ")
    assert "(QUEUE_SERVICE_DATABASE_URL)" in result.stderr
    assert json.loads(result.stdout) == []


def test_a_pipe_that_nobody_reads_ends_it_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "queue_service", "config", "show"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_an_error_without_uvloop_is_not_one_about_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails() -> None:
        raise LookupError

    monkeypatch.setitem(sys.modules, "uvloop", None)
    with pytest.raises(LookupError) as raised:
        options.run(fails())
    assert raised.value.__context__ is None


# demo


def test_the_demo_on_a_small_directory_loses_nothing(tmp_path: Path) -> None:
    files = tmp_path / "files"
    for n in range(400):
        file = files / f"{n % 7}" / f"{n}.bin"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(1 + n * 40))
    ended = process("demo", str(files))
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "lost 0" in ended.stdout
    assert "wrong 0" in ended.stdout
    assert re.search(r"files 400 \| done 400 ", ended.stdout)


def test_the_demo_needs_no_more_than_a_handful_of_files(tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"{n}.bin").write_bytes(os.urandom(100))
    ended = process("demo", str(tmp_path))
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "files 5 | done 5 " in ended.stdout


def test_the_demo_on_an_empty_directory_says_so(tmp_path: Path) -> None:
    assert "holds no readable file" in said(call("demo", str(tmp_path)), 1)


def test_the_demo_runs_on_a_database_that_is_named(database: str, tmp_path: Path) -> None:
    for n in range(300):
        (tmp_path / f"{n}.bin").write_bytes(os.urandom(1_000))
    ended = process("demo", str(tmp_path), "--database-url", database)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "lost 0 | wrong 0" in ended.stdout


def test_python_dash_m_and_the_script_are_the_same(database: str) -> None:
    script = Path(sys.executable).parent / "queue-service"
    shown: Any = subprocess.run([str(script), "version"], capture_output=True, text=True, check=True)
    assert shown.stdout == process("version").stdout
