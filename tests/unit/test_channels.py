"""Notices are hints from anyone: what we write we can read, and what we cannot read harms nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_service.app.enqueue import MAX_QUEUE
from queue_service.db import channels
from queue_service.db.channels import Notice

QUEUES = st.text(min_size=1, max_size=MAX_QUEUE).filter(lambda queue: len(queue.encode()) <= MAX_QUEUE)
PRIORITIES = st.integers(-(2**15), 2**15 - 1)
# Postgres: "payload string too long" from this size on.
TOO_LONG = 8_000


@given(QUEUES, PRIORITIES)
def test_a_notice_of_a_new_run_is_read_as_it_was_written(queue: str, priority: int) -> None:
    notice = channels.enqueued(queue, priority)
    assert notice.channel == channels.RUNS
    assert channels.read_enqueued(notice.payload) == (queue, priority)
    assert len(notice.payload.encode()) < TOO_LONG


@pytest.mark.parametrize("payload", ["", " ", "0", "0 ", "x default", "default", " default", "1.5 default", "*"])
def test_a_notice_that_is_not_ours_is_passed_over(payload: str) -> None:
    assert channels.read_enqueued(payload) is None


@pytest.mark.parametrize("priority", [2**15, -(2**15) - 1, 2**63, -(10**30)])
def test_a_notice_of_a_priority_that_no_run_can_have_is_passed_over(priority: int) -> None:
    assert channels.read_enqueued(f"{priority} default") is None


@given(st.sets(st.integers(1, 2**63 - 1), min_size=1, max_size=1_000))
def test_a_notice_about_runs_names_them_all_or_says_look_again(ids: set[int]) -> None:
    notice = channels.about_runs(channels.FINISHED, ids)
    assert len(notice.payload.encode()) < TOO_LONG
    read = channels.read_run_ids(notice.payload)
    assert read == ids if notice.payload != channels.EVERYTHING else read is None


def test_as_many_runs_as_fit_are_named() -> None:
    fits = range(1_000, 1_000 + 1_580)
    assert channels.read_run_ids(channels.about_runs(channels.CANCEL, fits).payload) == set(fits)
    assert channels.about_runs(channels.CANCEL, range(1_000, 1_000 + 1_581)) == Notice(channels.CANCEL, "*")


@pytest.mark.parametrize("payload", ["", "*", "1,", ",1", "1,x", "one", "1.5", "1;2"])
def test_a_notice_about_runs_that_cannot_be_read_means_look_again(payload: str) -> None:
    assert channels.read_run_ids(payload) is None


@pytest.mark.parametrize("alone", [True, False])
def test_notices_are_sent_in_one_statement(alone: bool) -> None:
    query = channels.notify([Notice("a", "1"), Notice("b", "2")], alone=alone)
    assert query.params == {"channels": ["a", "b"], "payloads": ["1", "2"]}
    assert query.text.count("pg_notify(") == 1
    assert ("synchronous_commit" in query.text) is alone


def test_the_channels_are_three() -> None:
    assert len({channels.RUNS, channels.FINISHED, channels.CANCEL}) == 3
