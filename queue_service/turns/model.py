"""How a turn may fail, how it stands, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec

from queue_service import codec
from queue_service.codec import sanitised
from queue_service.errors import ConfigError, PayloadRefused, nearest
from queue_service.exceptions import message
from queue_service.logs import get_logger
from queue_service.turn import Turn
from queue_service.words import check_word

log = get_logger(__name__)

# What a failed turn may have died of, and the sentence for the person who waits. Closed: whoever reads a
# code, in an event or in a marker, may rely on it being one of these.
SENTENCES: Mapping[str, str] = {
    "worker_died": "The agent stopped unexpectedly. Please send the message again.",
    "worker_unresponsive": "The agent stopped responding. Please send the message again.",
    "worker_startup_failed": "The agent could not be started. Please try again later.",
    "provider_quota_exhausted": "The model provider's quota is used up. Please try again later.",
    "provider_auth_failed": "The model provider refused the agent's credentials. Please check them.",
    "provider_overloaded": "The model provider is overloaded. Please try again later.",
    "provider_unavailable": "The model provider cannot be reached. Please try again later.",
    "context_too_large": "The conversation is too long for the model. Please start a new one.",
    "reply_refused": "The agent answered, but its answer could not be stored.",
    "no_answer": "The agent finished without an answer. Please send the message again.",
    "rejected": "The message was rejected.",
    "cancelled": "The turn was cancelled.",
    "timeout": "The agent took too long to answer. Please send the message again.",
    "internal_error": "Something went wrong. Please send the message again.",
}

MAX_REASON = 2_000


@dataclass(frozen=True, slots=True)
class TurnFailure:
    """Why a turn ends without a reply. `code` is one of the catalogue; `message` is a sentence for the person who waits
    (the catalogue's own by default), `reason` a detail for whoever looks into it. ConfigError for an unknown code.
    """

    code: str
    message: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.code not in SENTENCES:
            raise ConfigError(f"There is no failure code {self.code!r}.{nearest(str(self.code), SENTENCES)}")
        for name in ("message", "reason"):
            text = getattr(self, name)
            # A failure must be storable, whatever an exception or a dying process put into its text.
            object.__setattr__(self, name, sanitised(str(text))[:MAX_REASON] if text else None)

    @property
    def sentence(self) -> str:
        """What a person is to read: the message, or the usual sentence for the code."""
        return self.message or SENTENCES[self.code]


def known_code(code: str | None) -> str | None:
    """A code as it was stored, or `internal_error` for one that is not in the catalogue."""
    return code if code is None or code in SENTENCES else "internal_error"


def key_of(deployment: str, message_id: str) -> tuple[str, str]:
    """The identity of a turn. Raises ConfigError, PayloadRefused for what names none."""
    check_word(deployment, "deployment")
    check_word(message_id, "message_id")
    return deployment, message_id


def may_name(message_id: str) -> bool:
    """Whether a turn can have this id. One that cannot must not cost the others of its reply their ending."""
    try:
        check_word(message_id, "message_id")
    except (ConfigError, PayloadRefused) as refused:
        log.error("no turn has such an id; it is passed over", why=str(refused))
        return False
    return True


class Marker(msgspec.Struct, frozen=True, kw_only=True):
    """A turn that is owed its ending. `deadline` is when it lapses, `admitted_at` the first sign of life, `ends_by` when it
    lapses whatever signs of life there are (None: never)."""

    deployment: str
    message_id: str
    stream: str
    platform: str
    channel_id: str | None
    user_id: str | None
    organization_id: str | None
    metadata: Mapping[str, Any]
    armed_at: datetime
    deadline: datetime
    admitted_at: datetime | None
    admission: timedelta
    execution: timedelta
    run_id: int | None
    failure_code: str | None
    failure_reason: str | None
    overdue: bool
    ends_by: datetime | None = None

    @property
    def turn(self) -> Turn:
        """The turn that this is the marker of."""
        return Turn(**{name: getattr(self, name) for name in Turn.__slots__})


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a message got: from now on its turn is owed one ending. `seq` is where the message stands in its stream; `new`
    is False where it had been taken in before."""

    deployment: str
    message_id: str
    stream: str
    seq: int
    new: bool


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a turn ended: with the event `seq` of `stream`, of kind `reply` or `error` (then with a `code`), whose body this
    is; or `discharged`, by an operator, without an event. `body` is None where there is no event.
    """

    deployment: str
    message_id: str
    stream: str
    armed_at: datetime
    ended_at: datetime
    kind: str
    code: str | None = None
    seq: int | None = None
    body: Mapping[str, Any] | None = None

    @property
    def message(self) -> str | None:
        """The sentence of an error."""
        if self.code is None:
            return None
        stored = (self.body or {}).get("message")
        return str(stored) if stored else SENTENCES[self.code]


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """An outcome, or else the seconds before which the turn cannot lapse (negative: it has; None: it is just ending)."""

    stream: str
    outcome: Outcome | None
    seconds_left: float | None


class EndedTurn(msgspec.Struct, frozen=True):
    """A turn that a call ended, and the event it ended with."""

    deployment: str
    message_id: str
    stream: str
    seq: int
    kind: str
    platform: str


@dataclass(frozen=True, slots=True)
class TurnEnding:
    """What a turn is to end with; `body` is JSON text of an object."""

    deployment: str
    message_id: str
    kind: str
    body: str
    code: str | None = None


def failed(deployment: str, message_id: str, failure: TurnFailure) -> TurnEnding:
    """The ending of a turn that failed."""
    body = {"code": failure.code, "message": failure.sentence}
    if failure.reason:
        body["reason"] = failure.reason
    return TurnEnding(deployment, message_id, "error", msgspec.json.encode(body).decode(), failure.code)


def replied(deployment: str, message_id: str, body: Any, limit: int, together: Sequence[str] = ()) -> TurnEnding:
    """The ending of a turn that got this reply. It can always be written: characters that Postgres refuses are replaced,
    and where the reply cannot be stored at all, the ending is an error that says why. An answer to several messages names
    them all, in each of their endings.
    """
    try:
        reply = _object(body)
        if len(together) > 1:
            reply["together"] = list(together)
        text = codec.dumps_result(reply, limit=limit)
        return TurnEnding(deployment, message_id, "reply", text)
    except Exception as refused:  # noqa: BLE001 - whatever a reply does when it is read, its turn gets an ending
        return failed(deployment, message_id, TurnFailure("reply_refused", reason=message(refused)))


def _object(body: Any) -> dict[Any, Any]:
    if not isinstance(body, Mapping):
        raise PayloadRefused(f"The reply must be a dict (a JSON object), not {type(body).__name__}.")
    return dict(body)
