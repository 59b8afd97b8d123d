"""The queues that are compared: how each is started, and the environments in which the peers live.

A peer's dependencies are pinned in `contenders/` and installed below it, where git looks away: nothing of theirs is
installed with ours.
"""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
CONTENDERS = HERE / "contenders"
PYTHON = CONTENDERS / ".venv"
NODE = CONTENDERS / "node"
NODE_VERSION = "22.23.3"
OURS = "queue_service"
PATIENCE = 300.0
NODE_PEERS = {"graphile-worker", "pg-boss"}


class PeerFailed(Exception):
    """A contender did not answer."""


def commands(names: list[str]) -> dict[str, list[str]]:
    """How to start each of these; the environments are made where they are missing. Those on Node need npm."""
    if shutil.which("npm") is None and set(names) & NODE_PEERS:
        _say("npm is not installed: graphile-worker and pg-boss are left out")
        names = [name for name in names if name not in NODE_PEERS]
    known = {
        OURS: lambda: [sys.executable, "-m", "benchmarks.contenders.ours"],
        "procrastinate": lambda: [_python(), "-m", "benchmarks.contenders.procrastinate_"],
        "pgqueuer": lambda: [_python(), "-m", "benchmarks.contenders.pgqueuer_"],
        "graphile-worker": lambda: [_node(), str(NODE / "graphile.mjs")],
        "pg-boss": lambda: [_node(), str(NODE / "pgboss.mjs")],
    }
    return {name: known[name]() for name in names}


def _python() -> str:
    program = PYTHON / "bin" / "python"
    wanted = (CONTENDERS / "requirements.txt").read_text()
    installed = PYTHON / "installed.txt"
    if not installed.exists() or installed.read_text() != wanted:
        _say("installing the peers that run on Python")
        venv.create(PYTHON, with_pip=True, clear=True)
        subprocess.run([program, "-m", "pip", "install", "-qq", "-r", CONTENDERS / "requirements.txt"], check=True)
        installed.write_text(wanted)
    return str(program)


def _node() -> str:
    """Node itself comes from npm as well, where there is none or an old one."""
    npm = shutil.which("npm") or ""
    machine = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64"}[platform.machine()]
    package = f"node-{platform.system().lower()}-{machine}"
    program = NODE / "node_modules" / package / "bin" / "node"
    wanted = (NODE / "package.json").read_text()
    installed = NODE / "node_modules" / "installed.json"
    if not installed.exists() or installed.read_text() != wanted:
        _say("installing the peers that run on Node")
        options = ["--silent", "--no-audit", "--no-fund", "--no-save", "--no-package-lock", "--ignore-scripts"]
        subprocess.run([npm, "install", *options, f"{package}@{NODE_VERSION}"], cwd=NODE, check=True)
        installed.write_text(wanted)
    return str(program)


def versions() -> dict[str, str]:
    """The pinned versions of the peers."""
    pinned = [line.split("==") for line in (CONTENDERS / "requirements.txt").read_text().splitlines() if "==" in line]
    node: dict[str, str] = json.loads((NODE / "package.json").read_text())["dependencies"]
    return {name.split("[")[0]: version for name, version in pinned} | node | {"node": NODE_VERSION}


class Program:
    """A contender at work, with a conversation of JSON lines."""

    def __init__(self, name: str, command: list[str], url: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [*command, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def rss(self) -> float:
        """In MB, now. Linux only."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def ask(self, verb: str, **options: Any) -> dict[str, float]:
        """Have it do something, to the end. Raises PeerFailed."""
        self.tell(verb, **options)
        return self.answer()

    def tell(self, verb: str, **options: Any) -> None:
        stdin, _ = _pipes(self._process)
        stdin.write(json.dumps({"do": verb, **options}) + "\n")
        stdin.flush()

    def answer(self, patience: float = 0.0) -> dict[str, float]:
        stdout = _pipes(self._process)[1]
        if not select.select([stdout], [], [], PATIENCE + patience)[0]:
            self._process.kill()
            raise PeerFailed(f"{self.name} gave no answer within {PATIENCE + patience:g} s")
        if not (line := stdout.readline()):
            raise PeerFailed(f"{self.name} ended without an answer, with {self._process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        _pipes(self._process)[0].close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin
    assert process.stdout
    return process.stdin, process.stdout


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def cpu_seconds(pids: list[int]) -> float:
    """What these processes have used, and the children of theirs that have ended. Linux only."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended before the file was opened, or before it was read
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process and its children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        children = []
    return [pid, *map(int, children)]
