"""Each statement about runs, alone: what it changes, what it leaves, what it answers."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from psycopg import errors as pg

from queue_service import App, Run
from queue_service.db import channels
from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.errors import DuplicateRun
from queue_service.queues import queries as queues
from queue_service.runs import queries, settling, walks
from queue_service.runs.claim import Claim
from queue_service.runs.model import Ending, Floor, NewRun, Return, RunState
from queue_service.runs.queries import Claimant, Wanted
from queue_service.worker.floors import FRONT
from tests.support import LEASE, claim, claimed, enqueued, lapse, one, rows

LOST = "worker_lost"


async def ids_of(conn: Connection, where: str = "true") -> list[int]:
    return [row[0] for row in await rows(conn, f"select id from queue_service.runs where {where} order by id")]


async def leases(conn: Connection) -> list[tuple[int, list[int]]]:
    return [(row[0], row[1]) for row in await rows(conn, "select id, run_ids from queue_service.leases order by id")]


async def found(conn: Connection, run_id: int) -> Run:
    run = await fetch(conn, queries.get(run_id))
    assert run is not None
    return run


async def ended(conn: Connection, state: RunState = RunState.FAILED, **fields: Any) -> Run:
    """A run in history."""
    run_id = await enqueued(conn, **fields)
    await conn.execute("update queue_service.runs set run_at = '2000-01-01Z' where id = %s", [run_id])
    ((run, lease),) = await claimed(conn, limit=1, laned="ordering_key" in fields)
    assert run.id == run_id
    ending = Ending(run.claim, state, '"result"', '{"reason": "raised", "message": "m"}')
    await fetch(conn, settling.finish([ending], worker_id=7, freed=[lease]))
    return await found(conn, run_id)


async def suspect(conn: Connection, **fields: Any) -> int:
    """A queued run that lost a worker."""
    run_id = await enqueued(conn, **fields)
    await conn.execute("update queue_service.runs set losses = 1 where id = %s", [run_id])
    return run_id


def claimed_ids(taken: Sequence[tuple[Run, int]]) -> list[int]:
    return [run.id for run, _ in taken]


class TestEnqueue:
    async def test_ids_follow_one_another(self, conn: Connection) -> None:
        first = await enqueued(conn)
        assert [await enqueued(conn) for _ in range(5)] == list(range(first + 1, first + 6))

    async def test_a_new_run_is_queued_due_and_untouched(self, conn: Connection) -> None:
        run = await found(conn, await enqueued(conn, payload='{"a": [1.5, null, "x"]}'))
        assert (run.state, run.attempt, run.failures, run.losses) == (RunState.QUEUED, 0, 0, 0)
        assert (run.claimed_at, run.finished_at, run.worker_id, run.result, run.error) == (None, None, None, None, None)
        assert run.payload == {"a": [1.5, None, "x"]}
        assert not run.cancel_requested
        assert await one(conn, "select run_at <= clock_timestamp() from queue_service.runs")

    async def test_expiry_counts_from_when_it_is_due(self, conn: Connection) -> None:
        moment = datetime(2050, 1, 1, tzinfo=UTC)
        run = await found(conn, await enqueued(conn, run_at=moment, expires_in=timedelta(hours=1)))
        assert run.expires_at == moment + timedelta(hours=1)

    async def test_a_notice_is_sent_only_for_what_was_stored(self, conn: Connection) -> None:
        await conn.execute(f"listen {channels.RUNS}")
        new = NewRun("noop", "q", "{}", singleton_key="k")
        assert await fetch(conn, queries.enqueue(new, channels.enqueued("q", 1)))
        assert await fetch(conn, queries.enqueue(new, channels.enqueued("q", 2))) is None
        assert await fetch(conn, queries.enqueue(NewRun("noop", "q", "{}"), channels.enqueued("q", 3)))
        heard = [notice.payload async for notice in conn.notifies(timeout=5, stop_after=2)]
        assert heard == ["1 q", "3 q"]

    @pytest.mark.parametrize("payload", ["[]", '"text"', "1", "null"])
    async def test_a_payload_that_is_no_object_is_refused(self, conn: Connection, payload: str) -> None:
        with pytest.raises(pg.CheckViolation, match="runs_payload_check"):
            await enqueued(conn, payload=payload)

    @pytest.mark.parametrize("end", ["finish", "cancel", "expire", "delete", "sweep"])
    async def test_a_singleton_key_is_free_once_its_run_is_gone(self, conn: Connection, end: str) -> None:
        run_id = await enqueued(conn, singleton_key="k")
        if end in {"finish", "sweep"}:
            ((run, lease),) = await claimed(conn)
            await lapse(conn)
            finish = settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1, freed=[lease])
            assert await fetch(conn, finish if end == "finish" else queries.sweep(limit=1, max_losses=1))
        elif end == "expire":
            await conn.execute("update queue_service.runs set expires_at = '2000-01-01Z'")
            assert await fetch(conn, queries.expire(limit=1)) == [run_id]
        else:
            assert await fetch(conn, queries.cancel(run_id) if end == "cancel" else queries.delete(run_id))
        assert await enqueued(conn, singleton_key="k") > run_id

    async def test_a_swept_run_that_is_queued_again_still_holds_its_key(self, conn: Connection) -> None:
        run_id = await enqueued(conn, singleton_key="k")
        await claimed(conn)
        await lapse(conn)
        await fetch(conn, queries.sweep(limit=1, max_losses=3))
        assert await fetch(conn, queries.enqueue(NewRun("noop", "default", "{}", singleton_key="k"))) is None
        assert await fetch(conn, queries.singleton_holder("default", "k", None)) == (run_id, True)


class TestReplace:
    async def test_each_option_is_the_new_ones_and_the_id_the_old_ones(self, conn: Connection) -> None:
        old = await enqueued(
            conn, singleton_key="k", payload='{"old": 1}', priority=1, delay=timedelta(hours=1),
            expires_in=timedelta(hours=2), ordering_key="o", max_attempts=1, retry_delay=timedelta(1),
            timeout=timedelta(1), metadata='{"m": 1}', organization_id="acme",
        )  # fmt: skip
        before = await found(conn, old)
        assert (
            await fetch(
                conn, queries.replace(NewRun("other", "default", "{}", singleton_key="k", organization_id="acme"))
            )
            == old
        )
        run = await found(conn, old)
        assert run.created_at == before.created_at
        assert run.run_at < before.run_at
        assert (run.task, run.payload, run.priority, run.expires_at, run.ordering_key) == ("other", {}, 0, None, None)
        assert (run.max_attempts, run.retry_delay, run.timeout) == (None, None, None)
        assert (run.metadata, run.organization_id, run.singleton_key) == (None, "acme", "k")

    async def test_it_starts_with_fresh_counters_but_a_claim_of_before_never_fits_it(self, conn: Connection) -> None:
        await enqueued(conn, singleton_key="k")
        ((run, lease),) = await claimed(conn)
        back = Return(run.claim, failed=True, error='{"reason": "raised"}')
        await fetch(conn, settling.give_back([back], worker_id=1, freed=[lease]))
        await fetch(conn, queries.replace(NewRun("noop", "default", "{}", singleton_key="k")))
        ((again, _),) = await claimed(conn)
        assert (again.failures, again.error, again.attempt) == (0, None, 2)
        assert await fetch(conn, settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1)) == set()

    async def test_without_a_holder_it_is_a_plain_enqueue(self, conn: Connection) -> None:
        run_id = await fetch(conn, queries.replace(NewRun("noop", "default", "{}", singleton_key="k")))
        assert await ids_of(conn) == [run_id]


class TestReserve:
    async def test_ids_ascend_and_are_never_given_twice(self, conn: Connection) -> None:
        first = (await fetch(conn, queries.reserve(100, None, None, None))).ids
        second = (await fetch(conn, queries.reserve(100, None, None, None))).ids
        single = await enqueued(conn)
        assert [*first, *second] == sorted({*first, *second})
        assert single > second[-1]

    async def test_times_are_those_a_single_run_would_have(self, conn: Connection) -> None:
        moment = datetime(2050, 1, 1, tzinfo=UTC)
        due, expires, *_ = await fetch(conn, queries.reserve(1, None, moment, timedelta(hours=1)))
        assert (due, expires) == (moment, moment + timedelta(hours=1))
        due, expires, *_ = await fetch(conn, queries.reserve(1, timedelta(hours=1), None, None))
        assert expires is None
        assert timedelta(minutes=59) < due - datetime.now(UTC) < timedelta(minutes=61)


class TestScan:
    async def test_it_finds_the_first_claimable_run_of_each_priority_of_each_queue(self, conn: Connection) -> None:
        later = await enqueued(conn, run_at=datetime(2020, 1, 2, tzinfo=UTC))
        first = await enqueued(conn, run_at=datetime(2020, 1, 1, tzinfo=UTC))
        high, other = await enqueued(conn, priority=9), await enqueued(conn, queue="other", priority=-5)
        await enqueued(conn, queue="unasked")
        await enqueued(conn, priority=3, delay=timedelta(hours=1))
        await enqueued(conn, priority=4, task="unknown")
        await suspect(conn, priority=5)
        scan = await fetch(conn, queries.scan(["default", "other", "empty"], ["noop"]))
        assert {(lane.queue, lane.priority, lane.first.id) for lane in scan.due} == {
            ("default", 9, high),
            ("default", 0, first),
            ("other", -5, other),
        }
        assert later not in {lane.first.id for lane in scan.due}

    async def test_it_tells_the_time_even_where_nothing_is_due(self, conn: Connection) -> None:
        scan = await fetch(conn, queries.scan(["default"], ["noop"]))
        assert scan.due == []
        assert await one(conn, "select %s between now() - interval '1 minute' and now()", scan.at)

    async def test_a_paused_queue_has_no_lanes(self, conn: Connection) -> None:
        await enqueued(conn)
        await fetch(conn, queues.pause("default"))
        assert (await fetch(conn, queries.scan(["default"], ["noop"]))).due == []
        await fetch(conn, queues.resume("default"))
        assert len((await fetch(conn, queries.scan(["default"], ["noop"]))).due) == 1

    async def test_what_it_finds_is_what_a_claim_from_there_takes(self, conn: Connection) -> None:
        for priority in (2, 0, 1, 0, 2):
            await enqueued(conn, priority=priority)
        scan = await fetch(conn, queries.scan(["default"], ["noop"]))
        floors = {lane.priority: lane.first for lane in scan.due}
        query = queries.claim([Wanted("default", 10, floors)], Claimant(["noop"], 1, LEASE))
        assert len(await fetch(conn, query)) == 5


class TestClaim:
    async def test_higher_priority_first_then_by_time_then_by_id(self, conn: Connection) -> None:
        early, late = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
        places = [(0, late), (5, late), (0, early), (5, early), (-5, early), (5, early)]
        made = [(-priority, at, await enqueued(conn, priority=priority, run_at=at)) for priority, at in places]
        expected = [run_id for _, _, run_id in sorted(made)]
        priorities = (-5, 0, 5)
        assert claimed_ids(await claimed(conn, limit=4, priorities=priorities)) == expected[:4]
        assert claimed_ids(await claimed(conn, limit=4, priorities=priorities)) == expected[4:]

    async def test_of_several_queues_takes_of_each_what_is_wanted_of_it_under_one_lease(self, conn: Connection) -> None:
        made = {name: [await enqueued(conn, queue=name, priority=n % 2) for n in range(6)] for name in "abcd"}
        await fetch(conn, queues.pause("c"))
        asked = [
            Wanted(name, count, {0: FRONT, 1: FRONT}) for name, count in [("b", 4), ("a", 10), ("c", 5), ("none", 5)]
        ]
        taken = await fetch(conn, queries.claim(asked, Claimant(["noop"], 1, LEASE)))
        found = {name: [run.id for run, _ in taken if run.queue == name] for name in "abcd"}
        first = {name: ids[1::2] + ids[0::2] for name, ids in made.items()}
        assert found == {"a": first["a"], "b": first["b"][:4], "c": [], "d": []}
        assert len({lease for _, lease in taken}) == 1
        assert await one(conn, "select count(*) from queue_service.runs where state = 'running'") == 10

    async def test_it_takes_at_most_its_limit_under_one_lease_that_lists_what_it_took(self, conn: Connection) -> None:
        for _ in range(5):
            await enqueued(conn)
        taken = await claimed(conn, limit=3, worker_id=42)
        ((lease, listed),) = await leases(conn)
        assert {held for _, held in taken} == {lease}
        assert sorted(listed) == claimed_ids(taken) == await ids_of(conn, "state = 'running'")
        assert await rows(
            conn,
            "select worker_id, expires_at between clock_timestamp() + interval '25 s' and clock_timestamp() + "
            "interval '30 s' from queue_service.leases",
        ) == [(42, True)]

    async def test_a_claimed_run_is_returned_as_it_is_stored(self, conn: Connection) -> None:
        run_id = await enqueued(
            conn, payload='{"a": 1}', priority=0, expires_in=timedelta(hours=1), singleton_key="s", ordering_key="o",
            max_attempts=4, retry_delay=timedelta(seconds=2.5), timeout=timedelta(3), metadata='{"m": 1}',
            organization_id="acme",
        )  # fmt: skip
        ((run, _),) = await claimed(conn, laned=True)
        assert (run.attempt, run.state) == (1, RunState.RUNNING)
        stored = await found(conn, run_id)
        assert stored.claimed_at is not None
        assert stored.worker_id == 1
        unread = {"claimed_at", "worker_id", "attempts"}
        assert {n: getattr(run, n) for n in Run.__struct_fields__ if n not in unread} == {
            n: getattr(stored, n) for n in Run.__struct_fields__ if n not in unread
        }

    async def test_passed_over_are_those_of_others_those_not_due_expired_suspects_and_running_ones(
        self, conn: Connection
    ) -> None:
        await enqueued(conn)
        await claimed(conn)
        mine = await enqueued(conn, expires_in=timedelta(hours=1))
        await enqueued(conn, task="unknown")
        await enqueued(conn, queue="other")
        await enqueued(conn, priority=1)
        await enqueued(conn, delay=timedelta(hours=1))
        await suspect(conn)
        gone = await enqueued(conn, expires_in=timedelta(hours=1))
        await conn.execute("update queue_service.runs set expires_at = '2000-01-01Z' where id = %s", [gone])
        before = await rows(conn, "select * from queue_service.runs where id <> %s order by id", mine)
        assert claimed_ids(await claimed(conn)) == [mine]
        assert await rows(conn, "select * from queue_service.runs where id <> %s order by id", mine) == before

    async def test_a_claim_of_nothing_makes_no_lease(self, conn: Connection) -> None:
        await enqueued(conn, delay=timedelta(hours=1))
        assert await claimed(conn) == []
        assert await fetch(conn, queries.claim_suspect(["default"], Claimant(["noop"], 1, LEASE))) == []
        assert await leases(conn) == []

    async def test_a_paused_queue_gives_none_until_it_is_resumed(self, conn: Connection) -> None:
        await enqueued(conn)
        other = await enqueued(conn, queue="other")
        await fetch(conn, queues.pause("default"))
        assert await claimed(conn) == []
        assert claimed_ids(await claimed(conn, queue="other")) == [other]
        await fetch(conn, queues.resume("default"))
        assert len(await claimed(conn)) == 1

    async def test_what_lies_before_its_floor_is_not_looked_at(self, conn: Connection) -> None:
        moment = datetime(2020, 1, 1, tzinfo=UTC)
        ids = [await enqueued(conn, run_at=moment) for _ in range(4)]
        later = await enqueued(conn, run_at=moment + timedelta(seconds=1))
        high = await enqueued(conn, run_at=moment, priority=1)
        floors = {0: Floor(moment, ids[2]), 1: FRONT}
        query = queries.claim([Wanted("default", 10, floors)], Claimant(["noop"], 1, LEASE))
        assert claimed_ids(await fetch(conn, query)) == [high, ids[2], ids[3], later]
        assert await ids_of(conn, "state = 'queued'") == ids[:2]

    async def test_without_floors_it_takes_nothing(self, conn: Connection) -> None:
        await enqueued(conn)
        query = queries.claim([Wanted("default", 10, {})], Claimant(["noop"], 1, LEASE))
        assert await fetch(conn, query) == []


class TestClaimSuspect:
    SUSPECT = queries.claim_suspect(["default", "other"], Claimant(["noop"], 3, LEASE))

    async def test_suspects_come_one_at_a_time_the_longest_due_first(self, conn: Connection) -> None:
        second = await suspect(conn, run_at=datetime(2021, 1, 1, tzinfo=UTC))
        first = await suspect(conn, run_at=datetime(2020, 1, 1, tzinfo=UTC), queue="other", priority=-1)
        assert [claimed_ids(await fetch(conn, self.SUSPECT)) for _ in range(3)] == [[first], [second], []]
        assert [listed for _, listed in await leases(conn)] == [[first], [second]]

    @pytest.mark.parametrize(
        "fields",
        [{"task": "unknown"}, {"queue": "unasked"}, {"delay": timedelta(hours=1)}, {"queue": "other"}],
        ids=str,
    )
    async def test_it_passes_over_what_a_claim_would(self, conn: Connection, fields: dict[str, Any]) -> None:
        await enqueued(conn)
        run_id = await suspect(conn, **fields)
        await fetch(conn, queues.pause("other"))
        assert await fetch(conn, self.SUSPECT) == []
        assert not await fetch(conn, queries.suspect_is_due(["default", "other"], ["noop"]))
        await conn.execute(
            "update queue_service.runs set task = 'noop', queue = 'default', run_at = '2020-01-01Z', "
            "expires_at = '2020-01-02Z' where id = %s",
            [run_id],
        )
        assert await fetch(conn, self.SUSPECT) == []
        await conn.execute("update queue_service.runs set expires_at = null where id = %s", [run_id])
        assert await fetch(conn, queries.suspect_is_due(["default", "other"], ["noop"]))
        assert claimed_ids(await fetch(conn, self.SUSPECT)) == [run_id]


class TestExtend:
    async def test_it_pushes_the_deadline_of_those_still_held(self, conn: Connection) -> None:
        for _ in range(3):
            await enqueued(conn)
        taken = [(await claimed(conn, limit=1))[0] for _ in range(3)]
        ids = [lease for _, lease in taken]
        await lapse(conn)
        await conn.execute("delete from queue_service.leases where id = %s", [ids[1]])
        assert await fetch(conn, queries.extend([ids[0], ids[1]], timedelta(hours=1))) == {ids[0]}
        remaining = await rows(
            conn, "select id, expires_at > clock_timestamp() + interval '59 min' from queue_service.leases order by id"
        )
        assert remaining == [(ids[0], True), (ids[2], False)]

    async def test_an_extended_lease_is_not_swept(self, conn: Connection) -> None:
        await enqueued(conn)
        ((_, lease),) = await claimed(conn)
        await lapse(conn)
        await fetch(conn, queries.extend([lease], LEASE))
        assert await fetch(conn, queries.sweep(limit=10, max_losses=3)) == []


class TestCancelRequests:
    async def test_it_names_those_asked_for_under_the_leases_given(self, conn: Connection) -> None:
        ids = [await enqueued(conn) for _ in range(4)]
        (_, mine), *_ = await claimed(conn, limit=2)
        (_, other), *_ = await claimed(conn, limit=2)
        for run_id in (ids[1], ids[2]):
            await fetch(conn, queries.cancel(run_id))
        assert await fetch(conn, queries.cancel_requests([mine])) == [ids[1]]
        assert sorted(await fetch(conn, queries.cancel_requests([mine, other]))) == [ids[1], ids[2]]
        assert await fetch(conn, queries.cancel_requests([])) == []


class TestFinish:
    @pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED])
    async def test_history_has_all_that_the_run_had_and_how_it_ended(self, conn: Connection, state: RunState) -> None:
        run_id = await enqueued(
            conn, payload='{"a": 1}', expires_in=timedelta(hours=1), singleton_key="s", ordering_key="o",
            max_attempts=4, retry_delay=timedelta(seconds=2.5), timeout=timedelta(3), metadata='{"m": 1}',
            organization_id="acme",
        )  # fmt: skip
        await conn.execute("update queue_service.runs set failures = 2, losses = 0, attempt = 5")
        ((run, lease),) = await claimed(conn, laned=True)
        before = await found(conn, run_id)
        ending = Ending(run.claim, state, '{"r": [1]}', '{"reason": "raised", "message": "m"}')
        assert await fetch(conn, settling.finish([ending], worker_id=42, freed=[lease])) == {run.claim}
        after = await found(conn, run_id)
        changed = {"state", "finished_at", "worker_id", "result", "error", "failures", "attempts"}
        assert {n: getattr(after, n) for n in Run.__struct_fields__ if n not in changed} == {
            n: getattr(before, n) for n in Run.__struct_fields__ if n not in changed
        }
        good = state is RunState.SUCCEEDED
        assert (after.state, after.worker_id, after.failures) == (state, 42, 2 + (state is RunState.FAILED))
        assert after.result == ({"r": [1]} if good else None)
        assert after.error == (None if good else {"reason": "raised", "message": "m"})
        assert after.finished_at is not None
        assert before.claimed_at is not None
        assert after.finished_at >= before.claimed_at

    @pytest.mark.parametrize("result", ["null", "0", "false", '""', "[]", '"null"', '{"error": 1, "state": "failed"}'])
    async def test_every_json_value_is_a_result(self, conn: Connection, result: str) -> None:
        plain, run_id = await enqueued(conn), await enqueued(conn)
        taken = await claimed(conn)
        endings = [Ending(run.claim, RunState.SUCCEEDED, result if run.id == run_id else "null") for run, _ in taken]
        assert len(await fetch(conn, settling.finish(endings, worker_id=1, freed=[taken[0][1]]))) == 2
        stored = "select result::text, state, failures from queue_service.finished_runs where id = %s"
        assert await rows(conn, stored, run_id) == [(None if result == "null" else result, "succeeded", 0)]
        assert await rows(conn, stored, plain) == [(None, "succeeded", 0)]

    async def test_both_claims_of_one_run_in_a_batch_end_it_as_the_held_one_says(self, conn: Connection) -> None:
        others = [await enqueued(conn) for _ in range(2)]
        ((stale, lease), *_) = await claimed(conn, limit=1)
        await fetch(conn, settling.give_back([Return(stale.claim)], worker_id=1, freed=[lease]))
        taken = {run.id: run for run, _ in await claimed(conn)}
        batch = [
            Ending(taken[others[1]].claim, RunState.SUCCEEDED, '"other"'),
            Ending(taken[stale.id].claim, RunState.SUCCEEDED, '"held"'),
            Ending(stale.claim, RunState.SUCCEEDED, '"stale"'),
        ]
        assert await fetch(conn, settling.finish(batch, worker_id=1)) == {run.claim for run in taken.values()}
        assert await rows(conn, "select id, result from queue_service.finished_runs order by id") == [
            (others[0], "held"),
            (others[1], "other"),
        ]

    async def test_unknown_queued_and_finished_runs_are_left_out_of_its_answer(self, conn: Connection) -> None:
        over = await ended(conn)
        waiting = await enqueued(conn)
        batch = [Ending(Claim(run_id, 1), RunState.SUCCEEDED) for run_id in (over.id, waiting, 999)]
        assert await fetch(conn, settling.finish(batch, worker_id=1)) == set()
        assert await fetch(conn, settling.finish([Ending(Claim(waiting, 0), RunState.SUCCEEDED)], worker_id=1)) == set()
        assert await found(conn, over.id) == over
        assert (await found(conn, waiting)).state is RunState.QUEUED

    async def test_an_empty_batch_lets_go_of_leases(self, conn: Connection) -> None:
        assert await fetch(conn, settling.finish([], worker_id=1)) == set()
        await conn.execute("insert into queue_service.leases (worker_id, expires_at, run_ids) values (1, now(), '{}')")
        ((lease, _),) = await leases(conn)
        assert await fetch(conn, settling.finish([], worker_id=1, freed=[lease])) == set()
        assert await leases(conn) == []

    async def test_a_lease_that_is_not_let_go_goes_on_holding_the_others(self, conn: Connection) -> None:
        for _ in range(3):
            await enqueued(conn)
        taken = await claimed(conn)
        await fetch(conn, settling.finish([Ending(taken[0][0].claim, RunState.SUCCEEDED)], worker_id=1))
        assert len(await leases(conn)) == 1
        await lapse(conn)
        swept = await fetch(conn, queries.sweep(limit=1, max_losses=3))
        assert {each.run_id for each in swept} == {run.id for run, _ in taken[1:]}

    async def test_an_error_text_that_looks_like_sql_is_only_text(self, conn: Connection) -> None:
        await enqueued(conn)
        ((run, _),) = await claimed(conn)
        error = '{"reason": "raised", "message": "%(ids)s {outcome} %s \' \\" \\\\ ; drop table x"}'
        await fetch(conn, settling.finish([Ending(run.claim, RunState.FAILED, "null", error)], worker_id=1))
        after = await found(conn, run.id)
        assert after.error == {"reason": "raised", "message": "%(ids)s {outcome} %s ' \" \\ ; drop table x"}


class TestGiveBack:
    async def test_a_large_shuffled_batch_gives_each_run_its_own_outcome(self, conn: Connection) -> None:
        await conn.execute(
            "insert into queue_service.runs (queue, task, payload, run_at) select 'default', 'noop', '{}', "
            "'2020-01-01Z' from generate_series(1, 500)"
        )
        taken = await claimed(conn, limit=500)
        returns = [
            Return(run.claim, run.id * 10.0 if run.id % 3 else None, run.id % 2 == 0, f'{{"message": "{run.id}"}}')
            for run, _ in taken
        ]
        shuffled = returns[1::3] + returns[::-3] + returns[0::3]
        every = {back.claim: back for back in [*shuffled, *returns]}
        done = await fetch(conn, settling.give_back(list(every.values()), worker_id=1, freed=[taken[0][1]]))
        assert done == {run.claim for run, _ in taken}
        for run_id, failures, message, place, wait in await rows(
            conn,
            "select id, failures, error ->> 'message', run_at = '2020-01-01Z', "
            "extract(epoch from run_at - clock_timestamp())::float from queue_service.runs",
        ):
            assert (failures, message, place) == (run_id % 2 == 0, str(run_id), run_id % 3 == 0)
            assert place or run_id * 10 - 30 < wait <= run_id * 10
        assert await leases(conn) == []

    async def test_a_run_that_keeps_its_place_is_the_next_to_be_claimed(self, conn: Connection) -> None:
        first, second = await enqueued(conn), await enqueued(conn)
        ((run, lease),) = await claimed(conn, limit=1)
        await fetch(conn, settling.give_back([Return(run.claim)], worker_id=1, freed=[lease]))
        again = await claimed(conn)
        assert claimed_ids(again) == [first, second]
        assert [each.attempt for each, _ in again] == [2, 1]

    async def test_the_last_error_is_kept_where_none_is_given(self, conn: Connection) -> None:
        run_id = await enqueued(conn)
        for error in ('{"message": "first"}', "null"):
            ((run, lease),) = await claimed(conn)
            back = Return(run.claim, failed=error != "null", error=error)
            await fetch(conn, settling.give_back([back], worker_id=1, freed=[lease]))
        run = await found(conn, run_id)
        assert (run.error, run.failures, run.attempt) == ({"message": "first"}, 1, 2)

    async def test_what_was_asked_to_be_cancelled_ends_so_and_the_rest_is_queued(self, conn: Connection) -> None:
        ids = [await enqueued(conn) for _ in range(4)]
        taken = await claimed(conn)
        for run_id in ids[1::2]:
            await fetch(conn, queries.cancel(run_id))
        back = [Return(run.claim, 5.0, failed=True, error=f'{{"message": "{run.id}"}}') for run, _ in taken]
        done = await fetch(conn, settling.give_back(back, worker_id=42, freed=[taken[0][1]]))
        assert done == {run.claim for run, _ in taken}
        assert await ids_of(conn, "state = 'queued'") == ids[::2]
        assert await rows(
            conn,
            "select id, state, failures, worker_id, error ->> 'message', result from queue_service.finished_runs "
            "order by id",
        ) == [(run_id, "cancelled", 1, 42, str(run_id), None) for run_id in ids[1::2]]


class TestSweep:
    async def test_only_what_has_lapsed_is_taken_and_keeps_its_place(self, conn: Connection) -> None:
        moment = datetime(2020, 1, 1, tzinfo=UTC)
        lost = await enqueued(conn, run_at=moment)
        await claimed(conn)
        await lapse(conn)
        kept = await enqueued(conn)
        ((_, lease),) = await claimed(conn)
        assert await fetch(conn, queries.sweep(limit=10, max_losses=3)) == [
            queries.SweptRun(lost, RunState.QUEUED, "default", 0)
        ]
        run = await found(conn, lost)
        assert (run.state, run.losses, run.failures, run.attempt, run.run_at) == (RunState.QUEUED, 1, 0, 1, moment)
        assert run.error is not None
        assert run.error["reason"] == LOST
        assert await leases(conn) == [(lease, [kept])]
        assert await fetch(conn, queries.sweep(limit=10, max_losses=3)) == []

    async def test_its_limit_counts_leases_and_the_longest_lapsed_come_first(self, conn: Connection) -> None:
        for _ in range(6):
            await enqueued(conn)
        held = [claimed_ids(await claimed(conn, limit=2)) for _ in range(3)]
        await conn.execute("update queue_service.leases set expires_at = clock_timestamp() - id * interval '1 min'")
        sweep = queries.sweep(limit=2, max_losses=3)
        assert {each.run_id for each in await fetch(conn, sweep)} == {*held[1], *held[2]}
        assert {each.run_id for each in await fetch(conn, sweep)} == {*held[0]}
        assert await fetch(conn, sweep) == []

    async def test_it_ends_what_was_lost_too_often_and_what_was_to_be_cancelled(self, conn: Connection) -> None:
        again, often, asked = [await enqueued(conn) for _ in range(3)]
        await claimed(conn, worker_id=42)
        await conn.execute("update queue_service.runs set losses = 2 where id = %s", [often])
        await fetch(conn, queries.cancel(asked))
        await lapse(conn)
        swept = await fetch(conn, queries.sweep(limit=10, max_losses=3))
        assert {(each.run_id, each.state) for each in swept} == {
            (again, RunState.QUEUED),
            (often, RunState.FAILED),
            (asked, RunState.CANCELLED),
        }
        over = await found(conn, often)
        assert over.error is not None
        assert (over.losses, over.failures, over.worker_id, over.error["reason"]) == (3, 0, 42, LOST)
        assert "3. time" in over.error["message"]
        assert (await found(conn, asked)).losses == 1

    async def test_a_run_that_has_moved_on_to_another_lease_stays_there(self, conn: Connection) -> None:
        for _ in range(2):
            await enqueued(conn)
        taken = await claimed(conn)
        moved = taken[0][0]
        await fetch(conn, settling.give_back([Return(moved.claim)], worker_id=1))
        ((again, lease),) = await claimed(conn)
        await conn.execute("update queue_service.leases set expires_at = '2020-01-01Z' where id <> %s", [lease])
        assert [each.run_id for each in await fetch(conn, queries.sweep(limit=10, max_losses=3))] == [taken[1][0].id]
        assert again.id == moved.id
        assert await ids_of(conn, "state = 'running'") == [moved.id]

    async def test_a_lease_whose_runs_are_all_gone_vanishes(self, conn: Connection) -> None:
        await enqueued(conn)
        ((run, _),) = await claimed(conn)
        await fetch(conn, settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1))
        await lapse(conn)
        assert await fetch(conn, queries.sweep(limit=10, max_losses=3)) == []
        assert await leases(conn) == []


class TestFinalTasks:
    BY = Claimant(["noop"], 1, LEASE, final_tasks=["noop", "other"])

    @pytest.mark.parametrize(
        ("store", "query"),
        [
            (enqueued, queries.claim([Wanted("default", 1, {0: FRONT})], BY)),
            (functools.partial(enqueued, ordering_key="o"), claim(limit=1, laned=True, final_tasks=("noop", "other"))),
            (suspect, queries.claim_suspect(["default"], BY)),
        ],
        ids=["claim", "claim_lanes", "claim_suspect"],
    )
    async def test_every_claim_names_them_in_its_lease(
        self, conn: Connection, store: Callable[[Connection], Awaitable[int]], query: Query[list[tuple[Run, int]]]
    ) -> None:
        await store(conn)
        assert len(await fetch(conn, query)) == 1
        assert await rows(conn, "select final_tasks from queue_service.leases") == [(["noop", "other"],)]

    async def test_runs_of_a_final_task_end_at_their_first_loss_and_others_of_that_lease_do_not(
        self, conn: Connection
    ) -> None:
        final, ordinary, asked = await enqueued(conn, "final"), await enqueued(conn), await enqueued(conn, "final")
        other = await enqueued(conn, "final", queue="other")
        await claimed(conn, tasks=("final", "noop"), final_tasks=("final",), worker_id=4)
        # Of another worker, in whose version the task may be begun again.
        await claimed(conn, queue="other", tasks=("final",))
        await fetch(conn, queries.cancel(asked))
        await lapse(conn)
        swept = {each.run_id: each.state for each in await fetch(conn, queries.sweep(limit=10, max_losses=3))}
        assert swept == {
            final: RunState.FAILED, ordinary: RunState.QUEUED, asked: RunState.CANCELLED, other: RunState.QUEUED,
        }  # fmt: skip
        run = await found(conn, final)
        assert run.error == {
            "reason": LOST,
            "message": "The worker was lost while this run was with it, for the 1. time. Its task says "
            'on_lost="fail": it is begun again only if you retry it.',
        }
        assert (run.losses, run.failures, run.worker_id) == (1, 0, 4)


class TestExpire:
    async def test_only_queued_runs_past_their_time_end_the_longest_first(self, conn: Connection) -> None:
        ids = [await enqueued(conn, expires_in=timedelta(hours=1)) for _ in range(4)]
        running = await enqueued(conn, priority=1, expires_in=timedelta(hours=1))
        await claimed(conn, priorities=(1,))
        await enqueued(conn)
        past = "update queue_service.runs set expires_at = clock_timestamp() - %s * interval '1 min' where id = %s"
        for age, run_id in enumerate([ids[2], ids[1], running, ids[0]], 1):
            await conn.execute(past.encode(), [age, run_id])
        assert sorted(await fetch(conn, queries.expire(limit=2))) == ids[:2]
        assert await fetch(conn, queries.expire(limit=10)) == [ids[2]]
        assert await fetch(conn, queries.expire(limit=10)) == []
        assert (await found(conn, running)).state is RunState.RUNNING
        run = await found(conn, ids[0])
        assert run.error is not None
        assert (run.state, run.worker_id, run.error["reason"]) == (RunState.EXPIRED, None, "expired")
        assert run.expires_at is not None

    async def test_the_error_of_an_earlier_try_is_kept(self, conn: Connection) -> None:
        run_id = await enqueued(conn, expires_in=timedelta(hours=1))
        ((run, lease),) = await claimed(conn)
        back = Return(run.claim, failed=True, error='{"reason": "raised"}')
        await fetch(conn, settling.give_back([back], worker_id=1, freed=[lease]))
        await conn.execute("update queue_service.runs set expires_at = '2020-01-01Z'")
        await fetch(conn, queries.expire(limit=1))
        after = await found(conn, run_id)
        assert (after.state, after.error, after.failures) == (RunState.EXPIRED, {"reason": "raised"}, 1)


class TestCancel:
    async def test_a_queued_run_ends(self, conn: Connection) -> None:
        run_id = await enqueued(conn)
        assert await fetch(conn, queries.cancel(run_id)) == "cancelled"
        run = await found(conn, run_id)
        assert run.error is not None
        assert (run.state, run.error["reason"], run.worker_id) == (RunState.CANCELLED, "cancelled", None)
        assert await ids_of(conn) == []

    async def test_a_running_run_is_marked_however_often_it_is_asked(self, conn: Connection) -> None:
        run_id = await enqueued(conn)
        await claimed(conn)
        assert [await fetch(conn, queries.cancel(run_id)) for _ in range(2)] == ["requested", "requested"]
        run = await found(conn, run_id)
        assert (run.state, run.cancel_requested) == (RunState.RUNNING, True)

    async def test_of_an_unknown_or_finished_run_there_is_nothing_to_cancel(self, conn: Connection) -> None:
        run = await ended(conn, RunState.SUCCEEDED)
        assert await fetch(conn, queries.cancel(run.id)) is None
        assert await fetch(conn, queries.cancel(999)) is None
        assert await found(conn, run.id) == run


class TestRetry:
    @pytest.mark.parametrize("state", [RunState.FAILED, RunState.CANCELLED])
    async def test_it_moves_the_run_back_with_fresh_counters(self, conn: Connection, state: RunState) -> None:
        before = await ended(
            conn, state, singleton_key="s", ordering_key="o", max_attempts=4, retry_delay=timedelta(seconds=2.5),
            timeout=timedelta(3), metadata='{"m": 1}', organization_id="acme", payload='{"a": 1}',
            expires_in=timedelta(days=20_000),
        )  # fmt: skip
        assert await fetch(conn, queries.retry(before.id)) == queries.Retriable(
            "default", 0, "s", "acme", has_moved=True
        )
        run = await found(conn, before.id)
        changed = {"state", "failures", "run_at", "expires_at", "claimed_at", "finished_at", "worker_id"}
        assert {n: getattr(run, n) for n in Run.__struct_fields__ if n not in changed} == {
            n: getattr(before, n) for n in Run.__struct_fields__ if n not in changed
        }
        assert (run.state, run.failures, run.losses, run.expires_at) == (RunState.QUEUED, 0, 0, None)
        assert (run.claimed_at, run.finished_at, run.worker_id) == (None, None, None)
        assert await one(conn, "select count(*) from queue_service.finished_runs") == 0

    async def test_no_claim_of_before_fits_it(self, conn: Connection) -> None:
        before = await ended(conn)
        await fetch(conn, queries.retry(before.id))
        ((run, _),) = await claimed(conn)
        assert run.attempt == before.attempt + 1
        assert await fetch(conn, settling.finish([Ending(before.claim, RunState.SUCCEEDED)], worker_id=1)) == set()
        assert (await found(conn, run.id)).state is RunState.RUNNING

    async def test_what_was_to_be_cancelled_is_no_longer(self, conn: Connection) -> None:
        run_id = await enqueued(conn)
        ((run, lease),) = await claimed(conn)
        await fetch(conn, queries.cancel(run_id))
        await fetch(conn, settling.give_back([Return(run.claim)], worker_id=1, freed=[lease]))
        await fetch(conn, queries.retry(run_id))
        assert not (await found(conn, run_id)).cancel_requested

    async def test_an_expired_run_is_due_without_end(self, conn: Connection) -> None:
        run_id = await enqueued(conn, expires_in=timedelta(hours=1))
        await conn.execute("update queue_service.runs set expires_at = '2020-01-01Z'")
        await fetch(conn, queries.expire(limit=1))
        assert await fetch(conn, queries.retry(run_id))
        assert claimed_ids(await claimed(conn)) == [run_id]

    async def test_live_succeeded_and_unknown_runs_stay_as_they_are(self, conn: Connection) -> None:
        good, live = await ended(conn, RunState.SUCCEEDED), await enqueued(conn)
        assert [await fetch(conn, queries.retry(run_id)) for run_id in (good.id, live, 999)] == [None, None, None]
        assert await found(conn, good.id) == good

    async def test_the_app_says_which_live_run_holds_the_key_and_nothing_moved(
        self, app: App, conn: Connection
    ) -> None:
        before = await ended(conn, singleton_key="k")
        holder = await app.enqueue("noop", {}, singleton_key="k")
        with pytest.raises(DuplicateRun, match="not queued again") as said:
            await app.retry(before.id)
        assert (said.value.run_id, said.value.singleton_key) == (holder, "k")
        assert await found(conn, before.id) == before
        await app.delete(holder)
        assert await app.retry(before.id)


class TestDelete:
    async def test_queued_and_finished_runs_are_forgotten_and_others_are_not(self, conn: Connection) -> None:
        over, running = await ended(conn), await enqueued(conn)
        await claimed(conn)
        queued = await enqueued(conn)
        answers = [await fetch(conn, queries.delete(run_id)) for run_id in (queued, over.id, running, 999)]
        assert answers == [True, True, False, False]
        assert [await fetch(conn, queries.get(run_id)) for run_id in (queued, over.id)] == [None, None]
        assert (await found(conn, running)).state is RunState.RUNNING


class TestEndings:
    async def test_the_ended_with_how_the_unknown_with_none_and_the_live_not_at_all(self, conn: Connection) -> None:
        good, bad = await ended(conn, RunState.SUCCEEDED), await ended(conn, RunState.FAILED)
        running = await enqueued(conn)
        await claimed(conn)
        queued = await enqueued(conn)
        asked = [good.id, bad.id, running, queued, 999]
        assert await fetch(conn, queries.endings(asked)) == {
            good.id: RunState.SUCCEEDED,
            bad.id: RunState.FAILED,
            999: None,
        }
        assert await fetch(conn, queries.endings([])) == {}


async def walked(conn: Connection, **how: Any) -> list[int]:
    """The ids of all pages, one after the other."""
    page = await fetch(conn, walks.page(**how))
    ids = [run.id for run in page.runs]
    while page.below is not None:
        page = await fetch(conn, walks.page(before=page.below, **how))
        ids += [run.id for run in page.runs]
    return ids


class TestPage:
    async def test_pages_follow_one_another_from_the_newest_across_both_tables(self, conn: Connection) -> None:
        ids = [(await ended(conn)).id if n % 2 else await enqueued(conn, delay=LEASE) for n in range(7)]
        assert await walked(conn, limit=3) == ids[::-1]

    async def test_it_keeps_to_a_state_a_queue_and_a_task(self, conn: Connection) -> None:
        queued = await enqueued(conn, delay=LEASE)
        other = await enqueued(conn, queue="other", task="else", delay=LEASE)
        over = await ended(conn)

        async def ids(**only: Any) -> list[int]:
            return [run.id for run in (await fetch(conn, walks.page(**only))).runs]

        assert await ids(state=RunState.FAILED) == [over.id]
        assert await ids(state=RunState.QUEUED) == [other, queued]
        assert await ids(queue="other") == await ids(task="else") == [other]
        assert await ids(queue="default", task="noop") == [over.id, queued]
        assert await ids(state=RunState.RUNNING) == []

    @pytest.mark.parametrize("state", [None, *RunState])
    async def test_each_state_is_found_among_the_others_and_in_order(
        self, conn: Connection, state: RunState | None
    ) -> None:
        for _ in range(3):
            await ended(conn, RunState.SUCCEEDED)
            await ended(conn, RunState.FAILED)
            await fetch(conn, queries.cancel(await enqueued(conn)))
            await enqueued(conn, expires_in=LEASE)
            await claimed(conn, limit=1)
            await enqueued(conn)
        await conn.execute(
            "update queue_service.runs set expires_at = '2020-01-01Z' where expires_at is not null and state = 'queued'"
        )
        await enqueued(conn, expires_in=timedelta(days=-1))
        await fetch(conn, queries.expire(limit=10))
        stored = "select id, state from queue_service.runs union all select id, state from queue_service.finished_runs"
        everything = await rows(conn, stored)
        assert {each for _, each in everything} == set(RunState)
        expected = sorted((run_id for run_id, each in everything if state in {None, each}), reverse=True)
        assert await walked(conn, state=state, limit=2) == expected

    async def test_a_page_looks_at_so_many_runs_and_says_where_to_go_on(self, conn: Connection) -> None:
        rare, *others = [(await ended(conn)).id for _ in range(7)]
        await conn.execute("update queue_service.finished_runs set task = 'rare' where id = %s", [rare])
        first = await fetch(conn, walks.page(task="rare", scan_limit=3))
        assert (first.runs, first.below) == ([], others[3])
        second = await fetch(conn, walks.page(task="rare", scan_limit=3, before=first.below))
        assert (second.runs, second.below) == ([], others[0])
        third = await fetch(conn, walks.page(task="rare", scan_limit=3, before=second.below))
        assert ([run.id for run in third.runs], third.below) == ([rare], None)

    @pytest.mark.parametrize("look", [1, 2, 3, 100])
    @pytest.mark.parametrize("limit", [1, 2, 100])
    async def test_however_little_a_page_looks_at_nothing_is_passed_over(
        self, conn: Connection, look: int, limit: int
    ) -> None:
        ids = [(await ended(conn)).id if n % 2 else await enqueued(conn, delay=LEASE) for n in range(6)]
        wanted = [ids[0], ids[3], ids[4]]
        for table in ("runs", "finished_runs"):
            await conn.execute(f"update queue_service.{table} set task = 'a' where id = any(%s)".encode(), [wanted])
        assert await walked(conn, task="a", scan_limit=look, limit=limit) == wanted[::-1]


class TestDepth:
    async def test_it_counts_due_later_and_running_apart(self, conn: Connection) -> None:
        for _ in range(3):
            await enqueued(conn)
        await claimed(conn, limit=1)
        await enqueued(conn, delay=timedelta(hours=1))
        await enqueued(conn, queue="other")
        await claimed(conn, queue="other")
        depth = await fetch(conn, queries.depth("default"))
        assert (depth.due, depth.later, depth.running) == (2, 1, 1)
        assert depth.first_due == (await found(conn, (await ids_of(conn, "state = 'queued'"))[0])).run_at
        assert await fetch(conn, queries.depth("empty")) == queries.Depth(0, 0, 0, None)

    async def test_a_claim_made_by_a_lease_is_what_counts_as_running(self, conn: Connection) -> None:
        await enqueued(conn)
        ((run, lease),) = await fetch(conn, claim())
        assert (await fetch(conn, queries.depth("default"))).running == 1
        await fetch(conn, settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1, freed=[lease]))
        assert (await fetch(conn, queries.depth("default"))).running == 0
