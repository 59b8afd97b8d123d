"""What a migration does to those who are at work. One that expands only adds, and code from before it goes on. One that
contracts takes away what code from before it uses: that code has to be gone first, and here is found who still has it.

Each migration says in its docstring which of the two it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from queue_service.db.migration import NotFree
from queue_service.db.revision import FIRST_TO_SAY, LAST_SILENT
from queue_service.errors import ConfigError
from queue_service.printable import printable

if TYPE_CHECKING:
    import sqlalchemy
    from alembic.script import ScriptDirectory

# So many are named in a sentence.
NAMED = 10

_PHASE = re.compile(r"^Phase: (expand|contract)\b", re.MULTILINE)

# Whoever was not seen for a day comes back no more. The column is there since FIRST_TO_SAY.
_WORKERS = """
select 'worker ' || name || ' (version ' || version || ', ', pg_catalog.to_jsonb(w) ->> 'revision'::text,
       seen_at > clock_timestamp() - %(lease)s::interval
  from queue_service.workers as w
 where seen_at > clock_timestamp() - greatest(interval '1 d', %(lease)s::interval)
 order by id
"""
_GATEWAYS = """
select 'gateway ' || id || ' (', pg_catalog.to_jsonb(g) ->> 'revision'::text, expires_at > clock_timestamp()
  from queue_service.gateways as g
 where expires_at > clock_timestamp() - interval '1 d'
 order by id
"""
_TABLES = "select to_regclass('queue_service.workers') is not null, to_regclass('queue_service.gateways') is not null"
# Of programs that are in no list, as far as they connect by themselves.
_SESSIONS = """
select count(*) from pg_stat_activity
 where datname = current_database() and pid <> pg_backend_pid() and starts_with(application_name, 'queue_service')
   and application_name <> 'queue_service migrate'
"""


class Step(NamedTuple):
    revision: str
    is_contract: bool


class Entered(NamedTuple):
    """A worker or gateway that has not left, the revision that its code was built for, at the latest, and whether it was
    seen of late."""

    name: str
    code: str
    was_seen: bool


@dataclass(frozen=True, slots=True)
class Caution:
    """Whose work a migration may end. Those that are not seen for `lease` are gone. With `force` nobody stands against
    it; with `only_expand` nothing is taken away, whoever lives."""

    lease: timedelta = timedelta(seconds=30)
    force: bool = False
    only_expand: bool = False


class Look(NamedTuple):
    """Who looks, and for how many seconds the database has been watched."""

    connection: sqlalchemy.Connection
    caution: Caution
    watched: float


class Plan(NamedTuple):
    """The revision to migrate to (None: to none), and why not further."""

    to: str | None
    held: str | None = None


def steps(scripts: ScriptDirectory) -> list[Step]:
    """Of all migrations, the first one first."""
    found = [Step(script.revision, is_contract(script.revision, script.longdoc)) for script in scripts.walk_revisions()]
    return found[::-1]


def is_contract(revision: str, docstring: str) -> bool:
    said = _PHASE.findall(docstring)
    if len(said) != 1:
        raise ValueError(f"The docstring of migration {revision} has to say once `Phase: expand` or `Phase: contract`.")
    return bool(said[0] == "contract")


def plan(look: Look, migrations: Sequence[Step], have: str | None, to: str | None) -> Plan:
    """How far a database at revision `have` may go: to `to`, or without it as far as nobody is in the way.

    Raises ConfigError where `to` is given and somebody is in the way, and NotFree where that has to be watched for longer.
    """
    ahead = [each for each in migrations if (have or "") < each.revision and (to is None or each.revision <= to)]
    at = have
    for step in ahead:
        # In a schema that is new nobody is at work.
        if have is not None and step.is_contract:
            expanded = at != have and to is None
            held = _held(look, step.revision, have, expanded=expanded)
            if held is not None and to is not None:
                raise ConfigError(f"{held} Nothing was changed.")
            if held is not None:
                return Plan(at, held)
        at = step.revision
    return Plan(at)


def _held(look: Look, contract: str, have: str, *, expanded: bool) -> str | None:
    """Why this migration is not for now; None: it is. Where the same call has `expanded`, it is left for another call if
    anybody is connected, since not every program is in a list."""
    what = f"Revision {contract} takes away what code from before it uses"
    if look.caution.only_expand:
        return f"{what}, and is left for `queue-service db migrate` without --only-expand."
    if look.caution.force:
        return None
    old = [each for each in _entered(look, have) if each.code < contract]
    if seen := [each for each in old if each.was_seen]:
        return (
            f"{what}, and these are at work: {_named(seen)}. Replace them by this version, or stop them, "
            "and migrate again; --force does it all the same. Programs that only enqueue, wait or read are in no list: "
            "replace them, too."
        )
    sessions = look.connection.exec_driver_sql(_SESSIONS).scalar_one() if expanded else 0
    if sessions:
        return (
            f"{what}, and is left for another call, since programs are connected (sessions: {sessions}). When those have "
            "been replaced by this version, migrate again."
        )
    # In an outage of the database nobody is seen, and all come back. A worker may have a longer lease than ours, too.
    if old and look.watched < look.caution.lease.total_seconds():
        raise NotFree(
            f"a sign of life of {_named(old)}, which may be cut off, and counts as gone in a moment", ends=False
        )
    return None


def _named(entered: Sequence[Entered]) -> str:
    more = [f"and {len(entered) - NAMED} more"] if len(entered) > NAMED else []
    return ", ".join([*(each.name for each in entered[:NAMED]), *more])


def _entered(look: Look, have: str) -> list[Entered]:
    connection = look.connection
    has_workers, has_gateways = connection.exec_driver_sql(_TABLES).one()
    rows: list[Any] = []
    if has_workers:
        rows += connection.exec_driver_sql(_WORKERS, {"lease": look.caution.lease}).all()
    if has_gateways:
        rows += connection.exec_driver_sql(_GATEWAYS, {}).all()
    # Code before FIRST_TO_SAY has begun at its own revision, and so at this one or an earlier one.
    silent = min(have, LAST_SILENT)
    return [
        Entered(
            printable(f"{name}built for revision {code or f'{silent} or an earlier one'})"), code or silent, was_seen
        )
        for name, code, was_seen in rows
    ]


def note_oldest_code(*, ctx: Any, step: Any, **_: object) -> None:
    """Called by alembic after each migration, in its transaction: have the database say which code it works with now."""
    below = max(step.down_revision_ids, default="")
    if below < FIRST_TO_SAY or not is_contract(step.up_revision.revision, step.up_revision.longdoc):
        return
    stays = [step.up_revision] if step.is_upgrade else step.revision_map.iterate_revisions(below, "base")
    oldest = next(each.revision for each in stays if is_contract(each.revision, each.longdoc))
    ctx.execute(f"update queue_service.alembic_version set oldest_code = '{oldest}'")  # noqa: S608 - ours
