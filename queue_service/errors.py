"""Every error a caller can meet, as one tree.

    QueueServiceError
    ├── ConfigError              a setting, an option or a URL cannot be used
    ├── PayloadRefused           a payload, a result or metadata cannot be stored as it is
    ├── DatabaseUnavailable      the server cannot be reached, or a deadline passed; trying again may help
    ├── DatabaseRefused          the database said no to a statement, and would again; its own words say why
    ├── TransactionConflict      the caller's transaction got in the way of another one, and is to be begun again
    │   └── Deadlock             they waited for each other, and the database ended the caller's
    ├── SchemaMismatch           the database has a revision that this code does not work on
    ├── EmbeddedUnavailable      the bundled Postgres is not installed, or did not start
    ├── TaskUnknown              no task of that name is registered here
    ├── RunUnknown               no run has this id: it never existed, or its history was pruned
    ├── DuplicateRun             a live run holds the singleton key, and the caller asked for this error
    ├── ClaimLost                a handler writes for a run that is not its own any more
    ├── TurnUnknown              this turn was never armed, or was forgotten since
    ├── TurnEnded                this turn has had its ending; it cannot be armed again
    ├── MessageConflict          another message was sent under this id
    ├── StreamEnded              this stream takes no more events
    ├── AnswerRefused            what the handler of a batch, or a renderer, has answered cannot be carried out
    ├── DeploymentDown           there is no child process to pass a turn to
    ├── DeploymentHeld           another process, or another Supervisor, runs the deployment's child
    ├── NotConnected             a client has no connection to its gateway, or was closed
    ├── SendFailed               the gateway did not take what a client sent
    ├── OutboxFull               a client has too many messages waiting already
    └── OutboxInUse              another client has this outbox

Losing an election is not in the tree: it is a return value. Each class carries the exit code the command line uses for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class QueueServiceError(Exception):
    """Something a person has to read: what happened, why, what to do."""

    exit_code = 1


class ConfigError(QueueServiceError, ValueError):
    exit_code = 2


class PayloadRefused(QueueServiceError, ValueError):
    exit_code = 2


class DatabaseUnavailable(QueueServiceError):
    exit_code = 3


class DatabaseRefused(QueueServiceError):
    """The driver's error is the `__cause__`."""


class ValueRefused(DatabaseRefused, PayloadRefused):
    """A PayloadRefused that only the database could find."""


class TransactionConflict(QueueServiceError):
    """On a caller's own connection, whose transaction is `repeatable read` or `serializable`. The driver's error, or that
    of its library, is the `__cause__`."""

    def __init__(self, what_happened: str | None = None) -> None:
        super().__init__(
            what_happened
            or "Another transaction has changed what this one has seen, and the database does not let this one go on, as "
            "its isolation level asks: nothing of it is stored. Roll it back, and begin it again."
        )


class Deadlock(TransactionConflict):
    """At any isolation level."""

    def __init__(self) -> None:
        super().__init__(
            "This transaction and another one waited for each other, each for a row that the other had locked, and the "
            "database has ended this one: nothing of it is stored. Roll it back, and begin it again. It does not come to "
            "that where all transactions store runs with an ordering_key in the same order of queue and key."
        )


class EmbeddedUnavailable(QueueServiceError):
    exit_code = 3


class SchemaMismatch(QueueServiceError):
    exit_code = 4

    def __init__(self, have: str | None, want: str, *, newer: bool = False, oldest_code: str | None = None) -> None:
        self.have = have
        self.want = want
        found = f"at revision {have}" if have else "not there yet"
        if oldest_code is not None:
            found += f" and takes what was built for revision {oldest_code} or a later one"
        fix = (
            "install the version of pg-queue-service that made it"
            if newer
            else "run `queue-service db migrate` against the same database"
        )
        needs = f"this version was built for revision {want}" if newer else f"this version needs revision {want}"
        super().__init__(f"The schema queue_service is {found}, and {needs}. To go on: {fix}.")


class TaskUnknown(QueueServiceError, LookupError):
    exit_code = 2

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = sorted(known)
        names = ", ".join(self.known) if self.known else "none: import the module that defines them"
        super().__init__(f"No task is named {name!r}.{nearest(name, self.known)} Registered tasks: {names}.")


class RunUnknown(QueueServiceError, LookupError):
    def __init__(self, run_id: int) -> None:
        self.run_id = run_id
        super().__init__(f"There is no run {run_id}: it never existed, was deleted, or its history was pruned.")


