"""What a client was told, in a file, before it does anything else. It is what the checker believes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Ledger:
    """One file of one process."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, kind: str, **what: Any) -> None:
        """On the disk when this returns."""
        self._file.write(json.dumps({"at": time.time(), "kind": kind, **what}).encode() + b"\n")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Reader:
    """Of a ledger that is still written: `acknowledged` is when something was, so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._times: list[float] = []

    @property
    def acknowledged(self) -> list[float]:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole, _, _ = file.read().rpartition(b"\n")
            if whole:
                self._offset += len(whole) + 1
                told = map(json.loads, whole.split(b"\n"))
                self._times += [entry["at"] for entry in told if entry["kind"] in {"run", "turn"}]
        return self._times


def entries(directory: Path) -> Iterator[dict[str, Any]]:
    """Of all clients. A line that was cut off, by a kill, was never written."""
    for path in sorted(directory.glob("*.ledger")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            yield json.loads(line)
