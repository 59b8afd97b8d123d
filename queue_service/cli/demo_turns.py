"""The demo's second act: three conversations with agents in processes of their own; one is killed, one hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from queue_service.app import App
from queue_service.cli import render
from queue_service.errors import QueueServiceError
from queue_service.turn import Turn
from queue_service.turns.model import Outcome

EXECUTION = 2.0
ENDING_TIMEOUT = 60.0


class Scene(NamedTuple):
    deployment: str
    text: str
    harm: signal.Signals | None
    ending: str


SCENES = (
    Scene("agent-1", "Hello?", None, "reply"),
    Scene("agent-2", "This one is killed while it answers.", signal.SIGKILL, "worker_died"),
    Scene("agent-3", "This one stops moving.", signal.SIGSTOP, "worker_unresponsive"),
)


async def play(app: App, conninfo: str) -> None:
    """Raises QueueServiceError where a conversation did not end as it had to."""
    with host(conninfo):
        for scene in SCENES:
            await _converse(app, scene)


async def _converse(app: App, scene: Scene) -> None:
    turn = Turn(deployment=scene.deployment, message_id="m1", stream=f"conversation with {scene.deployment}")
    await app.turns.dispatch(turn, "agent_turn", {"text": scene.text}, queue="agents", execution=EXECUTION)
    waiting = asyncio.create_task(app.turns.wait(turn.deployment, turn.message_id, timeout=ENDING_TIMEOUT))
    render.echo("", f"{scene.deployment} < {scene.text}")
    pid, struck, words = 0, time.monotonic(), 0
    async for event in app.events.follow(turn.stream):
        if event.kind == "status":
            pid = int(event.body["pid"])
        elif event.kind == "delta":
            words += 1
            render.echo(f"{scene.deployment} > {event.body['text']}")
            if words == 3 and scene.harm is not None:
                os.kill(pid, scene.harm)
                struck = time.monotonic()
                render.echo(f"          {scene.harm.name} to its process {pid}")
        elif event.terminal:
            break
    outcome = await waiting
    _tell(scene, outcome, time.monotonic() - struck)


def _tell(scene: Scene, outcome: Outcome, seconds: float) -> None:
    body = outcome.body or {}
    if outcome.code is None:
        render.echo(f"{scene.deployment} > {body.get('text')}   [{outcome.kind}, event {outcome.seq}]")
    else:
        render.echo(f"{scene.deployment} ! {outcome.message}   [{outcome.code}: {body.get('reason')}]")
        render.echo(
            f"          its one ending, event {outcome.seq}, came {seconds * 1000:,.0f} ms after the {_name(scene)}"
        )
    if (outcome.code or outcome.kind) != scene.ending:
        raise QueueServiceError(f"{scene.deployment} had to end with {scene.ending}. Please report this.")


def _name(scene: Scene) -> str:
    return scene.harm.name if scene.harm is not None else "message"


@contextmanager
def host(conninfo: str) -> Iterator[None]:
    """A worker process that supervises the agents."""
    arguments = ["-a", "queue_service.cli.demo_agent:app", "-q", "agents:4", "--log-level", "error"]
    command: Sequence[str] = [sys.executable, "-m", "queue_service", "worker", *arguments, "--database-url", conninfo]
    worker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        worker.terminate()
        worker.wait()
