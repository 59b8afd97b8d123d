"""Logs: events reach the standard logging tree with their fields, and only the command line prints them."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog

import queue_service
from queue_service import logs

PACKAGE = Path(queue_service.__file__).parent
METHODS = {"debug", "info", "warning", "error", "exception", "critical"}
# `Logger.makeRecord` refuses these as extra fields; the others are arguments of the logging call itself.
TAKEN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "exc_info", "stack_info", "stacklevel", "event"}


@pytest.fixture
def tree() -> Iterator[None]:
    """The logging tree as it was, afterwards."""
    root, alembic = logging.getLogger(), logging.getLogger("alembic")
    handlers, level, quiet = root.handlers[:], root.level, alembic.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    alembic.setLevel(quiet)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()
    logs.configured = None


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_an_event_reaches_the_standard_logger_with_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="queue_service.somewhere"):
        logs.get_logger("queue_service.somewhere").info("worker started", worker_id=7)
    [record] = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == (
        "queue_service.somewhere", "INFO", "worker started",
    )  # fmt: skip
    assert vars(record)["worker_id"] == 7


def test_what_is_below_the_level_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="queue_service.somewhere"):
        logs.get_logger("queue_service.somewhere").info("not this")
        logs.get_logger("queue_service.somewhere").warning("this")
    assert [record.getMessage() for record in caplog.records] == ["this"]


def test_context_bound_around_an_event_comes_along(caplog: pytest.LogCaptureFixture) -> None:
    with structlog.contextvars.bound_contextvars(run_id=12):
        logs.get_logger("queue_service.somewhere").warning("this", attempt=2)
    assert (vars(caplog.records[0])["run_id"], vars(caplog.records[0])["attempt"]) == (12, 2)


def test_importing_the_package_leaves_the_logging_tree_alone() -> None:
    # In an interpreter of its own: here another test's command line may have configured both.
    code = """
import logging, structlog
from queue_service import logs
logs.get_logger("queue_service.somewhere").info("nobody asked")
print(logging.getLogger("queue_service").handlers, logging.getLogger().handlers, structlog.is_configured())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (ran.stdout, ran.stderr) == ("[] [] False\n", "")


@pytest.mark.usefixtures("tree")
def test_json_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", fmt="json")
    log = logs.get_logger("queue_service.somewhere")
    log.info("worker started", worker_id=7, queues={"a": 1})
    log.debug("not this")
    [line] = printed(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "worker started", "worker_id": 7, "queues": {"a": 1}, "logger": "queue_service.somewhere",
        "level": "info",
    }  # fmt: skip


@pytest.mark.usefixtures("tree")
def test_lines_of_other_libraries_look_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="debug", fmt="json")
    logging.getLogger("theirs").debug("hello %s", "world", extra={"n": 1})
    [line] = printed(capsys)
    assert (line["event"], line["logger"], line["level"], line["n"]) == ("hello world", "theirs", "debug", 1)


@pytest.mark.usefixtures("tree")
def test_an_exception_is_part_of_its_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", fmt="json")
    try:
        os.environ["GONE"]
    except KeyError:
        logs.get_logger("queue_service.somewhere").exception("it broke")
    [line] = printed(capsys)
    assert (line["event"], line["level"]) == ("it broke", "error")
    assert "KeyError: 'GONE'" in line["exception"]


@pytest.mark.usefixtures("tree")
def test_a_value_that_is_no_json_does_not_lose_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", fmt="json")
    logs.get_logger("queue_service.somewhere").info("odd", path=Path("/x"), kinds={1}, text="\ud800\x00")
    [line] = printed(capsys)
    assert line["event"] == "odd"
    assert "/x" in line["path"]


@pytest.mark.usefixtures("tree")
def test_off_a_terminal_auto_means_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", fmt="auto")
    logs.get_logger("queue_service.somewhere").info("hello")
    assert printed(capsys)[0]["event"] == "hello"


