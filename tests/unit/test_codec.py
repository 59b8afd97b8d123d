"""What goes into `jsonb`: payloads are refused when they could not be stored exactly, results are sanitised instead."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from queue_service import codec
from queue_service.errors import PayloadRefused

LIMIT = 256 * 1024
NUL_ESCAPE = "\\u0000"


def stored(payload: Any, *, limit: int = LIMIT) -> str:
    return codec.dumps_object(payload, what="payload", limit=limit)


def result_text(value: Any, *, limit: int = LIMIT) -> str:
    return codec.dumps_result(value, limit=limit)


def nested(levels: int, *, innermost: Any = 0) -> dict[str, Any]:
    value: Any = innermost
    for _ in range(levels - 1):
        value = [value]
    return {"deep": value}


@dataclass
class Point:
    x: Any


class Colour(msgspec.Struct):
    name: Any


class Odd(Enum):
    NUL = "a\x00b"


@pytest.mark.parametrize("payload", [None, [], [1], "text", 1, True, 1.5, b"{}", (), {1, 2}, Point(1), Colour("red")])
def test_a_payload_that_is_not_an_object_is_refused_by_its_type(payload: Any) -> None:
    with pytest.raises(PayloadRefused, match=rf"payload must be a dict .* not {type(payload).__name__}"):
        stored(payload)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda x: {"a": x}, "payload['a']"),
        (lambda x: {"a": [1, {"b": x}]}, "payload['a'][1]['b']"),
        (lambda x: {"a": (None, x)}, "payload['a'][1]"),
    ],
    ids=["value", "nested", "tuple"],
)
def test_a_number_that_json_cannot_hold_is_refused_with_its_path(number: float, wrap: Any, path: str) -> None:
    with pytest.raises(PayloadRefused) as refused:
        stored(wrap(number))
    assert str(refused.value).startswith(f"{path} is {number}")


@pytest.mark.parametrize(
    ("payload", "where"),
    [
        ({"a": "x\x00"}, "payload['a']"),
        ({"a": ["ok", "\x00"]}, "payload['a'][1]"),
        ({"\x00a": 1}, "a key of payload"),
        ({"outer": {"in\x00ner": 1}}, "a key of payload['outer']"),
        ({"a": "literal \\u0000 and a real \x00"}, "payload['a']"),
    ],
)
def test_a_nul_is_refused_in_values_and_in_keys(payload: dict[str, Any], where: str) -> None:
    with pytest.raises(PayloadRefused, match="NUL character, which Postgres cannot store") as refused:
        stored(payload)
    assert str(refused.value).startswith(where)


@pytest.mark.parametrize("payload", [{"a": "\ud800"}, {"\udfff": 1}, {"a": [{"b": "x\udc80y"}]}])
def test_a_lone_surrogate_is_refused(payload: dict[str, Any]) -> None:
    with pytest.raises(PayloadRefused, match="surrogate"):
        stored(payload)


@pytest.mark.parametrize("payload", [{"a": object()}, {"a": 1 + 2j}, {"a": {(1, 2): 3}}, {"a": lambda: None}])
def test_what_is_no_json_is_refused(payload: dict[str, Any]) -> None:
    with pytest.raises(PayloadRefused, match="payload is not JSON"):
        stored(payload)


@pytest.mark.parametrize(
    "payload",
    [{"a": Point("\x00")}, {"a": Colour("\x00")}, {"a": Odd.NUL}, {"a": [Point(["\x00"])]}],
    ids=["dataclass", "struct", "enum", "nested"],
)
def test_a_nul_inside_an_object_that_encodes_itself_is_refused(payload: dict[str, Any]) -> None:
    with pytest.raises(PayloadRefused, match="NUL"):
        stored(payload)


@pytest.mark.parametrize("payload", [{"a": Point(math.nan)}, {"a": Colour(math.inf)}], ids=["dataclass", "struct"])
def test_a_nan_inside_an_object_that_encodes_itself_is_refused(payload: dict[str, Any]) -> None:
    with pytest.raises(PayloadRefused, match="JSON cannot hold"):
        stored(payload)


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"a": r"\u0000"},
        {r"\u0000": r"\\u0000"},
        {"a": None, "b": [None, {"c": None}]},
        {"a": "null"},
        {"a": r"\ud800"},
        {"a": "\U0001f600 ö \ufffd \ufeff \u2028"},
        {"a": '\x01\x1f\x7f\\"/\t\n\r'},
        {"": ""},
        {"a": 2**63, "b": -(2**64), "c": 1e308, "d": 5e-324, "e": -0.0},
    ],
)
def test_what_jsonb_can_store_is_accepted_and_comes_back_the_same(payload: dict[str, Any]) -> None:
    assert codec.loads(stored(payload)) == payload


def test_a_payload_may_have_exactly_the_limit_in_bytes() -> None:
    exact = {"a": "x" * (LIMIT - len('{"a":""}'))}
    assert len(stored(exact)) == LIMIT
    with pytest.raises(PayloadRefused, match=r"payload is 262,145 bytes, over the limit of 262,144.*PAYLOAD_LIMIT"):
        stored({"a": exact["a"] + "x"})


def test_the_limit_counts_bytes_and_not_characters() -> None:
    stored({"a": "x" * 90}, limit=100)
    with pytest.raises(PayloadRefused, match="188 bytes"):
        stored({"a": "ö" * 90}, limit=100)


def test_a_payload_may_have_exactly_so_many_levels() -> None:
    assert codec.loads(stored(nested(codec.MAX_DEPTH - 1)))
    with pytest.raises(PayloadRefused, match=f"nested deeper than {codec.MAX_DEPTH} levels"):
        stored(nested(codec.MAX_DEPTH + 1))


def test_many_brackets_side_by_side_are_not_deep() -> None:
    assert stored({"rows": [[] for _ in range(10 * codec.MAX_DEPTH)]})


@pytest.mark.parametrize("innermost", [0, None, "\\u0000"], ids=["plain", "null", "escape"])
def test_a_payload_of_any_depth_is_refused_and_nothing_overflows(innermost: Any) -> None:
    for levels in [*range(300, 1200, 7), *range(950, 1010), 100_000]:
        with pytest.raises(PayloadRefused, match="nested"):
            stored(nested(levels, innermost=innermost))


@pytest.mark.parametrize("innermost", [0, None, "\x00", math.nan], ids=["plain", "null", "nul", "nan"])
def test_a_result_of_any_depth_is_refused_and_nothing_overflows(innermost: Any) -> None:
    for levels in [*range(300, 1200, 7), *range(950, 1010), 100_000]:
        with pytest.raises(PayloadRefused, match="nested"):
            result_text(nested(levels, innermost=innermost))


def test_a_payload_that_contains_itself_is_refused() -> None:
    payload: dict[str, Any] = {}
    payload["again"] = payload
    with pytest.raises(PayloadRefused, match="nested"):
        stored(payload)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("a\x00b", "a\ufffdb"),
        ("\ud83d", "\ufffd"),
        (math.nan, None),
        (-math.inf, None),
        ({"a": [math.inf, "\x00", 1]}, {"a": [None, "\ufffd", 1]}),
        ({"k\x00": {"\udfff": 1}}, {"k\ufffd": {"\ufffd": 1}}),
        (r"\u0000", r"\u0000"),
        (("x", "\x00"), ["x", "\ufffd"]),
        (frozenset(["\x00"]), ["\ufffd"]),
    ],
)
def test_a_result_is_sanitised(value: Any, expected: Any) -> None:
    assert json.loads(result_text(value)) == expected


@pytest.mark.parametrize(
    "value",
    [Point("a\x00b"), Colour("\x00"), Odd.NUL, [Point("\ud800")], {"a": Colour("\udfff")}],
    ids=["dataclass", "struct", "enum", "dataclass-surrogate", "struct-surrogate"],
)
def test_a_result_that_encodes_itself_is_sanitised_too(value: Any) -> None:
    text = result_text(value)
    assert NUL_ESCAPE not in text
    assert "\ufffd" in text


@pytest.mark.parametrize("value", [object(), {"a": 1j}, {(1, 2): 3}])
def test_a_result_that_is_no_json_is_refused(value: Any) -> None:
    with pytest.raises(PayloadRefused, match="result is not JSON"):
        result_text(value)


def test_a_result_over_the_limit_is_refused_with_its_size() -> None:
    with pytest.raises(PayloadRefused, match=r"result is 102 bytes, over the limit of 101"):
        result_text("x" * 100, limit=101)


TEXT = st.lists(
    st.characters(codec=None) | st.sampled_from(["\x00", "\ud800", "\udfff", "\\", "u0000"]), max_size=8
).map("".join)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=20
)


def storable(text: str) -> bool:
    """Whether jsonb takes every character of this JSON text: no NUL, no lone surrogate, no NaN."""

    def no_constant(name: str) -> Any:
        raise AssertionError(name)

    def clean(value: Any) -> bool:
        if isinstance(value, str):
            return "\x00" not in value and not any("\ud800" <= char <= "\udfff" for char in value)
        if isinstance(value, dict):
            return all(clean(key) and clean(item) for key, item in value.items())
        return not isinstance(value, list) or all(clean(item) for item in value)

    return clean(json.loads(text, parse_constant=no_constant))


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(VALUES)
def test_the_text_of_any_result_can_be_loaded_and_stored(value: Any) -> None:
    text = result_text(value, limit=10**7)
    text.encode()
    assert storable(text)


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_a_payload_is_stored_exactly_or_refused(payload: dict[str, Any]) -> None:
    try:
        text = stored(payload, limit=10**7)
    except PayloadRefused:
        assert codec.sanitised(payload) != payload
    else:
        assert storable(text)
        assert json.loads(text) == payload


@settings(deadline=None, max_examples=200)
@given(TEXT, TEXT)
def test_any_error_can_be_described_and_stored(message: str, note: str) -> None:
    error = RuntimeError(message)
    error.add_note(note)
    text = codec.describe_error(error)
    assert storable(text)
    assert json.loads(text)["reason"] == "raised"


def test_an_error_tells_its_type_message_and_where_it_was_raised() -> None:
    def broken() -> None:
        raise LookupError("no such\x00 thing \ud800")

    with pytest.raises(LookupError) as raised:
        broken()
    body = json.loads(codec.describe_error(raised.value))
    assert (body["reason"], body["type"], body["message"]) == ("raised", "LookupError", "no such\ufffd thing \ufffd")
    assert "in broken" in body["traceback"]


def test_an_error_of_any_length_is_bounded() -> None:
    body = json.loads(codec.describe_error(ValueError("ö" * 10**6), reason="timeout"))
    assert body["reason"] == "timeout"
    assert len(body["message"]) == len(body["traceback"]) == codec.MAX_ERROR_TEXT


def test_an_error_from_deep_recursion_is_bounded() -> None:
    def down() -> None:
        down()

    with pytest.raises(RecursionError) as raised:
        down()
    assert len(codec.describe_error(raised.value)) < 4 * codec.MAX_ERROR_TEXT


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class Wordless(Exception):
    pass


@pytest.mark.parametrize("kind", [Unspeakable, Wordless])
def test_an_error_without_words_is_called_by_its_type(kind: type[Exception]) -> None:
    body = json.loads(codec.describe_error(kind()))
    assert (body["message"], body["type"]) == (kind.__name__, kind.__name__)


# Reading what is stored, whoever stored it


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_what_can_be_read_is_read_as_it_is(value: Any) -> None:
    assert codec.read(json.dumps(value)) == (value, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1, "n": 1e5000}', {"a": 1, "n": None}),
        ('{"a": "[{", "n": ' + "9" * 5_000 + "}", {"a": "[{", "n": None}),
        ('["\\\\", ' + "[" * 3_000 + "]" * 3_000 + ', "after \\"]"]', None),
        ("no JSON", None),
    ],
    ids=["number", "digits", "deep", "no JSON"],
)
def test_of_what_cannot_be_read_the_rest_is(text: str, value: Any) -> None:
    read, flaw = codec.read(text)
    assert flaw
    if value is None and text.startswith("["):
        assert (read[0], read[2]) == ("\\", 'after "]')
        depth = 1
        level = read[1]
        while level:
            (level,), depth = level, depth + 1
        assert depth == codec.MAX_DEPTH
    else:
        assert read == value


@pytest.mark.parametrize("text", ["5", "[]", "null", None, "1e5000"])
def test_what_is_no_object_is_an_empty_one_with_a_flaw(text: str | None) -> None:
    read, flaw = codec.read_object(text)
    assert read == {}
    assert flaw


@pytest.mark.parametrize(
    "raw", [b"1e5000", b"1" * 5_000, b"[" * 201 + b"]" * 201, b'"\xff"', b'"\\ud800"', b'"\\u0000"', b"{"]
)
@pytest.mark.parametrize(
    "wrap", [lambda raw: {"n": raw}, lambda raw: {"deep": [{"n": raw, "x": None}]}], ids=["flat", "deep"]
)
def test_raw_json_that_could_not_be_read_back_is_refused(raw: bytes, wrap: Any) -> None:
    with pytest.raises(PayloadRefused):
        stored(wrap(msgspec.Raw(raw)))
    # Of a result, what can be replaced is.
    if raw != b'"\\u0000"':
        with pytest.raises(PayloadRefused):
            result_text(wrap(msgspec.Raw(raw)))
    else:
        assert codec.REPLACEMENT in json.dumps(json.loads(result_text(wrap(msgspec.Raw(raw)))), ensure_ascii=False)


@pytest.mark.parametrize("raw", [b"1e300", b"[1, 2]", b'"\\u00e9"', b"null"])
def test_raw_json_that_can_be_read_back_is_stored(raw: bytes) -> None:
    assert json.loads(stored({"n": msgspec.Raw(raw)})) == {"n": json.loads(raw)}
