"""What the page about roles says is so."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service.db import grants, schema
from queue_service.testing import databases
from tests.contract.test_docs import ROOT
from tests.roles.conftest import Make, asked, call, execute, grant
from tests.roles.test_partitions import days, name

PAGE = (ROOT / "docs" / "roles.md").read_text()
# With a star, only for some columns.
ROW = re.compile(r"^\| `(\w+)` \|([rawd |*]*)\|$", re.MULTILINE)


def test_the_table_is_the_one_that_is_granted() -> None:
    said = {
        table: tuple("" if "*" in cell else cell.strip() for cell in cells.split("|"))
        for table, cells in ROW.findall(PAGE)
    }
    assert said == grants.TABLES


def test_every_kind_is_explained() -> None:
    assert re.findall(r"^\| `(\w+)` \| [^|]{5,} \| [^|]{5,} \|$", PAGE, re.MULTILINE) == [*grants.Kind, "owner"]


def work(conninfo: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: when a worker has ended, so does its process, whatever is left in it."""
    words = ["worker", "-a", "tests.roles.tasks_for_tests:app", *arguments, "--database-url", conninfo]
    return subprocess.run([sys.executable, "-m", "queue_service", *words], capture_output=True, text=True, check=False)


def blocks() -> list[str]:
    return re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)


def test_the_first_time_an_owner_that_is_no_superuser_makes_all_of_it(server: str, role: Make) -> None:
    (first,) = [block for block in blocks() if "create role" in block]
    with databases.made(server, "template0") as conninfo:
        owner, database = role("owner"), str(conninfo_to_dict(conninfo)["dbname"])
        created, granted = (part for part in first.strip().splitlines())
        assert created == "create role queue_owner login;"
        execute(conninfo, granted.replace("app", "{}").replace("queue_owner", "{}"), database, owner)
        schema.upgrade(make_conninfo(conninfo, user=owner))
        assert (
            call(
                make_conninfo(conninfo, user=owner), "db", "check", "--accept", "fsync", "--accept", "full-page-writes"
            ).exit_code
            == 0
        )


@pytest.mark.parametrize("membership", ["with inherit false, set true", "with inherit true, set false"])
def test_a_member_acts_as_the_owner_where_it_may_become_it(
    owned: str, server: str, owner_role: str, role: Make, membership: str
) -> None:
    if int(str(asked(server, "show server_version_num")[0][0])) < 160_000:
        pytest.skip("Postgres 15 has one sort of membership")
    assert "grant queue_owner to app_worker with inherit false, set true;" in "".join(blocks())
    worker = role("worker")
    grant(owned, worker, "worker")
    execute(server, f"grant {{}} to {{}} {membership}", owner_role, worker)
    as_worker = make_conninfo(owned, user=worker)
    worked = work(as_worker, "--once")
    assert worked.returncode == 0, worked.stderr
    assert ("may not make or drop" in worked.stderr) is (membership == "with inherit true, set false")
    assert bool(days(owned)) is (membership == "with inherit false, set true")
    owners = "select distinct pg_get_userbyid(relowner)::text from pg_class where relname like 'finished_runs%'"
    assert asked(owned, owners) == [(owner_role,)]


def test_the_owner_drops_what_is_old_without_working_on_anything(owned: str) -> None:
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    for day in (yesterday, yesterday - timedelta(days=40)):
        execute(
            owned,
            f"create table queue_service.finished_runs_{day:%Y%m%d} partition of queue_service.finished_runs "
            f"for values from ('{day}Z') to ('{day + timedelta(days=1)}Z')",
        )
    assert "`queue-service worker -a example:app -q nothing --once`" in PAGE
    worked = work(owned, "-q", "nothing", "--once")
    assert worked.returncode == 0, worked.stderr
    assert days(owned)[0] == name(-1)
