"""Every Python block of the documentation is run, on a real database."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import create_async_engine

from queue_service import App

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- run: (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)
# Blocks that are whole programs, and what they print. The others are fragments that find an open `app`.
PROGRAMS = {
    "example": "succeeded Hello, Ada, on attempt 1\n",
    "turns": (
        "reply Hello, Ada\n"
        "error worker_unresponsive The agent stopped responding. Please send the message again.\n"
        "worker_died\n"
    ),
    "supervisors": "reply Hello, Ada\n",
    "steering": ("m0 a tent and make it red ['m0', 'm1']\nm1 a tent and make it red ['m0', 'm1']\n"),
    "hooks": "ready\ndone\n",
    "agents_handler": "['message', 'delta', 'delta', 'delta', 'reply']\n",
    "agents_tools": "Booked: number 1 ['a table']\n",
    "exactly_once": "succeeded {'paid': 30} on attempt 2\n(70, 1)\n",
    "steps": "succeeded with receipt 7 on attempt 2 - charged [30]\n",
    "gateway": "5 routes\n",
    "logging": (
        '{"run_id": 1, "task": "greet", "queue": "default", "attempt": 1, "letters": 3, "event": "greeting"}\n'
    ),
    "batches": "500\n500\n201\n1201 (1201,)\n",
    "schedules": "['pulse', 'report']\n5\nquick for pulse\n",
    "streams": (
        "3 ['delta', 'delta']\n1 status {'text': 'thinking'}\n2 delta {'text': 'Hel'}\n3 delta {'text': 'lo'}\n"
    ),
}
BLOCKS = {name: code for page in PAGES for name, code in BLOCK.findall(page.read_text())}


def test_every_block_has_a_name() -> None:
    assert "" not in BLOCKS
    assert len(BLOCKS) == sum(page.read_text().count("```python") for page in PAGES)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_the_documentation_prints_what_it_should(name: str, database: str, tmp_path: Path) -> None:
    program = tmp_path / "example.py"
    program.write_text(BLOCKS[name])
    done = subprocess.run(
        [sys.executable, str(program)],
        env={"QUEUE_SERVICE_DATABASE_URL": database, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, PROGRAMS[name]), done.stderr
    # One of the programs has a run fail once.
    assert set(done.stderr.splitlines()) <= {"run failed, will be tried again"}


def test_the_readme_example_has_about_twenty_lines() -> None:
    assert len([line for line in BLOCKS["example"].splitlines() if line.strip()]) <= 20


@pytest.fixture
async def names(app: App, database: str) -> AsyncIterator[dict[str, Any]]:
    engine = create_async_engine(
        "postgresql+psycopg://",
        async_creator=lambda: psycopg.AsyncConnection.connect(database),
        poolclass=NullPool,
    )
    yield {"app": app, "engine": engine, "psycopg": psycopg}
    await engine.dispose()


@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - PROGRAMS.keys() - {""}))
async def test_a_block_of_the_documentation_runs(name: str, names: dict[str, Any]) -> None:
    code = "async def block():\n" + textwrap.indent(BLOCKS[name], "    ")
    exec(compile(code, name, "exec"), names)  # noqa: S102 - our own documentation
    call = names["block"]
    await (asyncio.to_thread(lambda: asyncio.run(call())) if name == "sync" else call())
