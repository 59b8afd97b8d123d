"""The commands of `deploy/`, as they stand there, run as processes against a real database: they migrate, work, serve and are
probed, and end in order."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from queue_service import App
from queue_service.db import embedded, revision, schema
from queue_service.db.execute import Connection
from tests.deploy.files import COMMANDS, ROOT, Command, compose, documents, pods, project, running, surroundings
from tests.support import eventually, free_port, rows

SCALING = ROOT / "docs" / "scaling.md"
HEALTH, HTTP = "8081", "8000"


def commands(verb: str) -> pytest.MarkDecorator:
    found = [command for command in COMMANDS if command.verb == verb]
    return pytest.mark.parametrize("command", found, ids=[command.name for command in found])


def answer(port: int, path: str, *, token: str | None = None, body: Any = None) -> tuple[int, Any]:
    """What is answered there; 0 where nobody listens yet."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        response = httpx2.request(
            "GET" if body is None else "POST", f"http://127.0.0.1:{port}{path}", json=body, headers=headers, timeout=20
        )
    except httpx2.TransportError:
        return 0, None
    return response.status_code, response.json() if response.is_success else None


def probes(kind: str) -> dict[str, Any]:
    """Of a kind of pod: path by the name of its probe, where it is asked by HTTP."""
    (spec,) = [spec for name, _, spec in pods() if name == f"queue-service-{kind}"]
    container = spec["containers"][0]
    return {name: container[name].get("httpGet", {}).get("path") for name in ("livenessProbe", "readinessProbe")}


@commands("db migrate")
def test_a_migration_makes_the_schema_and_does_it_again(command: Command, empty_database: str, tmp_path: Path) -> None:
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "queue_service", *command.arguments], cwd=tmp_path, check=False,
            env=surroundings(command, empty_database),
        )  # fmt: skip
        assert done.returncode == 0


@pytest.mark.direct("check also looks at the settings of the role there")
@commands("db check")
def test_the_check_after_it_says_what_is_wrong_with_the_server(command: Command, direct: str, tmp_path: Path) -> None:
    def checked(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "queue_service", *command.arguments], cwd=tmp_path, check=False,
            capture_output=True, text=True, env=surroundings(command, direct) | env,
        )  # fmt: skip

    refused = checked()
    assert (refused.returncode, "[fsync]" in refused.stderr) == (1, True)
    assert checked(QUEUE_SERVICE_DB_CHECK_ACCEPT="fsync full-page-writes").returncode == 0


@pytest.mark.direct("check also looks at the settings of the role there")
@commands("db check")
def test_the_check_passes_while_the_version_before_is_still_there(
    command: Command, empty_database: str, tmp_path: Path
) -> None:
    """`db migrate` has gone as far as it may then, and what runs after it must not hold up the roll."""
    schema.upgrade(empty_database, revision.OLDEST)
    accepted = {"QUEUE_SERVICE_DB_CHECK_ACCEPT": "fsync full-page-writes"}
    checked = subprocess.run(
        [sys.executable, "-m", "queue_service", *command.arguments], cwd=tmp_path, check=False,
        capture_output=True, text=True, env=surroundings(command, empty_database) | accepted,
    )  # fmt: skip
    assert (checked.returncode, "were not compared" in checked.stderr) == (0, revision.OLDEST != revision.HEAD)


@commands("worker")
async def test_a_worker_works_answers_its_probes_and_stops(
    command: Command, app: App, database: str, conn: Connection, tmp_path: Path
) -> None:
    where, port = project(tmp_path / "project"), free_port()
    # That of the units is not asked by anybody.
    is_probed = HEALTH in " ".join((*command.arguments, *command.env.values()))
    placed = command.on(port, instead_of=HEALTH) if is_probed else command
    with running(placed, database, where):
        await eventually(lambda: rows(conn, "select from queue_service.workers"), within=60)
        if is_probed:
            for path in probes("worker").values():
                await eventually(partial(_is_well, port, path), within=60)
        if not command.of_examples:
            run_id = await app.enqueue("hello", {"name": "Ada"}, queue="default")
            done = await app.wait(run_id, timeout=60)
            assert done.result == "Hello, Ada"
    # It has left in order, and has not been killed.
    assert await rows(conn, "select from queue_service.workers") == []


async def test_the_units_give_a_worker_its_queues_and_its_name(database: str, conn: Connection, tmp_path: Path) -> None:
    (command,) = [each for each in COMMANDS if each.name == "queue-service-worker@.service 0"]
    with running(command, database, project(tmp_path / "project")):
        await eventually(lambda: rows(conn, "select from queue_service.workers"), within=60)
        assert await rows(conn, "select name, queues from queue_service.workers") == [
            ("machine:1", {"default": 10, "mail": 20})
        ]


