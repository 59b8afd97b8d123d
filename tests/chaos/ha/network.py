"""Machines of their own for three nodes, on one real machine: each has a network namespace and a cable to a switch, which can
be pulled out. Where the system allows no namespaces, each has an address of 127.0.0.0/8, and no cable to pull.

On the switch, at the gateway's address, is what is not on a node: etcd, HAProxy, a pooler, workers and clients.
"""

from __future__ import annotations

import fcntl
import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

NODES = ("n1", "n2", "n3")
_LOCKS = Path("/run/lock")


class Network:
    """The addresses, and how to start a program on a node. `has_cables`: a node can be cut off."""

    def __init__(self, number: int, *, has_cables: bool) -> None:
        self.has_cables = has_cables
        self._number = number
        self._prefix = f"10.213.{number}" if has_cables else f"127.213.{number}"
        self.gateway = f"{self._prefix}.1"

    def address(self, node: str) -> str:
        return f"{self._prefix}.{11 + NODES.index(node)}"

    def on(self, node: str, command: Sequence[str]) -> list[str]:
        """The command, as it is started on this node."""
        return ["ip", "netns", "exec", self._namespace(node), *command] if self.has_cables else list(command)

    def inner_address(self, node: str) -> str:
        """Where a program on the node finds what is on the node, also when it is cut off."""
        return "127.0.0.1" if self.has_cables else self.address(node)

    def cut(self, node: str) -> None:
        """Nothing reaches the node any more, and nothing leaves it. Nobody is told."""
        _ip(f"link set {self._cable(node)} down")

    def mend(self, node: str) -> None:
        _ip(f"link set {self._cable(node)} up")

    def _namespace(self, node: str) -> str:
        return f"qsha{self._number}{node}"

    def _cable(self, node: str) -> str:
        return f"qsha{self._number}{node}"

    @property
    def _switch(self) -> str:
        return f"qsha{self._number}"

    def make(self) -> None:
        _ip(f"link add {self._switch} type bridge")
        _ip(f"addr add {self.gateway}/24 dev {self._switch}")
        _ip(f"link set {self._switch} up")
        for node in NODES:
            space, cable = self._namespace(node), self._cable(node)
            _ip(f"netns add {space}")
            _ip(f"link add {cable} type veth peer name eth0 netns {space}")
            _ip(f"link set {cable} master {self._switch} up")
            _ip(f"-n {space} addr add {self.address(node)}/24 dev eth0")
            _ip(f"-n {space} link set eth0 up")
            _ip(f"-n {space} link set lo up")

    def unmake(self) -> None:
        """Also what is left of one that was half made."""
        for node in NODES:
            _ip(f"netns del {self._namespace(node)}", check=False)
            # Until the last program in it has ended, it and its end of the cable are there.
            _ip(f"link del {self._cable(node)}", check=False)
        _ip(f"link del {self._switch}", check=False)


@contextmanager
def network() -> Iterator[Network]:
    """One that goes with the block. What others have left, whose process was killed, goes now."""
    _sweep()
    number = random.SystemRandom().randrange(1, 255)
    with _lock(number).open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        made = Network(number, has_cables=True)
        try:
            yield made if _could_make(made) else Network(number, has_cables=False)
        finally:
            made.unmake()
            _lock(number).unlink(missing_ok=True)


def _could_make(wanted: Network) -> bool:
    try:
        wanted.make()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False
    return True


def _sweep() -> None:
    for path in _LOCKS.glob("qsha*.lock"):
        with suppress(OSError), path.open("w") as theirs:
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Network(int(path.stem.removeprefix("qsha")), has_cables=True).unmake()
            path.unlink(missing_ok=True)


def _lock(number: int) -> Path:
    """Locked by whoever has the network of this number, for as long as he lives."""
    return _LOCKS / f"qsha{number}.lock"


def _ip(arguments: str, *, check: bool = True) -> None:
    subprocess.run(["ip", *arguments.split()], check=check, capture_output=True)  # noqa: S607
