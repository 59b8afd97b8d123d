"""Reads a `.sql` file into named statements.

`-- name: verb` starts a statement; the comment lines after it are its contract. `-- define: name` starts a fragment, which
ends at the next blank line; its comment lines say what it is. `{name}` anywhere later stands for it. Nothing else is ever
substituted, and comments are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from typing import Any, TypeVar

from queue_service.db.query import Query, Rows

T = TypeVar("T")

_DEFINE = re.compile(r"^-- define: (\w+)\n(.*?)(?:\n\n|\Z)", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


class Statements:
    def __init__(self, package: str, filename: str = "statements.sql") -> None:
        self.texts = parse(resources.files(package).joinpath(filename).read_text(encoding="utf-8"))

    def query(self, name: str, decode: Callable[[Rows], T], /, **params: Any) -> Query[T]:
        return Query(self.texts[name], decode, params)


def parse(source: str) -> dict[str, str]:
    fragments = {match[1]: _code(match[2]) for match in _DEFINE.finditer(source)}
    parts = _NAME.split(_DEFINE.sub("", source))
    texts: dict[str, str] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        if name in texts:
            raise ValueError(f"statement {name!r} is defined twice")
        code = _code(body)
        for key, value in fragments.items():
            code = code.replace("{" + key + "}", value)
        texts[name] = code.rstrip(";")
    return texts


def _code(body: str) -> str:
    return "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("--")).strip()
