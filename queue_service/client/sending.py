"""Messages go up one at a time, in the order of `send`, and each is answered: with its receipt, or with why there is none.

One loop posts them, and only the head of the queue, so no retry can overtake what was sent before, and a flush is no second
way to send: it is a wait until this loop has dealt with what was queued. An attempt is a POST; to wait for a connection, or
for the pause after a failure, is none.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from queue_service.client.model import MessageReceipt
from queue_service.client.outbox import Line, Outbox
from queue_service.client.timing import Timing
from queue_service.client.wire import Stored, Wire
from queue_service.errors import NotConnected, OutboxFull, SendFailed
from queue_service.logs import get_logger

log = get_logger(__name__)

ATTEMPTS = 3
NOT_FOUND = 404
# What a POST is answered with, by its name.
ANSWERS: dict[str, type[Any]] = {"send": MessageReceipt, "permission": Stored}


def may_pass(failed: SendFailed) -> bool:
    """Whether the same may go through later: no answer, too late, too much, the gateway's fault, or a connection that it
    has forgotten."""
    return failed.status is None or failed.status in {408, 429} or failed.status >= 500 or is_forgotten(failed)


def is_forgotten(failed: SendFailed) -> bool:
    """Whether the gateway knows the connection no longer. A stream that it does not know is another 404."""
    return failed.status == NOT_FOUND and failed.field != "stream"


class Letter:
    """A message on its way."""

    def __init__(self, number: int, name: str, body: bytes) -> None:
        self.number = number
        self.name = name
        self.body = body
        self.attempts = 0
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def settle(self, answer: Any) -> None:
        # The caller may have given up waiting; the message went its way all the same.
        if self.answer.done():
            return
        if isinstance(answer, BaseException):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


class Sender:
    """`forgotten` is called with a connection that the gateway does not know."""

    def __init__(
        self, wire: Wire, outbox: Outbox, timing: Timing, *, cap: int, forgotten: Callable[[str], None]
    ) -> None:
        self._wire = wire
        self._outbox = outbox
        self._cap = cap
        self._forgotten = forgotten
        self._pauses = timing.pauses()
        self._queue: deque[Letter] = deque()
        self._left = outbox.left
        self._last = max((line.put for line in outbox.left if line.put is not None), default=0)
        self._connection: str | None = None
        self._is_pausing = False
        # A flush lasts until what was queued up to this number is dealt with.
        self._upto = 0
        self._flushed = asyncio.Event()
        self._moved = asyncio.Event()
        self._closed = False

    def send(self, name: str, body: bytes) -> asyncio.Future[Any]:
        """Queue a message; with a durable outbox it is on disk then. Raises OutboxFull, NotConnected."""
        if self._closed:
            raise NotConnected("This client is closed, and the message was not taken. Make a new one.")
        if len(self._queue) + len(self._left) >= self._cap:
            raise OutboxFull(self._cap)
        letter = Letter(self._last + 1, name, body)
        self._outbox.put(letter.number, name, body)
        self._last = letter.number
        self._queue.append(letter)
        self._moved.set()
        return letter.answer

    def recover(self) -> dict[str, asyncio.Future[MessageReceipt]]:
        """Queue what an earlier client left, before all else. The receipts to come, by client_message_id."""
        left, self._left = self._left, []
        letters = [self._letter(line) for line in left]
        self._queue.extendleft(reversed(letters))
        self._moved.set()
        return {_message_id(letter.body): letter.answer for letter in letters if letter.name == "send"}

    async def flush(self, connection: str) -> None:
        """Send over this connection from now on. Returns when what was queued by now is dealt with, or was tried and waits
        for its next attempt."""
        self._connection, self._upto = connection, self._last
        self._moved.set()
        self._look()
        await self._flushed.wait()

    def hold(self) -> None:
        """There is no connection to send over."""
        self._connection = None
        self._look()

    def close(self, why: BaseException | None) -> None:
        """Take nothing more. What is queued fails with `why`, or is left to the next client where the outbox is durable."""
        self._closed = True
        while self._queue:
            letter = self._queue.popleft()
            letter.settle(why or SendFailed(letter.name, self._farewell(letter)))

    async def run(self) -> None:
        while True:
            while not self._queue or self._connection is None:
                self._moved.clear()
                await self._moved.wait()
            letter, connection = self._queue[0], self._connection
            letter.attempts += 1
            try:
                answer = await self._wire.post(letter.name, letter.body, connection, ANSWERS[letter.name])
            except SendFailed as failed:
                await self._missed(letter, connection, failed)
            else:
                self._pauses.reset()
                self._dealt_with(letter, answer)

    async def _missed(self, letter: Letter, connection: str, failed: SendFailed) -> None:
        log.info("a message did not go through", post=letter.name, attempt=letter.attempts, why=str(failed))
        if letter.attempts == ATTEMPTS or not may_pass(failed):
            self._dealt_with(letter, failed)
        if is_forgotten(failed):
            if connection == self._connection:
                self.hold()
                self._forgotten(connection)
        elif may_pass(failed):
            # Whatever is next: the gateway is in trouble, and another message would burn its attempts as well.
            self._is_pausing = True
            self._look()
            try:
                await asyncio.sleep(self._pauses.next(floor=failed.retry_after))
            finally:
                self._is_pausing = False

    def _dealt_with(self, letter: Letter, answer: Any) -> None:
        self._queue.popleft()
        self._outbox.done(letter.number)
        letter.settle(answer)
        self._look()

    def _look(self) -> None:
        """Note whether the flush is over."""
        through = not self._queue or self._queue[0].number > self._upto
        if through or self._is_pausing or self._connection is None:
            self._flushed.set()
        else:
            self._flushed.clear()

    def _letter(self, line: Line) -> Letter:
        assert line.put is not None
        return Letter(line.put, line.name, bytes(line.body))

    def _farewell(self, letter: Letter) -> str:
        sent = "it may have been taken" if letter.attempts else "it was never sent"
        kept = "; it is kept, and the next client of this outbox sends it" if self._outbox.is_durable else ""
        return f"the client has ended, and {sent}{kept}."


def _message_id(body: bytes) -> str:
    return str(msgspec.json.decode(body)["client_message_id"])
