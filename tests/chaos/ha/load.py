"""A client: it stores runs and turns, each with a uid of its own making, and writes down what was acknowledged.

What may be repeated is, until it is acknowledged: a turn, and a run with a singleton key, on whose queue nobody works before
the end. Anything else that is not answered is given up, and the next one has another uid: it may be stored once, or not.

usage: python -m tests.chaos.ha.load NAME QUEUE LEDGER [KIND…]          SIGTERM ends it, once every waiter was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from queue_service import App, Turn
from queue_service.errors import DatabaseUnavailable, TurnEnded
from tests.chaos.ha.ledger import Ledger
from tests.chaos.ha.tasks import app as worker_app

T = TypeVar("T")

CALLERS = 3
PACE = 0.1
# The queue on which nobody works while there are faults.
HELD = "held"
KINDS = ("effect", "many", "held", "turn")


class Client:
    def __init__(self, app: App, name: str, queue: str, ledger: Ledger) -> None:
        self.is_over = False
        self._app = app
        self._name = name
        self._queue = queue
        self._ledger = ledger
        self._waiters: set[asyncio.Task[None]] = set()

    async def call(self, caller: int, kinds: tuple[str, ...] = KINDS) -> None:
        """One call after the other, until it is over and all are told."""
        for number in itertools.count():
            if self.is_over:
                break
            kind = kinds[(number + caller) % len(kinds)]
            try:
                await getattr(self, kind)(f"{self._name}-{os.getpid()}-{caller}-{number}")
            except DatabaseUnavailable as refused:
                self._ledger.write("refused", why=str(refused))
            except Exception as odd:  # noqa: BLE001 - what is no outage is a finding
                self._ledger.write("odd", why=f"{type(odd).__name__}: {odd}")
            await asyncio.sleep(PACE)  # the pace of a client
        while self._waiters:
            await asyncio.wait(self._waiters)

    async def effect(self, uid: str) -> None:
        self._acknowledge(uid, await self._app.enqueue("effect", {"uid": uid}, queue=self._queue))

    async def many(self, uid: str) -> None:
        uids = [f"{uid}-{n}" for n in range(3)]
        ids = await self._app.enqueue_many("plain", [{"uid": each} for each in uids], queue=self._queue)
        for each, run_id in zip(uids, ids, strict=True):
            self._acknowledge(each, run_id)

    async def held(self, uid: str) -> None:
        self._acknowledge(
            uid,
            await self.insist(lambda: self._app.enqueue("plain", {"uid": uid}, queue=HELD, singleton_key=uid)),
        )

    async def turn(self, uid: str) -> None:
        turn = Turn(deployment=self._name, message_id=uid, stream=f"stream {uid}")
        # One that has ended was stored by a try that was not answered.
        with contextlib.suppress(TurnEnded):
            await self.insist(lambda: self._app.turns.dispatch(turn, "answer", {"uid": uid}, queue=self._queue))
        self._ledger.write("turn", uid=uid, queue=self._queue)
        waiter = asyncio.create_task(self._wait(turn))
        self._waiters.add(waiter)
        waiter.add_done_callback(self._waiters.discard)

    async def insist(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except DatabaseUnavailable as refused:
                self._ledger.write("refused", why=str(refused))
                await asyncio.sleep(PACE)  # the pace of a client

    async def _wait(self, turn: Turn) -> None:
        try:
            told = await self.insist(lambda: self._app.turns.wait(turn.deployment, turn.message_id))
        except Exception as odd:  # noqa: BLE001 - as above
            self._ledger.write("odd", why=f"a waiter: {type(odd).__name__}: {odd}")
        else:
            text = (told.body or {}).get("text")
            self._ledger.write("told", uid=turn.message_id, seq=told.seq, ending=told.kind, code=told.code, text=text)

    def _acknowledge(self, uid: str, run_id: int) -> None:
        self._ledger.write("run", uid=uid, id=run_id, queue=self._queue)


async def main(name: str, queue: str, ledger: str, *kinds: str) -> None:
    book = Ledger(Path(ledger))
    async with worker_app as app:
        client = Client(app, name, queue, book)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: setattr(client, "is_over", True))
        book.write("begun", name=name)
        await asyncio.gather(*(client.call(number, kinds or KINDS) for number in range(CALLERS)))
        book.write("ended", name=name)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