class DuplicateRun(QueueServiceError):
    """A live run already holds this singleton key. `run_id` is that run."""

    def __init__(self, run_id: int, singleton_key: str, *, why: str = "and on_conflict is 'raise'") -> None:
        self.run_id = run_id
        self.singleton_key = singleton_key
        super().__init__(
            f"Run {run_id} is live under singleton key {singleton_key!r}, {why}. Nothing was enqueued; "
            "wait for that run, cancel it, or use on_conflict='return'."
        )


class ClaimLost(QueueServiceError):
    """The run was cancelled, its time is over, or its lease was swept; another worker may have it."""

    def __init__(self, run_id: int, attempt: int) -> None:
        self.run_id = run_id
        self.attempt = attempt
        super().__init__(
            f"Attempt {attempt} of run {run_id} is over: the run was cancelled, ran out of time, or was taken from this "
            "worker. What this transaction wrote must be rolled back (run.transaction() has done so). Stop here."
        )


class TurnUnknown(QueueServiceError, LookupError):
    def __init__(self, deployment: str, message_id: str) -> None:
        self.deployment = deployment
        self.message_id = message_id
        super().__init__(
            f"There is no turn {message_id!r} of deployment {deployment!r}: it was never armed, or ended so long ago that "
            "it was forgotten."
        )


class TurnEnded(QueueServiceError):
    """The turn has had its ending. `outcome` is how it ended."""

    def __init__(self, deployment: str, message_id: str, outcome: Any) -> None:
        self.deployment = deployment
        self.message_id = message_id
        self.outcome = outcome
        super().__init__(
            f"Turn {message_id!r} of deployment {deployment!r} has {_how(outcome)}. Nothing was armed: read "
            "its outcome, or send the message under a new id."
        )


class MessageConflict(QueueServiceError):
    def __init__(self, deployment: str, message_id: str) -> None:
        self.deployment = deployment
        self.message_id = message_id
        super().__init__(
            f"Another message of deployment {deployment!r} has the id {message_id!r}. Nothing was stored: send this one "
            "under an id of its own."
        )


class StreamEnded(QueueServiceError):
    def __init__(self, stream: str) -> None:
        self.stream = stream
        super().__init__(f"Stream {stream!r} has ended, and the event was not stored. Set its state to go on with it.")


class AnswerRefused(QueueServiceError, TypeError):
    pass


class DeploymentDown(QueueServiceError):
    """There is no child to pass a turn to. The turn keeps its deadline; it was not ended by this."""


class DeploymentHeld(QueueServiceError):
    """Another one runs the deployment's child. `owner` is its process, for `Defer(0, owner)`: the identity of its App."""

    def __init__(self, deployment: str, owner: str) -> None:
        self.deployment = deployment
        self.owner = owner
        super().__init__(
            f"Deployment {deployment!r} has its child with another Supervisor, in process {owner}, and none was started "
            "here. Leave the turn to that one (return Defer(0, owner) from the handler, as Supervisors.take does), or wait "
            "for it: start(wait=30)."
        )


class NotConnected(QueueServiceError):
    """The client has no connection to its gateway, or was closed. What raised this was not sent."""


class SendFailed(QueueServiceError):
    """The gateway did not take what it was sent. `status` and `field` are its answer, or None where there was none: then
    it may have been taken all the same. `retry_after` is how many seconds it asked to wait, or 0."""

    def __init__(
        self, what: str, why: str, *, status: int | None = None, field: str | None = None, retry_after: float = 0.0
    ) -> None:
        self.status = status
        self.field = field
        self.retry_after = retry_after
        super().__init__(f"`{what}` did not go through: {why}")


class OutboxFull(QueueServiceError):
    def __init__(self, cap: int) -> None:
        self.cap = cap
        super().__init__(
            f"{cap} messages wait to be sent already, and this one was not taken. Wait for one of them, or raise `cap`."
        )


class OutboxInUse(QueueServiceError):
    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"Another client sends what is in {path}. Close it, or give this one an outbox of its own.")


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause naming the closest known word, with a leading space, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def install_extra(extra: str) -> str:
    """The sentence that says how to install an extra of this package. It names the checkout, not the package: what has our
    name on a public index may be somebody else's."""
    return f"Install the extra {extra!r} in the checkout of queue_service: pip install '.[{extra}]'."


def _how(outcome: Any) -> str:
    if outcome.kind == "discharged":
        return "been discharged by an operator"
    return f"ended with {outcome.kind} {outcome.code}" if outcome.code else f"ended with a {outcome.kind}"
