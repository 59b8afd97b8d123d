"""What pgbench makes of a statement of ours: a floor with no client to speak of."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence

from queue_service.db import embedded


def rate(conninfo: str, script: Sequence[str], *, clients: int, seconds: int) -> float:
    """How often a second so many connections run the script, prepared, with nothing to pause for."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write("\n".join(script))
        file.flush()
        options = ["-n", "-M", "prepared", "-c", str(clients), "-j", str(min(clients, 2)), "-T", str(seconds)]
        out = subprocess.run(
            [str(embedded.programs() / "pgbench"), *options, "-f", file.name, conninfo],
            stdout=subprocess.PIPE, text=True, check=True,
        ).stdout  # fmt: skip
    return float(next(line for line in out.splitlines() if line.startswith("tps =")).split()[2])


def one_line(text: str, **values: str) -> str:
    """A statement as pgbench takes it: its parameters filled in, ended by a semicolon, with no comments within.

    A parameter without a value raises KeyError.
    """
    lines = (line.split(" -- ")[0] for line in text.splitlines() if not line.lstrip().startswith("--"))
    return " ".join(line.strip() for line in lines) % values + ";"
