"""What this project is installed as: the name is ours, the version stands in one place, and nothing that a person reads
makes them install the package that has our import name on the public index."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import queue_service
from queue_service.errors import install_extra

ROOT = Path(__file__).parents[2]
INSTALL = r"\b(?:install(?:s|ed|ing)?|uvx|uv add|poetry add|--with)\b(?:\s+-\S+)*\s+[`'\"]?"
FOREIGN = re.compile(
    # As a requirement, with extras or a version.
    r"(?<!pg[-_.])\bqueue[-_.]service\s*(?:\[|[=~!<>]=|\s@\s)"
    # As what is installed; ours too, where no path or wheel is named: the index would be asked for it.
    rf"|{INSTALL}queue[-_.]service\b|\bpip3?\s+{INSTALL}pg[-_.]queue[-_.]service\b",
    re.IGNORECASE,
)
THEIRS, COMMAND = queue_service.__name__, "queue-service"
OURS = f"pg_{THEIRS}"


def tracked() -> Iterator[tuple[Path, str]]:
    """Every text file that git knows, and what is in it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S607
    for path in (ROOT / name for name in listed.split("\0") if name):
        content = path.read_bytes() if path.is_file() else b"\0"
        if b"\0" not in content:
            yield path, content.decode()


def project() -> dict[str, object]:
    read: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return read


@pytest.mark.parametrize(
    "said",
    [
        f"pip install '{THEIRS}[embedded]'", f"pip install {THEIRS}", f"pip install -U {THEIRS}", f"{THEIRS}==1",
        f"{THEIRS} >= 0.1", f"{COMMAND}[cli]", f"uv add {THEIRS}", f"installing {THEIRS} now",
        f"pip install pg-{COMMAND}", f"pip install '{OURS}[cli]'",
    ],
)  # fmt: skip
def test_what_installs_another_package_is_found(said: str) -> None:
    assert FOREIGN.search(said)


@pytest.mark.parametrize(
    "said", ["pip install '.[embedded]'", f"pip install './dist/{OURS}-1-py3-none-any.whl[cli]'", f"{OURS}[test]"]
)
def test_what_installs_from_a_path_is_allowed(said: str) -> None:
    assert not FOREIGN.search(said)


def test_nothing_names_another_package_as_what_to_install() -> None:
    found = [f"{path.relative_to(ROOT)}: {hit[0]}" for path, text in tracked() for hit in FOREIGN.finditer(text)]
    assert found == []


def test_the_distribution_has_a_name_of_its_own() -> None:
    assert project()["name"] == "pg-queue-service"


def test_every_extra_that_a_message_names_is_there() -> None:
    named = {
        extra
        for path, text in tracked()
        if path.is_relative_to(ROOT / "queue_service")
        for extra in re.findall(r"install_extra\(['\"](\w+)['\"]\)", text)
    }
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    assert {"client", "embedded", "gateway"} <= named <= set(extras)
    assert "pip install '.[client]'" in install_extra("client")


@pytest.mark.parametrize(
    ("missing", "extra", "program"),
    [
        ("httpx2", "client", "import queue_service.client"),
        ("starlette", "gateway", "from queue_service.cli import cli; cli(['gateway', '--database-url', 'x'])"),
    ],
)
def test_a_part_whose_extra_is_missing_says_how_to_install_it(missing: str, extra: str, program: str) -> None:
    started = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{missing!r}] = None; {program}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert started.returncode != 0
    assert f"needs {missing}" in started.stderr
    assert install_extra(extra) in started.stderr


def test_the_version_stands_in_one_place() -> None:
    assert project()["dynamic"] == ["version"]
    assert "version" not in project()
    literal = re.compile(rf"""["']{re.escape(queue_service.__version__)}["']""")
    places = [path.relative_to(ROOT) for path, text in tracked() if literal.search(text)]
    assert places == [Path("queue_service/version.py")]
