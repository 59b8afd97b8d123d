"""The whole of it: a cluster, load, faults in an order that a seed gives, and after every few of them a check.

It can be broken off, and taken up again with the same file: what was checked is in it, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psycopg

from queue_service.db import grants, schema
from queue_service.testing.watcher import watched
from tests.chaos.ha.checker import Verdict, check
from tests.chaos.ha.cluster import USER, Cluster, missing, running
from tests.chaos.ha.faults import KINDS, LIMITS, Fault, Faults
from tests.chaos.ha.fleet import Fleet
from tests.chaos.ha.network import network
from tests.chaos.ha.routes import DATABASE, ROUTES, Routes, routed
from tests.chaos.ha.tasks import EFFECTS

# Between two checks.
ROUND = 5
WORDS = {
    "kill": "kills",
    "switchover": "switchovers",
    "freeze": "freezes",
    "partition": "partitions",
    "restart": "restarts",
}


class Suite:
    """One cluster, and all that uses it. `faults` and `verdict` are of all rounds so far."""

    def __init__(self, cluster: Cluster, routes: Routes, seed: int) -> None:
        self.cluster = cluster
        self.faults: list[Fault] = []
        self.verdict = Verdict()
        self._fleet = Fleet(cluster, routes)
        self._faults = Faults(cluster, routes, self._fleet, random.Random(seed))

    def go_through(self, kinds: Sequence[str]) -> None:
        """One round: these faults, under load, and a check of all there was."""
        struck = []
        try:
            self._fleet.start()
            for kind in kinds:
                struck.append(fault := self._faults.strike(kind))
                say(described(fault))
            self._fleet.end()
        finally:
            self._fleet.kill()
        self.faults += struck
        self.verdict = check(self._fleet.ledgers, self._fleet.conninfo)
        say(f"checked: {judged(self.verdict)}")


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM, as of a CI job that takes too long, is as Ctrl-C: the network is taken away, and the logs are left."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def suite(seed: int) -> Iterator[Suite]:
    place = Path(tempfile.mkdtemp(prefix="qs-ha-"))
    # Patroni and Postgres run as another user.
    place.chmod(0o755)
    is_kept = True
    try:
        with _stoppable(), network() as cables, watched(place):
            if not cables.has_cables:
                say("This machine allows no network namespaces: no node can be cut off.")
            begun = time.monotonic()
            with running(place, cables) as cluster, routed(cluster) as routes:
                _make_database(cluster, routes)
                say(f"three nodes are up after {time.monotonic() - begun:.0f} s, in {place}")
                made = Suite(cluster, routes, seed)
                yield made
                is_kept = not made.verdict.is_clean
    finally:
        # Also where the cluster did not come up: its logs say why.
        if is_kept:
            say(f"Logs, ledgers and the servers' files are left in {place}. Remove it once you have read them.")
        else:
            shutil.rmtree(place, ignore_errors=True)


def _make_database(cluster: Cluster, routes: Routes) -> None:
    leader = cluster.network.address(cluster.wait_for_leader())
    with psycopg.connect(f"postgresql://postgres:postgres@{leader}/postgres", autocommit=True) as conn:
        conn.execute(f"create database {DATABASE}".encode())
    schema.upgrade(routes.urls["hosts"])
    with psycopg.connect(f"postgresql://postgres:postgres@{leader}/{DATABASE}", autocommit=True) as conn:
        conn.execute(EFFECTS.encode())
        # As `db grants` prints them, for the routes with a pooler. Tables that are never vacuumed between two switchovers are
        # read as a whole without them.
        for statement in grants.settings(USER, grants.Place(USER, DATABASE, USER)):
            conn.execute(statement.encode())


def plan(asked: dict[str, int], done: Counter[str], seed: int) -> list[str]:
    """The kinds of faults that are left, in an order of their own."""
    left = [kind for kind in KINDS for _ in range(asked[kind] - done[kind])]
    random.Random(seed).shuffle(left)
    return left


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)  # noqa: T201 - the command's answer


def described(fault: Fault) -> str:
    ways = ", ".join(f"{route} {fault.acknowledged[route]:.1f}/{fault.finished[route]:.1f}" for route in ROUTES)
    slow = f"  more than {LIMITS[fault.kind]:.0f} s" if fault.is_slow else ""
    return f"{fault.kind} of {fault.victim} -> {fault.leader}: away (acknowledged/finished, s) {ways}{slow}"


def judged(verdict: Verdict) -> str:
    counts = ", ".join(f"{count:,} {name}" for name, count in verdict.counts.items())
    wrong = {"lost": verdict.lost, "doubled": verdict.doubled, "endings": verdict.endings, "odd": verdict.odd}
    found = "; ".join(f"{len(each)} {name}, as {each[0]!r}" for name, each in wrong.items() if each)
    return f"{counts}. {found or '0 lost, 0 doubled, every turn ended once'}"


class Record:
    """What was done so far, in a file: one entry for each cluster that there was."""

    def __init__(self, path: Path | None, seed: int) -> None:
        self._path = path
        self._sessions: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self._sessions = json.loads(path.read_text())["sessions"]
        self._sessions.append({"seed": seed, "cores": os.cpu_count(), "faults": [], "verdict": None})

    def put(self, faults: Sequence[Fault], verdict: Verdict) -> None:
        self._sessions[-1] |= {"faults": [asdict(fault) for fault in faults], "verdict": verdict.as_dict()}
        self._write()

    @contextmanager
    def failures(self) -> Iterator[None]:
        """What goes wrong in the block is kept, so that whoever takes it up again does not call it clean: service that never
        came back, or a worker that ended. Who breaks it off (Ctrl-C) has found nothing."""
        try:
            yield
        except Exception as failure:
            self._sessions[-1]["failed"] = f"{type(failure).__name__}: {failure}"
            self._write()
            raise

    def _write(self) -> None:
        if self._path is not None:
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps({"sessions": self._sessions}, indent=1) + "\n")
            new.replace(self._path)

    @property
    def faults(self) -> list[Fault]:
        return [Fault(**fault) for session in self._sessions for fault in session["faults"]]

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        return [session["verdict"] for session in self._sessions if session["verdict"] is not None]

    @property
    def failed(self) -> list[str]:
        return [session["failed"] for session in self._sessions if "failed" in session]

    def table(self) -> str:
        """As in docs/ha.md."""
        lines = ["| fault | times | " + " | ".join(ROUTES) + " |", "|---|---|" + "---|" * len(ROUTES)]
        for kind in KINDS:
            faults = [fault for fault in self.faults if fault.kind == kind]
            cells = [
                f"{max(fault.acknowledged[route] for fault in faults):.1f} / "
                f"{max(fault.finished[route] for fault in faults):.1f}"
                for route in ROUTES
                if faults
            ]
            if faults:
                lines.append(f"| {kind} | {len(faults)} | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(arguments)
    if lacking := missing():
        say(f"This needs {', '.join(lacking)}. `scripts/chaos ha` installs it, as root.")
        return 2
    record = Record(asked.json, asked.seed)
    wanted = {kind: getattr(asked, words) for kind, words in WORDS.items()}
    left = plan(wanted, Counter(fault.kind for fault in record.faults), asked.seed)
    say(f"seed {asked.seed}: {len(left)} faults to go")
    if left:
        with suite(asked.seed) as running_suite:
            if not running_suite.cluster.network.has_cables:
                left = [kind for kind in left if kind != "partition"]
            for begin in range(0, len(left), ROUND):
                with record.failures():
                    running_suite.go_through(left[begin : begin + ROUND])
                record.put(running_suite.faults, running_suite.verdict)
                if not running_suite.verdict.is_clean:
                    break
    return conclude(record, wanted, is_lenient=asked.lenient)


def conclude(record: Record, wanted: dict[str, int], *, is_lenient: bool) -> int:
    """What came of it, in words, and the exit code."""
    say("longest time without an acknowledged call / an ended run, in seconds:")
    print(record.table())  # noqa: T201 - the command's answer
    slow = [fault for fault in record.faults if fault.is_slow]
    if slow:
        say(f"{len(slow)} faults took longer than they may: {', '.join(f'{f.kind} {f.worst:.1f} s' for f in slow)}")
    done = Counter(fault.kind for fault in record.faults)
    undone = [f"{asked - done[kind]} of {asked} {WORDS[kind]}" for kind, asked in wanted.items() if asked > done[kind]]
    if undone:
        say(f"not done: {', '.join(undone)}")
    for why in record.failed:
        say(f"a round did not come to its check: {why}")
    if not record.verdicts:
        say("NOT CLEAN: nothing was checked")
        return 1
    is_clean = all(verdict["is_clean"] for verdict in record.verdicts) and not record.failed
    say("clean: nothing lost, nothing doubled, each turn ended once" if is_clean else "NOT CLEAN")
    return 0 if is_clean and (is_lenient or not slow) else 1


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos ha", description=__doc__)
    for words, count in zip(WORDS.values(), (20, 10, 5, 5, 5), strict=True):
        parser.add_argument(f"--{words}", type=int, default=count, metavar="N", help=f"{count} if nothing is said")
    parser.add_argument("--seed", type=int, default=1, help="of the order of faults")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the results are kept; what is in it is not done again"
    )
    parser.add_argument("--lenient", action="store_true", help="do not fail for how long service was away")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
