"""`queue-service gateway`, as its own process."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Start = Callable[..., tuple["subprocess.Popen[str]", int]]
Ask = Callable[..., http.client.HTTPResponse]


@pytest.fixture
def start(database: str) -> Iterator[Start]:
    """Starts a gateway; it and its port."""
    running: list[subprocess.Popen[str]] = []

    def start_one(*arguments: str, cwd: str | None = None, **env: str) -> tuple[subprocess.Popen[str], int]:
        child = subprocess.Popen(
            [sys.executable, "-m", "queue_service", "gateway", "--port", "0", *arguments],
            env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database, **env}, stderr=subprocess.PIPE, text=True,
            cwd=cwd,
        )  # fmt: skip
        running.append(child)
        assert child.stderr is not None
        for line in child.stderr:
            if found := re.search(r"gateway on http://\S+:(\d+)\.", line):
                return child, int(found[1])
        raise AssertionError("it did not start")

    yield start_one
    for child in running:
        child.kill()
        child.wait()
        assert child.stderr is not None
        child.stderr.close()


def refused(database: str, *arguments: str, cwd: str | None = None, **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "queue_service", "gateway", *arguments],
        env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database, **env},
        stderr=subprocess.PIPE, text=True, timeout=60, check=False, cwd=cwd,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Asks a gateway; the response, whose socket is closed in the end."""
    opened: list[http.client.HTTPConnection] = []

    def ask_one(port: int, path: str = "/api/chat/events?stream=a", **headers: str) -> http.client.HTTPResponse:
        conn = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        opened.append(conn)
        conn.request("GET", path, headers=headers)
        response = conn.getresponse()
        responses.append(response)
        return response

    responses: list[http.client.HTTPResponse] = []
    yield ask_one
    for response in responses:
        response.close()
    for conn in opened:
        conn.close()


def test_says_goodbye_and_ends_within_its_grace_with_streams_open(start: Start, ask: Ask) -> None:
    child, port = start()
    clients = [ask(port) for _ in range(20)]
    for client in clients:
        assert client.status == 200
        assert b"welcome" in client.readline() + client.readline() + client.readline()
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 0
    for client in clients:
        assert b"event: goodbye" in client.read()


def test_serves_the_page_and_nothing_from_elsewhere_may_run_in_it(start: Start, ask: Ask) -> None:
    _, port = start()
    answer = ask(port, "/")
    assert answer.status == 200
    assert "default-src 'none'" in (answer.getheader("content-security-policy") or "")
    page = answer.read().decode()
    assert not re.search(r"https?://|<style|<script>| on\w+=", page)
    for module in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert ask(port, "/" + module.lstrip("./")).status == 200


def test_leaves_the_page_out_where_asked(start: Start, ask: Ask) -> None:
    _, port = start("--no-page")
    assert ask(port, "/").status == 404
    assert ask(port, "/healthz").status == 200


def test_with_a_token_lets_in_who_knows_it(start: Start, ask: Ask) -> None:
    token = "a-token-that-is-long"  # noqa: S105
    _, port = start(QUEUE_SERVICE_GATEWAY_TOKEN=token)
    assert ask(port).status == 401
    assert ask(port, Authorization=f"Bearer {token}").status == 200


AUTHORIZE = """
from queue_service.gateway import Principal

limit = 5

def two(one, other): ...

def at_once(request):
    user = request.headers.get("x-user")
    return None if user is None else Principal(user, lambda stream: stream.startswith(user))

async def later(request):
    return at_once(request)

class Asker:
    async def __call__(self, request):
        return at_once(request)

asker = Asker()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a module, to be started in."""
    (tmp_path / "web_for_tests.py").write_text(AUTHORIZE)
    return tmp_path


@pytest.mark.parametrize("name", ["at_once", "later", "asker"])
@pytest.mark.parametrize("how", ["option", "variable"])
def test_asks_a_function_of_the_project_who_calls(start: Start, ask: Ask, project: Path, name: str, how: str) -> None:
    path = f"web_for_tests:{name}"
    arguments = ["--host", "0.0.0.0", *(["--authorize", path] if how == "option" else [])]  # noqa: S104
    env = {"QUEUE_SERVICE_GATEWAY_AUTHORIZE": path} if how == "variable" else {}
    _, port = start(*arguments, cwd=str(project), **env)
    assert ask(port).status == 401
    assert ask(port, **{"X-User": "a"}).status == 200
    assert ask(port, **{"X-User": "b"}).status == 404


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("web_for_tests", "names no function"),
        (":later", "names no function"),
        ("nowhere_at_all:later", "no module 'nowhere_at_all'"),
        ("web_for_tests:latter", "Did you mean 'later'?"),
        ("web_for_tests:limit", "is int, which cannot be called"),
        ("web_for_tests:two", "cannot be called with one argument"),
    ],
)
def test_says_what_is_wrong_with_a_function_that_cannot_be_asked(
    database: str, project: Path, path: str, why: str
) -> None:
    code, said = refused(database, "--authorize", path, cwd=str(project))
    assert (code, why in said) == (2, True), said


def test_takes_a_token_or_a_function_and_not_both(database: str, project: Path) -> None:
    code, said = refused(database, "--authorize", "web_for_tests:later", "--token", 20 * "x", cwd=str(project))
    assert (code, "Pass one of them" in said) == (2, True), said


def test_does_not_listen_beyond_this_machine_without_a_token(database: str) -> None:
    code, said = refused(database, "--host", "0.0.0.0")  # noqa: S104
    assert code == 2
    assert "QUEUE_SERVICE_GATEWAY_TOKEN" in said


def test_says_that_a_port_is_taken(database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = refused(database, "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "choose another --port" in said


def test_says_that_the_database_is_not_there() -> None:
    code, said = refused("postgresql://127.0.0.1:1/x")
    assert code == 3
    assert "cannot be reached" in said
