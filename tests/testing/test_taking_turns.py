"""A test that is to be alone is, and those that come later do not keep it waiting."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path

import pytest

from tests.support import eventually, taking_turns


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("door", "room"):
        (tmp_path / name).touch()
    return tmp_path / "door", tmp_path / "room"


class Visitor:
    """In the room, or on the way there, until it is sent out."""

    def __init__(self, places: tuple[Path, Path], *, alone: bool = False) -> None:
        self.is_inside = False
        self._out = threading.Event()
        self._places, self._alone = places, alone
        self._thread = threading.Thread(target=self._visit, daemon=True)
        self._thread.start()

    def _visit(self) -> None:
        with taking_turns(*self._places, alone=self._alone):
            self.is_inside = True
            self._out.wait()
        self.is_inside = False

    def leave(self) -> None:
        self._out.set()
        self._thread.join()


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


async def test_one_that_is_alone_waits_for_those_inside_and_keeps_the_others_out(places: tuple[Path, Path]) -> None:
    first, second = Visitor(places), Visitor(places)
    await eventually(lambda: first.is_inside and second.is_inside)
    alone = Visitor(places, alone=True)
    await eventually(lambda: is_locked(places[0]))
    later = [Visitor(places) for _ in range(3)]
    first.leave()
    assert not alone.is_inside
    second.leave()
    await eventually(lambda: alone.is_inside)
    assert not any(each.is_inside for each in later)
    alone.leave()
    await eventually(lambda: all(each.is_inside for each in later))
    for each in later:
        each.leave()
