"""The options of the runs that work on messages. What is wrong with them is no fault of who sends a message: it is refused
where the gateway is made, or, from a function, with 500 and a line in the log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, get_args

from queue_service.app.enqueue import SHARED, new_run
from queue_service.errors import ConfigError, nearest
from queue_service.exceptions import message, rendered
from queue_service.gateway.access import Principal, answered
from queue_service.gateway.refusals import Refused
from queue_service.logs import get_logger
from queue_service.tasks import Tasks, duration

log = get_logger(__name__)

RunMapping = Mapping[str, Any]
# Called with who sends, the stream, and the body of the message, which it must leave as it is.
OptionsFunction = Callable[[Principal, str, Mapping[str, Any]], RunMapping | Awaitable[RunMapping]]
Options = RunMapping | OptionsFunction
Ordering = Literal["stream", "none"]

OF_TURNS = frozenset({"admission", "execution", "total"})


class RunOptions:
    """Raises ConfigError, PayloadRefused for what no run can have."""

    def __init__(self, options: Options | None, *, queue: str | None, ordering: Ordering, payload_limit: int) -> None:
        if ordering not in get_args(Ordering):
            words = get_args(Ordering)
            raise ConfigError(f"ordering is one of {', '.join(words)}.{nearest(str(ordering), words)}")
        if not (options is None or callable(options) or isinstance(options, Mapping)):
            raise ConfigError(f"options is a mapping, or a function that gives one, not {type(options).__name__}.")
        self._options = options or {}
        self._ordering = ordering
        self._queue = {} if queue is None else {"queue": queue}
        self._payload_limit = payload_limit
        if isinstance(self._options, Mapping):
            if queue is not None and "queue" in self._options:
                raise ConfigError("queue and options['queue'] both name the queue. Pass one of them.")
            self._options = dict(self._options)
            self._check(self._options)
        self._check(self._queue)

    async def of(self, principal: Principal, stream: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """For one message. Raises Refused: 500 where the function fails, 503 where it does not answer in time."""
        given = self._options if isinstance(self._options, Mapping) else await self._asked(principal, stream, body)
        # A name that a stream may have is no longer than an ordering key may be.
        ordering = {"ordering_key": stream} if self._ordering == "stream" else {}
        return {**self._queue, **ordering, **given}

    async def _asked(self, principal: Principal, stream: str, body: Mapping[str, Any]) -> RunMapping:
        assert not isinstance(self._options, Mapping)
        try:
            given = await answered(self._options(principal, stream, body))
            self._check(given)
        except Refused:
            raise
        except Exception as broken:  # noqa: BLE001 - whatever it is, only this message is refused for it
            log.error(
                "the options of a run cannot be had", stream=stream, why=message(broken), exception=rendered(broken)
            )
            raise Refused(500, "This message cannot be taken now.") from None
        return given

    def _check(self, options: object) -> None:
        if not isinstance(options, Mapping):
            raise ConfigError(f"The options of a run are a mapping, not {type(options).__name__}.")
        known = SHARED | OF_TURNS
        for name in options:
            if name not in known:
                raise ConfigError(f"A message's run has no option {name!r}.{nearest(str(name), known)}")
        for name in OF_TURNS & options.keys():
            if options[name] is not None:
                duration(options[name], name, positive=True)
        of_run = {name: value for name, value in options.items() if name in SHARED}
        # As a run of a task that nobody knows, with an empty payload.
        new_run(Tasks(), self._payload_limit, "task", {}, **of_run)
