"""How the commands reach the database."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from queue_service import settings as settings_module
from queue_service.cli import render
from queue_service.cli.options import run
from queue_service.db import embedded, revision, url
from queue_service.db.cluster import Cluster
from queue_service.db.session import Address, Session, connect
from queue_service.errors import ConfigError, DatabaseUnavailable

T = TypeVar("T")


class Reached:
    """The connection string, with an embedded server running for as long as it is needed."""

    def __init__(self, database_url: str | None) -> None:
        self._target = target_of(database_url)
        self._cluster: Cluster | None = None

    def __enter__(self) -> str:
        render.echo(f"database: {self._target}", err=True)
        conninfo, self._cluster = embedded.reach(self._target)
        return conninfo

    def __exit__(self, *_: object) -> None:
        if self._cluster is not None:
            self._cluster.leave()


def target_of(database_url: str | None) -> url.Server | url.EmbeddedCluster:
    return url.choose(database_url, os.environ, settings_module.load(os.environ).data_dir)


def cluster_of(database_url: str | None) -> Cluster:
    target = target_of(database_url)
    if isinstance(target, url.Server):
        raise ConfigError(f"{target} is not ours to start or stop. Name an embedded cluster with file:PATH.")
    return embedded.cluster(target.path)


def current_revision(conninfo: str) -> str | None:
    return look(conninfo, revision.current)


def look(conninfo: str, looking: Callable[[Session], Coroutine[Any, Any, T]], *, prefers_writable: bool = False) -> T:
    """Of several hosts, the first; or, if that is preferred, one that takes writes, where there is one."""

    async def body() -> T:
        where = Address(conninfo, pooler=settings_module.load(os.environ).pooler)
        conn = await _connected(where, prefers_writable=prefers_writable)
        try:
            return await looking(conn)
        finally:
            await conn.close()

    return run(body())


async def _connected(where: Address, *, prefers_writable: bool) -> Session:
    if prefers_writable:
        with contextlib.suppress(DatabaseUnavailable):
            return await connect(where)
    return await connect(where, writable=False)
