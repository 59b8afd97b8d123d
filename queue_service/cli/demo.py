"""The main job on real input, with a crash in the middle, verified."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from queue_service.app import App
from queue_service.cli import demo_turns, render
from queue_service.cli.options import command, run
from queue_service.db import embedded, schema, url
from queue_service.errors import QueueServiceError
from queue_service.roster import queries as roster
from queue_service.runs import queries
from queue_service.runs.model import Run, RunState
from queue_service.settings import Settings, parse_duration

LEASE = "2s"
WORK_TIMEOUT = 300.0
# A handful of files takes a worker some milliseconds, in which it has to be caught.
CLAIM_LOOKS = 20


@dataclass
class Verdict:
    done: int = 0
    rescued: int = 0
    lost: int = 0
    wrong: int = 0


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@command
def demo(directory: Path | None, database_url: str | None) -> None:
    """Checksum every file of DIRECTORY (Python's standard library by default) with two worker processes, kill one of
    them while it holds claims, and compare every result with a checksum computed here. Then talk to three agents: one
    answers, one is killed while it does, one hangs; each conversation gets its one ending.

    Runs on a Postgres of its own in a temporary directory, unless --database-url names another.
    """
    begun = time.monotonic()
    # Ended as by Ctrl-C: the server, the workers and their directory are cleared away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    chosen = directory is not None
    directory = (directory or Path(sysconfig.get_path("stdlib"))).absolute()
    files = _files(directory, besides=() if chosen else ("site-packages", "__pycache__"))
    if not files:
        raise click.ClickException(f"{directory} holds no readable file. Name another directory.")
    render.echo(f"input: {len(files):,} files of {directory}")
    scratch = None if database_url else _scratch()
    target = url.parse(database_url or f"file:{scratch}/postgres", source="--database-url" if database_url else "demo")
    try:
        render.echo(f"database: {target}")
        conninfo, cluster = embedded.reach(target)
        try:
            upgraded = schema.upgrade(conninfo)
            render.echo(f"schema at revision {upgraded.revision} ({time.monotonic() - begun:.1f} s)")
            verdict = run(_demo(conninfo, files))
            _report(files, verdict, time.monotonic() - begun)
            run(_conversations(conninfo))
        finally:
            if cluster is not None:
                cluster.leave()
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    render.echo("Try next: queue-service db start; queue-service --help; the example in README.md")


def _report(files: Sequence[str], verdict: Verdict, seconds: float) -> None:
    render.echo(
        f"files {len(files):,} | done {verdict.done:,} | rescued {verdict.rescued:,} | lost {verdict.lost} | "
        f"wrong {verdict.wrong} | {seconds:.1f} s"
    )
    if verdict.lost or verdict.wrong:
        raise click.ClickException("The queue lost or falsified something. Please report this.")


async def _conversations(conninfo: str) -> None:
    async with App(conninfo) as app:
        await demo_turns.play(app, conninfo)


def _scratch() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="queue_service-demo-"))
    # As root the server runs as another user, who has to pass through.
    directory.chmod(0o711)
    return directory


async def _demo(conninfo: str, files: Sequence[str]) -> Verdict:
    settings = Settings(lease=parse_duration(LEASE))
    async with App(conninfo, settings=settings) as app:
        workers = [_start_worker(conninfo, "doomed")]
        try:
            ids = await _enqueued_and_stopped(app, files, workers[0], "doomed")
            workers.append(_start_worker(conninfo, "survivor"))
            held = await _held_by(app, "doomed")
            workers[0].kill()
            render.echo(f"killed worker {workers[0].pid} with SIGKILL while it held {held} claims")
            await _until_ended(app, ids, workers[1])
        finally:
            for worker in workers:
                worker.send_signal(signal.SIGCONT)
                worker.terminate()
                worker.wait()
        return _verdict(files, await _results(app, ids))


def _files(directory: Path, besides: Collection[str]) -> list[str]:
    found = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [each for each in folders if each not in besides]
        found += [Path(folder) / name for name in names]
    # A path that is no valid Unicode cannot be JSON.
    return sorted(
        str(path) for path in found if path.is_file() and os.access(path, os.R_OK) and str(path).isprintable()
    )


def _start_worker(conninfo: str, name: str) -> subprocess.Popen[bytes]:
    arguments = ["-a", "queue_service.cli.demo_tasks:app", "-q", "demo:8", "--name", name, "--lease", LEASE]
    pace = ["--sweep-interval", "500ms", "--log-level", "error", "--database-url", conninfo]
    return subprocess.Popen(
        [sys.executable, "-m", "queue_service", "worker", *arguments, *pace], stderr=subprocess.DEVNULL
    )


async def _enqueued_and_stopped(
    app: App, files: Sequence[str], worker: subprocess.Popen[bytes], name: str
) -> Sequence[int]:
    """The ids of runs, some of which are held by a worker that was stopped, so that what it holds cannot change until it
    is killed."""
    for _ in range(CLAIM_LOOKS):
        ids = await app.enqueue_many("checksum", [{"path": path} for path in files], queue="demo")
        if await _stop_holding(app, worker, name):
            render.echo(f"enqueued {len(ids):,} runs, ids {ids[0]} to {ids[-1]}")
            return ids
    raise QueueServiceError("The worker was done before it could be killed. Name a directory with more files.")


async def _stop_holding(app: App, worker: subprocess.Popen[bytes], name: str) -> bool:
    """SIGSTOP the worker at a moment when it holds claims. Returns False if all was done before."""
    deadline = time.monotonic() + WORK_TIMEOUT
    while time.monotonic() < deadline:
        _check_alive(worker)
        if await _held_by(app, name):
            worker.send_signal(signal.SIGSTOP)
            if await _held_by(app, name):
                return True
            worker.send_signal(signal.SIGCONT)
        depth = await app.fetch(queries.depth("demo"))
        if not depth.due + depth.running:
            return False
        await asyncio.sleep(0.001)
    raise QueueServiceError(f"The worker claimed nothing within {WORK_TIMEOUT:g} s.")


async def _held_by(app: App, name: str) -> int:
    return sum(worker.holds for worker in await app.fetch(roster.listed(app.settings.lease)) if worker.name == name)


async def _until_ended(app: App, ids: Sequence[int], worker: subprocess.Popen[bytes]) -> None:
    deadline, live = time.monotonic() + WORK_TIMEOUT, set(ids)
    with render.progress("working", len(ids)) as advance:
        while live and time.monotonic() < deadline:
            _check_alive(worker)
            await asyncio.sleep(0.2)
            ended = await app.fetch(queries.endings(live))
            live -= ended.keys()
            advance(len(ended))


def _check_alive(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is not None:
        raise QueueServiceError(f"A worker ended by itself, with code {worker.returncode}.")


async def _results(app: App, ids: Sequence[int]) -> dict[int, Run]:
    results = {run.id: run for run in await app.fetch(queries.get_many(ids))}
    return {run_id: results[run_id] for run_id in ids if run_id in results}


def _verdict(files: Sequence[str], results: dict[int, Run]) -> Verdict:
    """Compare the manifest with checksums computed in this process, from the files themselves."""
    verdict = Verdict()
    by_path = {run.payload["path"]: run for run in results.values() if run.state is RunState.SUCCEEDED}
    for path in files:
        found = by_path.get(path)
        if found is None:
            verdict.lost += 1
            continue
        verdict.done += 1
        verdict.rescued += found.losses > 0
        verdict.wrong += found.result != {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    return verdict
