"""Text of others on a terminal: what could move the cursor, change colours or titles, or turn the order of letters around
is shown as an escape sequence of Python's."""

from __future__ import annotations

import unicodedata


def printable(text: str, *, keep: str = "") -> str:
    """The text with every character escaped that is not visible by itself, but for spaces and those in `keep`: control
    characters, bidirectional and zero-width ones, line separators, surrogates, and what Unicode has not assigned."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep or _is_space(char) else _escaped(char) for char in text)


def printable_json(text: str) -> str:
    """JSON text with the same characters escaped as JSON does, so that it says the same."""
    if text.isprintable():
        return text
    # Line breaks in JSON text are layout: in a string they are escaped already.
    return "".join(
        char if char.isprintable() or char == "\n" or _is_space(char) else _escaped_in_json(char) for char in text
    )


def _is_space(char: str) -> bool:
    return unicodedata.category(char) == "Zs"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _escaped_in_json(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
