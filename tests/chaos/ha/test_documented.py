"""What docs/ha.md says to set is what the suite sets, and measures."""

from __future__ import annotations

import re
from pathlib import Path

from tests.chaos.ha.cluster import Cluster
from tests.chaos.ha.network import Network
from tests.chaos.ha.poolers import write_pooler
from tests.chaos.ha.routes import HAPROXY_SETTINGS

PAGE = (Path(__file__).parents[3] / "docs" / "ha.md").read_text()


def block(kind: str) -> list[str]:
    """The lines of the one block of this kind, without their remarks."""
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [line for each in found.splitlines() if (line := each.partition("#")[0].strip())]


def test_patroni(tmp_path: Path) -> None:
    settings = Cluster(tmp_path, Network(1, has_cables=False)).dynamic_settings()
    postgresql = settings.pop("postgresql")
    flat = {**settings, **{name: value for name, value in postgresql.items() if name != "parameters"}}
    flat |= postgresql["parameters"]
    said = dict(line.split(": ") for line in block("yaml") if not line.endswith(":"))
    assert said == {name: str(flat[name]).lower() if isinstance(flat[name], bool) else str(flat[name]) for name in said}
    assert flat.keys() - said.keys() == {"max_connections", "shared_buffers", "wal_keep_size"}


def test_haproxy() -> None:
    assert set(block("text")) <= {line.strip() for line in HAPROXY_SETTINGS.splitlines()}


def test_pgbouncer(tmp_path: Path) -> None:
    write_pooler(tmp_path, listens=("127.0.0.1", 1), server=("127.0.0.1", 2))
    assert set(block("ini")) <= set((tmp_path / "pgbouncer.ini").read_text().splitlines())
