"""Writes how claimed runs ended, many in one statement, and keeps trying until the database has taken it.

A lost claim is logged and counted, not raised: the run was taken away, and others decide how it ends. What the database
refuses, or cannot write in time, is written in ever smaller companies until the cause is alone. A run that another session
has locked, or whose lane it has, is set aside until that lets go, and so is one that is refused whatever is written of it:
they must not hold up other endings, nor the keeper, which waits for the leases that a statement here has locked.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from enum import Enum, auto

from psycopg import errors as pg

from queue_service import codec
from queue_service.backoff import Pauses
from queue_service.db.execute import NOT_EXECUTED
from queue_service.db.meaning import is_about_a_row, took_too_much
from queue_service.db.pool import Fetcher
from queue_service.errors import DatabaseUnavailable, SchemaMismatch, ValueRefused
from queue_service.exceptions import message, type_name
from queue_service.logs import get_logger
from queue_service.runs import settling
from queue_service.runs.model import Ending, Return, RunState
from queue_service.services.loop import Service
from queue_service.worker.groups import Entry, Group, by_kind
from queue_service.worker.leases import Held, Leases
from queue_service.worker.tally import Settlement, Tally

log = get_logger(__name__)

ENDINGS_AT_ONCE = 1_000
# A statement that takes longer than this, in seconds, is followed by smaller ones, until they are quick again.
SLOW, QUICK = 3.0, 0.5
# After a write of fewer runs than these, others are let come together for so long, in seconds: a statement costs as much as
# ten handlers. One that came alone has a caller who waits, as likely as not, and who then asks for the next.
FEW, REST = 50, 0.005
FIRST_PAUSE, MAX_PAUSE = 0.1, 0.5
# Seconds until what was set aside is looked at again.
AGAIN = 1.0
# No handler is begun while so many endings, or so many bytes of results, are not written yet: they would be executed once
# more if this process died.
MAX_UNWRITTEN, MAX_BYTES = 2_000, 16 * 1024 * 1024


class Verdict(Enum):
    """What an error says of a write: whether it may be done all the same, and whether a part of it would go through."""

    UNKNOWN = auto()
    NOT_DONE = auto()
    LOCKED = auto()
    TAKE_APART = auto()


class _Aside:
    """What cannot be written now, and is looked at again after a pause."""

    def __init__(self, pauses: Pauses, wake: Callable[[], None]) -> None:
        self.entries: list[Entry] = []
        self.is_due = False
        self._pauses = pauses
        self._wake = wake
        self._timer: asyncio.TimerHandle | None = None

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._pauses.next(), self._look_again)

    def take(self, limit: int) -> list[Entry]:
        taken, self.entries = self.entries[:limit], self.entries[limit:]
        self.is_due = bool(self.entries)
        if not self.entries:
            self._pauses.reset()
        return taken

    def _look_again(self) -> None:
        self._timer, self.is_due = None, True
        self._wake()


class Finisher:
    """`put` never waits. `run` writes until `close` was called and nothing is left that can be written. Once something is
    committed, `announce` is given the ids of runs that ended, `free` the queues of which a lane was left, and those with a
    limit, and `handed_back` each queue to which runs went back that are due, with the highest priority of these.
    """

    def __init__(
        self,
        connection: Fetcher,
        leases: Leases,
        worker_id: int,
        *,
        announce: Callable[[list[int]], None] = lambda _ids: None,
        free: Callable[[set[str], set[str]], None] = lambda _laned, _limited: None,
        handed_back: Callable[[str, int], None] = lambda _queue, _priority: None,
    ) -> None:
        self.tally = Tally()
        self._connection = connection
        self._leases = leases
        self._worker_id = worker_id
        self._announce = announce
        self._free = free
        self._handed_back = handed_back
        # Without an outcome, only the lease is still to be let go of.
        self._pending: list[Entry] = []
        # What is being written.
        self._groups: list[Group] = []
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._locked = _Aside(Pauses(AGAIN, AGAIN), self._wake.set)
        self._refused = _Aside(Pauses(AGAIN, 60 * AGAIN), self._wake.set)
        self._at_once = ENDINGS_AT_ONCE
        self._unwritten = self._bytes = 0
        #: Whether handlers are to wait until some of what has ended is written.
        self.is_full = False
        self._has_room = asyncio.Event()
        self._closing = False
        self._is_resting = False

    def put(self, held: Held, outcome: Settlement) -> None:
        self._pending.append((held, outcome))
        self._unwritten += 1
        if type(outcome) is Ending:
            self._bytes += len(outcome.result)
        if self._unwritten >= MAX_UNWRITTEN or self._bytes >= MAX_BYTES:
            self.is_full = True
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
        self._unwritten += 1
        self._wake.set()

    async def room(self) -> None:
        """Wait until it is not full."""
        while self.is_full:
            self._has_room.clear()
            await self._has_room.wait()

    def close(self) -> None:
        self._closing = True
        if self._locked.entries:
            log.warning("stopping waits for endings that a transaction holds up", runs=len(self._locked.entries))
        if self._refused.entries:
            log.error(
                "the database refuses these endings; their runs are taken over when their leases lapse",
                run_ids=[held.run.id for held, _ in self._refused.entries],
            )
        self._wake.set()
        self._hurry.set()

    @property
    def is_idle(self) -> bool:
        return not self._pending and not self._groups and not self._locked.entries and not self._refused.entries

    async def run(self, service: Service) -> None:
        """Write until `close` was called and nothing is left that can be written."""
        while not (self._closing and not self._pending and not self._groups and not self._locked.entries):
            await self._wake.wait()
            self._wake.clear()
            # Left behind where this was cancelled or has failed.
            await self._write(service)
            for aside in (self._locked, self._refused):
                if aside.is_due:
                    taken = aside.take(self._at_once)
                    self._unwritten += len(taken)
                    self._bytes += sum(len(outcome.result) for _, outcome in taken if type(outcome) is Ending)
                    await self._write(service, taken, is_doubtful=True)
            while self._pending:
                taken, self._pending = self._pending[: self._at_once], self._pending[self._at_once :]
                await self._write(service, taken, is_doubtful=bool(self._locked.entries))
                if 1 < len(taken) < FEW:
                    await self._rest()

    def unwritten(self) -> list[Entry]:
        """What was not written yet. May be called from any thread, while nothing else goes on here."""
        groups = [entry for group in self._groups for entry in group.entries]
        return [*groups, *self._pending, *self._locked.entries, *self._refused.entries]

    async def flush(self) -> None:
        """Write all that can be written, beside nobody: `run` has ended."""
        taken, self._pending = self._pending, []
        await self._write(Service("finisher", self.run), taken, is_doubtful=True)

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

    async def _write(self, service: Service, taken: Sequence[Entry] = (), *, is_doubtful: bool = False) -> None:
        """Write it, but for what has to be set aside. Where that `is_doubtful`, it is looked at first."""
        self._groups += by_kind(taken)
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE, jitter=random.random)
        while self._groups:
            group = self._groups[0]
            try:
                if is_doubtful:
                    await self._set_locked_aside(group)
                await self._write_group(group)
            except NOT_EXECUTED as refused:
                verdict = _verdict(refused)
                if verdict is Verdict.LOCKED and not is_doubtful:
                    is_doubtful = True
                    log.warning(
                        "a transaction has runs locked that ended here, or their lanes; their endings wait for it. Find it "
                        "in pg_stat_activity, by its xact_start"
                    )
                elif verdict is Verdict.TAKE_APART:
                    self._take_apart(refused)
                elif verdict is Verdict.NOT_DONE and self._closing:
                    self._give_up(refused)
                else:
                    group.uncertain = group.uncertain or verdict is Verdict.UNKNOWN
                    service.failed(refused)
                    await asyncio.sleep(pauses.next())
            except BaseException:
                group.uncertain = True
                raise
            else:
                self._forget(self._groups.pop(0).entries)
                pauses.reset()
                service.well()

    def _forget(self, entries: Sequence[Entry]) -> None:
        """These are written, or set aside: a transaction that stays open must not keep handlers from being begun."""
        self._unwritten -= len(entries)
        if self._bytes:
            self._bytes -= sum(len(outcome.result) for _, outcome in entries if type(outcome) is Ending)
        self.is_full = self._unwritten >= MAX_UNWRITTEN or self._bytes >= MAX_BYTES
        if not self.is_full:
            self._has_room.set()

    def _take_apart(self, refused: Exception) -> None:
        """The first group was not written, and the cause is in one of its entries, or in how many they are."""
        group = self._groups.pop(0)
        if (half := len(group.entries) // 2) > 0:
            parts = (group.entries[:half], group.entries[half:])
            self._groups[:0] = [Group(part, uncertain=group.uncertain) for part in parts]
            if isinstance(refused, DatabaseUnavailable):
                self._at_once = half
            return
        ((held, outcome),) = group.entries
        if isinstance(refused, ValueRefused) and outcome is not None and not group.is_bare:
            log.error("the database refused a result", run_id=held.run.id, why=type_name(refused))
            bare = codec.dumps_error("result_refused", message(refused))
            ending = Ending(held.run.claim, RunState.FAILED, error=bare)
            self._groups.insert(0, Group([(held, ending)], uncertain=group.uncertain, is_bare=True))
        else:
            log.error("the database refused an ending, which is tried again", run_id=held.run.id, why=message(refused))
            self._refused.add((held, outcome))
            self._forget(group.entries)

    def _give_up(self, refused: Exception) -> None:
        """What is refused to each of them, as where the role lacks a right, may be granted some day: a worker that stops
        does not wait for it. The leases stay, and lapse."""
        entries = self._groups.pop(0).entries
        log.error(
            "the database refuses these endings; their runs are taken over when their leases lapse",
            run_ids=[held.run.id for held, _ in entries], why=message(refused),
        )  # fmt: skip
        self._forget(entries)

    async def _set_locked_aside(self, group: Group) -> None:
        """What another session keeps from being written. Its leases stay, too."""
        busy = await self._connection.fetch(settling.busy([each.claim for each in group.outcomes]))
        aside = [(held, outcome) for held, outcome in group.entries if held.run.claim in busy]
        for entry in aside:
            self._locked.add(entry)
        self._forget(aside)
        group.hold([(held, outcome) for held, outcome in group.entries if held.run.claim not in busy])

    async def _write_group(self, group: Group) -> None:
        outcomes = group.outcomes
        leases = Counter(held.lease for held, _ in group.entries)
        # Those that hold nothing more once this is written go with it.
        freed = [lease.id for lease, runs in leases.items() if lease.outstanding == runs]
        done: Collection[settling.Done] = ()
        if outcomes or freed:
            asyncio.get_running_loop().call_soon(self._prepare_next)
            began = time.monotonic()
            done = await self._connection.fetch(group.query(self._worker_id, freed))
            self._adapt(time.monotonic() - began)
        for lease, runs in leases.items():
            lease.outstanding -= runs
        self._leases.release(freed)
        self._account(outcomes, done, group.uncertain)
        laned = {held.run.queue for held, _ in group.entries if held.run.ordering_key is not None}
        limited = set()
        if any(lease.limited for lease in leases):
            limited = {held.run.queue for held, _ in group.entries if held.lease.limited}
        if laned or limited:
            self._free(laned, limited)
        for queue, priority in group.handed_back().items():
            self._handed_back(queue, priority)

    def _prepare_next(self) -> None:
        """While the database writes one group, make the statement for a full one behind it: otherwise it would have nothing
        to do in the time that takes."""
        if len(self._groups) == 1 and len(self._pending) >= self._at_once:
            taken, self._pending = self._pending[: self._at_once], self._pending[self._at_once :]
            behind = by_kind(taken)
            for group in behind:
                group.query(self._worker_id, ())
            self._groups += behind

    def _adapt(self, seconds: float) -> None:
        if seconds > SLOW:
            self._at_once = max(1, self._at_once // 2)
        elif seconds < QUICK and self._at_once < ENDINGS_AT_ONCE:
            self._at_once = min(ENDINGS_AT_ONCE, 2 * self._at_once)

    def _account(self, outcomes: Sequence[Settlement], done: Collection[settling.Done], uncertain: bool) -> None:
        written = outcomes
        if len(done) < len(outcomes) and not uncertain:
            written = [outcome for outcome in outcomes if outcome.claim in done]
            missing = [outcome.claim for outcome in outcomes if outcome.claim not in done]
            self.tally.lost += len(missing)
            for run_id, attempt in missing:
                log.warning("claim lost: the run was taken away, its outcome dropped", run_id=run_id, attempt=attempt)
        self.tally.add(written)
        ended = [outcome.claim.run_id for outcome in outcomes if isinstance(outcome, Ending)]
        if ended:
            self._announce(ended)


def _verdict(refused: Exception) -> Verdict:
    cause = refused.__cause__ or refused
    if isinstance(cause, pg.LockNotAvailable):
        return Verdict.LOCKED
    if took_too_much(refused):
        return Verdict.TAKE_APART
    if isinstance(refused, (DatabaseUnavailable, SchemaMismatch)):
        return Verdict.UNKNOWN
    return Verdict.TAKE_APART if is_about_a_row(refused) else Verdict.NOT_DONE
