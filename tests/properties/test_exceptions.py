"""Describing an exception is total: whatever it does when it is asked, there is a description, and it can be stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_service import codec, exceptions
from queue_service.tasks import Retry
from tests.hostile import METHODS, MISDEEDS, PROPERTIES, hostile

misdeeds = st.dictionaries(st.sampled_from((*METHODS, *PROPERTIES)), st.sampled_from(sorted(MISDEEDS)), max_size=4)
bases = st.sampled_from((Exception, BaseException, KeyError, OSError, UnicodeError, SystemExit))
places = st.sampled_from(("alone", "cause", "context", "note", "group", "deep"))


def raised(error: BaseException) -> BaseException:
    try:
        raise error  # noqa: TRY301 - a raise is what gives it a traceback
    except BaseException as caught:  # noqa: BLE001 - it comes back with its traceback
        return caught


def placed(error: BaseException, place: str) -> BaseException:
    """An exception that has this one in it."""
    match place:
        case "cause":
            outer = ValueError("outer")
            outer.__cause__ = error
        case "context":
            outer = ValueError("outer")
            outer.__context__ = error
        case "note":
            outer = ValueError("outer")
            outer.__notes__ = [error]  # type: ignore[list-item]
        case "group":
            try:
                outer = BaseExceptionGroup("outer", [error, ValueError("other")])  # type: ignore[assignment]
            except BaseException:  # noqa: BLE001 - it asks its members what they are, so this one can be in none
                return raised(error)
        case "deep":
            outer = error  # type: ignore[assignment]
            for _ in range(3_000):
                above = ValueError("outer")
                above.__context__ = outer
                outer = above
        case _:
            return raised(error)
    return raised(outer)


@given(misdeeds, bases, places)
def test_every_exception_is_described(acts: Mapping[str, str], base: type[BaseException], place: str) -> None:
    error = placed(hostile(acts, base), place)
    described: dict[str, Any] = json.loads(codec.describe_error(error))
    assert described.keys() == {"reason", "message", "type", "traceback"}
    assert all(type(value) is str for value in described.values())
    assert codec.loads(codec.describe_error(error)) == described
    assert "\x00" not in json.dumps(described)
    assert max(map(len, described.values())) <= codec.MAX_ERROR_TEXT
    assert type(exceptions.message(error)) is str
    assert exceptions.is_a(error, LookupError) is issubclass(type(error), LookupError)


@given(misdeeds, bases)
def test_a_retry_policy_is_asked_by_type_alone(acts: Mapping[str, str], base: type[BaseException]) -> None:
    error = hostile(acts, base)
    assert Retry(on=base).covers(error)
    assert not Retry(never=base).covers(error)


def test_of_what_can_be_read_nothing_is_lost() -> None:
    """Without its notes, which cannot be read, an exception is shown with its traceback and what led to it."""
    first = raised(LookupError("the first"))
    second = hostile({"__notes__": "raises KeyError", "__str__": "raises SystemExit"})
    second.__cause__ = first
    described = json.loads(codec.describe_error(raised(second)))
    assert described["type"] == described["message"] == "Hostile"
    for text in ("LookupError: the first", "Hostile\n", "in raised"):
        assert text in described["traceback"]
    assert described["traceback"].index("LookupError") < described["traceback"].index("Hostile\n")


def test_text_with_methods_of_its_own_is_only_text() -> None:
    text = exceptions.message(hostile({"__str__": "returns odd text"}))
    assert (text, type(text)) == ("odd", str)


def test_a_class_that_raises_when_asked_for_its_name_is_named() -> None:
    class Shy(type):
        def __getattribute__(cls, name: str) -> Any:
            raise KeyError(name)

    class Error(Exception, metaclass=Shy):
        pass

    with pytest.raises(KeyError):
        _ = Error.__name__
    assert json.loads(codec.describe_error(Error("hidden")))["type"].endswith("Error")
