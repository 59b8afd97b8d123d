"""An App for worker processes under test: its tasks leave witnesses in files named by their payloads."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from queue_service import App, Retry, Run

app = App()


@app.task
async def double(n: int) -> int:
    return 2 * n


@app.task(retry=Retry(max_attempts=1))
async def fail() -> None:
    raise RuntimeError("as it was told to")


@app.task
async def hold(directory: str, run: Run) -> None:
    """Says in DIRECTORY/started that it began, and waits until DIRECTORY/release is there."""
    _append(Path(directory) / "started", f"{run.id}\n")
    release = Path(directory) / "release"
    while not release.exists():  # noqa: ASYNC110 - the other side is another process
        await asyncio.sleep(0.01)


@app.task
async def witness(path: str, seconds: float, run: Run) -> int:
    """Writes a line when it begins and another when it has ended."""
    _append(Path(path), f"begun {run.id} {run.attempt} {os.getpid()}\n")
    await asyncio.sleep(seconds)
    _append(Path(path), f"ended {run.id} {run.attempt} {os.getpid()}\n")
    return run.id


@app.task
async def poison(path: str, run: Run) -> None:
    """Kills its process, once it is seen to be running."""
    _append(Path(path), f"poison {run.id} {run.attempt} {os.getpid()}\n")
    await asyncio.sleep(0.2)
    os._exit(9)


def _append(path: Path, line: str) -> None:
    """One write of one line: whole, even among processes that are killed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
