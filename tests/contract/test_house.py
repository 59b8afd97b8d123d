"""Rules of this code base that a tool can hold."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

import queue_service
from queue_service.db import revision
from queue_service.runs.model import RunState

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "queue_service"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULE, MAX_FUNCTION = 400, 45
VAGUE = {"utils", "helpers", "manager", "common", "base", "misc"}


def functions(module: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
class TestModule:
    def test_is_short_and_its_functions_are(self, module: Path) -> None:
        assert len(module.read_text().splitlines()) <= MAX_MODULE
        long = {function.name: body_lines(function) for function in functions(module)}
        assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION} == {}

    def test_has_a_name_that_says_something(self, module: Path) -> None:
        assert module.stem not in VAGUE

    def test_leaves_no_work_behind(self, module: Path) -> None:
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", module.read_text())

    def test_reads_the_environment_only_at_the_edge(self, module: Path) -> None:
        edge = {
            "settings.py",
            "app.py",
            "cluster.py",
            "options.py",
            "config.py",
            "reached.py",
            "migrating.py",
            "demo.py",
        }
        assert module.name in edge or "os.environ" not in module.read_text()


def test_the_public_names_are_those_that_are_documented() -> None:
    assert set(queue_service.__all__) <= set(dir(queue_service))
    assert {"App", "Run", "Retry", "Snooze", "Cancel", "Turn", "TurnFailure", "Worker"} <= set(queue_service.__all__)


def test_every_statement_has_a_caller() -> None:
    for statements in PACKAGE.rglob("*.sql"):
        names = re.findall(r"^-- name: (\w+)", statements.read_text(), re.MULTILINE)
        python = "".join(path.read_text() for path in statements.parent.glob("*.py"))
        assert [name for name in names if f'"{name}"' not in python] == []


def test_the_states_in_code_and_in_the_checks_are_the_same() -> None:
    migration = (ROOT / "alembic" / "versions" / "0001_runs.py").read_text()
    checked = re.findall(r"check \(state in \(([^)]*)\)\)", migration)
    states = {state.strip(" '") for part in checked for state in part.split(",")}
    assert states == {state.value for state in RunState}


def test_the_revision_this_code_needs_is_the_newest() -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "alembic"))
    assert ScriptDirectory.from_config(config).get_current_head() == revision.HEAD


def test_nothing_shadows_the_migration_library() -> None:
    assert not (ROOT / "alembic" / "__init__.py").exists()


def test_public_methods_say_what_they_do() -> None:
    methods = [method for name, method in inspect.getmembers(queue_service.App) if not name.startswith("_")]
    assert [method for method in methods if callable(method) and not inspect.getdoc(method)] == []


def test_no_test_sleeps_to_wait() -> None:
    allowed = {"support.py", "tasks_for_tests.py"}
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name not in allowed and path != Path(__file__):
            waits = re.findall(
                r"^    (?:    )?(?:await )?(?:asyncio|time)\.sleep\((?!0\))[^#\n]*$", path.read_text(), re.MULTILINE
            )
            assert waits == [], f"{path.relative_to(ROOT)} sleeps; wait on a condition, or say why in a comment"


def test_the_command_line_prints_in_one_place() -> None:
    for path in (PACKAGE / "cli").glob("*.py"):
        if path.name != "render.py":
            assert not re.search(r"click\.s?echo\(|(?<![\w.])print\(", path.read_text()), (
                f"{path.name}: use render.echo"
            )
