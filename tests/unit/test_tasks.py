"""Tasks: what can be registered, which parameter is ours to fill, and what a payload must look like for them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, assert_type

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import queue_service
from queue_service import App, Cancel, Retry, RetryLater, Run, RunState, Snooze
from queue_service.errors import ConfigError, PayloadRefused
from queue_service.tasks import LONGEST, Task, duration

if TYPE_CHECKING:
    from nowhere import OnlyForTypeCheckers  # type: ignore[import-not-found]


@pytest.fixture
def app() -> App:
    """An App that is never opened."""
    return App("postgresql://nobody@localhost/nothing")


class Sent:
    """Stands in for `App.enqueue`."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, task: str, payload: Mapping[str, Any], /) -> int:
        self.runs.append((task, dict(payload)))
        return len(self.runs)


def task_of(function: Callable[..., Any], sent: Sent | None = None) -> Task[..., Any]:
    return Task(
        function, name="t", queue="default", timeout=None, retry=Retry(), enqueue=sent if sent is not None else Sent()
    )


def a_run(payload: dict[str, Any], **fields: Any) -> Run:
    now = datetime.now(UTC)
    made = Run(
        id=1, queue="default", task="t", state=RunState.RUNNING, payload=payload, attempt=1, failures=0, losses=0,
        priority=0, created_at=now, run_at=now,
    )  # fmt: skip
    return msgspec.structs.replace(made, **fields)


def test_a_function_is_registered_under_its_own_name_with_the_defaults(app: App) -> None:
    @app.task
    def send() -> None: ...

    assert app.tasks["send"] is send
    assert (send.name, send.queue, send.timeout, send.retry) == ("send", "default", None, Retry(max_attempts=3))


def test_a_task_may_say_name_queue_timeout_and_retry(app: App) -> None:
    @app.task(name="mail.send", queue="mail", timeout=2.5, retry=Retry(max_attempts=7))
    def send() -> None: ...

    assert list(app.tasks) == ["mail.send"]
    assert len(app.tasks) == 1
    assert (send.queue, send.timeout, send.retry.max_attempts) == ("mail", timedelta(seconds=2.5), 7)


def test_a_task_can_still_be_called(app: App) -> None:
    @app.task
    def double(n: int) -> int:
        return 2 * n

    assert double(21) == 42


async def test_an_async_task_can_still_be_awaited(app: App) -> None:
    @app.task
    async def double(n: int) -> int:
        return 2 * n

    assert double.is_async
    assert await double(21) == 42


def test_two_functions_that_want_one_name_are_refused_with_both_places(app: App) -> None:
    def first() -> None: ...
    def second() -> None: ...

    app.task(name="same")(first)
    with pytest.raises(ConfigError, match=r"Two functions want the task name 'same': .*first and .*second\. Give one"):
        app.task(name="same")(second)
    assert app.tasks["same"].function is first


def test_one_function_may_be_registered_twice_and_under_two_names(app: App) -> None:
    def first() -> None: ...

    app.task(first)
    app.task(queue="other")(first)
    app.task(name="again")(first)
    assert {name: task.queue for name, task in app.tasks.items()} == {"first": "other", "again": "default"}


def test_apps_do_not_share_their_tasks(app: App) -> None:
    app.task(name="mine")(print_nothing)
    assert "mine" not in App("postgresql://nobody@localhost/nothing").tasks


def print_nothing() -> None: ...


def annotated(run: Run, n: int) -> None: ...
def annotated_under_another_name(n: int, job: Run) -> None: ...
def keyword_only(n: int, *, current: Run) -> None: ...
def unannotated(n, run):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    ...


def by_package(job: queue_service.Run, n: int) -> None: ...
def beside_a_name_for_checkers(job: Run, n: OnlyForTypeCheckers) -> None: ...
def beside_one_by_package(job: queue_service.Run, n: OnlyForTypeCheckers) -> None: ...
async def a_coroutine(run: Run, n: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (annotated, "run"),
        (annotated_under_another_name, "job"),
        (keyword_only, "current"),
        (unannotated, "run"),
        (by_package, "job"),
        (beside_a_name_for_checkers, "job"),
        (beside_one_by_package, "job"),
        (a_coroutine, "run"),
    ],
)
def test_the_parameter_for_the_run_is_found_and_filled(function: Callable[..., Any], name: str) -> None:
    task = task_of(function)
    assert task.run_parameter == name
    run = a_run({"n": 1})
    assert task.arguments(run) == {"n": 1, name: run}
    task.check({"n": 1})
    with pytest.raises(PayloadRefused):
        task.check({"n": 1, name: 2})
    with pytest.raises(PayloadRefused):
        task.check({})


