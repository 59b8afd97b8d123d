"""Which database: argument > QUEUE_SERVICE_DATABASE_URL > DATABASE_URL > PG* > embedded. Nothing is ever probed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service.errors import ConfigError

# Those that say where the server is. PGPASSWORD or PGSSLMODE alone choose nothing.
PG_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE")

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+._-]*):")
# What libpq itself marks as not to be shown, and what it merely forgot to mark.
_SECRET = {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"} | {
    option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults() if option.dispchar == b"*"
}


@dataclass(frozen=True, slots=True)
class Server:
    """A Postgres somebody else runs."""

    conninfo: str
    source: str

    def __str__(self) -> str:
        return f"{masked(self.conninfo)} ({self.source})"

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class EmbeddedCluster:
    """A Postgres of our own, in this directory."""

    path: Path
    source: str

    def __str__(self) -> str:
        return f"embedded Postgres at {self.path} ({self.source})"


def choose(argument: str | None, environ: Mapping[str, str], data_dir: Path) -> Server | EmbeddedCluster:
    """Where to go, and who said so. Raises ConfigError for what is neither a Postgres URL nor a path."""
    if argument:
        return parse(argument, source="argument")
    for variable in ("QUEUE_SERVICE_DATABASE_URL", "DATABASE_URL"):
        if environ.get(variable):
            return parse(environ[variable], source=variable)
    named = [variable for variable in PG_VARIABLES if environ.get(variable)]
    if named:
        return Server("", source=", ".join(named))
    return EmbeddedCluster(data_dir / "postgres", source="default")


def parse(text: str, *, source: str) -> Server | EmbeddedCluster:
    text = text.strip()
    if text.startswith("file:"):
        return EmbeddedCluster(_path(re.sub(r"^file:(//(?=/))?", "", text)), source)
    scheme = _SCHEME.match(text)
    if scheme is None and "=" in text and "/" not in text.split("=", 1)[0]:
        return Server(_checked(text), source)
    if scheme is None:
        return EmbeddedCluster(_path(text), source)
    name = scheme[1].lower()
    if name in {"postgresql", "postgres", "postgresql+psycopg", "postgresql+psycopg_async"}:
        return Server(_checked("postgresql:" + text[scheme.end() :]), source)
    raise ConfigError(
        f"The database URL from {source} begins with {name}:, which is not Postgres. "
        "Use postgresql://user@host/name for a server, or file:PATH for an embedded cluster."
    )


def masked(conninfo: str) -> str:
    """The connection string for people: without its password, and without anything else that is secret."""
    parts = conninfo_to_dict(conninfo)
    shown = {key: ("***" if key in _SECRET else value) for key, value in parts.items()}
    return make_conninfo("", **shown) or "the server named by the PG* variables"


def _path(text: str) -> Path:
    if not text.strip("/"):
        raise ConfigError("file: needs a path after it, such as file:./postgres.")
    return Path(text).expanduser().absolute()


def _checked(conninfo: str) -> str:
    try:
        conninfo_to_dict(conninfo)
    except psycopg.ProgrammingError:
        # The driver's message quotes the string, and with it the password.
        raise ConfigError(
            "The database URL cannot be read. Write postgresql://user:password@host:port/name, "
            "with special characters percent-encoded."
        ) from None
    return conninfo
