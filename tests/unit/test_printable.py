"""No character of somebody's data moves a cursor, and nothing that can be seen is changed."""

from __future__ import annotations

import json
import logging
import unicodedata

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from queue_service import logs
from queue_service.printable import printable, printable_json

HOSTILE = st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Lu", "Zs", "So"]))


def obeyed(text: str) -> set[str]:
    """The characters in it that a terminal or a reader's eye would take for more than a sign."""
    return {char for char in text if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}


@given(HOSTILE)
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    assert obeyed(printable(text)) == set()
    assert obeyed(printable(text, keep="\n\t")) <= {"\n", "\t"}


@given(st.text())
def test_what_can_be_seen_stays_as_it_is(text: str) -> None:
    seen = "".join(char for char in text if char.isprintable() and char != "\\")
    assert printable(seen) == seen


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"), ("\x1b]0;title\x07", r"\x1b]0;title\x07"), ("a\u202eb", r"a\u202eb"), ("\x7f", r"\x7f"),
        ("\x9b31m", r"\x9b31m"), ("\u200b", r"\u200b"), ("\u2028", r"\u2028"), ("\U000e0041", r"\U000e0041"),
        ("\ud800", r"\ud800"), ("\r", r"\r"), ("Grüße, 世界 👍", "Grüße, 世界 👍"), ("a\u00a0b\u3000c", "a\u00a0b\u3000c"),
    ],
    ids=ascii,
)  # fmt: skip
def test_each_kind_is_shown_as_what_it_is(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_with_escapes_says_the_same(text: str) -> None:
    written = printable_json(json.dumps({"value": text}, ensure_ascii=False, indent=2))
    assert json.loads(written) == {"value": text}
    assert obeyed(written) <= {"\n"}


class Loud:
    def __repr__(self) -> str:
        return "\x1b[5mloud"


def test_log_lines_on_a_console_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.configure(level="info", fmt="console")
        error = ValueError("\x1b]0;title\x07")
        log = logs.get_logger("queue_service.test")
        log.error("it said \x1b[2J\nforged", task="\u202etask", more=Loud(), exc_info=error)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    said = capsys.readouterr().err
    assert r"\x1b[2J" in said
    assert r"\u202etask" in said
    assert r"\x1b]0;title\x07" in said
    assert "\nforged" not in said
    assert not any(part in said for part in ("\x1b[2J", "\u202e", "\x1b]", "\x07", "\x1b[5m"))
