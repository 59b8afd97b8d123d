"""A name that a page uses as ours can be imported from where users import."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import re
from pathlib import Path

import pytest

import queue_service
from tests.contract.test_docs import PAGES, ROOT

# Where users import from. Pages about the inside name classes of any module.
PUBLIC = ("", ".errors", ".gateway", ".client", ".logs", ".supervisor", ".supervisor.child", ".testing")
INSIDE = {"architecture.md"}
# What is somebody else's: of SQLAlchemy, psycopg and httpx2, of frameworks, of the standard library; and a header.
OUTSIDE = {
    "AsyncClient", "AsyncConnection", "AsyncSession", "Connection", "EventSource", "FastAPI", "Origin", "Session", "TaskGroup",
}  # fmt: skip

FENCED = re.compile(r"```.*?```", re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
# Alone, or called, wherever that stands; of a dotted name the first part that looks like a class.
CLASS = r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*|NOT_MINE"
ALONE = re.compile(rf"(?:\w+\.)*({CLASS})(?:\.\w+)*")
CALLED = re.compile(rf"(?<![\w./-])(?:[a-z_]\w*\.)*({CLASS})\(")


def names_in(page: str) -> set[str]:
    """Classes that the text of a page names as code, outside of its blocks."""
    found: set[str] = set()
    for code in CODE.findall(FENCED.sub("", page)):
        alone = ALONE.fullmatch(code)
        found |= {alone[1]} if alone else set(CALLED.findall(code))
    return found


@functools.cache
def defined() -> set[str]:
    """The classes of all our modules, and the names of types."""
    paths = (ROOT / "queue_service").rglob("*.py")
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    return classes | {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def known(page: Path) -> set[str]:
    modules = [importlib.import_module(queue_service.__name__ + name) for name in PUBLIC]
    ours = {name for module in modules for name in getattr(module, "__all__", dir(module))}
    if page.name in INSIDE or page.parent.name == "decisions":
        ours |= defined()
    return ours | OUTSIDE | set(dir(builtins))


def test_names_are_found_in_the_text_and_not_in_blocks() -> None:
    page = (
        "Return `Snooze(delay)`, `NOT_MINE` or an `Event`; `app.enqueue(…)`, `SELECT`, `App.enqueue`, `x/Application Support`,\n"
        "`Deliveries(app, retry=Retry(…))`, `queue_service.errors.TurnEnded`, `A` and `None`.\n```python\nHidden()\n```\n`--Flag`"
    )
    assert names_in(page) == {"Snooze", "NOT_MINE", "Event", "App", "Deliveries", "Retry", "TurnEnded", "None"}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "examples" / "README.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_name_of_a_page_can_be_imported(page: Path) -> None:
    assert names_in(page.read_text()) - known(page) == set()


def test_what_is_named_as_somebody_elses_is_on_some_page() -> None:
    assert OUTSIDE - set().union(*(names_in(page.read_text()) for page in PAGES)) == set()


def test_what_every_public_module_lists_is_there() -> None:
    for name in PUBLIC:
        module = importlib.import_module(queue_service.__name__ + name)
        assert [each for each in getattr(module, "__all__", []) if not hasattr(module, each)] == []
