"""The ways from a client to the primary: HAProxy; the three servers; a pooler on each of them; and a pooler before HAProxy."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.chaos.ha.cluster import API, POOLER, POSTGRES, USER, Cluster, listens, until
from tests.chaos.ha.network import NODES
from tests.chaos.ha.poolers import write_pooler

ROUTES = ("haproxy", "hosts", "poolers", "pooled")
HAPROXY = 5000
DATABASE = "queue"

# Patroni answers 200 on the primary alone. Two failures, half a second apart: one may be a busy machine. What leads to a server
# that is not the primary any more is closed at once.
HAPROXY_SETTINGS = """
global
    maxconn 1000
defaults
    mode tcp
    option clitcpka
    option srvtcpka
    retries 0
    timeout connect 1s
    timeout queue 1s
    timeout check 1s
    timeout client 1h
    timeout server 1h
listen primary
    bind {bind}
    option httpchk GET /primary
    http-check expect status 200
    default-server inter 500ms downinter 200ms fall 2 rise 1 on-marked-down shutdown-sessions
{servers}
"""


class Kept:
    """A program that is started again when it ends, as systemd does it."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self._is_wanted = True
        self._process = start()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._is_wanted = False
        while self._keeper.is_alive():
            self._process.kill()
            self._keeper.join(0.1)

    def _keep(self) -> None:
        while True:
            self._process.wait()
            if not self._is_wanted:
                return
            time.sleep(0.1)  # as systemd's RestartSec
            self._process = self._start()


class Routes:
    """`urls` by name."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._gateway = cluster.network.gateway
        self._kept: dict[str, Kept] = {}
        addresses = [cluster.network.address(node) for node in NODES]
        ways = {
            "haproxy": f"{self._gateway}:{HAPROXY}",
            "hosts": ",".join(f"{address}:{POSTGRES}" for address in addresses),
            "poolers": ",".join(f"{address}:{POOLER}" for address in addresses),
            "pooled": f"{self._gateway}:{POOLER}",
        }
        self.urls = {name: f"postgresql://{USER}:postgres@{where}/{DATABASE}" for name, where in ways.items()}

    def start(self) -> None:
        home = self._cluster.place / "routes"
        home.mkdir(mode=0o750)
        servers = "\n".join(
            f"    server {node} {self._cluster.network.address(node)}:{POSTGRES} check port {API}" for node in NODES
        )
        (home / "haproxy.cfg").write_text(HAPROXY_SETTINGS.format(bind=f"{self._gateway}:{HAPROXY}", servers=servers))
        write_pooler(home, listens=(self._gateway, POOLER), server=(self._gateway, HAPROXY))
        for each in (home, *home.iterdir()):
            shutil.chown(each, USER, USER)
        haproxy = ["/usr/sbin/haproxy", "-db", "-f", str(home / "haproxy.cfg")]
        self._kept["haproxy"] = self._keep(home, haproxy)
        self._kept["pgbouncer"] = self._keep(home, ["/usr/sbin/pgbouncer", "-q", str(home / "pgbouncer.ini")])
        for port in (HAPROXY, POOLER):
            until(f"port {port}", lambda: listens(self._gateway, port), 30)  # noqa: B023

    def restart(self, name: str) -> None:
        """`haproxy` or `pgbouncer` is killed, and started again."""
        self._kept[name].kill()

    def stop(self) -> None:
        for each in self._kept.values():
            each.end()

    def _keep(self, home: Path, command: list[str]) -> Kept:
        def start() -> subprocess.Popen[bytes]:
            with (home / f"{Path(command[0]).name}.out").open("ab") as out:
                return subprocess.Popen(
                    command,
                    user=USER,
                    group=USER,
                    extra_groups=[],
                    cwd=home,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )

        return Kept(start)


@contextmanager
def routed(cluster: Cluster) -> Iterator[Routes]:
    routes = Routes(cluster)
    try:
        routes.start()
        yield routes
    finally:
        with suppress(ProcessLookupError):
            routes.stop()
