"""What `deploy/` says is to be run: commands, with their environments, as they stand in its files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
MANIFESTS = [path for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")) if path.name != "secret.example.yaml"]
INSTALLED = "/opt/myproject/.venv/bin/queue-service"
PROBE = "probe"


class Command(NamedTuple):
    """`queue-service` with these arguments and variables. Whether the App of the examples is meant, or one of the reader's."""

    name: str
    arguments: tuple[str, ...]
    env: dict[str, str]
    of_examples: bool = False

    @property
    def verb(self) -> str:
        return " ".join(word for word in self.arguments[:2] if word.isalpha())

    def on(self, port: int, *, instead_of: str) -> Command:
        """At another port, which has to be named somewhere."""
        arguments = tuple(re.sub(rf"(?<!\d){instead_of}(?!\d)", str(port), each) for each in self.arguments)
        env = {name: str(port) if value == instead_of else value for name, value in self.env.items()}
        assert (arguments, env) != (self.arguments, self.env), f"{self.name} names no port {instead_of}"
        return self._replace(arguments=arguments, env=env)


def unit(path: Path) -> dict[str, list[str]]:
    """The settings of a unit of systemd, all sections together; a name may come more than once."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value.replace("%H", "machine").replace("%i", "1"))
    return found


def of_units() -> Iterator[Command]:
    for path in UNITS:
        settings = unit(path)
        (file,) = settings["EnvironmentFile"]
        assert Path(file).parent == Path("/etc/queue-service")
        env = environment_file(DEPLOY / "systemd" / Path(file).name)
        env |= dict(each.split("=", 1) for each in settings.get("Environment", []))
        for number, line in enumerate(settings["ExecStart"]):
            program, *arguments = shlex.split(line)
            assert program == INSTALLED
            yield Command(f"{path.name} {number}", tuple(arguments), env)


def environment_file(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(shlex.split(line)[0].split("=", 1) for line in lines)


def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    return read


def of_compose() -> Iterator[Command]:
    for name, service in compose()["services"].items():
        if "command" in service:
            program, *arguments = service["command"]
            assert program == "queue-service"
            env = {
                key: re.sub(r"\$\{(\w+):\?[^}]*\}", r"\1", str(value)) for key, value in service["environment"].items()
            }
            yield Command(f"compose {name}", tuple(arguments), env, of_examples=True)


def documents() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def secret() -> dict[str, str]:
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes" / "secret.example.yaml").read_text())
    values: dict[str, str] = read["stringData"]
    return values


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The name, the labels and the spec of each kind of pod."""
    for document in documents():
        if "template" in document.get("spec", {}):
            template = document["spec"]["template"]
            yield document["metadata"]["name"], template["metadata"]["labels"], template["spec"]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def of_kubernetes() -> Iterator[Command]:
    for _, _, spec in pods():
        for container in containers(spec):
            program, *arguments = container["args"]
            assert program == "queue-service"
            env = {each["name"]: _value(each) for each in container["env"]}
            yield Command(f"kubernetes {container['name']}", tuple(arguments), env)


def _value(variable: dict[str, Any]) -> str:
    if "value" in variable:
        return str(variable["value"])
    source = variable["valueFrom"]
    return secret()[source["secretKeyRef"]["key"]] if "secretKeyRef" in source else source["fieldRef"]["fieldPath"]


COMMANDS = [*of_units(), *of_compose(), *of_kubernetes()]
PROJECT = """
from queue_service import App

app = App()


@app.task
async def hello(name: str) -> str:
    return f"Hello, {name}"


@app.task(name="agent_turn")
async def agent_turn(text: str) -> str:
    return text
"""


def project(path: Path) -> Path:
    """Where the reader's project is, and the examples beside it."""
    package = path / "myproject"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "queue.py").write_text(PROJECT)
    shutil.copy(ROOT / "examples" / "agent.py", path)
    return path


@contextmanager
def running(command: Command, database: str, where: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a process of its own on this database. It has to end by itself and in order when it is asked to."""
    child = subprocess.Popen(
        [sys.executable, "-m", "queue_service", *command.arguments], cwd=where, env=surroundings(command, database)
    )
    try:
        yield child
        child.terminate()
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()


def surroundings(command: Command, database: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("QUEUE_SERVICE_")}
    return ours | command.env | {"QUEUE_SERVICE_DATABASE_URL": database}
