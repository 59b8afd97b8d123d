"""Writes how claimed runs ended, many in one statement, and keeps trying until the database has taken it.

A lost claim is logged and counted, not raised: the run was taken away, and others decide how it ends. A run that another
session has locked, or whose lane it has, is set aside until that lets go. A transaction that stays open must not hold up
other endings, nor the keeper, which waits for the leases that a statement here has locked.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from psycopg import errors as pg

from queue_service import codec
from queue_service.backoff import Pauses
from queue_service.db.pool import OwnConnection
from queue_service.errors import DatabaseUnavailable, ValueRefused
from queue_service.logs import get_logger
from queue_service.runs import queries
from queue_service.runs.model import Ending, Return, RunState
from queue_service.worker.leases import Held, Leases

log = get_logger(__name__)

Settlement = Ending | Return

ENDINGS_AT_ONCE = 500
# After a write of fewer runs than these, others are let come together for so long, in seconds: a statement costs as much as
# ten handlers. One that came alone has a caller who waits, as likely as not, and who then asks for the next.
FEW, REST = 50, 0.005
FIRST_PAUSE, MAX_PAUSE = 0.1, 5.0
# Seconds until what was set aside is looked at again.
AGAIN = 1.0


@dataclass(slots=True)
class Tally:
    """What a worker did. `returned` counts retries, snoozes and runs handed back; `lost` those taken away from it."""

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    returned: int = 0
    lost: int = 0

    def add(self, outcomes: Sequence[Settlement]) -> None:
        names = Counter("returned" if isinstance(outcome, Return) else outcome.state.value for outcome in outcomes)
        for name, count in names.items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(slots=True)
class _Batch:
    taken: Sequence[tuple[Held, Settlement | None]]
    endings: list[Ending] = field(default_factory=list)
    returns: list[Return] = field(default_factory=list)
    freed: list[int] = field(default_factory=list)
    # Queues of which a lane is free when this is written, and those with a limit that allows for more.
    laned: set[str] = field(default_factory=set)
    limited: set[str] = field(default_factory=set)
    # A write that failed may have been done all the same; then its claims are found gone, and are not lost.
    uncertain: bool = False


class Finisher:
    """`put` never waits. `run` writes until `close` was called and nothing is left. `announce` is given the ids of runs
    that ended, and `free` the queues of which a lane was left, and those with a limit, once that is committed.
    """

    def __init__(
        self,
        connection: OwnConnection,
        leases: Leases,
        worker_id: int,
        *,
        announce: Callable[[list[int]], None] = lambda _ids: None,
        free: Callable[[set[str], set[str]], None] = lambda _laned, _limited: None,
    ) -> None:
        self.tally = Tally()
        self._connection = connection
        self._leases = leases
        self._worker_id = worker_id
        # Without an outcome, only the lease is still to be let go of.
        self._pending: list[tuple[Held, Settlement | None]] = []
        # Set aside, and whether it is time to look at them again.
        self._busy: list[tuple[Held, Settlement | None]] = []
        self._is_due = False
        self._look_timer: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._closing = False
        self._writing = False
        self._is_resting = False
        self._announce = announce
        self._free = free

    def put(self, held: Held, outcome: Settlement) -> None:
        self._pending.append((held, outcome))
        self._wake.set()
        if self._is_resting and (held.lease.limited or held.run.ordering_key is not None):
            # Others may begin when this is written.
            self._hurry.set()

    def hand_back(self, unbegun: Iterable[Held]) -> None:
        """These runs go back to their queue, each to its old place."""
        for held in unbegun:
            self.put(held, Return(held.run.claim))

    def settled(self, held: Held, ending: Ending) -> None:
        """The handler has ended its run, in a transaction of its own: what is left is the notice, and the lease."""
        self.tally.add([ending])
        self._announce([ending.claim.run_id])
        self._pending.append((held, None))
        self._wake.set()

    def close(self) -> None:
        self._closing = True
        if self._busy:
            log.warning("stopping waits for endings that a transaction holds up", runs=len(self._busy))
        self._wake.set()
        self._hurry.set()

    @property
    def is_idle(self) -> bool:
        return not self._pending and not self._busy and not self._writing

    async def run(self) -> None:
        while not (self._closing and not self._pending and not self._busy):
            await self._wake.wait()
            self._wake.clear()
            if self._is_due:
                self._is_due = False
                taken, self._busy = self._busy[:ENDINGS_AT_ONCE], self._busy[ENDINGS_AT_ONCE:]
                await self._write(self._batch(taken), is_doubtful=True)
            while self._pending:
                taken, self._pending = self._pending[:ENDINGS_AT_ONCE], self._pending[ENDINGS_AT_ONCE:]
                await self._write(self._batch(taken), is_doubtful=bool(self._busy))
                if 1 < len(taken) < FEW:
                    await self._rest()

    async def _rest(self) -> None:
        """Let more come, unless somebody waits for what has come."""
        if self._closing or any(held.lease.limited or held.run.ordering_key is not None for held, _ in self._pending):
            return
        self._hurry.clear()
        self._is_resting = True
        try:
            async with asyncio.timeout(REST):
                await self._hurry.wait()
        except TimeoutError:
            pass
        finally:
            self._is_resting = False

    def _batch(self, taken: Sequence[tuple[Held, Settlement | None]]) -> _Batch:
        batch = _Batch(taken)
        for held, outcome in taken:
            if isinstance(outcome, Ending):
                batch.endings.append(outcome)
            elif outcome is not None:
                batch.returns.append(outcome)
            if held.run.ordering_key is not None:
                batch.laned.add(held.run.queue)
            if held.lease.limited:
                batch.limited.add(held.run.queue)
            held.lease.outstanding -= 1
            if held.lease.outstanding == 0:
                batch.freed.append(held.lease.id)
        return batch

    async def _write(self, batch: _Batch, *, is_doubtful: bool = False) -> None:
        """Write it, but for what has to be set aside. Where that `is_doubtful`, it is looked at first."""
        self._writing, pauses = True, Pauses(FIRST_PAUSE, MAX_PAUSE)
        while True:
            try:
                if is_doubtful:
                    await self._set_aside(batch)
                await self._write_once(batch)
            except DatabaseUnavailable as lost:
                if isinstance(lost.__cause__, pg.LockNotAvailable) and not is_doubtful:
                    is_doubtful = True
                    log.warning(
                        "a transaction has runs locked that ended here, or their lanes; their endings wait for it. Find it "
                        "in pg_stat_activity, by its xact_start"
                    )
                    continue
                if not batch.uncertain:
                    log.warning("cannot write endings; trying until it works", runs=_size(batch), why=str(lost))
                batch.uncertain = True
                await asyncio.sleep(pauses.next())
            else:
                if pauses.count:
                    log.info("writing endings again")
                self._leases.release(batch.freed)
                if batch.laned or batch.limited:
                    self._free(batch.laned, batch.limited)
                self._writing = False
                return

    async def _set_aside(self, batch: _Batch) -> None:
        """What another session keeps from being written. Its leases stay, too."""
        outcomes: list[Settlement] = [*batch.endings, *batch.returns]
        busy = await self._connection.fetch(queries.busy([each.claim for each in outcomes]))
        batch.endings = [each for each in batch.endings if each.claim not in busy]
        batch.returns = [each for each in batch.returns if each.claim not in busy]
        for held, outcome in batch.taken:
            if held.run.claim in busy:
                held.lease.outstanding += 1
                self._busy.append((held, outcome))
        kept = {held.lease.id for held, _ in self._busy}
        batch.freed = [lease_id for lease_id in batch.freed if lease_id not in kept]
        if self._busy and self._look_timer is None:
            self._look_timer = asyncio.get_running_loop().call_later(AGAIN, self._look_again)

    def _look_again(self) -> None:
        self._look_timer, self._is_due = None, True
        self._wake.set()

    async def _write_once(self, batch: _Batch) -> None:
        # The leases go with the last statement, when all that they held has been dealt with.
        if batch.endings:
            written = await self._finish(batch.endings, () if batch.returns else batch.freed)
            self._account(batch.endings, written, batch.uncertain)
            batch.endings = []
        elif batch.freed and not batch.returns:
            await self._connection.fetch(queries.finish([], worker_id=self._worker_id, freed=batch.freed))
        if batch.returns:
            back = queries.give_back(batch.returns, worker_id=self._worker_id, freed=batch.freed)
            done = await self._connection.fetch(back)
            self._account(batch.returns, [each for each in batch.returns if each.claim in done], batch.uncertain)

    async def _finish(self, endings: list[Ending], freed: Sequence[int]) -> list[Ending]:
        """Finish them all, and return those that were written, as they were written: where the database refuses the batch,
        the ones it refuses are found and end without what it refused, so that no ending is lost for a value.
        """
        try:
            done = await self._connection.fetch(queries.finish(endings, worker_id=self._worker_id, freed=freed))
            return endings if len(done) == len(endings) else [each for each in endings if each.claim in done]
        except ValueRefused as refused:
            if len(endings) == 1:
                bare = _bare(endings[0], refused)
                done = await self._connection.fetch(queries.finish([bare], worker_id=self._worker_id, freed=freed))
                return [bare] if done else []
        half = len(endings) // 2
        return await self._finish(endings[:half], ()) + await self._finish(endings[half:], freed)

    def _account(self, outcomes: Sequence[Settlement], written: Sequence[Settlement], uncertain: bool) -> None:
        if len(written) < len(outcomes):
            done = {outcome.claim for outcome in written}
            missing = [outcome for outcome in outcomes if outcome.claim not in done]
            if uncertain:
                written = [*written, *missing]
            else:
                self.tally.lost += len(missing)
                for outcome in missing:
                    run_id, attempt = outcome.claim
                    log.warning(
                        "claim lost: the run was taken away, its outcome dropped", run_id=run_id, attempt=attempt
                    )
        self.tally.add(written)
        ended = [outcome.claim.run_id for outcome in outcomes if isinstance(outcome, Ending)]
        if ended:
            self._announce(ended)


def _bare(ending: Ending, refused: Exception) -> Ending:
    log.error("the database refused a result", run_id=ending.claim.run_id, why=type(refused).__name__)
    error = codec.dumps_error("result_refused", f"The database could not store the result: {refused}")
    return Ending(ending.claim, RunState.FAILED, error=error)


def _size(batch: _Batch) -> int:
    return len(batch.endings) + len(batch.returns)
