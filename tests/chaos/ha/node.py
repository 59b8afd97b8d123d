"""What runs on a node, as a program: Patroni and a pgbouncer, each started again when it ends, as systemd does it.

Whatever they start stays a child of this process, also when its own parent has ended (Postgres leaves Patroni). So all that is
on the node is found from here, to be killed or frozen together.

usage: node.py USER COMMAND [-- COMMAND]…          Only the standard library: it is started with any interpreter.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

_SUBREAPER, _DEATH_SIGNAL = 36, 1
_PAUSE = 0.5


def main(user: str, commands: list[list[str]]) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_SUBREAPER, 1)
    libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)
    running: dict[int, list[str]] = {}

    def start(command: list[str]) -> None:
        child = subprocess.Popen(
            command, user=user, group=user, extra_groups=[], stdin=subprocess.DEVNULL, start_new_session=True
        )
        child.returncode = 0  # the loop below reaps it
        running[child.pid] = command

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    for command in commands:
        start(command)
    while True:
        pid, _ = os.wait()
        if (ended := running.pop(pid, None)) is not None:
            time.sleep(_PAUSE)  # as systemd's RestartSec
            start(ended)


def split(arguments: list[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    for each in arguments:
        if each == "--":
            commands.append([])
        else:
            commands[-1].append(each)
    return commands


if __name__ == "__main__":
    main(sys.argv[1], split(sys.argv[2:]))
