"""What the benchmarks share: the list of scenarios, measuring them, and a database to do it on."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from queue_service import App, logs
from queue_service.db import embedded, schema, url

Scenario = Callable[[App, int], Awaitable[dict[str, float]]]
SCENARIOS: dict[str, Scenario] = {}

TABLES = "runs, finished_runs, leases, turn_markers, turn_outcomes, streams, events"


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


async def reset(app: App) -> None:
    async with app.pool.connection() as conn:
        await conn.execute(f"truncate {', '.join('queue_service.' + name for name in TABLES.split(', '))}".encode())
        await conn.execute("vacuum analyze queue_service.runs")
        await conn.execute("checkpoint")


async def measure(app: App, names: list[str], count: int, rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    async with app:
        for name in names:
            taken: dict[str, list[float]] = {}
            for _ in range(rounds):
                await reset(app)
                for figure, value in (await SCENARIOS[name](app, count)).items():
                    taken.setdefault(figure, []).append(value)
            results[name] = taken
            for figure, values in taken.items():
                low, middle, high = min(values), statistics.median(values), max(values)
                print(f"{name:10} {figure:26} {middle:12,.1f}   ({low:,.1f} to {high:,.1f})", flush=True)
    return results


def run(build: Callable[[str], App], description: str) -> None:
    """Parse the command line, find a database, and measure the scenarios it names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--database-url", help="an existing server; its schema queue_service is emptied")
    parser.add_argument("--runs", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    given = parser.parse_args()
    logs.configure(level="error", fmt="auto")
    names = given.names or list(SCENARIOS)
    if unknown := set(names) - SCENARIOS.keys():
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    scratch = Path(tempfile.mkdtemp(prefix="queue_service-bench-"))
    scratch.chmod(0o711)
    target = url.parse(given.database_url or f"file:{scratch}/postgres", source="argument")
    cluster = embedded.cluster(target.path) if isinstance(target, url.EmbeddedCluster) else None
    try:
        conninfo = cluster.use() if cluster else target.conninfo  # type: ignore[union-attr]
        schema.upgrade(conninfo)
        print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {target}", flush=True)
        results = asyncio.run(measure(build(conninfo), names, given.runs, given.rounds))
    finally:
        if cluster:
            cluster.leave()
        shutil.rmtree(scratch, ignore_errors=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))
