"""The assertions pass where they should, and where they fail their message says what is there instead."""

from __future__ import annotations

import asyncio
import inspect
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from queue_service import App, Run
from queue_service.errors import ConfigError
from queue_service.testing import assert_enqueued, drain, eventually, refute_enqueued

MAIL: dict[str, Any] = {"to": "ada", "about": {"order": 7, "items": ["a", "b"]}}


@pytest.fixture
async def mail(app: App) -> int:
    @app.task(queue="mail")
    async def send(to: str, about: Any = None) -> None:
        return

    return await app.enqueue("send", MAIL, priority=3, timeout=5, metadata={"from": "tests", "n": 1}, singleton_key="k")


class TestWhatFits:
    @pytest.mark.parametrize(
        ("payload", "fields"),
        [
            (None, {}),
            ({}, {}),
            ({"to": "ada"}, {"queue": "mail"}),
            ({"about": {"order": 7}}, {"priority": 3, "singleton_key": "k"}),
            ({"about": {"items": ("a", "b")}}, {"timeout": 5}),
            ({"to": lambda to: to.startswith("a")}, {"timeout": timedelta(seconds=5)}),
            (None, {"metadata": {"n": 1}, "organization_id": None}),
            (None, {"run_at": lambda at: at < datetime.now(UTC) + timedelta(minutes=1), "count": 1}),
            (None, {"id": lambda run_id: run_id > 0, "state": "queued"}),
        ],
    )
    async def test_is_found_and_refuted(self, app: App, mail: int, payload: Any, fields: dict[str, Any]) -> None:
        run = await assert_enqueued(app, "send", payload, **fields)
        assert isinstance(run, Run)
        assert run.id == mail
        fields.pop("count", None)
        with pytest.raises(AssertionError, match=f"run {mail}: payload="):
            await refute_enqueued(app, "send", payload, **fields)

    @pytest.mark.parametrize(
        ("payload", "fields", "why"),
        [
            ({"to": "bob"}, {}, "payload['to'] is 'ada'"),
            ({"cc": "bob"}, {}, "payload has no 'cc'"),
            ({"about": {"order": 8}}, {}, "payload['about']['order'] is 7"),
            ({"about": {"items": ["a"]}}, {}, "payload['about']['items'] is ['a', 'b']"),
            ({"to": lambda to: to == "bob"}, {}, "payload['to'] is 'ada'"),
            ({"to": "bob"}, {"queue": "fast"}, "payload['to'] is 'ada'; queue is 'mail'"),
            (None, {"metadata": {"n": 2}}, "metadata['n'] is 1"),
            (None, {"organization_id": "acme"}, "organization_id is None"),
            (None, {"timeout": 6}, "timeout is datetime.timedelta(seconds=5)"),
            (None, {"state": "failed"}, "it is queued"),
        ],
    )
    async def test_is_not_what_differs_and_the_message_says_in_what(
        self, app: App, mail: int, payload: Any, fields: dict[str, Any], why: str
    ) -> None:
        await refute_enqueued(app, "send", payload, **fields)
        with pytest.raises(AssertionError) as raised:
            await assert_enqueued(app, "send", payload, **fields)
        assert f"  run {mail}: {why}" in str(raised.value).splitlines()

    async def test_is_the_one_enqueued_first_of_several(self, app: App, mail: int) -> None:
        later = await app.enqueue("send", MAIL)
        assert (await assert_enqueued(app, "send", count=2)).id == mail < later

    async def test_is_found_behind_more_runs_than_a_page_holds(self, app: App, mail: int) -> None:
        await app.enqueue_many("send", [{"to": "bob"}] * 1_500)
        assert (await assert_enqueued(app, "send", {"to": "ada"}, count=1)).id == mail
        await assert_enqueued(app, "send", count=1_501)

    async def test_may_be_a_run_that_has_ended_if_asked_for(self, app: App, mail: int) -> None:
        await drain(app)
        await refute_enqueued(app, "send")
        assert (await assert_enqueued(app, "send", MAIL, state="succeeded")).id == mail

    async def test_is_seen_in_a_transaction_before_it_is_committed(self, app: App, database: str) -> None:
        closed = App(database)
        with psycopg.connect(database) as mine:
            await app.enqueue("noop", {}, conn=mine)
            await assert_enqueued(closed, "noop", conn=mine)
            await refute_enqueued(app, "noop")
            mine.rollback()
            await refute_enqueued(closed, "noop", conn=mine)