def test_annotations_that_are_no_strings_are_read_too() -> None:
    def handler(job, n):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        ...

    handler.__annotations__ = {"job": Run, "n": int}
    assert task_of(handler).run_parameter == "job"


def run_of_another_kind(run: int) -> None: ...
def no_run(runner: int, rerun: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "payload"), [(run_of_another_kind, {"run": 1}), (no_run, {"runner": 1, "rerun": ""})]
)
def test_a_parameter_that_is_only_named_alike_belongs_to_the_payload(
    function: Callable[..., Any], payload: dict[str, Any]
) -> None:
    task = task_of(function)
    assert task.run_parameter is None
    task.check(payload)
    assert task.arguments(a_run(payload)) == payload


@pytest.mark.parametrize("annotation", ["int[str]", "datetime.nothing", "int | 'str'", "not a type"])
def test_an_annotation_that_cannot_be_evaluated_is_no_obstacle(annotation: str) -> None:
    def handler(run: Run, n: int) -> None: ...

    handler.__annotations__["n"] = annotation
    task = task_of(handler)
    assert task.run_parameter == "run"
    task.check({"n": 1})


def plain(to: str, subject: str = "hello") -> None: ...
def rest(to: str, **more: Any) -> None: ...
def nothing() -> None: ...


@pytest.mark.parametrize(
    ("function", "payload"),
    [
        (plain, {"to": "a"}),
        (plain, {"to": "a", "subject": "b"}),
        (plain, {"subject": "b", "to": "a"}),
        (rest, {"to": "a", "anything": 1}),
        (rest, {"to": "a"}),
        (nothing, {}),
    ],
)
def test_a_payload_that_fits_is_taken(function: Callable[..., Any], payload: dict[str, Any]) -> None:
    task_of(function).check(payload)


@pytest.mark.parametrize(
    ("function", "payload", "said"),
    [
        (plain, {}, "missing a required argument: 'to'"),
        (plain, {"to": "a", "cc": "b"}, "unexpected keyword argument 'cc'"),
        (plain, {"subject": "b"}, "missing a required argument: 'to'"),
        (rest, {"anything": 1}, "missing a required argument: 'to'"),
        (rest, {"more": 1}, "missing a required argument: 'to'"),
        (nothing, {"x": 1}, "unexpected keyword argument 'x'"),
        (plain, {1: 2}, "keywords must be strings"),
    ],
)
def test_a_payload_that_does_not_fit_is_refused_with_the_signature(
    function: Callable[..., Any], payload: dict[str, Any], said: str
) -> None:
    with pytest.raises(PayloadRefused) as refused:
        task_of(function).check(payload)
    assert str(refused.value).startswith("Task 't'(")
    assert said in str(refused.value)


def positional(n: int, /) -> None: ...
def starred(*n: int) -> None: ...


@pytest.mark.parametrize("function", [positional, starred])
def test_a_parameter_that_has_no_name_for_a_payload_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"'t' takes .*n: int.* by position"):
        task_of(function)


async def test_arguments_become_a_payload_by_name() -> None:
    sent = Sent()
    assert await task_of(plain, sent).enqueue("a", subject="b") == 1
    assert await task_of(plain, sent).enqueue("a") == 2
    assert await task_of(rest, sent).enqueue("a", x=1, y=2) == 3
    assert await task_of(annotated, sent).enqueue(5) == 4
    assert sent.runs == [
        ("t", {"to": "a", "subject": "b"}),
        ("t", {"to": "a"}),
        ("t", {"to": "a", "x": 1, "y": 2}),
        ("t", {"n": 5}),
    ]


async def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent() -> None:
    sent = Sent()
    with pytest.raises(PayloadRefused, match="cannot be called so: too many positional arguments"):
        await task_of(plain, sent).enqueue("a", "b", "c")
    with pytest.raises(PayloadRefused, match="unexpected keyword argument 'run'"):
        await task_of(annotated, sent).enqueue(n=1, run=2)
    assert sent.runs == []


