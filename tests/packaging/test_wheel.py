"""The wheel works by itself: built from a copy, installed in an environment of its own, used from an empty directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import psycopg
import pytest

from queue_service import __version__
from queue_service.db import revision

REPOSITORY = Path(__file__).parents[2]

# The first test builds and installs the wheel, too.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What it printed; a failure is shown with all it said."""
    clean = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    finished = subprocess.run(
        [str(each) for each in command],
        cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is, or is about to be, committed."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("built")
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=REPOSITORY)
    for name in filter(None, listed.split("\0")):
        source, target = REPOSITORY / name, copy / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, cwd=copy)
    (made,) = built.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `python` and `queue-service` where only our dependencies come from elsewhere."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    paths = {"base": str(place), "platbase": str(place)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    command: list[str | Path] = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install"]
    run(*command, "--no-deps", "--no-index", "--quiet", wheel, cwd=place)
    # After our own packages on the path, so that ours come first.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_every_module_statement_and_revision(wheel: Path) -> None:
    inside = set(names(wheel))
    package = REPOSITORY / "queue_service"
    sources = [path for path in package.rglob("*") if path.suffix in {".py", ".sql", ".typed"}]
    assert len(sources) > 40
    missing = {str(path.relative_to(REPOSITORY)) for path in sources} - inside
    assert missing == set()
    revisions = [path.name for path in (REPOSITORY / "alembic" / "versions").glob("*.py")]
    assert any(name.startswith(f"{revision.HEAD}_") for name in revisions)
    for path in (*(f"versions/{name}" for name in revisions), "env.py", "script.py.mako"):
        assert f"queue_service/db/_alembic/{path}" in inside


def test_the_wheel_has_the_name_and_the_version_of_this_package(wheel: Path) -> None:
    assert wheel.name == f"pg_queue_service-{__version__}-py3-none-any.whl"


def test_the_wheel_is_typed_and_holds_nothing_else(wheel: Path) -> None:
    inside = names(wheel)
    assert "queue_service/py.typed" in inside
    tops = {name.split("/")[0] for name in inside}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"queue_service"}
    assert [name for name in inside if "__pycache__" in name or name.endswith(".pyc")] == []
    assert [name for name in inside if name.endswith("alembic/__init__.py")] == []


def test_the_repository_never_shadows_alembic() -> None:
    assert not (REPOSITORY / "alembic" / "__init__.py").exists()


def test_the_metadata_names_the_script_the_licence_and_the_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        read = {Path(name).name: archive.read(name).decode() for name in names(wheel) if ".dist-info/" in name}
    assert "queue-service = queue_service.cli:main" in read["entry_points.txt"]
    assert "Name: pg-queue-service\n" in read["METADATA"]
    assert f"Version: {__version__}\n" in read["METADATA"]
    assert "Requires-Python: >=3.11" in read["METADATA"]
    assert "LICENSE" in read
    for name in ("psycopg", "sqlalchemy", "alembic", "click", "structlog", "msgspec"):
        assert f"Requires-Dist: {name}" in read["METADATA"]


def test_an_installed_wheel_migrates_enqueues_and_works_from_an_empty_directory(
    installed: Path, empty_database: str, tmp_path: Path
) -> None:
    script = installed / "queue-service"
    on = {"QUEUE_SERVICE_DATABASE_URL": empty_database}
    where = run(installed / "python", "-c", "import queue_service; print(queue_service.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)

    shown = json.loads(run(script, "version", "--json", cwd=tmp_path))
    assert shown == {"version": __version__, "schema": revision.HEAD}
    migrated = run(script, "db", "migrate", "--database-url", empty_database, cwd=tmp_path)
    assert f"none -> {revision.HEAD}" in migrated
    run(script, "db", "check", "--accept", "fsync", "--accept", "full-page-writes", cwd=tmp_path, **on)
    (tmp_path / "my_tasks.py").write_text(
        textwrap.dedent(
            """
            import queue_service
            from queue_service import App

            app = App()

            @app.task
            async def where(greeting: str) -> list[str]:
                return [greeting, queue_service.__file__]
            """
        )
    )
    enqueued = run(script, "enqueue", "where", '{"greeting": "hello"}', "-a", "my_tasks:app", cwd=tmp_path, **on)
    assert "enqueued run" in enqueued
    run(script, "worker", "--once", "-a", "my_tasks:app", cwd=tmp_path, **on)
    with psycopg.connect(empty_database) as conn:
        finished = conn.execute("select state, result from queue_service.finished_runs").fetchall()
    assert finished == [("succeeded", ["hello", where])]


def test_an_installed_wheel_prints_its_migrations(installed: Path, tmp_path: Path) -> None:
    assert "create table queue_service.runs" in run(installed / "queue-service", "db", "sql", cwd=tmp_path)


def test_types_are_seen_from_outside(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        textwrap.dedent(
            """
            from queue_service import App, Run

            app = App()

            @app.task
            async def double(n: int) -> int:
                return 2 * n

            @app.task(queue="q")
            async def name(run: Run, text: str) -> str:
                return text

            async def body() -> None:
                await double.enqueue(n=1)
                await name.enqueue(text="x")
                await double.enqueue(n="wrong")
                await name.enqueue(nothing="wrong")
            """
        )
    )
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(installed / "python"), "user.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    errors = [line for line in checked.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in errors if "user.py" in line] == ["17", "18"], checked.stdout
