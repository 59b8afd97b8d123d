"""What is done to the cluster, one at a time. Each leaves it healthy for the next one, and says how long service was away."""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tests.chaos.ha.cluster import LOOP_WAIT, TTL, Cluster
from tests.chaos.ha.fleet import Fleet
from tests.chaos.ha.network import NODES
from tests.chaos.ha.routes import Routes

KINDS = ("kill", "switchover", "freeze", "partition", "restart")
# How long service may be away, in seconds.
LIMITS = {"kill": TTL + 5.0, "switchover": 3.0}
# Service as usual between two faults.
CALM = 3.0
# A node that was frozen or cut off comes back when another one leads for sure, and goes on for so long under the eyes of a
# client that knows nobody else.
AWAY, BACK = TTL + LOOP_WAIT, 5.0


@dataclass
class Fault:
    """`acknowledged` and `finished`: by route, how long none was, in seconds: from the fault, or the last one after it."""

    kind: str
    victim: str
    at: float
    leader: str = ""
    until: float = 0.0
    acknowledged: dict[str, float] = field(default_factory=dict)
    finished: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max((*self.acknowledged.values(), *self.finished.values()), default=0.0)

    @property
    def is_slow(self) -> bool:
        return self.worst > LIMITS.get(self.kind, float("inf"))


class Faults:
    def __init__(self, cluster: Cluster, routes: Routes, fleet: Fleet, dice: random.Random) -> None:
        self._cluster = cluster
        self._routes = routes
        self._fleet = fleet
        self._dice = dice

    def strike(self, kind: str) -> Fault:
        self._cluster.wait_until_healthy()
        time.sleep(CALM + self._dice.random())  # service as usual
        fault: Fault = getattr(self, f"_{kind}")(self._cluster.wait_for_leader())
        self._cluster.wait_until_healthy()
        self._fleet.wait_until_served(time.time())
        fault.until = time.time()
        acknowledged, finished = self._fleet.acknowledged(), self._fleet.finished(fault.at - CALM)
        for route, times in acknowledged.items():
            fault.acknowledged[route] = away(times, fault.at, fault.until)
            fault.finished[route] = away(finished[route], fault.at, fault.until)
        return fault

    def _kill(self, leader: str) -> Fault:
        """The leader's node, and all that is on it. It comes back when another one leads and serves."""
        fault = Fault("kill", leader, time.time())
        self._cluster.kill(leader)
        fault.leader = self._cluster.wait_for_leader(but=leader)
        self._fleet.wait_until_served(time.time())
        self._cluster.boot(leader)
        return fault

    def _switchover(self, leader: str) -> Fault:
        fault = Fault("switchover", leader, time.time())
        self._cluster.switch_over(leader)
        fault.leader = self._cluster.wait_for_leader(but=leader)
        self._fleet.wait_until_served(time.time())
        return fault

    def _freeze(self, leader: str) -> Fault:
        """The leader's node, which knows nothing of it when it goes on."""
        with self._fleet.inside(leader):
            fault = Fault("freeze", leader, time.time())
            self._cluster.freeze(leader)
            try:
                self._come_back_later(fault)
            finally:
                self._cluster.thaw(leader)
            time.sleep(BACK)  # under the eyes of the client inside
        return fault

    def _partition(self, leader: str) -> Fault:
        """The leader's node is cut off, from etcd too, and goes on."""
        with self._fleet.inside(leader):
            fault = Fault("partition", leader, time.time())
            self._cluster.network.cut(leader)
            try:
                self._come_back_later(fault)
            finally:
                self._cluster.network.mend(leader)
            time.sleep(BACK)  # under the eyes of the client inside
        return fault

    def _restart(self, leader: str) -> Fault:
        """HAProxy, the pooler before it, or the pooler of a node."""
        victim = self._dice.choice(["haproxy", "pgbouncer", *(f"pgbouncer of {node}" for node in NODES)])
        fault = Fault("restart", victim, time.time(), leader)
        if victim in {"haproxy", "pgbouncer"}:
            self._routes.restart(victim)
        else:
            self._cluster.restart_pooler(victim.removeprefix("pgbouncer of "))
        self._fleet.wait_until_served(time.time())
        return fault

    def _come_back_later(self, fault: Fault) -> None:
        fault.leader = self._cluster.wait_for_leader(but=fault.victim)
        self._fleet.wait_until_served(time.time())
        time.sleep(max(0.0, fault.at + AWAY - time.time()))  # as long as a fault that outlasts the lock of a leader


def away(times: Sequence[float], since: float, until: float) -> float:
    """The longest time without one of these in between, as far as it is after `since`."""
    first = max(bisect_left(times, since) - 1, 0)
    inside = [since, *(each for each in times[first:] if since < each < until), until]
    return max(after - before for before, after in pairwise(inside))