@commands("gateway")
async def test_a_gateway_serves_those_who_know_its_token(command: Command, database: str, tmp_path: Path) -> None:
    port, token = free_port(), uuid4().hex
    command = command._replace(env=command.env | {"QUEUE_SERVICE_GATEWAY_TOKEN": token})
    with running(command.on(port, instead_of=HTTP), database, project(tmp_path / "project")):
        await eventually(partial(_is_well, port, probes("gateway")["readinessProbe"]), within=60)
        message = {"stream": "s", "client_message_id": "m1", "body": {"text": "hi"}}
        assert answer(port, "/api/chat/send", body=message)[0] == 401
        assert answer(port, "/api/chat/send", body=message, token=token)[0] == 202


@commands("gateway")
def test_a_token_that_nobody_has_changed_is_refused(command: Command, database: str, tmp_path: Path) -> None:
    if command.of_examples:
        # Nothing is in the file: whoever starts it has to name one.
        assert (
            "${QUEUE_SERVICE_GATEWAY_TOKEN:?"
            in compose()["services"]["gateway"]["environment"]["QUEUE_SERVICE_GATEWAY_TOKEN"]
        )
        return
    refused = subprocess.run(
        [sys.executable, "-m", "queue_service", *command.arguments], cwd=project(tmp_path / "project"), check=False,
        env=surroundings(command, database), capture_output=True, text=True,
    )  # fmt: skip
    assert (refused.returncode, "openssl rand" in refused.stderr) == (2, True)


async def test_docker_s_parts_answer_a_message_and_their_health_checks_pass(database: str, tmp_path: Path) -> None:
    where = project(tmp_path / "project")
    by_name = {each.name.removeprefix("compose "): each for each in COMMANDS if each.of_examples}
    port, health = free_port(), free_port()
    worker = by_name["worker"].on(health, instead_of=HEALTH)
    gateway, token = by_name["gateway"].on(port, instead_of=HTTP), uuid4().hex
    gateway = gateway._replace(env=gateway.env | {"QUEUE_SERVICE_GATEWAY_TOKEN": token})
    with running(worker, database, where), running(gateway, database, where):
        for placed, name in ((worker, "worker"), (gateway, "gateway")):
            await eventually(partial(_is_healthy, placed, name, port, database), within=60)
        message = {"stream": "s", "client_message_id": "m1", "body": {"text": "Hello there"}}
        assert answer(port, "/api/chat/send", body=message, token=token)[0] == 202

        def replied() -> bool:
            events = answer(port, "/api/sessions/s/events", token=token)[1]["events"]
            return [each["body"]["text"] for each in events if each["kind"] == "reply"] == ["You said: Hello there"]

        await eventually(replied, within=60)


def _is_well(port: int, path: str) -> bool:
    return answer(port, path)[0] == 200


def _is_healthy(placed: Command, name: str, port: int, database: str) -> bool:
    kind, program, *arguments = compose()["services"][name]["healthcheck"]["test"]
    assert kind == "CMD"
    programs = {"queue-service": [sys.executable, "-m", "queue_service"], "python": [sys.executable]}
    arguments = [each.replace(f":{HTTP}/", f":{port}/") for each in arguments]
    asked = subprocess.run(
        [*programs[program], *arguments], env=surroundings(placed, database), check=False, capture_output=True
    )
    return asked.returncode == 0


@pytest.fixture
def scaler(direct: str, server: str) -> Iterator[str]:
    """One with the rights that docs/scaling.md gives, and no others."""
    name = f"scaler_{uuid4().hex[:8]}"
    grants = SCALING.read_text().split("```sql\n", 1)[1].split("```", 1)[0].replace("app_scaler", name)
    with psycopg.connect(server, autocommit=True) as admin, psycopg.connect(direct, autocommit=True) as owner:
        owner.execute(grants.encode())
        yield make_conninfo(direct, user=name)
        owner.execute(f"drop owned by {name}".encode())
        admin.execute(f"drop role {name}".encode())


async def test_the_scalers_query_says_how_many_as_a_role_that_may_do_nothing_else(app: App, scaler: str) -> None:
    (scaled,) = [each for each in documents() if each["kind"] == "ScaledObject"]
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]

    def asked(question: str = query) -> Any:
        with psycopg.connect(scaler) as conn:
            row = conn.execute(question.encode()).fetchone()
            return row and row[0]

    assert asked() == 0
    app.task(name="hello")(lambda name: name)
    await app.enqueue_many("hello", [{"name": str(number)} for number in range(25)], queue="default")
    assert asked() == 3
    await app.enqueue_many("hello", [{"name": str(number)} for number in range(500)], queue="default")
    assert asked() == scaled["spec"]["maxReplicaCount"]
    # And so does the line of docs/scaling.md for those who start machines by other means.
    line = next(line for line in SCALING.read_text().splitlines() if line.startswith("psql "))
    words = [scaler if word == "$SCALER_URL" else word for word in shlex.split(line)]
    psql = [str(embedded.programs() / "psql"), *words[1:]]
    said = await asyncio.to_thread(subprocess.run, psql, capture_output=True, check=True)
    assert said.stdout.decode() == f"{scaled['spec']['maxReplicaCount']}\n"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        asked("select payload from queue_service.runs limit 1")
