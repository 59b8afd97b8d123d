"""What of a server's settings breaks a promise of ours, or may: a sentence each, with what to do.

What breaks one is a failure, unless somebody says that they know. What the role may not see is a failure, too: to say
nothing of it would look as if all were well.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator
from enum import StrEnum
from typing import NamedTuple

from queue_service.db import revision
from queue_service.db.server_facts import OF_PATRONI, Facts

# What a process holds: at rest, and at work besides the App's pool.
IDLE_WORKER, IDLE_GATEWAY = 3, 2
WORKER_BESIDES_POOL, GATEWAY_BESIDES_POOL = 4, 1
_NUMBER = re.compile(r"\s*(?:(first|any)\s+)?(\d+)\s*\(", re.IGNORECASE)


class Level(StrEnum):
    FAILURE = "failure"
    NOTE = "note"


class Finding(NamedTuple):
    """The name is what it is accepted by, and never changes."""

    name: str
    level: Level
    sentence: str


def findings(facts: Facts, accepted: Collection[str] = ()) -> list[Finding]:
    """Of each that is accepted only a note is left."""
    return [
        finding._replace(level=Level.NOTE) if finding.name in accepted else finding
        for look in _LOOKS
        for finding in look(facts)
    ]


def _failure(name: str, sentence: str) -> Finding:
    return Finding(name, Level.FAILURE, sentence)


def _note(name: str, sentence: str) -> Finding:
    return Finding(name, Level.NOTE, sentence)


def _writing(facts: Facts) -> Iterator[Finding]:
    if facts.place.is_standby:
        yield _failure(
            "standby",
            "This server is a standby: it takes no writes, and its tables were not compared. Ask the primary; name all "
            "servers in the address, and the one that takes writes is found.",
        )
    elif facts.value("default_transaction_read_only") == "on":
        yield _failure(
            "read-only",
            f"Sessions of the role {facts.place.role} begin with default_transaction_read_only = on: nothing is enqueued, "
            "claimed or ended until that is taken back, on the server, the database or the role.",
        )


def _schema(facts: Facts) -> Iterator[Finding]:
    have, head = facts.schema.revision, revision.HEAD
    if have is not None and have != head:
        rest = (
            "When older code is gone, `queue-service db migrate` does the rest."
            if have < head
            else "The version that was built for it compares them."
        )
        yield _note(
            "revision",
            f"The schema is at revision {have}. This version works on it, but was built for {head}: the tables were not "
            f"compared. {rest}",
        )


def _disk(facts: Facts) -> Iterator[Finding]:
    if facts.value("fsync") != "on":
        yield _failure(
            "fsync",
            "fsync is off: a crash of the machine loses what was acknowledged, and may leave a database that cannot be "
            "read. Set it to on.",
        )
    if facts.value("full_page_writes") != "on":
        yield _failure(
            "full-page-writes",
            "full_page_writes is off: a crash in the middle of a write may leave half a page, and runs in it are lost. Set "
            "it to on, or accept this where the file system never writes half a page (ZFS).",
        )
    if facts.value("data_checksums") == "off":
        yield _note(
            "data-checksums",
            "data_checksums is off: what a disk damages is given out as if it were right. `pg_checksums --enable` turns "
            "it on while the server is stopped.",
        )


def _commits(facts: Facts) -> Iterator[Finding]:
    value, user = facts.value("synchronous_commit"), facts.place.role
    if value == "off" and facts.is_pooled:
        yield _failure(
            "synchronous-commit",
            f"Behind a pooler of transactions, sessions of the role {user} begin with synchronous_commit = 'off', and not "
            f"with 'on': a crash loses what was acknowledged. {_how_to_set(facts)}",
        )
    elif value == "off":
        yield _note(
            "synchronous-commit",
            f"synchronous_commit is off for the role {user}. Our own sessions set it to on; a connection that you lend "
            "(conn=) does not, and a crash loses what it was told is stored.",
        )
    elif facts.value("synchronous_standby_names") and value == "local":
        yield _failure(
            "synchronous-commit",
            f"Sessions of the role {user} begin with synchronous_commit = local: their commits do not wait for the "
            "synchronous standby, and a failover loses what was acknowledged. Set it to on.",
        )
    elif facts.value("synchronous_standby_names") and value == "remote_write":
        yield _note(
            "synchronous-commit",
            f"Sessions of the role {user} begin with synchronous_commit = remote_write: where the machine of the standby "
            "crashes at the moment of a failover, what was acknowledged last is lost. `on` waits for its disk.",
        )


def _standbys(facts: Facts) -> Iterator[Finding]:
    if facts.place.is_standby:
        return
    names = facts.value("synchronous_standby_names").strip()
    hidden = sum(each.state is None for each in facts.standbys)
    if names and hidden:
        yield _failure(
            "synchronous-standbys",
            f"Whether commits wait for a standby cannot be seen by the role {facts.place.role}. Grant it pg_monitor, or "
            "check as a role that has it.",
        )
    elif names:
        yield from _named(facts, names)
    elif attached := _attached(facts):
        yield _failure(
            "synchronous-standbys",
            f"synchronous_standby_names is empty, and {attached}: commits are acknowledged before anybody else has them, "
            "and a failover loses what was acknowledged last. Name the standbys (Patroni: synchronous_mode and "
            "synchronous_mode_strict), or accept this where nothing fails over to them.",
        )


def _attached(facts: Facts) -> str:
    """Why we think that there are standbys, or will be."""
    if facts.standbys:
        return f"this server has standbys ({', '.join(sorted({each.name for each in facts.standbys}))})"
    if facts.empty_slots:
        slots = ", ".join(facts.empty_slots)
        return f"a place is kept for a standby that is away (slot {slots})"
    return "Patroni runs this server" if _is_of_patroni(facts) else ""


def _named(facts: Facts, names: str) -> Iterator[Finding]:
    found = _NUMBER.match(names)
    wanted = int(found[2]) if found else 1
    waited_for = sum(each.sync_state in ("sync", "quorum") for each in facts.standbys)
    if waited_for < wanted:
        yield _failure(
            "synchronous-standbys",
            f"synchronous_standby_names is {names!r}, and of {_counted(wanted, 'standby')} that commits wait for, "
            f"{waited_for} is there: no commit is acknowledged until that has changed. Start the standby.",
        )
    if found and (found[1] or "").lower() == "any":
        yield _note(
            "synchronous-quorum",
            f"synchronous_standby_names is {names!r}: what was acknowledged is on some of these, not on each. Nothing is "
            "lost only if a failover looks for one that has it, as Patroni does with synchronous_mode: quorum.",
        )
    if _is_of_patroni(facts) and names != "*":
        yield _note(
            "synchronous-mode-strict",
            "Patroni runs this server, and from here it does not show whether synchronous_mode_strict is set: without it, "
            "a primary that is alone acknowledges alone. `patronictl show-config` says.",
        )


def _is_of_patroni(facts: Facts) -> bool:
    given = [facts.settings[name].is_of_the_command_line for name in OF_PATRONI if name in facts.settings]
    return len(given) == len(OF_PATRONI) and all(given)


def _vacuum(facts: Facts) -> Iterator[Finding]:
    if facts.value("autovacuum") != "on":
        yield _failure(
            "autovacuum",
            "autovacuum is off: what runs leave behind is never cleaned up, claims slow down from hour to hour, and in the "
            "end the server takes no writes. Set it to on.",
        )
    if facts.value("track_counts") != "on":
        yield _failure(
            "track-counts", "track_counts is off: autovacuum does not see what there is to clean up. Set it to on."
        )
    if facts.unvacuumed:
        tables = ", ".join(facts.unvacuumed)
        yield _failure(
            "autovacuum-tables",
            f"autovacuum keeps away from {tables}: what runs leave behind there is never cleaned up, and claims slow down "
            "from hour to hour. Take it back: alter table queue_service.… reset (autovacuum_enabled, "
            "toast.autovacuum_enabled).",
        )


def _connections(facts: Facts) -> Iterator[Finding]:
    if facts.place.is_standby or facts.is_pooled:
        # How many there are to the server is up to the pooler.
        return
    if facts.processes is None:
        yield _failure(
            "max-connections",
            f"Whether the server has connections enough cannot be seen by the role {facts.place.role}: it may not read who "
            "is at work. Check as a role that works or observes.",
        )
        return
    workers, gateways = facts.processes
    limit, what = min(_limits(facts))
    idle = workers * IDLE_WORKER + gateways * IDLE_GATEWAY
    busy = workers * (facts.pool_size + WORKER_BESIDES_POOL) + gateways * (facts.pool_size + GATEWAY_BESIDES_POOL)
    who = f"{_counted(workers, 'worker')} and {_counted(gateways, 'gateway')}"
    if idle > limit:
        yield _failure(
            "max-connections",
            f"{who} hold {idle} connections at rest, and {what} leaves {limit}: some of them wait for one, and do nothing "
            "meanwhile. Raise it, or put a pooler in between.",
        )
    elif busy > limit:
        yield _note(
            "max-connections",
            f"{who} hold {idle} connections at rest and up to {busy} when all are busy at once, without those that "
            f"handlers borrow, and {what} leaves {limit}: calls may then wait for one. Raise it, lower "
            "QUEUE_SERVICE_POOL_SIZE, or put a pooler in between.",
        )


def _limits(facts: Facts) -> Iterator[tuple[int, str]]:
    """How many connections we may have, and what says so."""
    reserved = facts.number("superuser_reserved_connections") + facts.number("reserved_connections")
    most = facts.number("max_connections")
    yield most - (0 if facts.place.is_superuser else reserved), f"max_connections = {most}"
    if facts.place.limit_of_role is not None:
        yield facts.place.limit_of_role, f"the connection limit of the role {facts.place.login}"
    if facts.place.limit_of_database is not None:
        yield facts.place.limit_of_database, f"the connection limit of the database {facts.place.database}"


def _role(facts: Facts) -> Iterator[Finding]:
    lacking = [each for each in facts.lacking if each.name != "synchronous_commit"]
    if lacking:
        differences = "; with ".join(f"{each.name} = {each.have!r}, and not with {each.want!r}" for each in lacking)
        yield _failure(
            "role-settings",
            f"Behind a pooler of transactions, sessions of the role {facts.place.role} begin with {differences}: a large "
            f"queue may be read as a whole. {_how_to_set(facts)}",
        )


def _how_to_set(facts: Facts) -> str:
    return f"`queue-service db grants {shlex.quote(facts.place.role)}` prints how to set it on the role."


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


_LOOKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _writing, _schema, _disk, _commits, _standbys, _role, _vacuum, _connections,
)  # fmt: skip
# Whatever may be found, by name.
NAMES = (
    "autovacuum", "autovacuum-tables", "data-checksums", "fsync", "full-page-writes", "max-connections", "read-only",
    "revision", "role-settings", "standby", "synchronous-commit", "synchronous-mode-strict", "synchronous-quorum",
    "synchronous-standbys", "track-counts",
)  # fmt: skip
