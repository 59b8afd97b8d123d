"""What the suite says of itself: it calls nothing clean that it did not check, and no fault done that was none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from tests.chaos.ha import cluster, suite
from tests.chaos.ha.checker import Verdict
from tests.chaos.ha.cluster import Cluster
from tests.chaos.ha.faults import Fault
from tests.chaos.ha.network import Network
from tests.chaos.ha.routes import ROUTES

ROOT = Path(__file__).parents[3]
KILL = Fault("kill", "n1", 0.0, "n2", 1.0, dict.fromkeys(ROUTES, 1.0), dict.fromkeys(ROUTES, 1.0))


def concluded(record: suite.Record, **wanted: int) -> int:
    return suite.conclude(record, wanted, is_lenient=False)


def test_what_was_checked_is_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = suite.Record(tmp_path / "record.json", 1)
    record.put([KILL], Verdict())
    assert concluded(record, kill=1, partition=0) == 0
    said = capsys.readouterr().out
    assert "clean: nothing lost" in said
    assert "not done" not in said


def test_nothing_checked_is_not_clean(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite, "missing", list)
    assert suite.main([word for kind in suite.WORDS.values() for word in (f"--{kind}", "0")]) == 1
    assert "nothing was checked" in capsys.readouterr().out


def test_faults_that_the_machine_does_not_allow_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    record = suite.Record(None, 1)
    record.put([KILL], Verdict())
    assert concluded(record, kill=1, partition=5) == 0
    assert "not done: 5 of 5 partitions" in capsys.readouterr().out


def test_a_round_that_failed_is_not_forgotten_when_it_is_taken_up_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(TimeoutError), suite.Record(path, 1).failures():
        raise TimeoutError("service by every route: not within 120 s.")
    again = suite.Record(path, 1)
    again.put([KILL], Verdict())
    assert concluded(again, kill=1) == 1
    assert "service by every route: not within 120 s." in capsys.readouterr().out


def test_one_that_was_broken_off_is_taken_up_again(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(KeyboardInterrupt), suite.Record(path, 1).failures():
        raise KeyboardInterrupt
    assert not path.exists() or "failed" not in json.loads(path.read_text())["sessions"][0]


def test_the_logs_of_a_cluster_that_does_not_come_up_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def cables() -> Iterator[Network]:
        yield Network(1, has_cables=True)

    @contextmanager
    def never(place: Path, _network: Network) -> Iterator[Cluster]:
        (place / "node.log").write_text("why")
        raise TimeoutError
        yield

    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: os.fspath(tmp_path))
    monkeypatch.setattr(suite, "network", cables)
    monkeypatch.setattr(suite, "running", never)
    with pytest.raises(TimeoutError), suite.suite(1):
        pass
    assert (tmp_path / "node.log").read_text() == "why"
    assert f"left in {tmp_path}" in capsys.readouterr().out


def test_one_that_is_told_to_end_takes_away_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    is_there = False

    @contextmanager
    def cables() -> Iterator[Network]:
        nonlocal is_there
        is_there = True
        try:
            yield Network(1, has_cables=True)
        finally:
            is_there = False

    @contextmanager
    def told_to_end(_place: Path, _network: Network) -> Iterator[Cluster]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield Cluster(tmp_path, Network(1, has_cables=True))

    monkeypatch.setattr(tempfile, "mkdtemp", lambda **_: os.fspath(tmp_path))
    monkeypatch.setattr(suite, "network", cables)
    monkeypatch.setattr(suite, "running", told_to_end)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), suite.suite(1):
        pass
    assert (is_there, signal.getsignal(signal.SIGTERM)) == (False, before)
    assert f"left in {tmp_path}" in capsys.readouterr().out


def test_a_pooler_that_is_not_there_was_not_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Cluster(tmp_path, Network(1, has_cables=False))
    family: list[Any] = [psutil.Process()]
    monkeypatch.setattr(made, "_family", lambda _node: family)
    monkeypatch.setattr(cluster, "POOLER_TIMEOUT", 0.2)
    with pytest.raises(TimeoutError, match="a pgbouncer of n1 to kill"):
        made.restart_pooler("n1")


def test_the_command_says_how_it_is_used() -> None:
    used = subprocess.run([ROOT / "scripts" / "chaos"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (used.returncode, used.stdout) == (2, "")
    assert used.stderr.startswith("Break a real cluster")
    assert used.stderr.rstrip().splitlines()[-1].startswith("Needs root")
