"""Where the programs of the servers under test are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from queue_service.db import embedded

# Those we say that we work with.
MAJORS = ("15", "16", "17", "18")
_DEBIAN = Path("/usr/lib/postgresql")


def of_version(major: str) -> Path:
    """Those of this version: bundled, a package of this machine, or fetched by `scripts/servers`."""
    if major == "18":
        return embedded.programs()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for directory in (_DEBIAN / major / "bin", cache / "queue_service" / "servers" / major / "bin"):
        if (directory / "initdb").is_file():
            return directory
    pytest.exit(f"There are no programs of Postgres {major} here. `scripts/servers {major}` fetches 16 and 17.", 4)


def of_this_machine() -> Path:
    """Those on PATH, or else the newest of this machine's packages."""
    found = shutil.which("initdb")
    if found and os.path.realpath(found).endswith("/initdb"):
        return Path(os.path.realpath(found)).parent
    versions = sorted(_DEBIAN.glob("*/bin"), key=lambda path: int(path.parent.name))
    assert versions, "--pg=local found no server programs on PATH or in /usr/lib/postgresql"
    return versions[-1]
