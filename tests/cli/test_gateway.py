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

import pytest

Start = Callable[..., tuple["subprocess.Popen[str]", int]]
Ask = Callable[..., http.client.HTTPResponse]


@pytest.fixture
def start(database: str) -> Iterator[Start]:
    """Starts a gateway; it and its port."""
    running: list[subprocess.Popen[str]] = []

    def start_one(*arguments: str, **env: str) -> tuple[subprocess.Popen[str], int]:
        child = subprocess.Popen(
            [sys.executable, "-m", "queue_service", "gateway", "--port", "0", *arguments],
            env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database, **env}, stderr=subprocess.PIPE, text=True,
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


def refused(database: str, *arguments: str, **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "queue_service", "gateway", *arguments],
        env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database, **env},
        stderr=subprocess.PIPE, text=True, timeout=60, check=False,
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
