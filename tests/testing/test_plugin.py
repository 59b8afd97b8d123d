"""The pytest plugin, as a project that has installed it uses it: in a pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from queue_service import App
from queue_service.errors import ConfigError
from queue_service.testing import databases, on_database
from tests.support import own_basetemp

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text()
PLUGIN = 'pytest_plugins = ["queue_service.testing"]\n'


def ran(project: Path, test: str, *options: str, conftest: str = PLUGIN, **environment: str) -> str:
    """What pytest says at the end of such a run, and all of it where a test was not collected."""
    (project / "conftest.py").write_text(conftest)
    (project / "test_it.py").write_text(test)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", own_basetemp(project), *options, str(project)],
        cwd=project,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def names_on(server: str) -> set[str]:
    with psycopg.connect(server) as conn:
        return {name for (name,) in conn.execute("select datname from pg_database").fetchall()}


def test_the_page_is_a_test_that_passes(tmp_path: Path, server: str) -> None:
    block = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    said = ran(tmp_path, block[1], "-o", "asyncio_mode=auto", conftest="", QUEUE_SERVICE_TEST_DATABASE_URL=server)
    assert "2 passed" in said, said


def test_each_test_has_a_database_of_its_own_and_none_is_left(tmp_path: Path, server: str) -> None:
    before = names_on(server)
    test = """
import pytest
from queue_service.testing import assert_enqueued, refute_enqueued

@pytest.mark.asyncio
@pytest.mark.parametrize("n", range(3))
async def test_one(opened_app, n):
    await refute_enqueued(opened_app, "noop")
    await opened_app.enqueue("noop", {})
    await assert_enqueued(opened_app, "noop", count=1)
    assert n < 2, "the last one fails"
"""
    said = ran(tmp_path, test, QUEUE_SERVICE_TEST_DATABASE_URL=server)
    assert "1 failed, 2 passed" in said, said
    assert names_on(server) == before


def test_a_test_without_an_event_loop_works_off_what_its_code_enqueued(tmp_path: Path, server: str) -> None:
    conftest = f"""
{PLUGIN}
import psycopg
import pytest
from queue_service import App

app = App("postgresql://nowhere.invalid/production")

@app.task
def noop():
    pass

@pytest.fixture(scope="session")
def queue_service_app():
    return app

@pytest.fixture(scope="session")
def queue_service_prepare():
    def prepare(conninfo):
        with psycopg.connect(conninfo) as conn:
            conn.execute("create table orders (n int)")
    return prepare
"""
    test = """
import asyncio
import psycopg
from conftest import app
from queue_service.testing import drain

def test_sync(tested_app, queue_service_database):
    assert tested_app is app
    with psycopg.connect(queue_service_database) as conn:
        conn.execute("insert into orders values (1)")
        app.sync.enqueue("noop", {}, conn=conn)
    assert asyncio.run(drain(app)).succeeded == 1

def test_another_one(tested_app, queue_service_database):
    assert asyncio.run(drain(app)).succeeded == 0
    with psycopg.connect(queue_service_database) as conn:
        assert conn.execute("select count(*) from orders").fetchone() == (0,)

def test_the_app_is_back_where_it_was():
    assert "nowhere.invalid" in str(app.database)
"""
    said = ran(tmp_path, test, conftest=conftest, QUEUE_SERVICE_TEST_DATABASE_URL=server)
    assert "3 passed" in said, said


def test_without_a_server_it_makes_an_embedded_one(tmp_path: Path) -> None:
    test = """
import os, tempfile

def test_it(tested_app):
    with tested_app.sync as q:
        assert q.enqueue("noop", {})
    assert [name[:20] for name in os.listdir(tempfile.gettempdir())] == ["queue_service-tests-"]
"""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    said = ran(tmp_path, test, TMPDIR=str(scratch))
    assert "1 passed" in said, said
    assert list(scratch.iterdir()) == [], "its server left something behind"


def test_a_server_that_crashed_while_tests_used_it_is_an_error_with_what_its_log_says(tmp_path: Path) -> None:
    test = """
import os, signal
import psycopg, pytest

def test_it(queue_service_database):
    with psycopg.connect(queue_service_database, autocommit=True) as conn:
        os.kill(conn.info.backend_pid, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            conn.execute("select 1")
"""
    said = ran(tmp_path, test)
    assert re.search(r"crashed while tests used it(.|\n)*\(PID \d+\) was terminated by signal 9", said), said
    assert "Tests look for it" not in said


def test_a_statement_that_speaks_of_a_crash_is_none(tmp_path: Path) -> None:
    test = '''
import psycopg, pytest

def test_it(queue_service_database):
    with psycopg.connect(queue_service_database, autocommit=True) as conn, pytest.raises(psycopg.Error):
        conn.execute("set log_statement = 'all'")
        conn.execute("""select 1 / 0, 'PANIC:  here', '
2026-01-01 00:00:00 UTC [1] PANIC:  there', 'process (PID 1) was terminated by signal 9'""")
'''
    said = ran(tmp_path, test)
    assert re.search(r"^1 passed in", said, re.MULTILINE), said


def test_the_failure_of_an_assertion_shows_the_line_of_the_test(tmp_path: Path, server: str) -> None:
    test = """
import pytest
from queue_service.testing import assert_enqueued

@pytest.mark.asyncio
async def test_one(opened_app):
    await assert_enqueued(opened_app, "mail", {"to": "ada"})
"""
    said = ran(tmp_path, test, QUEUE_SERVICE_TEST_DATABASE_URL=server)
    assert "There is no queued run of task 'mail' with payload={'to': 'ada'}." in said
    assert ">       await assert_enqueued(" in said
    assert "raise AssertionError" not in said, "it shows our lines instead"


def test_the_functions_do_without_pytest() -> None:
    program = "import sys; sys.modules['pytest'] = None; import queue_service.testing"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_an_app_that_is_open_stays_where_it_is(app: App, database: str) -> None:
    with pytest.raises(ConfigError, match="is open"):
        with on_database(app, database):
            pass


def test_a_database_is_gone_even_where_its_test_left_a_session_open(server: str, template: str) -> None:
    with databases.made(server, template) as conninfo:
        left = psycopg.connect(conninfo)
        name = left.info.dbname
    assert name not in names_on(server)
    with pytest.raises(psycopg.OperationalError):
        left.execute("select 1")
