"""What a step is, and what is stored of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import msgspec


class NewStep(NamedTuple):
    """A step that an attempt of a run has done. `result` is JSON text."""

    run_id: int
    attempt: int
    name: str
    result: str


class Step(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A step as it is stored. `attempt` is the one that did it, `result` a JSON value. `unreadable` says what of it could
    not be read, which somebody has put there by other means than this library; None is as it should be."""

    name: str
    attempt: int
    created_at: datetime
    result: Any = None
    unreadable: str | None = None
