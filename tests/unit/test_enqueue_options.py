"""Everything a caller can get wrong about a run is refused, in words, before anything is sent."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from queue_service import App
from queue_service.app import enqueue as enqueueing
from queue_service.app.enqueue import MAX_QUEUE, MAX_TASK
from queue_service.db.channels import Notice
from queue_service.errors import ConfigError, PayloadRefused, QueueServiceError
from queue_service.runs.model import NewRun
from queue_service.tasks import Tasks
from queue_service.words import MAX_WORD

LIMIT = 256 * 1024
NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)

BAD: list[tuple[dict[str, Any], type[QueueServiceError], str]] = [
    ({"queue": ""}, ConfigError, "queue must be a text that is not empty"),
    ({"queue": 5}, ConfigError, "queue must be a text"),
    ({"queue": b"mail"}, ConfigError, "queue must be a text"),
    ({"queue": "q" * (MAX_QUEUE + 1)}, ConfigError, "queue is 129 bytes long; the limit is 128"),
    ({"queue": "ö" * 65}, ConfigError, "queue is 130 bytes long"),
    ({"queue": "a\x00b"}, PayloadRefused, "queue holds a NUL"),
    ({"queue": "\ud800"}, PayloadRefused, "queue holds a lone surrogate"),
    ({"priority": 2**15}, ConfigError, "priority must be a whole number from -32768 to 32767, not 32768"),
    ({"priority": -(2**15) - 1}, ConfigError, "priority"),
    ({"priority": True}, ConfigError, "priority"),
    ({"priority": 1.0}, ConfigError, "priority"),
    ({"priority": "1"}, ConfigError, "priority"),
    ({"priority": None}, ConfigError, "priority"),
    ({"priority": math.nan}, ConfigError, "priority"),
    ({"delay": -1}, ConfigError, "delay must not be negative"),
    ({"delay": timedelta(seconds=-1)}, ConfigError, "delay must not be negative"),
    ({"delay": math.nan}, ConfigError, "delay is nan seconds; it must be finite"),
    ({"delay": math.inf}, ConfigError, "delay is inf"),
    ({"delay": 10**400}, ConfigError, "delay"),
    ({"delay": timedelta.max}, ConfigError, "delay must be at most"),
    ({"delay": True}, ConfigError, "delay must be a timedelta or a number of seconds, not bool"),
    ({"delay": "5s"}, ConfigError, "not str"),
    ({"delay": 1, "run_at": NOW}, ConfigError, "delay and run_at both say when"),
    ({"delay": 0, "run_at": NOW}, ConfigError, "delay and run_at both say when"),
    ({"run_at": datetime(2030, 1, 1)}, ConfigError, "has no time zone"),  # noqa: DTZ001
    ({"run_at": NOW.date()}, ConfigError, "run_at must be a datetime, not date"),
    ({"run_at": NOW.timestamp()}, ConfigError, "run_at must be a datetime, not float"),
    ({"run_at": NOW.isoformat()}, ConfigError, "run_at must be a datetime, not str"),
    ({"run_at": datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))}, ConfigError, "run_at"),
    ({"run_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))}, ConfigError, "run_at"),
    ({"run_at": datetime.max.replace(tzinfo=UTC), "expires_in": 60}, ConfigError, "run_at|expires_in"),
    ({"expires_in": 0}, ConfigError, "expires_in must be positive"),
    ({"expires_in": -5}, ConfigError, "expires_in must be positive"),
    ({"expires_in": math.nan}, ConfigError, "expires_in is nan"),
    ({"singleton_key": ""}, ConfigError, "singleton_key must be a text that is not empty"),
    ({"singleton_key": 7}, ConfigError, "singleton_key must be a text"),
    ({"singleton_key": "k" * (MAX_WORD + 1)}, ConfigError, "singleton_key is 1025 bytes"),
    ({"singleton_key": "\x00"}, PayloadRefused, "singleton_key holds a NUL"),
    ({"ordering_key": ""}, ConfigError, "ordering_key"),
    ({"ordering_key": "k" * (MAX_WORD + 1)}, ConfigError, "ordering_key is 1025 bytes"),
    ({"ordering_key": "a\x00"}, PayloadRefused, "ordering_key holds a NUL"),
    ({"organization_id": ""}, ConfigError, "organization_id"),
    ({"organization_id": 12}, ConfigError, "organization_id must be a text"),
    ({"organization_id": "\udfff"}, PayloadRefused, "organization_id holds a lone surrogate"),
    ({"max_attempts": 0}, ConfigError, "max_attempts must be a whole number from 1"),
    ({"max_attempts": -1}, ConfigError, "max_attempts"),
    ({"max_attempts": True}, ConfigError, "max_attempts"),
    ({"max_attempts": 2.0}, ConfigError, "max_attempts"),
    ({"max_attempts": 2**31}, ConfigError, "max_attempts"),
    ({"retry_delay": -1}, ConfigError, "retry_delay must not be negative"),
    ({"retry_delay": math.inf}, ConfigError, "retry_delay is inf"),
    ({"timeout": 0}, ConfigError, "timeout must be positive"),
    ({"timeout": "1m"}, ConfigError, "timeout must be a timedelta"),
    ({"metadata": []}, PayloadRefused, "metadata must be a dict"),
    ({"metadata": {"a": "\x00"}}, PayloadRefused, r"metadata\['a'\] holds a NUL"),
    ({"metadata": {"a": math.nan}}, PayloadRefused, r"metadata\['a'\] is nan"),
    ({"metadata": {"a": "x" * LIMIT}}, PayloadRefused, "metadata is 262,152 bytes"),
]
NAMES = ["-".join(f"{key}={str(value)[:12]!r}" for key, value in options.items()) for options, _, _ in BAD]


def new(task: Any = "noop", payload: Any = None, *, tasks: Tasks | None = None, **options: Any) -> NewRun:
    chosen = {} if payload is None else payload
    return enqueueing.new_run(tasks if tasks is not None else Tasks(), LIMIT, task, chosen, **options)


def many(payloads: Any, *, tasks: Tasks | None = None, **options: Any) -> tuple[NewRun, list[str]]:
    return enqueueing.new_runs(tasks if tasks is not None else Tasks(), LIMIT, "noop", payloads, options)


@pytest.fixture
def app() -> App:
    """An App that is never opened: what it refuses, it refuses without a database."""
    made = App("postgresql://nobody@localhost/nothing")

    @made.task(queue="mail")
    def send(to: str) -> None: ...

    return made


@pytest.mark.parametrize(("options", "error", "said"), BAD, ids=NAMES)
def test_an_option_that_cannot_be_stored_is_refused(
    options: dict[str, Any], error: type[QueueServiceError], said: str
) -> None:
    with pytest.raises(error, match=said):
        new(**options)


@pytest.mark.parametrize(("options", "error", "said"), BAD, ids=NAMES)
def test_an_option_that_cannot_be_stored_is_refused_for_many_runs_too(
    options: dict[str, Any], error: type[QueueServiceError], said: str
) -> None:
    with pytest.raises(
        (ConfigError, error), match="singleton_key needs enqueue" if "singleton_key" in options else said
    ):
        many([{}], **options)


@pytest.mark.parametrize(
    ("task", "error", "said"),
    [
        ("", ConfigError, "task must be a text that is not empty"),
        (None, ConfigError, "task must be a text"),
        ("t" * (MAX_TASK + 1), ConfigError, "task is 257 bytes long"),
        ("a\x00", PayloadRefused, "task holds a NUL"),
        ("\ud800", PayloadRefused, "task holds a lone surrogate"),
    ],
)
def test_a_task_name_that_cannot_be_stored_is_refused(task: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        new(task)
    with pytest.raises(error, match=said):
        enqueueing.new_runs(Tasks(), LIMIT, task, [{}], {})


@pytest.mark.parametrize("task", [["send"], {"send": 1}, {"send"}])
def test_a_task_name_that_is_no_text_is_refused_for_many_runs_too(task: Any) -> None:
    with pytest.raises(ConfigError, match="task must be a text"):
        enqueueing.new_runs(Tasks(), LIMIT, task, [{}], {})


def test_the_longest_and_largest_options_are_taken() -> None:
    taken = new(
        "t" * MAX_TASK, {"a": "x" * (LIMIT - 8)}, queue="q" * MAX_QUEUE, priority=-(2**15), delay=0,
        singleton_key="s" * MAX_WORD, ordering_key="o" * MAX_WORD, organization_id="i" * MAX_WORD, max_attempts=2**31 - 1,
        retry_delay=0, timeout=timedelta(days=36_500), expires_in=0.000_001, metadata={"m": None},
    )  # fmt: skip
    assert (taken.priority, taken.delay, taken.retry_delay) == (-(2**15), timedelta(0), timedelta(0))
    assert (len(taken.payload), taken.metadata) == (LIMIT, '{"m":null}')
    assert new(priority=2**15 - 1).priority == 2**15 - 1


def test_what_is_not_said_is_left_to_the_task_and_the_worker() -> None:
    assert new() == NewRun(task="noop", queue="default", payload="{}")


def test_a_run_goes_to_the_queue_of_its_task_unless_another_is_named(app: App) -> None:
    assert new("send", {"to": "a"}, tasks=app.tasks).queue == "mail"
    assert new("send", {"to": "a"}, tasks=app.tasks, queue="fast").queue == "fast"


def test_a_task_unknown_here_may_take_any_payload() -> None:
    assert new("elsewhere", {"anything": [1]}).payload == '{"anything":[1]}'


def test_a_payload_that_does_not_fit_its_task_is_refused(app: App) -> None:
    with pytest.raises(PayloadRefused, match=r"Task 'send'\(to: str\).*missing a required argument: 'to'"):
        new("send", {}, tasks=app.tasks)
    with pytest.raises(PayloadRefused, match="unexpected keyword argument 'cc'"):
        enqueueing.new_runs(app.tasks, LIMIT, "send", [{"to": "a"}, {"to": "b", "cc": 1}], {})


@pytest.mark.parametrize("payload", [[], "text", 5, True])
def test_a_payload_that_is_no_object_is_refused(payload: Any) -> None:
    with pytest.raises(PayloadRefused, match="payload must be a dict"):
        new(payload=payload)
    with pytest.raises(PayloadRefused, match="payload must be a dict"):
        many([{}, payload])


def test_the_naive_time_is_refused_with_the_way_to_a_good_one() -> None:
    with pytest.raises(ConfigError, match=r"2030-01-01T00:00:00 has no time zone.*datetime.now\(timezone.utc\)"):
        new(run_at=datetime(2030, 1, 1))  # noqa: DTZ001


@pytest.mark.parametrize(
    "run_at",
    [NOW, datetime(1970, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=timezone(timedelta(hours=-5)))],
)
def test_a_time_with_a_zone_is_taken_as_it_is(run_at: datetime) -> None:
    assert new(run_at=run_at).run_at == run_at


@pytest.mark.parametrize(
    ("policy", "hint"),
    [("replce", " Did you mean 'replace'?"), ("", ""), ("RETURN", ""), (None, ""), (1, ""), (["return"], "")],
)
async def test_another_policy_is_refused_with_the_three_there_are(app: App, policy: Any, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        await app.enqueue("send", {"to": "a"}, on_conflict=policy)
    assert str(refused.value).startswith("on_conflict must be one of return, replace, raise.")
    assert hint in str(refused.value)


async def test_an_unknown_option_is_refused(app: App) -> None:
    with pytest.raises(TypeError, match="prioritty"):
        await app.enqueue("send", {"to": "a"}, prioritty=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"enqueue_many has no option 'prioritty'\. Did you mean 'priority'\?"):
        await app.enqueue_many("send", [{"to": "a"}], prioritty=1)
    with pytest.raises(TypeError, match="prioritty"):
        app.sync.enqueue("send", {"to": "a"}, conn=object(), prioritty=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("option", ["singleton_key", "on_conflict"])
async def test_many_runs_cannot_share_a_singleton_key(app: App, option: str) -> None:
    with pytest.raises(ConfigError, match="singleton_key needs enqueue, one by one"):
        await app.enqueue_many("send", [{"to": "a"}], **{option: "x"})


async def test_an_app_refuses_options_before_it_looks_for_a_database(app: App) -> None:
    with pytest.raises(ConfigError, match="priority must be"):
        await app.enqueue("send", {"to": "a"}, priority=True)
    with pytest.raises(PayloadRefused, match="NUL"):
        await app.enqueue("send", {"to": "\x00"})
    with pytest.raises(PayloadRefused, match="missing a required argument"):
        await app.enqueue_many("send", [{}])
    with pytest.raises(ConfigError, match="priority must be"):
        app.sync.enqueue("send", {"to": "a"}, priority=True, conn=object())


async def test_an_app_that_is_not_open_says_how_to_open_it(app: App) -> None:
    with pytest.raises(ConfigError, match=r"not connected\. Use it inside `async with app:`"):
        await app.enqueue("send", {"to": "a"})
    with pytest.raises(ConfigError, match=r"not connected\. Use it inside `with app.sync as q:`"):
        app.sync.enqueue("send", {"to": "a"})


@pytest.mark.parametrize("conn", [object(), "postgresql://", 5])
async def test_a_connection_of_an_unknown_kind_is_refused_by_its_type(app: App, conn: Any) -> None:
    with pytest.raises(ConfigError, match=f"conn={type(conn).__name__} cannot be used. Pass a psycopg Connection"):
        await app.enqueue("send", {"to": "a"}, conn=conn)


def test_many_runs_keep_the_order_of_their_payloads() -> None:
    first, texts = many(({"n": n} for n in range(3)), priority=4, delay=1)
    assert texts == ['{"n":0}', '{"n":1}', '{"n":2}']
    assert (first.priority, first.delay, first.payload) == (4, timedelta(seconds=1), "{}")


def test_many_runs_go_to_the_queue_of_their_task_unless_another_is_named(app: App) -> None:
    payloads = [{"to": "a"}]
    assert enqueueing.new_runs(app.tasks, LIMIT, "send", payloads, {})[0].queue == "mail"
    assert enqueueing.new_runs(app.tasks, LIMIT, "send", payloads, {"queue": "fast"})[0].queue == "fast"
    assert many(payloads)[0].queue == "default"


def test_only_a_run_that_is_due_is_announced() -> None:
    assert enqueueing.notice(new(queue="a b", priority=-3)) == Notice("queue_service_runs", "-3 a b")
    assert enqueueing.notice(new(delay=0)) is not None
    assert enqueueing.notice(new(delay=5)) is None
