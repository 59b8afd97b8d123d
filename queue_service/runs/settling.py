"""What workers write about the runs they claimed, as values: how far they are, how they end, and that they go back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import msgspec

from queue_service.db.query import Query, Rows, array_literal
from queue_service.runs.claim import Claim
from queue_service.runs.model import Ending, Return, RunState
from queue_service.runs.sql import SQL

_claim_of = attrgetter("claim")

# A claim as its row: it equals the Claim, both being tuples, and need not be made into one.
Done = tuple[Any, ...]


def report(reports: Mapping[Claim, str]) -> Query[set[Done]]:
    """Store how far runs are, as JSON text for each. The claims that are missing were lost, or another session has their
    runs locked."""
    claims = sorted(reports)
    return SQL.query("report", _done, **_named(claims), reports=_json_array([reports[claim] for claim in claims]))


def finish(endings: Sequence[Ending], *, worker_id: int, freed: Collection[int] = ()) -> Query[set[Done]]:
    """The claims that were still held and have ended. A missing one was lost: nothing about its run changed."""
    ordered = sorted(endings, key=_claim_of)
    outcomes = [_ending_json(ending) for ending in ordered]
    return SQL.query("finish", _done, **_batch([each.claim for each in ordered], outcomes, worker_id, freed))


def hand_on(endings: Sequence[Ending], *, worker_id: int, freed: Collection[int] = ()) -> Query[set[Done]]:
    """As `finish`, of runs whose turns are handed on."""
    ordered = sorted(endings, key=_claim_of)
    outcomes = [_ending_json(ending) for ending in ordered]
    heirs = msgspec.json.encode([ending.heir for ending in ordered]).decode()
    return SQL.query(
        "hand_on", _done, **_batch([each.claim for each in ordered], outcomes, worker_id, freed), heirs=heirs
    )


def busy(claims: Collection[Claim]) -> Query[set[Done]]:
    """Those that are held, but an ending of which would wait for another session."""
    return SQL.query("busy", _done, **_named(sorted(claims)))


def give_back(returns: Sequence[Return], *, worker_id: int, freed: Collection[int] = ()) -> Query[set[Done]]:
    """The claims that were still held and whose runs are queued again (or `cancelled`, where that had been asked)."""
    ordered = sorted(returns, key=_claim_of)
    outcomes = [_return_json(back) for back in ordered]
    return SQL.query("give_back", _done, **_batch([each.claim for each in ordered], outcomes, worker_id, freed))


def freeing(write: Query[set[Done]], leases: Collection[int]) -> Query[set[Done]]:
    """As a `finish` or `give_back` that was made before, and lets go of these leases."""
    return Query(write.text, write.decode, {**write.params, "leases": array_literal(sorted(leases))})


def _batch(
    claims: Sequence[Claim], outcomes: Sequence[str], worker_id: int, freed: Collection[int]
) -> dict[str, object]:
    return {
        **_named(claims),
        "outcomes": _json_array(outcomes),
        "worker_id": worker_id,
        "leases": array_literal(sorted(freed)),
    }


def _named(claims: Sequence[Claim]) -> dict[str, str]:
    return {
        "ids": array_literal([claim.run_id for claim in claims]),
        "attempts": array_literal([claim.attempt for claim in claims]),
    }


def _ending_json(ending: Ending) -> str:
    if ending.state is RunState.SUCCEEDED:
        return "null" if ending.result == "null" else f'{{"result":{ending.result}}}'
    error = "" if ending.error == "null" else f',"error":{ending.error}'
    return f'{{"state":"{ending.state.value}"{error}}}'


def _return_json(back: Return) -> str:
    parts = [] if back.delay is None else [f'"delay":{back.delay!r}']
    parts += ['"failed":true'] if back.failed else []
    parts += [] if back.error == "null" else [f'"error":{back.error}']
    parts += [] if back.reserved_for is None else [f'"reserved_for":{msgspec.json.encode(back.reserved_for).decode()}']
    return "{" + ",".join(parts) + "}"


def _json_array(texts: Sequence[str]) -> str | None:
    # All null is the common case of a drain, and then the server has nothing to parse.
    return None if all(text == "null" for text in texts) else "[" + ",".join(texts) + "]"


def _done(rows: Rows) -> set[Done]:
    return set(rows)
