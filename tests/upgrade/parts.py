"""What runs in processes of both releases: the tasks of workers, and a program that enqueues. It uses nothing that only one of
them has, and no other module of the tests, which the older one does not see.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from queue_service import App, Run, Turn
from queue_service.db.revision import HEAD

app = App(os.environ.get("QUEUE_SERVICE_DATABASE_URL", "postgresql:///unused"))
witness = os.environ.get("WITNESS", "/dev/null")
LANES, STREAMS, DEPLOYMENTS = 3, 4, 3


def note(path: str | Path, **what: Any) -> None:
    """One line, written at once."""
    line = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(line, json.dumps(what).encode() + b"\n")
    os.close(line)


@app.task
async def work(run: Run, by: str) -> int:
    note(witness, did="begun", run=run.id, attempt=run.attempt, by=by, code=HEAD, pid=os.getpid())
    await asyncio.sleep(random.uniform(0.01, 0.05))  # the work
    note(witness, did="ended", run=run.id, attempt=run.attempt, by=by, code=HEAD, key=run.ordering_key)
    return run.id


@app.task
async def agent_turn(run: Run, text: str, by: str = "gateway") -> None:
    turn = run.turn
    assert turn is not None
    note(witness, did="turn", run=run.id, attempt=run.attempt, by=by, code=HEAD)
    for word in text.split():
        await app.events.append(turn.stream, "delta", {"of": turn.message_id, "text": word})
        await asyncio.sleep(random.uniform(0, 0.02))  # the work
    await app.turns.commit_reply(turn.deployment, [turn.message_id], {"text": text.upper(), "code": HEAD})


@app.task
async def hold(run: Run, gate: str) -> None:
    """Goes on until its gate is there, unless somebody has lost it before."""
    note(witness, did="held", run=run.id, attempt=run.attempt, code=HEAD, pid=os.getpid(), gate=gate)
    while run.attempt == 1 and not Path(gate).exists():  # noqa: ASYNC110, ASYNC240 - the other side is another process
        await asyncio.sleep(0.02)  # the pace of who looks


async def enqueue(by: str, directory: Path) -> None:
    """Until `stop` is there: runs, runs of lanes and turns, each noted when it is acknowledged; some of them waited for."""
    acknowledged = directory / f"acknowledged.{by}"

    async def run(number: int) -> None:
        key = f"{by}-{number % LANES}" if number % 2 else None
        note(acknowledged, run=await app.enqueue("work", {"by": by}, ordering_key=key))

    async def turn(number: int) -> None:
        of = Turn(
            deployment=f"{by}-{number % DEPLOYMENTS}", message_id=f"{by}-{number}", stream=f"{by}-{number % STREAMS}"
        )
        run_id = await app.turns.dispatch(of, "agent_turn", {"text": f"the {number} of {by}", "by": by})
        note(acknowledged, run=run_id, turn=of.message_id)

    async def wait(number: int) -> None:
        run_id = await app.enqueue("work", {"by": by})
        note(acknowledged, run=run_id, wait=(await app.wait(run_id, timeout=60)).result)
        of = Turn(deployment=f"{by}-waited", message_id=f"{by}-waited-{number}", stream=f"{by}-waited")
        run_id = await app.turns.dispatch(of, "agent_turn", {"text": "hello", "by": by})
        ended = await app.turns.wait(of.deployment, of.message_id, timeout=60)
        note(acknowledged, run=run_id, turn=of.message_id, told=ended.kind)

    async def again(what: Callable[[int], Awaitable[None]], pause: float) -> None:
        number = 0
        while not (directory / "stop").exists() and not (directory / f"stop.{by}").exists():
            number += 1
            await what(number)
            await asyncio.sleep(pause)  # the pace of what asks

    async with app, asyncio.TaskGroup() as group:
        group.create_task(again(run, 0.03))
        group.create_task(again(turn, 0.08))
        group.create_task(again(wait, 0.1))


if __name__ == "__main__":
    asyncio.run(enqueue(sys.argv[1], Path(sys.argv[2])))
