"""What a name may be: of a queue, a key, a deployment, a stream."""

from __future__ import annotations

from queue_service.errors import ConfigError, PayloadRefused

# An index entry holds at most about 2,700 bytes, and some hold two names.
MAX_WORD = 1_024


def check_word(value: object, what: str, limit: int = MAX_WORD) -> None:
    """ConfigError or PayloadRefused for a text that cannot name anything. `limit` is in bytes."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{what} must be a text that is not empty, not {value!r}.")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise PayloadRefused(f"{what} holds a lone surrogate, which is no character.") from None
    if size > limit:
        raise ConfigError(f"{what} is {size} bytes long; the limit is {limit}.")
    if "\x00" in value:
        raise PayloadRefused(f"{what} holds a NUL character, which Postgres cannot store.")
