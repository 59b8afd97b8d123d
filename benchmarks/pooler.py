"""Runs worked off through a pooler of transactions, and straight, in turns: scenarios of our own."""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.contests import LONG, TASTE
from benchmarks.scenario import scenario
from queue_service import App, Worker

PAIRS = 5
# Sessions of the server that the pooler has, as where many processes share few.
SESSIONS = 6
MILLION, BATCH = 1_000_000, 50_000
LONG.add("pooler_million")


@scenario
async def pooler(app: App, count: int) -> dict[str, float]:
    """No-op runs through pgbouncer (transactions, 6 sessions) and straight, in turns, and what went wrong."""
    return await both(app, count, 1 if count <= TASTE.drain else PAIRS)


@scenario
async def pooler_million(app: App, count: int) -> dict[str, float]:
    """A million of them through it."""
    program = found()
    if program is None:
        return {}
    taken = 0.0
    with pooled(app.conninfo, program) as conninfo, Mistakes() as mistakes:
        for _ in range(MILLION // BATCH):
            rate, wrong = await drained(conninfo, BATCH)
            taken += BATCH / rate
            mistakes.count += wrong
    return {"runs/s": MILLION / taken, "errors": float(mistakes.count)}


async def both(app: App, count: int, pairs: int) -> dict[str, float]:
    program = found()
    if program is None:
        return {}
    ratios, rates, wrong = [], [], 0
    with pooled(app.conninfo, program) as conninfo, Mistakes() as mistakes:
        for number in range(pairs):
            ways = [app.conninfo, conninfo]
            measured: dict[str, float] = {}
            for way in ways if number % 2 else reversed(ways):
                measured[way], more = await drained(way, count)
                wrong += more
            ratios.append(measured[conninfo] / measured[app.conninfo])
            rates.append(measured[conninfo])
        wrong += mistakes.count
    return {"runs/s": statistics.median(rates), "of the direct rate": statistics.median(ratios), "errors": float(wrong)}


async def drained(conninfo: str, count: int) -> tuple[float, int]:
    """How many a second, from the first handler to the last ending, and how many did not succeed at the first attempt."""
    first = 0.0
    async with App(conninfo) as app:

        @app.task
        async def noop() -> None:
            nonlocal first
            first = first or time.perf_counter()

        await app.enqueue_many("noop", [{}] * count)
        tally = await Worker(app, {"default": 100}).run(once=True)
        taken = time.perf_counter() - first
    return count / taken, count - tally.succeeded


class Mistakes(logging.Handler):
    """Counts what is logged as an error meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        self.count += 1

    def __enter__(self) -> Self:
        logging.getLogger("queue_service").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("queue_service").removeHandler(self)


def found() -> str | None:
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        print("pooler: pgbouncer is not installed here, so it was not measured.", file=sys.stderr, flush=True)
    return program


@contextmanager
def pooled(conninfo: str, program: str) -> Iterator[str]:
    """The way through a pgbouncer of transactions, for the length of the block."""
    place = Path(tempfile.mkdtemp(prefix="queue_service-pooler-"))
    place.chmod(0o755)
    given = conninfo_to_dict(conninfo)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    target = " ".join(f"{name}={given[name]}" for name in ("host", "port", "user", "password") if given.get(name))
    config = place / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n* = {target}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = any\npool_mode = transaction\ndefault_pool_size = {SESSIONS}\nmax_client_conn = 200\n"
        "ignore_startup_parameters = extra_float_digits\nlog_connections = 0\nlog_disconnections = 0\nlog_stats = 0\n"
    )
    # It refuses to run as root, as the server does.
    user: dict[str, int | str] = {}
    if os.geteuid() == 0:
        with suppress(KeyError):
            user["user"] = pwd.getpwnam("postgres").pw_uid
    process = subprocess.Popen([program, "-q", str(config)], stderr=subprocess.DEVNULL, **user)  # type: ignore[call-overload]
    try:
        _wait_for(port)
        yield make_conninfo(conninfo, host="127.0.0.1", port=port)
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(place, ignore_errors=True)


def _wait_for(port: int) -> None:
    for _ in range(200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError("pgbouncer did not start.")
