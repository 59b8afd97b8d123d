"""An App for worker processes under test: its tasks leave witnesses in files named by their payloads."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import structlog

from queue_service import App, Cancel, Retry, RetryLater, Run, Snooze

app = App()


@app.task
async def double(n: int) -> int:
    return 2 * n


@app.task(retry=Retry(max_attempts=1))
async def fail() -> None:
    raise RuntimeError("on purpose")


@app.task
async def hold(directory: str, run: Run) -> None:
    """Says in DIRECTORY/started that it began, and waits until DIRECTORY/release is there."""
    _append(Path(directory) / "started", f"{run.id}\n")
    release = Path(directory) / "release"
    while not release.exists():  # noqa: ASYNC110 - the other side is another process
        await asyncio.sleep(0.01)


@app.task(on_lost="fail")
async def hold_once(directory: str, run: Run) -> None:
    await hold(directory, run)


@app.task
async def witness(path: str, seconds: float, run: Run) -> int:
    """Writes a line when it begins and another when it has ended."""
    _append(Path(path), f"begun {run.id} {run.attempt} {os.getpid()}\n")
    await asyncio.sleep(seconds)
    _append(Path(path), f"ended {run.id} {run.attempt} {os.getpid()}\n")
    return run.id


@app.task
async def poison(path: str, run: Run) -> None:
    """Kills its process, once it is seen to be running."""
    _append(Path(path), f"poison {run.id} {run.attempt} {os.getpid()}\n")
    await asyncio.sleep(0.2)
    os._exit(9)


@app.task
def hold_thread(directory: str) -> None:
    """As `hold`, in a thread."""
    _append(Path(directory) / "started", "thread\n")
    while not (Path(directory) / "release").exists():
        time.sleep(0.01)


@app.task
async def clog(directory: str) -> None:
    """As `hold`, and blocks the event loop meanwhile."""
    hold_thread(directory)


@app.task
async def grind(path: str, rounds: int) -> None:
    """Blocks the event loop for some seconds, in one call that takes no notice of signals."""
    _append(Path(path), "begun\n")
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
    _append(Path(path), "ended\n")


@app.task
async def speak(word: str) -> None:
    structlog.get_logger("theirs").info(word, name="a field of theirs")
    logging.getLogger("theirs").info("plain %s", word)


@app.task
def speak_in_thread(word: str) -> None:
    structlog.get_logger("theirs").info(word)


@app.task(process=True)
def speak_in_process(word: str) -> None:
    structlog.get_logger("theirs").info(word)
    logging.getLogger("theirs").info("plain %s", word)


@app.task
async def spend(run: Run, dies: str = "") -> None:
    """Leaves a row in `effects` as its run ends. At its first attempt its process dies, if asked: before it, or after."""
    async with run.transaction() as conn:
        await conn.execute("insert into effects values (%s, %s)", [run.id, run.attempt])
        if dies == "before" and run.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if dies == "after" and run.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(queue="slow")
async def hold_in_transaction(run: Run, directory: str) -> None:
    """As `hold`, in a transaction of its own."""
    async with run.transaction():
        await hold(directory, run)


@app.task(process=True, retry=Retry(max_attempts=1), timeout=1)
def effect_in_time(run: Run) -> None:
    """As `effect`, with little time."""
    with run.transaction() as conn:
        conn.execute("insert into public.effects values (%s, %s)", [run.id, run.attempt])


@app.task(process=True, retry=Retry(max_attempts=1))
def sleep_in_database(run: Run) -> None:
    """Has the database sleep for long."""
    with run.transaction() as conn:
        conn.execute("select pg_sleep(%s)", [3600])


@app.task
async def add_one(run: Run, seconds: float) -> None:
    """Counts one more in `counter`, and takes its time about it."""
    async with run.transaction() as conn:
        await asyncio.sleep(seconds)
        await conn.execute("update counter set n = n + 1")
    await asyncio.sleep(seconds)


def _leave(path: str, line: str) -> str:
    _append(Path(path), f"{line}\n")
    return line


@app.task
async def pay_in_steps(run: Run, path: str, dies_behind: str = "") -> list[str]:
    """Leaves a line in the file at PATH in each of two steps, and a row in `effects` in a third. At its first attempt its
    process is killed behind one of them, or in the third."""

    def may_die(name: str) -> None:
        if name == dies_behind and run.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    found = []
    for name in ("first", "second"):
        found.append(await run.step(name, _leave, path, name))
        may_die(name)
    async with run.step("third") as step:
        if not step.done:
            await step.conn.execute("insert into effects values (%s, %s)", [run.id, run.attempt])
            step.result = "third"
            may_die("in the third")
    may_die("third")
    return [*found, step.result]


# In processes of their own


@app.task(process=True, retry=Retry(max_attempts=2, base=0))
def pay_in_process(run: Run, path: str, dies: bool = False) -> list[Any]:
    """As `pay_in_steps`. It fails once, or its process dies."""
    found = [run.step("first", _leave, path, line="first")]
    with run.step("second") as step:
        if not step.done:
            run.step("in a block", _leave, path, line="inner")
            step.conn.execute("insert into effects values (%s, %s)", [run.id, run.attempt])
            step.result = os.getpid()
    if run.attempt == 1:
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("again")
    refused: list[str] = []
    for call in (lambda: run.step("first", print), lambda: asyncio.run(_step_on_a_loop(run))):
        try:
            call()
        except ValueError as error:
            refused.append(type(error).__name__)
    return [*found, step.result == os.getpid() and not dies, *refused]


async def _step_on_a_loop(run: Run) -> None:
    await run.step("another", _leave, "/nowhere", "nothing")


class Busy(Exception):
    def __init__(self, seconds: float | None) -> None:
        super().__init__("too busy")
        self.seconds = seconds


def when_it_says(failures: int, error: BaseException) -> float | None:
    assert isinstance(error, Busy)
    return None if error.seconds is None else error.seconds + failures


@app.task(process=True)
def where(run: Run, n: int = 0) -> Any:
    print("printed, and no answer", end="", flush=True)  # noqa: T201 - it must not disturb the answer
    return [n, run.id, run.attempt, os.getpid()]


@app.task(process=True, retry=Retry(max_attempts=1))
def burn(path: str, program: str | None = None) -> None:
    """Computes for ever, or for a minute. Its process, and one that it starts, are named in the file at PATH."""
    started = subprocess.Popen([sys.executable, "-c", program]) if program else None
    _append(Path(path), f"{os.getpid()} {started.pid if started else 0}\n")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        sum(range(10_000))


@app.task(process=True, retry=Retry(max_attempts=1), on_lost="fail")
def burn_once(path: str) -> None:
    burn(path)


@app.task(process=True, retry=Retry(max_attempts=1))
def nap(seconds: float, path: str | None = None) -> int:
    """Leaves two lines in the file at PATH, and sleeps between them."""
    if path:
        _append(Path(path), "begun\n")
    time.sleep(seconds)
    if path:
        _append(Path(path), "ended\n")
    return os.getpid()


@app.task(process=True, retry=Retry(max_attempts=1))
def die(how: str | int) -> None:
    if isinstance(how, int):
        os._exit(how)
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(60)


@app.task(process=True, retry=Retry(max_attempts=2, base=0), on_lost="fail")
def die_once(how: str | int) -> None:
    die(how)


@app.task(process=True, retry=Retry(backoff=when_it_says, never=(KeyError,)))
def say(word: str, value: Any = None) -> Any:
    words: dict[str, Any] = {"snooze": Snooze, "cancel": Cancel, "give": lambda value: value, "set": lambda _: object()}
    errors: dict[str, Any] = {"busy": Busy, "key": KeyError, "later": RetryLater, "exit": SystemExit}
    if word in errors:
        raise errors[word](value)
    return words[word](value)


@app.task(process=True)
def look(run: Run) -> Any:
    """What the database says of this very run."""
    with app.sync as q:
        found = q.get(run.id)
    return found and found.state.value


@app.task(process=True, retry=Retry(max_attempts=1))
def effect(run: Run, dies: bool = False, raises: bool = False) -> None:
    """Leaves a row in `effects` as its run ends."""
    transaction = run.transaction()
    with transaction as conn:
        conn.execute("insert into effects values (%s, %s)", [run.id, run.attempt])
        transaction.result = os.getpid()
        if raises:
            raise RuntimeError("on purpose")
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(process=True, retry=Retry(max_attempts=1))
def progress(run: Run, path: str) -> list[bool]:
    """Reports more often than anybody could store, and waits for the file at PATH."""
    said = [run.progress(n / 1000, f"step {n}") for n in range(500)]
    while not Path(path).exists():
        time.sleep(0.01)
    return sorted(set(said))


def _append(path: Path, line: str) -> None:
    """One write of one line: whole, even among processes that are killed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@app.task
async def swallow(path: str) -> None:
    """Ends for nobody."""
    _append(Path(path), "")
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


@app.task
async def block(path: str) -> None:
    """Lets nothing else run on its event loop."""
    _append(Path(path), "")
    while True:
        time.sleep(0.1)  # noqa: ASYNC251 - what is tested


@app.task
def thread(path: str) -> None:
    """Leaves a thread behind for which Python waits."""
    threading.Thread(target=time.sleep, args=[3_600]).start()
    Path(path).touch()
    time.sleep(3_600)  # what is tested


@app.task
async def ask_around(run: Run) -> None:
    """Waits for another run, and follows a stream."""
    stream = f"asked-{run.id}"
    await app.events.append(stream, "delta", {})
    async for event in app.events.follow(stream):
        assert event.seq == 1
        break
    await app.wait(await app.enqueue("double", {"n": 1}), timeout=30)
