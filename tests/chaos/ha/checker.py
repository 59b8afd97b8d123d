"""Whether what clients were told is true. It believes their files and the tables, and nothing of the code it checks: it imports
none of it, and its questions are its own.

lost       acknowledged, and neither live nor in history, or there under another id than its client was given; or in history
           without what its handler stored with it
doubled    a uid that is stored or has ended twice; a step's or an ending's row that is there twice
endings    a turn that was acknowledged has one event that ends it, one outcome, and a waiter that was told this one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from tests.chaos.ha.ledger import entries

_STORED = """
select payload ->> 'uid', id, task, state from queue_service.finished_runs where payload ? 'uid'
 union all select payload ->> 'uid', id, task, state from queue_service.runs where payload ? 'uid'
"""
_IDS = "select id from queue_service.finished_runs union all select id from queue_service.runs"
_EFFECTS = "select uid, name from public.ha_effects"
_ENDINGS = "select stream, seq, kind, body ->> 'code', body ->> 'text' from queue_service.events where terminal"
_OUTCOMES = "select message_id, seq, kind, code from queue_service.turn_outcomes"
_GAPS = """
select stream from queue_service.events group by stream
having count(*) <> max(seq) or min(seq) <> 1 or count(distinct seq) <> count(*)
"""
_LEFT = "select (select count(*) from queue_service.runs), (select count(*) from queue_service.turn_markers)"


class _Stored(NamedTuple):
    uid: str
    run_id: int
    task: str
    state: str


@dataclass
class Verdict:
    """What is wrong, in words. `counts` is what was looked at."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.doubled or self.endings or self.odd)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_clean": self.is_clean}


def check(ledgers: Path, conninfo: str) -> Verdict:
    """After all runs have ended. `conninfo` is that of the primary, without anything in between."""
    told = list(entries(ledgers))
    verdict = Verdict()
    with psycopg.connect(conninfo, autocommit=True) as conn:
        _check_clients(told, verdict)
        stored = [_Stored(*row) for row in _rows(conn, _STORED)]
        _check_runs(told, stored, conn, verdict)
        _check_turns(told, stored, conn, verdict)
        runs, markers = _rows(conn, _LEFT)[0]
        if runs or markers:
            verdict.odd.append(f"{runs} runs and {markers} turns have not ended")
    return verdict


def _check_clients(told: list[dict[str, Any]], verdict: Verdict) -> None:
    verdict.odd += [entry["why"] for entry in told if entry["kind"] == "odd"]
    begun, ended = (Counter(entry["name"] for entry in told if entry["kind"] == kind) for kind in ("begun", "ended"))
    verdict.odd += [f"client {name} did not end" for name in (begun - ended)]
    verdict.counts["refused"] = sum(entry["kind"] == "refused" for entry in told)


def _check_runs(
    told: list[dict[str, Any]], stored: list[_Stored], conn: psycopg.Connection[Any], verdict: Verdict
) -> None:
    acknowledged = {entry["uid"] for entry in told if entry["kind"] in {"run", "turn"}}
    times = Counter(each.uid for each in stored)
    verdict.lost += [f"run {uid} is not there" for uid in sorted(acknowledged - times.keys())]
    # Whoever waits for the id that he was given would wait for another run.
    known = {(each.uid, each.run_id) for each in stored}
    given = {(entry["uid"], entry["id"]) for entry in told if entry["kind"] == "run" and entry["uid"] in times}
    verdict.lost += [f"run {uid} is not there as {run_id}" for uid, run_id in sorted(given - known)]
    verdict.doubled += [f"run {uid} is there {count} times" for uid, count in times.items() if count > 1]
    ids = Counter(run_id for (run_id,) in _rows(conn, _IDS))
    verdict.doubled += [f"the id {run_id} is there {count} times" for run_id, count in ids.items() if count > 1]
    verdict.odd += [f"run {each.uid} is {each.state}" for each in stored if each.state != "succeeded"]
    effects = Counter(_rows(conn, _EFFECTS))
    verdict.doubled += [f"the {name} of run {uid} counts {n} times" for (uid, name), n in effects.items() if n > 1]
    wanted = {(each.uid, name) for each in stored if each.task == "effect" for name in ("step", "ending")}
    verdict.lost += [f"the {name} of run {uid} is not there" for uid, name in sorted(wanted - effects.keys())]
    verdict.doubled += [f"the {name} of {uid}, which is no run" for uid, name in sorted(effects.keys() - wanted)]
    verdict.counts |= {"acknowledged": len(acknowledged), "stored": len(stored), "effects": effects.total()}


def _check_turns(
    told: list[dict[str, Any]], stored: list[_Stored], conn: psycopg.Connection[Any], verdict: Verdict
) -> None:
    turns = {entry["uid"] for entry in told if entry["kind"] == "turn"}
    events = _by_first(_rows(conn, _ENDINGS))
    outcomes = _by_first(_rows(conn, _OUTCOMES))
    heard: dict[str, list[tuple[Any, ...]]] = {}
    for entry in told:
        if entry["kind"] == "told":
            heard.setdefault(entry["uid"], []).append((entry["seq"], entry["ending"], entry["code"], entry["text"]))
    # Also those that nobody was told of: a turn that was stored has one ending, and its run is stored with it.
    answered = {each.uid for each in stored if each.task == "answer"}
    for uid in sorted(turns | outcomes.keys() | answered):
        ends = events.get(f"stream {uid}", [])
        if len(ends) != 1:
            verdict.endings.append(f"turn {uid} has {len(ends)} endings in its stream")
        if outcomes.get(uid, []) != [end[:3] for end in ends]:
            verdict.endings.append(f"turn {uid} ended so {outcomes.get(uid)}, and so in its stream: {ends}")
        if uid in turns and (not (words := heard.get(uid)) or any([each] != ends for each in words)):
            verdict.endings.append(f"who waited for turn {uid} was told {words}, and its stream says {ends}")
    verdict.endings += [f"{stream} has a gap" for (stream,) in _rows(conn, _GAPS)]
    verdict.counts |= {"turns": len(turns), "told": sum(map(len, heard.values()))}


def _by_first(rows: Iterable[tuple[Any, ...]]) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = {}
    for first, *others in rows:
        found.setdefault(first, []).append(tuple(others))
    return found


def _rows(conn: psycopg.Connection[Any], question: str) -> list[tuple[Any, ...]]:
    return conn.execute(question.encode()).fetchall()
