"""The page about the protocol and the code say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from queue_service.supervisor import protocol

PAGE = (Path(__file__).parents[2] / "docs" / "agents-protocol.md").read_text()


def documented(heading: str) -> dict[str, list[str]]:
    """The fields of each line in the table under this heading."""
    part = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \|([^|]*)\|", part, re.MULTILINE)
    return {name: re.findall(r"`(\w+)`", fields) for name, fields in found}


def declared(lines: Any) -> dict[str, list[str]]:
    return {kind.__struct_config__.tag: sorted(kind.__struct_fields__) for kind in get_args(lines)}


@pytest.mark.parametrize(
    ("heading", "lines"), [("To the agent", protocol.AnySupervisorLine), ("From the agent", protocol.AnyLine)]
)
def test_every_line_is_documented_with_its_fields(heading: str, lines: Any) -> None:
    assert {name: sorted(fields) for name, fields in documented(heading).items()} == declared(lines)


def test_the_version_is_documented() -> None:
    assert f"The protocol is version {protocol.PROTOCOL}." in PAGE


def test_a_child_passes_over_a_line_that_it_does_not_know_and_refuses_half_of_one_that_it_does() -> None:
    assert protocol.decoded_by_child(b'{"type":"news","of":"tomorrow"}') is None
    assert protocol.decoded_by_child(b'{"type":"drain","until":"tomorrow"}') == protocol.DrainLine()
    with pytest.raises(ValueError, match="message_id"):
        protocol.decoded_by_child(b'{"type":"cancelled"}')


def test_a_child_that_says_no_version_speaks_the_first() -> None:
    assert protocol.decoded(b'{"type":"ready"}') == protocol.ReadyLine(1)