@pytest.mark.usefixtures("tree")
def test_on_a_terminal_auto_means_console(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logs.configure(level="info", fmt="auto")
    logs.get_logger("queue_service.somewhere").info("hello", n=1)
    line = capsys.readouterr().err
    assert "hello" in line
    assert not line.startswith("{")


@pytest.mark.usefixtures("tree")
def test_an_exception_is_shown_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", fmt="console")
    try:
        os.environ["GONE"]
    except KeyError:
        logs.get_logger("queue_service.somewhere").exception("it broke")
    shown = capsys.readouterr().err
    assert "it broke" in shown
    assert "GONE" in shown


@dataclass(frozen=True)
class Handled:
    id: int = 7
    task: str = "greet"
    queue: str = "mail"
    attempt: int = 2
    turn: None = None


@pytest.fixture
def handling(tree: None) -> Iterator[None]:
    """As in a handler."""
    before = logs.running.set(Handled())
    yield
    logs.running.reset(before)


OF_THE_RUN = {"run_id": 7, "task": "greet", "queue": "mail", "attempt": 2}


@pytest.mark.usefixtures("handling")
def test_what_a_handler_logs_is_a_json_line_with_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", fmt="auto")
    structlog.get_logger("theirs").info("hello %s", "Ada", name="a field", thread=1)
    structlog.get_logger("theirs").debug("not this")
    logging.getLogger("theirs").info("plain %s", "Ada")
    lines = printed(capsys)
    assert all(line.pop("timestamp").endswith("Z") for line in lines)
    level = {"logger": "theirs", "level": "info"}
    assert lines == [
        {"event": "hello Ada", "name": "a field", "thread": 1, **level, **OF_THE_RUN},
        {"event": "plain Ada", **level, **OF_THE_RUN},
    ]


@pytest.mark.usefixtures("handling")
def test_what_a_handler_logs_is_shown_on_a_terminal_with_its_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logs.configure(level="info", fmt="auto")
    structlog.get_logger("theirs").info("hello")
    line = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().err)
    assert all(f"{name}={value}" in line for name, value in OF_THE_RUN.items())
    assert not line.startswith("{")


@pytest.mark.usefixtures("handling")
def test_an_exception_that_a_handler_logs_is_part_of_its_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", fmt="json")
    try:
        os.environ["GONE"]
    except KeyError:
        structlog.get_logger("theirs").exception("it broke")
    [line] = printed(capsys)
    assert "KeyError: 'GONE'" in line["exception"]
    assert line["run_id"] == 7


@pytest.mark.usefixtures("handling")
def test_our_own_lines_are_not_taken_for_the_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    """What works for the whole process may have been started by a handler, and stays in its context."""
    logs.configure(level="info", fmt="json")
    logs.get_logger("queue_service.services.notifier").info("hello")
    assert "run_id" not in printed(capsys)[0]


@pytest.mark.usefixtures("handling")
def test_what_an_event_says_of_a_run_comes_before_the_handlers() -> None:
    assert logs.run_context(None, "info", {"event": "hello", "run_id": 1}) == {"event": "hello", "run_id": 1}
    said = logs.run_context(None, "info", {"event": "hello", "queue": "named"})
    assert said == {"event": "hello", **OF_THE_RUN, "queue": "named"}
    record = logging.makeLogRecord({"run_id": 1})
    assert logs.RunFilter().filter(record)
    assert (vars(record)["run_id"], vars(record)["task"]) == (1, None)


@pytest.mark.usefixtures("tree")
def test_configuring_twice_prints_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="info", fmt="json")
    logs.configure(level="info", fmt="json")
    logs.get_logger("queue_service.somewhere").info("hello")
    assert len(printed(capsys)) == 1


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize("level", logs.LEVELS)
def test_migrations_are_quiet_unless_something_is_wrong(capsys: pytest.CaptureFixture[str], level: str) -> None:
    logs.configure(level=level, fmt="json")
    logging.getLogger("alembic.runtime.migration").info("Context impl PostgresqlImpl.")
    assert printed(capsys) == []
    logging.getLogger("alembic.runtime.migration").error("wrong")
    assert len(printed(capsys)) == 1


def calls() -> list[tuple[str, ast.Call]]:
    return [
        (f"{file.relative_to(PACKAGE)}:{node.lineno}", node)
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in METHODS
        and ast.unparse(node.func.value).endswith("log")
    ]


def test_every_event_is_a_constant_with_fields_that_a_record_can_hold() -> None:
    assert len(calls()) > 10
    for where, call in calls():
        assert len(call.args) == 1, where
        said = call.args[0]
        events = [said.body, said.orelse] if isinstance(said, ast.IfExp) else [said]
        assert all(isinstance(event, ast.Constant) for event in events), where
        fields = {keyword.arg for keyword in call.keywords} - {"exc_info"}
        assert not fields & TAKEN, where


def test_no_event_carries_a_payload_a_result_or_a_connection_string() -> None:
    for where, call in calls():
        shown = " ".join(ast.unparse(keyword.value) for keyword in call.keywords)
        assert not {"payload", "result", "metadata", "conninfo"} & set(shown.replace(".", " ").split()), where