@pytest.mark.parametrize("attempts", [0, -1, True, 1.5, "3", None, math.nan])
def test_a_number_of_attempts_that_is_none_is_refused(attempts: Any) -> None:
    with pytest.raises(ConfigError, match="max_attempts must be a whole number from 1"):
        Retry(max_attempts=attempts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *[({"backoff": each}, "backoff must be") for each in ("quadratic", "", None, 3, ["linear"])],
        *[({which: each}, f"^{which} ") for which in ("base", "cap") for each in (-1, math.nan, math.inf, "2", True, None)],
        *[({which: each}, rf"Retry\({which}=\)") for which in ("on", "never") for each in (3, "x", [OSError], (OSError, 1))],
    ],
)  # fmt: skip
def test_a_policy_that_is_none_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Retry(**options)


def test_a_policy_that_would_have_to_be_awaited_is_refused() -> None:
    async def policy(failures: int, error: BaseException) -> float:
        return 1.0

    with pytest.raises(ConfigError, match="plain function"):
        Retry(backoff=policy)  # type: ignore[arg-type]


OPTIONS = st.fixed_dictionaries(
    {
        "backoff": st.sampled_from(["exponential", "linear", "fixed"]),
        "base": st.floats(0, LONGEST.total_seconds()) | st.timedeltas(timedelta(0), LONGEST),
        "cap": st.floats(0, LONGEST.total_seconds()) | st.timedeltas(timedelta(0), LONGEST),
        "jitter": st.booleans(),
    }
)


@given(OPTIONS, st.integers(1, 2**31))
def test_every_policy_waits_between_nothing_and_its_cap(options: dict[str, Any], failures: int) -> None:
    wait = Retry(**options).wait(failures, ValueError())
    assert wait is not None
    assert 0 <= wait <= duration(options["cap"], "cap").total_seconds()
    assert timedelta(seconds=wait) >= timedelta(0)


@given(st.floats() | st.integers() | st.timedeltas() | st.none() | st.text() | st.booleans())
def test_what_a_callable_returns_is_a_wait_or_is_refused(answer: Any) -> None:
    try:
        wait = Retry(backoff=lambda *_: answer).wait(1, ValueError())
    except ConfigError:
        return
    assert (wait is None) == (answer is None)
    assert wait is None or 0 <= wait <= LONGEST.total_seconds()


@pytest.mark.parametrize("delay", [-1, math.nan, math.inf, "soon", None])
def test_a_retry_after_no_time_is_refused(delay: Any) -> None:
    with pytest.raises(ConfigError, match=r"RetryLater\(delay\)"):
        RetryLater(delay)


def test_a_function_that_no_process_could_import_is_refused(app: App) -> None:
    def local() -> None: ...

    for function in (local, lambda: None, functools.partial(print_nothing)):
        with pytest.raises(ConfigError, match="not defined at the top of a module"):
            app.task(name="t", process=True)(function)
    with pytest.raises(ConfigError, match="is async"):
        app.task(process=True)(a_coroutine)
    assert len(app.tasks) == 0
    assert app.task(process=True)(plain).process
    assert not app.task(rest).process


@pytest.mark.parametrize("value", [3, "3", {"max_attempts": 3}])
def test_a_retry_that_is_none_is_refused(app: App, value: Any) -> None:
    with pytest.raises(ConfigError, match="retry"):
        app.task(retry=value)(print_nothing)


@pytest.mark.parametrize("value", ["ignore", None, True, ["fail"]])
def test_an_answer_to_a_loss_that_is_none_is_refused(app: App, value: Any) -> None:
    with pytest.raises(ConfigError, match="'retry' or 'fail'"):
        app.task(on_lost=value)(print_nothing)
    assert app.tasks == {}
    assert (app.task(print_nothing).on_lost, app.task(on_lost="fail")(print_nothing).on_lost) == ("retry", "fail")


@pytest.mark.parametrize("timeout", [0, -1, timedelta(0), math.nan, math.inf, True, "5s", timedelta(days=99_999)])
def test_a_timeout_that_is_none_is_refused(app: App, timeout: Any) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        app.task(timeout=timeout)(print_nothing)
    assert len(app.tasks) == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, timedelta(0)), (1.5, timedelta(seconds=1.5)), (timedelta(hours=1), timedelta(hours=1)), (LONGEST, LONGEST)],
)
def test_a_duration_may_be_seconds_or_a_timedelta(value: timedelta | float, expected: timedelta) -> None:
    assert duration(value, "delay") == expected


