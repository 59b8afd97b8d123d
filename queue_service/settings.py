"""Every setting, its default and its environment variable. Built once by `load` and passed down; nothing else reads
the environment. Durations are `timedelta` inside and text such as `30s` outside.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from queue_service.errors import ConfigError, nearest

PREFIX = "QUEUE_SERVICE_"

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}


def parse_duration(text: str) -> timedelta:
    """`500ms`, `30s`, `5m`, `2h`, `14d`, or plain seconds."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a duration. Write 500ms, 30s, 5m, 2h or 14d.")
    try:
        return timedelta(seconds=float(match[1]) * _UNITS[match[2]])
    except OverflowError:
        raise ConfigError(f"{text[:40]!r} is longer than any duration can be.") from None


def format_duration(value: timedelta) -> str:
    """The shortest text that `parse_duration` reads as this."""
    seconds = value.total_seconds()
    for unit in ("d", "h", "m"):
        if seconds and seconds % _UNITS[unit] == 0:
            return f"{seconds / _UNITS[unit]:.0f}{unit}"
    return f"{seconds:g}s" if seconds >= 1 or not seconds else f"{seconds * 1000:g}ms"


def parse_path(text: str) -> Path:
    return Path(text).expanduser().absolute()


# As what `db/session.py` takes the way to the server.
Pooler = Literal["auto", "none", "session", "transaction"]


def one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        word = text.strip().lower()
        if word not in words:
            raise ConfigError(f"Write one of {', '.join(words)}.")
        return word

    return parse


def default_data_dir() -> Path:
    """Where the embedded cluster lives unless a setting says otherwise."""
    if os.name == "posix" and os.geteuid() == 0:
        return Path("/var/lib/queue_service")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "queue_service"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "queue_service"


def _setting(default: Any, parse: Callable[[str], Any], doc: str, *, is_secret: bool = False) -> Any:
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**kind, repr=not is_secret, metadata={"parse": parse, "doc": doc})


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    data_dir: Path = _setting(default_data_dir, parse_path, "directory of the embedded cluster")
    pool_size: int = _setting(4, int, "most connections of an App, besides those of a worker")
    pooler: Pooler = _setting(
        "auto",
        one_of("auto", "none", "session", "transaction"),
        "what is between us and the server: auto (find out), none, or a pooler of sessions or of transactions",
    )
    listen_url: str | None = _setting(
        None, str, "a way to the server for notices, where a pooler of transactions lets none through", is_secret=True
    )
    lent_connections: int = _setting(
        10, int, "most connections lent at once to the handlers of a queue, if so many runs of it go on"
    )
    lent_statement_timeout: timedelta = _setting(
        timedelta(minutes=1), parse_duration, "how long the database may be silent about a statement on one of them"
    )
    payload_limit: int = _setting(256 * 1024, int, "largest payload, metadata or result, in bytes")
    lease: timedelta = _setting(timedelta(seconds=30), parse_duration, "how long a claim outlives its worker")
    poll_interval: timedelta = _setting(timedelta(seconds=1), parse_duration, "longest wait without a notice")
    sweep_interval: timedelta = _setting(timedelta(seconds=5), parse_duration, "how often lapsed leases are taken")
    drain_timeout: timedelta = _setting(timedelta(seconds=30), parse_duration, "grace for handlers when stopping")
    max_losses: int = _setting(3, int, "lost workers after which a run ends failed")
    admission: timedelta = _setting(timedelta(minutes=5), parse_duration, "how long a turn may wait to be taken up")
    execution: timedelta = _setting(
        timedelta(minutes=1), parse_duration, "how long a turn outlives its last sign of life"
    )
    total: timedelta = _setting(timedelta(days=1), parse_duration, "how long a turn may take as a whole")
    retention: timedelta = _setting(timedelta(days=14), parse_duration, "how long finished runs are kept")
    retention_failed: timedelta = _setting(
        timedelta(days=14), parse_duration, "how long failed runs are kept, where that is longer"
    )
    read_timeout: timedelta = _setting(
        timedelta(seconds=2), parse_duration, "longest a command may look for what it is to show"
    )
    log_level: str = _setting("info", one_of("debug", "info", "warning", "error"), "debug, info, warning or error")
    log_format: str = _setting("auto", one_of("auto", "console", "json"), "auto, console or json")

    def __post_init__(self) -> None:
        for name in ("pool_size", "lent_connections", "payload_limit", "max_losses"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in (
            "lease", "poll_interval", "sweep_interval", "admission", "execution", "total", "read_timeout",
            "lent_statement_timeout",
        ):  # fmt: skip
            if getattr(self, name) < timedelta(milliseconds=10):
                raise ConfigError(f"{name} must be at least 10ms, not {getattr(self, name)}.")
        if self.drain_timeout < timedelta(0) or self.retention < timedelta(days=1):
            raise ConfigError("drain_timeout must not be negative, and retention must be at least 1d.")


def env_name(field: str) -> str:
    return PREFIX + field.upper()


def load(environ: Mapping[str, str], **overrides: Any) -> Settings:
    """Defaults, then the environment, then `overrides` that are not None. An unreadable value names its variable."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        text = environ.get(env_name(field.name))
        if text:
            try:
                values[field.name] = field.metadata["parse"](text)
            except ValueError as refused:
                raise ConfigError(f"{env_name(field.name)}={text!r} cannot be used: {refused}") from None
    given = {name: value for name, value in overrides.items() if value is not None}
    known = {field.name for field in dataclasses.fields(Settings)}
    for name in given.keys() - known:
        raise ConfigError(f"There is no setting {name!r}.{nearest(name, known)}")
    return Settings(**values | given)
