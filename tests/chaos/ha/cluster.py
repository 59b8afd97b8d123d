"""Three nodes with Patroni and one etcd, as people run them: synchronous replication, strictly.

`ttl` is Patroni's smallest. A node is killed, frozen and cut off as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from tests.chaos.ha.network import NODES, Network
from tests.chaos.ha.poolers import write_pooler

TTL, LOOP_WAIT, RETRY_TIMEOUT = 20, 2, 5
POSTGRES, API, POOLER, ETCD = 5432, 8008, 6432, 2379
USER = "postgres"
PROGRAMS = Path("/usr/lib/postgresql/15/bin")
# Where `scripts/chaos` has installed it.
PATRONI = Path(os.environ.get("QUEUE_SERVICE_PATRONI", "/var/cache/queue_service/patroni")) / "bin" / "patroni"
NODE = Path(__file__).with_name("node.py")
START_TIMEOUT = 120.0
# Until a node that was just booted has its pooler.
POOLER_TIMEOUT = 30.0


class Member(NamedTuple):
    """What Patroni says of a node."""

    name: str
    role: str
    state: str
    timeline: int | None

    @property
    def is_leader(self) -> bool:
        return self.role in {"leader", "master", "primary"} and self.state == "running"


def missing() -> list[str]:
    """What is not installed, or not allowed, of what this needs."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
    found = [name for name in ("etcd", "haproxy", "pgbouncer", "ip") if shutil.which(name, path=path) is None]
    found += [str(program) for program in (PROGRAMS / "postgres", PATRONI) if not program.exists()]
    return found if os.geteuid() == 0 else ["root's rights", *found]


