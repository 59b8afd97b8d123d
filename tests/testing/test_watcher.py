"""Whatever ends a test run ends what it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from queue_service.testing.watcher import watched
from tests.support import eventually, is_gone, own_basetemp

MODULE = """
import os, subprocess, sys, time
import pytest

pytest_plugins = ["queue_service.testing"]

def test_that_never_ends(queue_service_database, tmp_path):
    worker = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": queue_service_database},
    )
    import psycopg
    with psycopg.connect(queue_service_database) as conn:
        directory = conn.execute("show data_directory").fetchone()[0]
    server = int(open(os.path.join(directory, "postmaster.pid")).readline())
    # On a line of its own: pytest has begun one with the name of this file.
    print(f"\\n{server} {worker.pid} {directory}", flush=True)
    worker.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
async def test_a_server_and_a_worker_end_with_a_run_that_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "test_module.py").write_text(MODULE)
    running = subprocess.Popen(  # noqa: ASYNC220 - the loop has nothing else to do
        [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", own_basetemp(tmp_path), "test_module.py"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert running.stdout is not None
    line = next(line for line in running.stdout if line.split()[:1] and line.split()[0].isdecimal())
    server, worker, directory = line.split(maxsplit=2)
    assert not is_gone(int(server))
    running.send_signal(number)
    running.wait()
    running.stdout.close()
    await eventually(lambda: is_gone(int(server)) and is_gone(int(worker)), within=30)
    await eventually(lambda: not Path(directory.strip()).exists(), within=30)


def sleeper(directory: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    return subprocess.Popen(command, env={**os.environ, "STARTED_FOR": f"host={directory}/data"})


HOLDER = """
import sys
from pathlib import Path
from queue_service.testing.watcher import watched

with watched(Path(sys.argv[1])):
    print("watched", flush=True)
    sys.stdin.read()
"""


async def test_nothing_else_is_killed(tmp_path: Path) -> None:
    """Neither what has a longer name, nor what stands deeper in another directory, nor what was there before."""
    ours = tmp_path / "run-2"
    ours.mkdir()
    older = sleeper(ours)
    await eventually(lambda: time.time() - psutil.Process(older.pid).create_time() > 0.1)
    holder = subprocess.Popen(  # noqa: ASYNC220 - the loop has nothing else to do
        [sys.executable, "-c", HOLDER, str(ours)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"watched\n"
    victim, spared = sleeper(ours), [older, sleeper(tmp_path / "run-23"), sleeper(Path(f"/elsewhere{ours}"))]
    try:
        holder.kill()
        holder.wait()
        await eventually(lambda: is_gone(victim.pid) and not ours.exists(), within=30)
        assert [each.poll() for each in spared] == [None, None, None]
    finally:
        for each in (victim, *spared):
            each.kill()
            each.wait()
        holder.stdin.close()
        holder.stdout.close()


async def test_what_does_not_show_yet_what_it_is_is_waited_for(tmp_path: Path) -> None:
    """A process in the midst of `exec` has neither a command line nor an environment. This one has none for longer."""
    ours = tmp_path / "run"
    ours.mkdir()
    with watched(ours):
        victim = subprocess.Popen([""], executable="/bin/sh", env={}, stdin=subprocess.PIPE, bufsize=0)  # noqa: ASYNC220, S607
        assert victim.stdin is not None
        become = f"exec /usr/bin/env STARTED_FOR=host={ours}/data /bin/sleep 600\n".encode()
        # The block ends at once, and waits for the watcher, which has looked by then.
        later = threading.Timer(0.5, victim.stdin.write, [become])
        later.start()
    later.join()
    try:
        await eventually(lambda: victim.poll() == -signal.SIGKILL)
    finally:
        victim.kill()
        victim.wait()
        victim.stdin.close()


async def test_a_run_that_ends_in_order_leaves_no_process_and_keeps_its_files(tmp_path: Path) -> None:
    ours = tmp_path / "run"
    ours.mkdir()
    with watched(ours):
        victim = sleeper(ours)
    try:
        await eventually(lambda: victim.poll() == -signal.SIGKILL)
        assert ours.exists()
    finally:
        victim.kill()
        victim.wait()
