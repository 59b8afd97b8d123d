"""The files of `deploy/` fit together, and are what systemd and Kubernetes take."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner

from queue_service.cli import cli
from queue_service.settings import PREFIX, Settings, env_name, parse_duration
from tests.deploy.files import (
    COMMANDS,
    DEPLOY,
    INSTALLED,
    UNITS,
    Command,
    compose,
    containers,
    documents,
    pods,
    secret,
    unit,
)

# How long a worker may take after its drain: see docs/worker.md. And a gateway altogether.
AFTER_DRAIN, GATEWAY = 5, 10
KUBERNETES = "1.31"


def parsed(arguments: tuple[str, ...], env: dict[str, str]) -> dict[str, Any]:
    """The options of the command as click reads them, without running it."""
    group: click.Command = cli
    words = list(arguments)
    context = click.Context(cli, info_name="queue-service", auto_envvar_prefix="QUEUE_SERVICE")
    with pytest.MonkeyPatch.context() as patched:
        for name, value in env.items():
            patched.setenv(name, value)
        while isinstance(group, click.Group):
            name = words.pop(0)
            found = group.get_command(context, name)
            assert found is not None, name
            group = found
            context = (
                group.make_context(name, words[:], parent=context)
                if not isinstance(group, click.Group)
                else click.Context(group, info_name=name, parent=context)
            )
    return context.params


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_command_is_one_of_ours_with_options_that_it_has(command: Command) -> None:
    options = parsed(command.arguments, command.env)
    if command.verb == "worker":
        assert options["app_path"]
        assert options["queues"]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_variable_is_one_that_the_command_reads(command: Command) -> None:
    """A name that is spelt wrongly would be passed over in silence."""
    known = {env_name(field.name) for field in dataclasses.fields(Settings)}
    words = [word for word in command.arguments[:2] if word.isalpha()]
    told = CliRunner().invoke(cli, [*words, "--help"]).output
    ours = {name for name in command.env if name.startswith(PREFIX)}
    assert ours <= known | set(re.findall(rf"{PREFIX}\w+", told))


def test_the_files_say_where_to_find_the_variables_that_are_in_them() -> None:
    text = (DEPLOY / "systemd" / "worker.env").read_text()
    shown = "".join(CliRunner().invoke(cli, words).output for words in (["worker", "--help"], ["config", "show"]))
    assert "`queue-service worker --help` and `config show`" in text
    assert set(re.findall(rf"^({PREFIX}\w+)=", text, re.MULTILINE)) <= set(re.findall(rf"{PREFIX}\w+", shown))


def test_there_is_a_worker_a_gateway_and_a_migration_of_each_kind() -> None:
    assert sorted(command.verb for command in COMMANDS) == sorted(
        ["db check", "db check", *["db migrate"] * 3, *["gateway"] * 3, *["worker"] * 3]
    )


def test_who_stops_a_worker_gives_it_the_time_that_it_gives_its_handlers() -> None:
    (of_units,) = unit(DEPLOY / "systemd" / "queue-service-worker@.service")["TimeoutStopSec"]
    graces = {"queue-service-worker@.service 0": int(of_units)}
    services = compose()["services"]
    graces["compose worker"] = int(services["worker"]["stop_grace_period"].removesuffix("s"))
    graces |= {
        f"kubernetes {spec['containers'][0]['name']}": spec.get("terminationGracePeriodSeconds", 30)
        for _, _, spec in pods()
    }
    workers = [command for command in COMMANDS if command.verb == "worker"]
    for command in workers:
        drain = parsed(command.arguments, command.env)["drain_timeout"].total_seconds()
        assert graces[command.name] > drain + AFTER_DRAIN, command.name
    assert graces["kubernetes gateway"] > GATEWAY
    assert int(services["gateway"]["stop_grace_period"].removesuffix("s")) > GATEWAY
    (of_gateway,) = unit(DEPLOY / "systemd" / "queue-service-gateway.service")["TimeoutStopSec"]
    assert int(of_gateway) > GATEWAY
    assert parse_duration("30s").total_seconds() == 30


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not on this machine")
    placed = []
    for path in UNITS:
        # With a program and a user that this machine has.
        text = path.read_text().replace(INSTALLED, sys.executable)
        text = text.replace("User=queue-service", "User=root").replace("Group=queue-service", "Group=root")
        placed.append(tmp_path / path.name)
        placed[-1].write_text(text)
    verified = subprocess.run([program, "verify", *map(str, placed)], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr.replace(str(tmp_path), "")) == (0, "")
    placed[0].write_text(placed[0].read_text().replace("PrivateTmp=", "PrivatTmp="))
    assert (
        "Unknown key"
        in subprocess.run([program, "verify", str(placed[0])], capture_output=True, text=True, check=False).stderr
    )


def test_units_keep_secrets_out_of_the_command_line_and_handlers_out_of_the_system() -> None:
    for path in UNITS:
        settings = unit(path)
        assert settings["NoNewPrivileges"] == ["true"], path
        assert settings["ProtectSystem"] == ["strict"], path
        assert settings["User"] == ["queue-service"], path
        assert not any("postgresql://" in line or "token" in line for line in settings["ExecStart"]), path


@pytest.mark.parametrize("document", documents(), ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_kubernetes_takes_the_manifests(document: dict[str, Any]) -> None:
    assert "namespace" not in document["metadata"]
    if not document["apiVersion"].startswith("keda.sh/"):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        broken = document | {"spec": document["spec"] | {"replicaz": 1}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_what_the_manifests_name_is_there() -> None:
    known = {key for key in secret() if key}
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in documents()}
    labels = [labels for _, labels, _ in pods()]
    for name, own_labels, spec in pods():
        for container in containers(spec):
            ports = {port["name"] for port in container.get("ports", [])}
            for kind in ("livenessProbe", "readinessProbe"):
                asked = container.get(kind, {})
                assert asked.get("httpGet", asked.get("tcpSocket", {"port": None}))["port"] in ports | {None}, name
            for variable in container["env"]:
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                assert reference is None or (reference["name"] == "queue-service" and reference["key"] in known), (
                    variable
                )
        selector = by_name.get(("Deployment", name), {"spec": {"selector": {"matchLabels": own_labels}}})["spec"][
            "selector"
        ]
        assert selector["matchLabels"] == own_labels
    selected = [
        each["spec"]["selector"] for (kind, _), each in by_name.items() if kind in {"Service", "PodDisruptionBudget"}
    ]
    assert len(selected) == 3
    assert all((each.get("matchLabels") or each) in labels for each in selected)


def test_the_scaler_scales_the_worker_by_its_own_slots() -> None:
    by_kind = {each["kind"]: each for each in documents() if each["apiVersion"].startswith("keda.sh/")}
    scaled, authentication = by_kind["ScaledObject"]["spec"], by_kind["TriggerAuthentication"]
    (trigger,) = scaled["triggers"]
    (worker,) = [spec for name, _, spec in pods() if name == scaled["scaleTargetRef"]["name"]]
    (queue,) = parsed(tuple(worker["containers"][0]["args"][1:]), {})["queues"]
    name, slots = queue.split(":")
    assert trigger["type"] == "postgresql"
    assert trigger["metadata"]["query"] == (
        f"select queue_service.wanted_workers('{name}', {slots}, {scaled['maxReplicaCount']})"
    )
    # As many replicas as the number says.
    assert (trigger["metricType"], trigger["metadata"]["targetQueryValue"]) == ("AverageValue", "1")
    assert scaled["minReplicaCount"] >= 1
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    (target,) = authentication["spec"]["secretTargetRef"]
    assert (target["parameter"], target["name"], target["key"] in secret()) == ("connection", "queue-service", True)
    (deployment,) = [
        each
        for each in documents()
        if each["metadata"]["name"] == "queue-service-worker" and each["kind"] == "Deployment"
    ]
    # Two who say how many would undo each other's work.
    assert "replicas" not in deployment["spec"]


def test_a_service_of_kubernetes_does_not_set_variables_of_ours() -> None:
    for name, _, spec in pods():
        assert spec["enableServiceLinks"] is False, name
    gateway = next(command for command in COMMANDS if command.verb == "gateway" and command.name.startswith("queue"))
    without = tuple(word for word in gateway.arguments if word not in {"--port", "8000"})
    with pytest.raises(click.BadParameter):
        parsed(without, {"QUEUE_SERVICE_GATEWAY_PORT": "tcp://10.0.0.1:80"})


def test_docker_starts_each_when_what_it_needs_is_there() -> None:
    services = compose()["services"]
    for name in ("worker", "gateway"):
        assert services[name]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
        assert services[name]["restart"] == "unless-stopped"
        assert "healthcheck" in services[name]
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert set(compose()["volumes"]) == {volume.split(":")[0] for volume in services["postgres"]["volumes"]}


def test_the_image_is_built_from_files_that_are_there(tmp_path: Path) -> None:
    ignored = (DEPLOY / "compose" / "Dockerfile.dockerignore").read_text().splitlines()
    root = DEPLOY.parent
    for name in (line[1:] for line in ignored if line.startswith("!")):
        source = root / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(tmp_path), "--outdir", str(tmp_path / "dist")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    assert len(list((tmp_path / "dist").glob("*.whl"))) == 1