def until(what: str, condition: Callable[[], Any], within: float, *, every: float = 0.1) -> Any:
    """What the condition says, once that is true."""
    end = time.monotonic() + within
    while not (said := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {within:.0f} s.")
        time.sleep(every)  # other programs do it
    return said


class Cluster:
    def __init__(self, place: Path, network: Network) -> None:
        self.network = network
        self.place = place
        self._nodes: dict[str, psutil.Popen] = {}
        self._etcd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        shutil.chown(self.place, USER, USER)
        self._start_etcd()
        for node in NODES:
            self._write(node)
        # The first makes the database, the others copy it.
        for node in NODES:
            self.boot(node)
        self.wait_until_healthy(START_TIMEOUT)

    def boot(self, node: str) -> None:
        """As if the power had come back."""
        home = self.place / node
        patroni = [str(PATRONI), str(home / "patroni.json")]
        pooler = ["/usr/sbin/pgbouncer", "-q", str(home / "pgbouncer.ini")]
        command = [sys.executable, str(NODE), USER, *patroni, "--", *pooler]
        with (home / "node.log").open("ab") as log:
            self._nodes[node] = psutil.Popen(
                self.network.on(node, command),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=home,
                # `watched` finds it by this.
                env={"PATH": f"{os.defpath}:/usr/sbin", "PWD": str(self.place), "LC_ALL": "C.UTF-8"},
            )  # fmt: skip

    # What is done to a node

    def kill(self, node: str) -> None:
        """All of its processes at once."""
        family = self._stopped(node)
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, timeout=10)

    def freeze(self, node: str) -> None:
        self._stopped(node)

    def thaw(self, node: str) -> None:
        for each in self._family(node):
            with suppress(psutil.NoSuchProcess):
                each.resume()

    def restart_pooler(self, node: str) -> None:
        """It is killed, and started again by its node."""
        until(f"a pgbouncer of {node} to kill", lambda: self._kill_pooler(node), POOLER_TIMEOUT)

    def _kill_pooler(self, node: str) -> bool:
        killed = 0
        for each in self._family(node):
            with suppress(psutil.NoSuchProcess):
                if each.name() == "pgbouncer" and each.status() != psutil.STATUS_ZOMBIE:
                    each.kill()
                    killed += 1
        return killed > 0

    def switch_over(self, leader: str) -> str:
        """Ask for it; what Patroni answers when it is done. No candidate is named: where one is, the third node waits for
        two seconds before it follows, and a strict primary acknowledges nothing before."""
        asked = json.dumps({"leader": leader}).encode()
        request = urllib.request.Request(f"{self._api(leader)}/switchover", data=asked, method="POST")  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return str(answer.read().decode())

    def _family(self, node: str) -> list[psutil.Process]:
        first = self._nodes[node]
        with suppress(psutil.NoSuchProcess):
            return [first, *first.children(recursive=True)]
        return []

    def _stopped(self, node: str) -> list[psutil.Process]:
        """All of its processes, each of which is stopped: they start no others."""
        known: set[psutil.Process] = set()
        while new := set(self._family(node)) - known:
            for each in sorted(new, key=lambda process: process.pid):
                with suppress(psutil.NoSuchProcess):
                    each.suspend()
            known |= new
        return list(known)

    # How it is

    def members(self) -> list[Member]:
        """As the first node says that answers; none: none answers."""
        for node in NODES:
            with suppress(OSError, ValueError):
                with urllib.request.urlopen(f"{self._api(node)}/cluster", timeout=1) as answer:  # noqa: S310
                    return [
                        Member(each["name"], each["role"], each["state"], each.get("timeline"))
                        for each in json.load(answer)["members"]
                    ]
        return []

    def leader(self, *, but: str | None = None) -> str | None:
        """The node that says itself that it is the primary."""
        for node in NODES:
            if node != but:
                with suppress(OSError), urllib.request.urlopen(f"{self._api(node)}/primary", timeout=1):  # noqa: S310
                    return node
        return None

    def wait_for_leader(self, *, but: str | None = None, within: float = 90.0) -> str:
        return str(until("a leader", lambda: self.leader(but=but), within))

    def wait_until_healthy(self, within: float = 120.0) -> None:
        """One leads, two follow it, and its commits wait for one of them."""
        until("a healthy cluster", self.is_healthy, within)

    def is_healthy(self) -> bool:
        members = self.members()
        return (
            len(members) == len(NODES)
            and sum(each.is_leader for each in members) == 1
            and sum(each.state == "streaming" for each in members) == len(NODES) - 1
            and len({each.timeline for each in members}) == 1
            and any(each.role in {"sync_standby", "quorum_standby"} for each in members)
            and self.leader() is not None
        )

    def stop(self) -> None:
        """In no order."""
        for node in self._nodes:
            self.kill(node)
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()

    # Making it

    def _api(self, node: str) -> str:
        return f"http://{self.network.address(node)}:{API}"

    def _start_etcd(self) -> None:
        where = f"http://{self.network.gateway}"
        command = [
            "etcd", "--name", "etcd", "--data-dir", str(self.place / "etcd"), "--listen-client-urls", f"{where}:{ETCD}",
            "--advertise-client-urls", f"{where}:{ETCD}", "--listen-peer-urls", f"{where}:{ETCD + 1}",
            "--initial-advertise-peer-urls", f"{where}:{ETCD + 1}", "--initial-cluster", f"etcd={where}:{ETCD + 1}",
        ]  # fmt: skip
        with (self.place / "etcd.log").open("ab") as log:
            self._etcd = subprocess.Popen(
                command, user=USER, group=USER, extra_groups=[], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        until("etcd", lambda: listens(self.network.gateway, ETCD), 30)

    def _write(self, node: str) -> None:
        home = self.place / node
        home.mkdir(mode=0o750)
        own = self.network.address(node)
        inside = self.network.inner_address(node)
        (home / "patroni.json").write_text(json.dumps(self._settings(node, home, own, inside)))
        write_pooler(home, listens=(own, POOLER), server=(inside, POSTGRES))
        for each in (home, *home.iterdir()):
            shutil.chown(each, USER, USER)

    def dynamic_settings(self) -> dict[str, Any]:
        """What `patronictl edit-config` shows."""
        return {
            "ttl": TTL,
            "loop_wait": LOOP_WAIT,
            "retry_timeout": RETRY_TIMEOUT,
            "synchronous_mode": "quorum",
            "synchronous_mode_strict": True,
            "postgresql": {
                "use_pg_rewind": True,
                "parameters": {
                    "max_connections": 200, "shared_buffers": "64MB", "wal_keep_size": "256MB",
                    # Of a standby whose primary has changed; by default 5 s.
                    "wal_retrieve_retry_interval": "500ms",
                },
            },
        }  # fmt: skip

    def _settings(self, node: str, home: Path, own: str, inside: str) -> dict[str, Any]:
        known = {"username": USER, "password": "postgres"}
        return {
            "scope": "ha",
            "name": node,
            "restapi": {"listen": f"{own}:{API}", "connect_address": f"{own}:{API}"},
            "etcd3": {"hosts": [f"{self.network.gateway}:{ETCD}"]},
            "bootstrap": {
                "dcs": self.dynamic_settings(),
                "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums"],
            },
            "postgresql": {
                "listen": ",".join(dict.fromkeys([own, inside])) + f":{POSTGRES}",
                "connect_address": f"{own}:{POSTGRES}",
                "data_dir": str(home / "data"),
                "bin_dir": str(PROGRAMS),
                "pgpass": str(home / "pgpass"),
                "parameters": {"unix_socket_directories": str(home)},
                "pg_hba": ["local all all trust", "host all all 0.0.0.0/0 trust", "host replication all 0.0.0.0/0 trust"],
                "authentication": {
                    "superuser": known,
                    "replication": {"username": "replicator", "password": "replicator"},
                    "rewind": {"username": "rewinder", "password": "rewinder"},
                },
            },
            "watchdog": {"mode": "off"},
        }  # fmt: skip


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def running(place: Path, network: Network) -> Iterator[Cluster]:
    cluster = Cluster(place, network)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
