"""Giving a statement up: its connection is closed on this side, and the server goes on with what it was sent. What writes
nothing, or surely commits nothing, may be cancelled there as well, since the server does not look who listens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from typing import Any

import psycopg
from psycopg import generators
from psycopg.abc import PQGenConn
from psycopg.pq.abc import PGcancelConn, PGconn
from psycopg.waiting import wait_conn

# How long the request to cancel a statement may take to arrive, and how often it is looked whether it takes longer.
CANCEL_SECONDS, CANCEL_INTERVAL = 5.0, 0.1


class HangUp:
    """Hangs up when so many seconds have passed: whoever waits on the connection then hears that it has ended. To be
    cancelled would take longer: psycopg then has the statement cancelled on the server, and waits 5 s for one that does not
    answer. For the event loop that it is made on."""

    def __init__(self, conn: psycopg.AsyncConnection[Any], seconds: float, *, may_cancel: bool = False) -> None:
        self.has_hung_up = False
        self._conn = conn
        self._may_cancel = may_cancel
        self._timer = asyncio.get_running_loop().call_later(seconds, self._hang_up)

    def cancel(self) -> None:
        """It is not needed any more."""
        self._timer.cancel()

    def _hang_up(self) -> None:
        self.has_hung_up = True
        with contextlib.suppress(OSError, psycopg.Error):
            if self._may_cancel:
                cancel_there(self._conn.pgconn)
            shut(self._conn.pgconn.socket)


def shut(descriptor: int) -> None:
    """Let whoever uses this socket hear that it has ended."""
    with socket.socket(fileno=os.dup(descriptor)) as line:
        line.shutdown(socket.SHUT_RDWR)


def cancel_there(pgconn: PGconn) -> None:
    """Have the server end the statement that is under way; nobody waits for this. From any thread.

    Not by libpq's blocking calls, in a thread or not: the driver keeps the interpreter's lock while it waits for a server
    that may never answer, so all threads stand still, also the one that keeps leases. With libpq 16 and older there is
    nothing else, and the statement is left to the server's `statement_timeout`; as it is where no thread can be started."""
    if psycopg.capabilities.has_cancel_safe():
        with contextlib.suppress(psycopg.Error, RuntimeError):
            cancel = pgconn.cancel_conn()
            cancel.start()
            threading.Thread(target=_deliver, args=[cancel], name="queue_service cancel", daemon=True).start()


def _deliver(cancel: PGcancelConn) -> None:
    with contextlib.suppress(OSError, psycopg.Error, TimeoutError):
        wait_conn(_bounded(generators.cancel(cancel)), interval=CANCEL_INTERVAL)


def _bounded(request: PQGenConn[None]) -> PQGenConn[None]:
    """Psycopg 3.2 has no bound, but comes back empty-handed once in each interval."""
    ends_at = time.monotonic() + CANCEL_SECONDS
    with contextlib.suppress(StopIteration):
        wanted = next(request)
        while time.monotonic() < ends_at:
            if ready := (yield wanted):
                wanted = request.send(ready)
