"""The processes that use the database while there are faults: for each route a client, and a worker of its own queue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psycopg

from tests.chaos.ha.cluster import Cluster, until
from tests.chaos.ha.ledger import Reader
from tests.chaos.ha.load import HELD
from tests.chaos.ha.routes import DATABASE, ROUTES, Routes

_REPOSITORY = Path(__file__).parents[3]
_PACES = ("--lease", "5s", "--poll-interval", "500ms", "--sweep-interval", "500ms", "--max-losses", "1000")
# A call that is under way may take its whole deadline, and the next one as well.
_ENDING = 150.0
_LEFT = "select (select count(*) from queue_service.runs) + (select count(*) from queue_service.turn_markers)"
_FINISHED = """
select queue, extract(epoch from finished_at)::float8 from queue_service.finished_runs
 where finished_at >= to_timestamp(%s) order by finished_at
"""


class _Client(NamedTuple):
    route: str
    process: subprocess.Popen[bytes]
    ledger: Reader


class Fleet:
    def __init__(self, cluster: Cluster, routes: Routes) -> None:
        self.ledgers = cluster.place / "ledgers"
        self.ledgers.mkdir()
        self._cluster = cluster
        self._routes = routes
        self._clients: list[_Client] = []
        self._inside: list[_Client] = []
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._count = 0

    def start(self) -> None:
        """Returns when all are at work."""
        begun = time.time()
        for route in ROUTES:
            self._work(route, self._routes.urls[route])
            self._clients.append(self._client(route, self._routes.urls[route]))
        self.wait_until_served(begun, within=90)

    @contextmanager
    def inside(self, node: str) -> Iterator[None]:
        """For the length of the block, a client on this node, which knows no other server."""
        network = self._cluster.network
        url = f"postgresql://postgres:postgres@{network.inner_address(node)}/{DATABASE}"
        client = self._client("inside", url, "effect", "many", node=node)
        self._inside.append(client)
        until("a client on the node", lambda: client.ledger.acknowledged, 60)
        yield
        client.process.send_signal(signal.SIGTERM)

    def wait_until_served(self, since: float, within: float = 120.0) -> None:
        """By each route something was acknowledged after this moment, and something has ended."""
        until("service by every route", lambda: self._is_served(since), within, every=0.3)

    def end(self) -> None:
        """The clients end once every waiter was told, the workers once everything has ended."""
        self._work(HELD, self._routes.urls["hosts"])
        for client in self._clients:
            client.process.send_signal(signal.SIGTERM)
        for client in (*self._clients, *self._inside):
            client.process.wait(_ENDING)
        self._clients, self._inside = [], []
        until("the end of all runs", self._is_drained, _ENDING, every=0.5)
        self._end_workers()

    def kill(self) -> None:
        for process in (*(each.process for each in (*self._clients, *self._inside)), *self._workers.values()):
            process.kill()
            process.wait()

    def acknowledged(self) -> dict[str, list[float]]:
        """When something was, by route, in order."""
        return {each.route: each.ledger.acknowledged for each in self._clients}

    def finished(self, since: float) -> dict[str, list[float]]:
        """When runs have ended, by route, in order."""
        times: dict[str, list[float]] = {route: [] for route in ROUTES}
        with self._direct() as conn:
            for queue, at in conn.execute(_FINISHED, [since]):
                times.setdefault(str(queue), []).append(float(str(at)))
        return times

    @property
    def conninfo(self) -> str:
        """The primary, without anything in between."""
        leader = self._cluster.wait_for_leader()
        return f"postgresql://postgres:postgres@{self._cluster.network.address(leader)}/{DATABASE}"

    def _direct(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.conninfo, autocommit=True, connect_timeout=5)

    def _is_served(self, since: float) -> bool:
        if any(not each or each[-1] <= since for each in self.acknowledged().values()):
            return False
        try:
            finished = self.finished(since)
        except psycopg.OperationalError:
            return False
        return all(finished[route] for route in ROUTES)

    def _is_drained(self) -> bool:
        try:
            with self._direct() as conn:
                return conn.execute(_LEFT).fetchone() == (0,)
        except psycopg.OperationalError:
            return False

    def _end_workers(self) -> None:
        ended = {name: worker.poll() for name, worker in self._workers.items()}
        assert set(ended.values()) == {None}, f"workers have ended by themselves: {ended}"
        for worker in self._workers.values():
            worker.send_signal(signal.SIGTERM)
        codes = {name: worker.wait(_ENDING) for name, worker in self._workers.items()}
        self._workers = {}
        assert set(codes.values()) == {0}, f"workers did not end in order: {codes}"

    def _work(self, queue: str, url: str) -> None:
        command = [
            sys.executable,
            "-m",
            "queue_service",
            "worker",
            "-a",
            "tests.chaos.ha.tasks:app",
            "-q",
            f"{queue}:8",
        ]
        self._workers[queue] = self._started(
            [*command, *_PACES, "--name", f"worker of {queue}"], url, f"worker-{queue}"
        )

    def _client(self, route: str, url: str, *kinds: str, node: str | None = None) -> _Client:
        self._count += 1
        name = f"{route}-{self._count}"
        ledger = self.ledgers / f"{name}.ledger"
        # What the client on a node stores is worked off by whoever can reach the primary.
        queue = route if node is None else ROUTES[0]
        command = [sys.executable, "-m", "tests.chaos.ha.load", name, queue, str(ledger), *kinds]
        command = command if node is None else self._cluster.network.on(node, command)
        return _Client(route, self._started(command, url, name), Reader(ledger))

    def _started(self, command: list[str], url: str, name: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "QUEUE_SERVICE_DATABASE_URL": url, "QUEUE_SERVICE_HA": str(self._cluster.place)}
        with (self._cluster.place / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=_REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
