"""JSON in and out of `jsonb`.

What a caller hands in is refused when Postgres could not store it exactly; what a handler hands out is sanitised instead,
because a finish must never be lost for a character. Both leave here as text that `jsonb` accepts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from queue_service import exceptions
from queue_service.errors import PayloadRefused

REPLACEMENT = "\ufffd"
_NESTING = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# jsonb nests no deeper than the server's stack allows; Python's own limit is lower, and this one is below both.
MAX_DEPTH = 200
# Of a number; Python reads no more than 4,300.
MAX_DIGITS = 4_000
MAX_ERROR_TEXT = exceptions.MAX_MESSAGE

_encode = msgspec.json.Encoder().encode
loads = msgspec.json.Decoder().decode


def dumps(value: Any, *, what: str, limit: int) -> str:
    """`value` as JSON text, or PayloadRefused saying which part cannot be stored. `limit` is in bytes."""
    try:
        encoded = _encode(value)
        # As it will be read: msgspec.Raw goes in as it is, and may be no JSON, or hold a number that nobody can read.
        stored = loads(encoded)
    except RecursionError:
        raise PayloadRefused(f"The {what} is nested too deeply. Keep it under {MAX_DEPTH} levels.") from None
    except Exception as refused:  # noqa: BLE001 - the attributes of an object may do anything when they are read
        raise PayloadRefused(
            f"The {what} is not JSON: {exceptions.message(refused)}. Pass dicts, lists, strings, numbers, None."
        ) from None
    if len(encoded) > limit:
        raise PayloadRefused(
            f"The {what} is {len(encoded):,} bytes, over the limit of {limit:,}. "
            "Store the large part elsewhere and pass a reference, or raise QUEUE_SERVICE_PAYLOAD_LIMIT."
        )
    # msgspec writes NaN and the infinities as null, and NUL as an escape that jsonb refuses. Both leave a trace in the
    # text, so that a walk through the value is only paid for when there may be something to find. It is looked for in
    # text, not in bytes, which takes ten times as long.
    text = encoded.decode()
    _refuse_depth(text, stored, what)
    if "null" in text or "\\u0000" in text:
        _refuse_unstorable(_plain(value), what)
        _refuse_unstorable(stored, what)
    return text


def dumps_object(value: Any, *, what: str, limit: int) -> str:
    """As `dumps`, for a value that must be a JSON object."""
    if not isinstance(value, dict):
        raise PayloadRefused(f"The {what} must be a dict (a JSON object), not {type(value).__name__}.")
    return dumps(value, what=what, limit=limit)


def dumps_result(value: Any, *, limit: int, what: str = "result") -> str:
    """What a handler gives back as JSON text: NUL, lone surrogates and NaN replaced. PayloadRefused only for what is not
    JSON."""
    if value is None:
        return "null"
    try:
        return dumps(value, what=what, limit=limit)
    except PayloadRefused:
        try:
            cleaned = sanitised(_plain(value))
        except RecursionError:
            raise PayloadRefused(f"The {what} is nested deeper than {MAX_DEPTH} levels.") from None
        except Exception as refused:  # noqa: BLE001 - as in `dumps`
            raise PayloadRefused(f"The {what} is not JSON: {exceptions.message(refused)}.") from None
        return dumps(cleaned, what=what, limit=limit)


class Readable(NamedTuple):
    """A JSON value, and what of it could not be read as it is stored: None where all of it was."""

    value: Any
    flaw: str | None = None


def read(text: str | None) -> Readable:
    """What is stored as JSON, whoever has stored it. In the place of what cannot be read (a number that is too large,
    levels that are too deep) stands None. No text is None, too."""
    if text is None:
        return Readable(None)
    try:
        return Readable(loads(text))
    except Exception as refused:  # noqa: BLE001 - it is stored: what is wrong with it is said, not raised
        return Readable(_salvaged(text), exceptions.message(refused))


def read_object(text: str | None) -> Readable:
    """As `read`, of what is to be an object; {} for anything else."""
    value, flaw = read(text)
    if isinstance(value, dict):
        return Readable(value, flaw)
    return Readable({}, flaw or "It is no JSON object.")


def read_body(text: str | None, flaw: str | None = None) -> Any:
    """As `read`, of what is passed on to others: it says itself what of it could not be read, as `unreadable`. `flaw` is
    what was found before."""
    value, found = read(text)
    flaw = flaw or found
    if flaw is None:
        return value
    return {**(value if isinstance(value, dict) else {}), "unreadable": flaw}


def describe_error(error: BaseException, *, reason: str = "raised") -> str:
    """An exception as the JSON object stored with a run: reason, type, message, traceback; bounded and storable. Whatever
    the exception does when it is asked, it is described."""
    stack = exceptions.rendered(error)[-MAX_ERROR_TEXT:]
    return dumps_error(reason, exceptions.message(error), type=exceptions.type_name(error), traceback=stack)


def dumps_error(reason: str, message: str, **more: str) -> str:
    body = {"reason": reason, "message": message[:MAX_ERROR_TEXT], **more}
    return _encode(sanitised(body)).decode()


def sanitised(value: Any, depth: int = 0) -> Any:
    """The value with every character and number that jsonb refuses replaced: U+FFFD for text, None for numbers."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_clean_key(k): sanitised(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [sanitised(item, depth + 1) for item in value]
    return value


def _salvaged(text: str) -> Any:
    try:
        return json.loads(_flattened(text), parse_int=_integer, parse_float=_float, parse_constant=lambda _: None)
    except Exception:  # noqa: BLE001 - then nothing of it can be read
        return None


def _flattened(text: str) -> str:
    """Without what is nested deeper than MAX_DEPTH."""
    kept: list[str] = []
    depth = start = 0
    for token in _NESTING.finditer(text):
        if token[0] in {"{", "["}:
            depth += 1
            if depth == MAX_DEPTH + 1:
                kept += [text[start : token.start()], "null"]
        elif token[0] in {"}", "]"}:
            depth -= 1
            if depth == MAX_DEPTH:
                start = token.end()
    return "".join(kept) + text[start:]


def _integer(digits: str) -> int | None:
    return int(digits) if len(digits) <= MAX_DIGITS else None


def _float(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    """Made of dicts, lists, texts and numbers."""
    return msgspec.to_builtins(value, str_keys=True, enc_hook=_plain_raw)


def _plain_raw(value: Any) -> Any:
    if isinstance(value, msgspec.Raw):
        return loads(value)
    raise NotImplementedError


def _clean_key(key: Any) -> Any:
    return _clean_text(key) if isinstance(key, str) else key


def _clean_text(text: str) -> str:
    return _UNSTORABLE.sub(REPLACEMENT, text)


def _refuse_unstorable(value: Any, what: str) -> None:
    for path, leaf in _leaves(value, what):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise PayloadRefused(f"{path} is {leaf}, which JSON cannot hold. Pass None or a finite number.")
        if isinstance(leaf, str) and "\x00" in leaf:
            raise PayloadRefused(f"{path} holds a NUL character, which Postgres cannot store. Remove it.")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"a key of {path}", key
            yield from _leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def _refuse_depth(text: str, stored: Any, what: str) -> None:
    # Two gates that cost nothing: a level takes two characters, and an opening bracket.
    if len(text) <= 2 * MAX_DEPTH or text.count("{") + text.count("[") <= MAX_DEPTH:
        return
    if _depth(stored) > MAX_DEPTH:
        raise PayloadRefused(f"The {what} is nested deeper than {MAX_DEPTH} levels. Flatten it.")


def _depth(value: Any) -> int:
    level, deepest = [value], 0
    while level:
        deepest += 1
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below
    return deepest
