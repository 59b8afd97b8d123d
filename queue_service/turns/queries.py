"""The operations on turns, as values: one function for each statement of the `.sql` files beside this one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import msgspec

from queue_service.codec import read_body, read_object
from queue_service.db import channels
from queue_service.db.channels import Notice
from queue_service.db.query import Query, Rows, column, found, interval_literal, json_literal, scalar
from queue_service.db.rows import flaw_of
from queue_service.db.statements import Statements
from queue_service.errors import ConfigError
from queue_service.turns.model import (
    EndedTurn,
    Marker,
    Outcome,
    Standing,
    TurnEnding,
    TurnFailure,
    known_code,
)
from queue_service.words import check_word

SQL = Statements("queue_service.turns")

Key = tuple[str, str]

# Above this, a count is shown as "this many or more".
COUNT_LIMIT = 50_001


class Owed(NamedTuple):
    """A turn as the arming statements take it: its fields, its two deadlines, and the bound on the whole of it."""

    fields: dict[str, Any]
    admission: timedelta
    execution: timedelta
    total: timedelta | None = None

    @property
    def key(self) -> Key:
        return self.fields["deployment"], self.fields["message_id"]


class Outage(NamedTuple):
    """Whose turns an outage is about, wherever they are worked on. The provider is what their metadata says it is."""

    organization_id: str | None = None
    provider: str | None = None


class Dispatched(NamedTuple):
    """`run_id` is None and `kind` not: the turn has ended. Both None: another session is at it."""

    new: bool
    run_id: int | None
    kind: str | None


class Sent(NamedTuple):
    """`word` is `sent`, `known` or `ended`. Of a known message, `seq` and `digest` are None where its turn was armed by
    other means than sending."""

    word: str
    seq: int | None
    digest: str | None


class TurnCounts(NamedTuple):
    """Counts up to COUNT_LIMIT, and for how long the oldest overdue turn has been so."""

    owed: int
    overdue: int
    oldest_overdue: timedelta | None


def arm(turns: Sequence[Owed]) -> Query[dict[Key, bool]]:
    """Which turns are armed now (True), and which had been before, or have ended (False). One that is missing is being
    armed by another session: ask again."""

    def decode(rows: Rows) -> dict[Key, bool]:
        return {(deployment, message_id): word == "armed" for deployment, message_id, word in rows}

    return SQL.query("arm", decode, turns=_turns(turns))


def dispatch(turn: Owed, run: dict[str, Any], notice: Notice | None) -> Query[Dispatched | None]:
    """`run` has the fields of a new run. None: another session is arming the turn; ask again."""

    def decode(rows: Rows) -> Dispatched | None:
        return Dispatched(rows[0][0] == "dispatched", rows[0][1], rows[0][2]) if rows else None

    noticed = {"channel": channels.RUNS, "notice": None if notice is None else notice.payload}
    return SQL.query("dispatch", decode, turns=_turns([turn]), **run, **noticed)


def send(
    turn: Owed, run: dict[str, Any], message: str, digest: str, notice: Notice | None, *, notify: bool
) -> Query[Sent | None]:
    """`message` is JSON text. None: another session is sending it; ask again. With `notify`, followers are notified
    with the commit."""

    def decode(rows: Rows) -> Sent | None:
        return Sent(*rows[0][:3]) if rows else None

    noticed = {"channel": channels.RUNS, "notice": None if notice is None else notice.payload}
    stream = turn.fields["stream"]
    return SQL.query(
        "send",
        decode,
        turns=_turns([turn]),
        message=message,
        digest=digest,
        stream=stream,
        notify=notify,
        **run,
        **noticed,
    )


def end(endings: Sequence[TurnEnding], *, notify: bool) -> Query[list[EndedTurn]]:
    """The turns this ended. With `notify`, notices go out with the commit."""
    return SQL.query("end", _ended, endings=_endings([endings]), notify=notify)


def end_free(calls: Sequence[Sequence[TurnEnding]], *, notify: bool) -> Query[tuple[list[EndedTurn], set[Key]]]:
    """As `end`, for several calls, waiting for nobody. Also the turns that another session holds or whose stream it writes
    to: each call that has one of them did nothing, and is to be made again."""

    def decode(rows: Rows) -> tuple[list[EndedTurn], set[Key]]:
        return _ended([row for row in rows if row[3] is not None]), {(row[0], row[1]) for row in rows if row[3] is None}

    return SQL.query("end_free", decode, endings=_endings(calls), notify=notify)


def fail_deployment(deployment: str, failure: TurnFailure, *, notify: bool) -> Query[list[EndedTurn]]:
    return SQL.query(
        "fail_deployment",
        _ended,
        deployment=deployment,
        code=failure.code,
        message=failure.message,
        reason=failure.reason,
        notify=notify,
    )


def sweep(*, limit: int, notify: bool = False) -> Query[list[EndedTurn]]:
    return SQL.query("sweep", _ended, limit=limit, notify=notify)


def sweep_one(deployment: str, message_id: str) -> Query[list[EndedTurn]]:
    """Ends the turn if its deadline has passed, and notifies those who follow."""
    return SQL.query("sweep_one", _ended, deployment=deployment, message_id=message_id, notify=True)


def interrupt(deployment: str, message_id: str) -> Query[list[tuple[EndedTurn, int | None]]]:
    """The turns before this one that were being worked on and have ended now, and the run of each, whose cancellation is
    requested. Followers are notified with the commit; the workers are not."""

    def decode(rows: Rows) -> list[tuple[EndedTurn, int | None]]:
        return [(EndedTurn(*row[:6]), row[6]) for row in rows]

    return SQL.query("interrupt", decode, deployment=deployment, message_id=message_id, notify=True)


def discharge(deployment: str, message_id: str) -> Query[bool]:
    return SQL.query("discharge", found, deployment=deployment, message_id=message_id)


def extend(deployment: str) -> Query[list[str]]:
    return SQL.query("extend", column, deployment=deployment)


def outage(deployment: str | None, organization_id: str | None, provider: str | None) -> Outage | None:
    """What these words are about; None: one deployment. ConfigError for too many words, or too few."""
    whose = Outage(organization_id, provider)
    if (deployment is None) == (whose == Outage()):
        raise ConfigError("Say whose turns: those of a deployment, or of an organization_id or a provider.")
    for name, value in {"deployment": deployment, **whose._asdict()}.items():
        if value is not None:
            check_word(value, name)
    return whose if deployment is None else None


def withhold(deployment: str, code: str, reason: str | None) -> Query[list[str]]:
    return SQL.query("withhold", column, deployment=deployment, code=code, reason=reason)


def restore(deployment: str) -> Query[list[str]]:
    return SQL.query("restore", column, deployment=deployment)


def withhold_all(which: Outage, code: str, reason: str | None) -> Query[list[str]]:
    return SQL.query("withhold_all", column, **which._asdict(), code=code, reason=reason)


def restore_all(which: Outage) -> Query[list[str]]:
    return SQL.query("restore_all", column, **which._asdict())


def reset_admission(deployment: str, message_id: str) -> Query[bool]:
    return SQL.query("reset_admission", found, deployment=deployment, message_id=message_id)


def message_seq(deployment: str, message_id: str) -> Query[int | None]:
    """Where the message of a turn stands in its stream; None for a turn that was armed by other means."""
    return SQL.query("message_seq", scalar, deployment=deployment, message_id=message_id)


def waits(deployment: str, message_id: str) -> Query[bool]:
    """Whether a turn is owed its ending, and its run has not begun."""
    return SQL.query("waits", scalar, deployment=deployment, message_id=message_id)


def is_live(deployment: str, message_id: str) -> Query[bool]:
    return SQL.query("is_live", scalar, deployment=deployment, message_id=message_id)


def standing(deployment: str, message_id: str) -> Query[Standing | None]:
    """None: the turn was never armed, or was forgotten since."""
    return SQL.query("standing", _standing, deployment=deployment, message_id=message_id)


def oldest_overdue() -> Query[timedelta | None]:
    """For how long the turn has been overdue that has been so longest; None: none is."""
    return SQL.query("oldest_overdue", scalar)


def overdue(*, limit: int) -> Query[list[Key]]:
    return SQL.query("overdue", lambda rows: [(row[0], row[1]) for row in rows], limit=limit)


def tally() -> Query[TurnCounts]:
    return SQL.query("tally", lambda rows: TurnCounts(*rows[0]), most=COUNT_LIMIT)


def page(
    *,
    deployment: str | None = None,
    message_id: str | None = None,
    stream: str | None = None,
    platform: str | None = None,
    organization_id: str | None = None,
    overdue: bool = False,
    limit: int = 50,
) -> Query[list[Marker]]:
    """The markers that fit everything that is said, those first that lapse first."""
    return SQL.query(
        "page",
        _markers,
        deployment=deployment,
        message_id=message_id,
        stream=stream,
        platform=platform,
        organization_id=organization_id,
        overdue=overdue,
        limit=limit,
    )


def of_run(run_id: int) -> Query[tuple[str, str, datetime] | None]:
    """The turn that a run works on, with its deadline; None if it works on none that is owed an ending."""

    def decode(rows: Rows) -> tuple[str, str, datetime] | None:
        return (rows[0][0], rows[0][1], rows[0][2]) if rows else None

    return SQL.query("of_run", decode, run_id=run_id)


def prune(age: timedelta, *, limit: int) -> Query[int]:
    return SQL.query("prune", scalar, age=age, limit=limit)


def _turns(turns: Sequence[Owed]) -> str:
    objects = [
        {
            **turn.fields,
            "admission": interval_literal(turn.admission),
            "execution": interval_literal(turn.execution),
            "total": None if turn.total is None else interval_literal(turn.total),
        }
        for turn in turns
    ]
    return msgspec.json.encode(objects).decode()


def _endings(calls: Sequence[Sequence[TurnEnding]]) -> str:
    texts = [
        f'{{"call":{call},"deployment":{json_literal(each.deployment)},"message_id":{json_literal(each.message_id)},'
        f'"kind":{json_literal(each.kind)},"code":{json_literal(each.code)},"body":{each.body}}}'
        for call, endings in enumerate(calls)
        for each in endings
    ]
    return "[" + ",".join(texts) + "]"


def _ended(rows: Rows) -> list[EndedTurn]:
    return [EndedTurn(*row[:6]) for row in rows]


def _standing(rows: Rows) -> Standing | None:
    if not rows:
        return None
    deployment, message_id, stream, armed_at, ended_at, kind, code, seq, body, left = rows[0]
    outcome = None
    if kind is not None:
        outcome = Outcome(
            deployment=deployment,
            message_id=message_id,
            stream=stream,
            armed_at=armed_at,
            ended_at=ended_at,
            kind=kind,
            code=known_code(code),
            seq=seq,
            body=read_body(body, flaw_of(rows[0])),
        )
    return Standing(stream=stream, outcome=outcome, seconds_left=left)


def _markers(rows: Rows) -> list[Marker]:
    return [
        Marker(
            deployment=row[0], message_id=row[1], stream=row[2], platform=row[3], channel_id=row[4], user_id=row[5],
            organization_id=row[6], metadata=read_object(row[7]).value, armed_at=row[8], deadline=row[9],
            admitted_at=row[10], admission=row[11], execution=row[12], run_id=row[13], failure_code=known_code(row[14]),
            failure_reason=row[15], ends_by=row[16], overdue=row[17],
        )
        for row in rows
    ]  # fmt: skip
