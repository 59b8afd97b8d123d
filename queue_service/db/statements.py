"""Reads the `.sql` files of a package into named statements.

`-- name: verb` starts a statement; the comment lines after it are its contract. Without a line `-- writes: tables` among
them it changes nothing, and may be cancelled. `-- define: name` starts a fragment, which ends at the next blank line; its
comment lines say what it is. `{name}` in any file of the package stands for it. A fragment may hold fragments, but these
hold none: to read a statement takes two looks at most. Nothing else is ever substituted, and comments are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from typing import Any, TypeVar

from queue_service.db.query import Query, Rows

T = TypeVar("T")

_DEFINE = re.compile(r"^-- define: (\w+)\n(.*?)(?:\n\n|\Z)", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_WRITES = re.compile(r"^-- writes: ", re.MULTILINE)
_STANDS_FOR = re.compile(r"\{(\w+)\}")


class Statements:
    def __init__(self, package: str) -> None:
        files = (file for file in resources.files(package).iterdir() if file.name.endswith(".sql"))
        sources = [file.read_text(encoding="utf-8") for file in files]
        self.texts = parse(*sources)
        self._writing = {name for name, body in _statements(sources) if _WRITES.search(body)}

    def query(self, name: str, decode: Callable[[Rows], T], /, **params: Any) -> Query[T]:
        return Query(self.texts[name], decode, params, name in self._writing)


def parse(*sources: str) -> dict[str, str]:
    """The statements of these files, by name. ValueError: a name stands for two, or fragments are three deep."""
    fragments = _unique(found.groups() for source in sources for found in _DEFINE.finditer(source))
    leaves = {name: code for name, code in fragments.items() if not _named(code, fragments)}
    stages = {name: _filled(code, leaves) for name, code in fragments.items()}
    for name, code in stages.items():
        if _named(code, fragments):
            raise ValueError(f"fragment {name!r} holds fragments that hold fragments")
    return {name: _filled(code, stages).rstrip(";") for name, code in _unique(_statements(sources)).items()}


def _statements(sources: Iterable[str]) -> Iterator[tuple[str, str]]:
    for source in sources:
        parts = _NAME.split(_DEFINE.sub("", source))
        yield from zip(parts[1::2], parts[2::2], strict=True)


def _unique(named: Iterable[tuple[str, ...]]) -> dict[str, str]:
    codes: dict[str, str] = {}
    for name, body in named:
        if name in codes:
            raise ValueError(f"{name!r} is defined twice")
        codes[name] = "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("--")).strip()
    return codes


def _named(code: str, fragments: dict[str, str]) -> bool:
    return any(name in fragments for name in _STANDS_FOR.findall(code))


def _filled(code: str, fragments: dict[str, str]) -> str:
    return _STANDS_FOR.sub(lambda found: fragments.get(found[1], found[0]), code)
