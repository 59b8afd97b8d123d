"""Measure queue_service and what you would take instead, in the same run and on the same Postgres.

The contenders take turns within each round, each in a process and on a database of its own. The server is embedded, in
a temporary directory unless a URL is given, with its default settings: nothing about durability is changed. Nothing else
should be running.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import psycopg

from benchmarks import floor, gateway, outages, peers, pooler, report, row_security, scenario, turns, wakeups
from benchmarks.arena import Arena, Figures
from benchmarks.contests import CONTESTS, LONG, TASTE, Sizes
from benchmarks.scenario import SCENARIOS
from queue_service import logs
from queue_service.db import embedded, schema, url

assert all((turns, floor, gateway, pooler, outages, wakeups, row_security)), "importing them lists their scenarios"
CONTENDERS = [peers.OURS, "procrastinate", "pgqueuer", "graphile-worker", "pg-boss"]


def options(arguments: list[str]) -> argparse.Namespace:
    known = [*CONTESTS, *SCENARIOS]
    parser = argparse.ArgumentParser(
        "scripts/bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    told = "\n".join(f"{name:16} {_told(name)}" for name in known)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure; all by default:\n{told}")
    parser.add_argument("--only", metavar="LIST", help=f"contenders, of {','.join(CONTENDERS)}; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--taste", action="store_true", help="tiny sizes, to see that it works; the figures mean nothing"
    )
    parser.add_argument("--long", action="store_true", help=f"also {', '.join(sorted(LONG))}, once: an hour more")
    parser.add_argument("--database-url", help="an existing server, on which a database is made and dropped")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write JSON, a table and charts to this directory")
    given = parser.parse_args(arguments)
    given.names = given.names or [name for name in known if given.long or name not in LONG]
    given.only = given.only.split(",") if given.only else CONTENDERS
    if unknown := set(given.names) - set(known):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    if unknown := set(given.only) - set(CONTENDERS):
        parser.error(f"no contender is called {', '.join(sorted(unknown))}")
    return given


def _told(name: str) -> str:
    function: Any = CONTESTS.get(name) or SCENARIOS[name]
    return str(function.__doc__).splitlines()[0]


def measure(arena: Arena, given: argparse.Namespace) -> Figures:
    figures, sizes = Figures(), TASTE if given.taste else Sizes()
    if not given.taste:
        # The first to use a new server finds it cold.
        for contender in arena.names:
            CONTESTS["drain"](arena, contender, TASTE)
    for number in range(given.rounds):
        for name in given.names if number == 0 else [each for each in given.names if each not in LONG]:
            together = name in CONTESTS and name not in LONG
            turn = number % len(arena.names)
            for contender in [*arena.names[turn:], *arena.names[:turn]] if together else [peers.OURS]:
                taken = one(arena, name, contender, sizes)
                if taken:
                    figures.add(name, contender, taken)
                    told = ", ".join(f"{figure} {report.number(value)}" for figure, value in taken.items())
                    print(f"{number + 1}/{given.rounds}  {name:15} {contender:15} {told}", flush=True)
    return figures


def one(arena: Arena, name: str, contender: str, sizes: Sizes) -> dict[str, float]:
    """One contender in one scenario, once. A peer that fails is told of and has no figures; we must not."""
    if name in SCENARIOS:
        conninfo = arena.emptied()
        schema.upgrade(conninfo)
        return asyncio.run(scenario.measured(conninfo, name, sizes.drain))
    try:
        return CONTESTS[name](arena, contender, sizes)
    except peers.PeerFailed as failed:
        if contender == peers.OURS:
            raise
        print(f"{name}: {failed}", file=sys.stderr, flush=True)
        return {}


def main() -> None:
    given = options(sys.argv[1:])
    logs.configure(level="error", fmt="auto")
    contending = given.only if set(given.names) & (CONTESTS.keys() - LONG) else [peers.OURS]
    commands = peers.commands(contending)
    scratch = Path(tempfile.mkdtemp(prefix="queue_service-bench-"))
    scratch.chmod(0o711)
    target = url.parse(given.database_url or f"file:{scratch}/postgres", source="argument")
    cluster = embedded.cluster(target.path) if isinstance(target, url.EmbeddedCluster) else None
    try:
        conninfo = cluster.use() if cluster else target.conninfo  # type: ignore[union-attr]
        arena = Arena(conninfo, commands, cluster.data if cluster else None)
        with psycopg.connect(conninfo) as conn:
            version = f"Postgres {conn.info.parameter_status('server_version')}"
        figures = measure(arena, given)
        arena.drop()
    finally:
        if cluster:
            cluster.leave()
        shutil.rmtree(scratch, ignore_errors=True)
    command = shlex.join(["scripts/bench", *(each for each in sys.argv[1:] if "://" not in each)])
    told = report.Report(figures, report.machine(command, list(commands), given.rounds, version))
    print("\n" + told.table())
    if given.results:
        told.write(given.results)


if __name__ == "__main__":
    main()
