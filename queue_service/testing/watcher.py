"""What tests start in a directory of their own ends with them, however they end: also when they are killed.

A second process waits for the end of a pipe that only the first one holds. Then it kills every process that was started
with the directory on its command line or in its environment (a server by its data directory, a worker by its database
URL); and where the pipe ended without a word, it removes the directory. Only those: the path has to stand there as a
whole, so that `run-2` is not found in `run-23`, and the process has to be younger than the watcher. (Without /proc, as on
macOS, only command lines are read, and ages are not: that is untested.)
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Run with `-I`: it needs the standard library only, and starts quickly. Killed with SIGKILL, since nobody reads what these
# processes would still say, and a server that is killed leaves nothing outside of its directory.
_PROGRAM = r"""
import os, re, shutil, signal, subprocess, sys, time

directory = sys.argv[1]
named = re.compile(rb"(?<![\w./-])" + re.escape(os.fsencode(directory)) + rb"(?![\w.-])")

def started(pid):
    # In clock ticks since the machine started; what comes before it holds the name, which may have brackets of its own.
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[19])

has_proc = os.path.isdir("/proc/self")
own_start = started("self") if has_proc else 0
has_ended_in_order = bool(sys.stdin.buffer.read())

def theirs():
    # Each process that is to be killed, and None for one that does not show yet what it is.
    if has_proc:
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                texts = [open(f"/proc/{name}/{kind}", "rb").read() for kind in ("cmdline", "environ")]
                if started(name) < own_start:
                    continue
                if any(map(named.search, texts)):
                    yield int(name)
                elif not any(text.strip(b"\0") for text in texts):
                    # In the midst of `exec` neither is there. Of zombies and the kernel's threads neither, but no program.
                    os.readlink(f"/proc/{name}/exe")
                    yield None
            except OSError:
                continue
    else:
        listed = subprocess.run(["ps", "-axww", "-o", "pid=,command="], capture_output=True).stdout
        for line in listed.splitlines():
            pid, _, command = line.strip().partition(b" ")
            if named.search(command):
                yield int(pid)

# A server forks while it is being killed: look until there is nothing left.
for _ in range(100):
    found = [pid for pid in theirs() if pid != os.getpid()]
    if not found:
        break
    for pid in filter(None, found):
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.05)
if not has_ended_in_order:
    shutil.rmtree(directory, ignore_errors=True)
"""


@contextmanager
def watched(directory: Path) -> Iterator[None]:
    """Whatever was started with this directory ends with the block, or with this process if that is killed in it."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-c", _PROGRAM, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A signal to our group, such as Ctrl-C, must not end it.
        start_new_session=True,
    )
    assert watcher.stdin is not None
    try:
        yield
    finally:
        # It may have been killed itself, which is no failure of what was watched.
        with suppress(BrokenPipeError):
            watcher.stdin.write(b"done")
            watcher.stdin.flush()
        with suppress(BrokenPipeError):
            watcher.stdin.close()
        watcher.wait()