class TestTheMessage:
    async def test_lists_what_is_there(self, app: App, mail: int) -> None:
        await app.enqueue_many("report", [{}, {}])
        await app.enqueue("sync", {})
        with pytest.raises(AssertionError) as raised:
            await assert_enqueued(app, "send", {"to": "bob"}, queue="mail")
        assert str(raised.value) == (
            "There is no queued run of task 'send' with payload={'to': 'bob'}, queue='mail'.\n"
            "Runs of 'send':\n"
            f"  run {mail}: payload['to'] is 'ada'\n"
            "Other tasks, queued: 'report' (2), 'sync' (1)"
        )

    @pytest.mark.usefixtures("mail")
    async def test_says_that_there_is_nothing_and_what_may_have_been_meant(self, app: App) -> None:
        with pytest.raises(AssertionError) as raised:
            await assert_enqueued(app, "sent")
        assert str(raised.value) == (
            "There is no queued run of task 'sent'.\n"
            "No run of 'sent' is there at all.\n"
            "Other tasks, queued: 'send' (1)\n"
            "This App has no task of that name. Did you mean 'send'?"
        )

    async def test_of_a_wrong_count_says_both_and_which_they_are(self, app: App, mail: int) -> None:
        with pytest.raises(AssertionError) as raised:
            await assert_enqueued(app, "send", {"to": "ada"}, count=2)
        first, _, line = str(raised.value).splitlines()
        assert first == "1 instead of 2 queued run of task 'send' with payload={'to': 'ada'}."
        assert line.startswith(f"  run {mail}: payload={{'to': 'ada', ")
        assert line.endswith(", queue='mail', as it should be")

    async def test_is_short_where_there_is_much(self, app: App) -> None:
        await app.enqueue_many("send", [{"to": str(n)} for n in range(100)])
        with pytest.raises(AssertionError) as raised:
            await assert_enqueued(app, "send", {"to": "ada"})
        assert len(str(raised.value).splitlines()) == 13
        assert str(raised.value).endswith("  and 90 more")


class TestMistakesOfTheTest:
    async def test_a_field_that_no_run_has_is_refused(self, app: App) -> None:
        with pytest.raises(ConfigError, match=r"no field 'que'\. Did you mean 'queue'"):
            await assert_enqueued(app, "send", que="mail")
        with pytest.raises(ConfigError, match="no field 'que'"):
            await refute_enqueued(app, "send", que="mail")

    async def test_a_count_of_none_at_all_is_refused(self, app: App) -> None:
        with pytest.raises(ConfigError, match="refute_enqueued"):
            await assert_enqueued(app, "send", count=0)

    async def test_a_state_that_there_is_not_is_refused(self, app: App) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'succeeded'"):
            await assert_enqueued(app, "send", state="succeed")


class TestEventually:
    async def test_returns_the_first_true_value(self) -> None:
        values = iter([None, 0, "", "now", "later"])
        assert await eventually(lambda: next(values)) == "now"

    async def test_awaits_what_is_asynchronous(self) -> None:
        values = iter([False, True])

        async def condition() -> bool:
            await asyncio.sleep(0)
            return next(values)

        assert await eventually(condition) is True

    async def test_fails_with_the_last_value(self) -> None:
        with pytest.raises(AssertionError, match=r"within 0\.01 s; the last value was \[\]"):
            await eventually(list, within=0.01)

    async def test_looks_at_least_once(self) -> None:
        assert await eventually(lambda: 1, within=0) == 1


def test_every_function_says_what_it_does() -> None:
    import queue_service.testing as testing  # noqa: PLR0402

    assert [name for name in testing.__all__ if not inspect.getdoc(getattr(testing, name))] == []