@pytest.mark.parametrize(
    "value",
    [-1, -0.001, timedelta(microseconds=-1), math.nan, math.inf, -math.inf, 1e300, 10**400, -(10**400), True, "1", None,
     timedelta.max, timedelta.min, LONGEST + timedelta(seconds=1), LONGEST.total_seconds() + 1],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_a_duration_that_is_none_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^delay "):
        duration(value, "delay")


def test_a_positive_duration_is_longer_than_nothing() -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        duration(0, "timeout", positive=True)
    with pytest.raises(ConfigError, match="must be positive"):
        duration(1e-9, "timeout", positive=True)


@pytest.mark.parametrize("delay", [-1, math.nan, "soon", None])
def test_a_snooze_for_no_time_is_refused(delay: Any) -> None:
    with pytest.raises(ConfigError, match=r"Snooze\(delay\)"):
        Snooze(delay)


def test_what_a_handler_may_return_says_what_it_is_given() -> None:
    assert Snooze(90).delay == timedelta(seconds=90)
    assert Cancel("not needed").reason == "not needed"
    assert Cancel().reason


# Batches


def test_the_handler_of_a_batch_takes_its_runs_and_a_payload_may_have_any_keys(app: App) -> None:
    @app.task(batch=100, queue="index")
    async def index(runs: list[Run]) -> list[int]:
        return [run.id for run in runs]

    @app.task(batch=1)
    def one(batch: list[Run], /) -> None: ...

    @app.task
    async def ordinary(n: int) -> int:
        return n

    assert_type(index, Task[..., list[int]])
    assert_type(one, Task[..., None])
    assert (index.batch, one.batch, ordinary.batch) == (100, 1, None)
    index.check({"anything": 1, "runs": 2})
    index.check({})


async def test_a_run_of_a_batch_is_enqueued_by_keywords() -> None:
    def index(runs: list[Run]) -> None: ...

    sent = Sent()
    task: Task[..., Any] = Task(index, name="t", queue="default", timeout=None, retry=Retry(), enqueue=sent, batch=10)
    await task.enqueue(path="a", runs=1)
    assert sent.runs == [("t", {"path": "a", "runs": 1})]
    with pytest.raises(PayloadRefused, match="positional"):
        await task.enqueue({"path": "a"})


@pytest.mark.parametrize("batch", [0, -1, 1_001, True, 2.0, "10"])
def test_batches_of_a_size_that_makes_no_sense_are_refused(app: App, batch: Any) -> None:
    def index(runs: list[Run]) -> None: ...

    with pytest.raises(ConfigError, match="batch must be a whole number from 1 to 1,000"):
        app.task(batch=batch)(index)


def takes_nothing() -> None: ...
def takes_one_run(run: Run) -> None: ...
def takes_a_run_of_another_name(it: Run) -> None: ...
def takes_more(runs: list[Run], path: str) -> None: ...
def takes_a_keyword(*, runs: list[Run]) -> None: ...
def takes_several(*runs: Run) -> None: ...
def takes_any(**runs: Any) -> None: ...


@pytest.mark.parametrize(
    "function",
    [
        takes_nothing, takes_one_run, takes_a_run_of_another_name, takes_more, takes_a_keyword, takes_several, takes_any,
    ],
)  # fmt: skip
def test_a_handler_that_takes_something_else_than_the_runs_of_a_batch_is_refused(
    app: App, function: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=r"must take the runs of a batch, and nothing else"):
        app.task(batch=10)(function)


def test_what_cannot_be_had_with_batches_is_refused(app: App) -> None:
    with pytest.raises(ConfigError, match="max_attempts=1, and the last attempt of a run is made alone"):
        app.task(batch=10, retry=Retry(max_attempts=1))(takes_runs)
    with pytest.raises(ConfigError, match="cannot have both batch and process=True"):
        app.task(batch=10, process=True)(takes_runs)  # type: ignore[call-overload]
    app.task(batch=1, retry=Retry(max_attempts=1))(takes_runs)


def takes_runs(runs: list[Run]) -> None: ...


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 100),
        ({"failures": 1}, 10),
        ({"failures": 2}, 1),
        ({"failures": 3}, 1),
        ({"losses": 1}, 1),
        ({"max_attempts": 1}, 1),
        ({"max_attempts": 2}, 100),
        ({"max_attempts": 2, "failures": 1}, 1),
        ({"max_attempts": 9, "failures": 5}, 1),
    ],
)
def test_a_run_is_handled_with_fewer_the_more_often_it_failed(app: App, fields: dict[str, int], size: int) -> None:
    task = app.task(batch=100)(takes_runs)
    assert task.together(a_run({}, **fields)) == size
