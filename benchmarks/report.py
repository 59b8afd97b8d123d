"""Results as JSON, as a table and as charts."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.arena import Figures

# What is charted: the scenario, the figure, a title, and whether more is better.
CHARTS = {
    "drain": [("drain", "jobs/s", "no-op jobs worked off, jobs/s (more is better)")],
    "enqueue": [
        ("drain", "enqueued in bulk/s", "enqueued in bulk, jobs/s (more is better)"),
        ("enqueue", "16 callers, jobs/s", "enqueued one by one by 16 callers, jobs/s (more is better)"),
    ],
    "latency": [
        ("latency", "p50 ms", "idle, call to handler, p50 ms (less is better)"),
        ("latency", "p99 ms", "idle, call to handler, p99 ms (less is better)"),
    ],
}
TROUBLES = ("backlog", "ten_million", "scheduled", "queues", "processes")
COST = ("ms", "MB", "bytes", "transactions", "seconds")


@dataclass(frozen=True, slots=True)
class Report:
    figures: Figures
    machine: dict[str, Any]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"machine": self.machine, "rounds": self.figures.rounds}
        (folder / "latest.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        (folder / "latest.md").write_text(self.table())
        for name, charts in CHARTS.items():
            present = [each for each in charts if each[0] in self.figures.rounds]
            if present:
                self._chart(folder / f"{name}.png", present)

    def table(self) -> str:
        """A table of medians with the spread, and our ratio to the best peer."""
        machine = self.machine
        lines = [
            (
                f"{machine['date']}, {machine['cores']} cores, {machine['postgres']}, Python {machine['python']}, "
                f"{machine['rounds']} rounds, medians (lowest to highest). `{machine['command']}`."
            ),
            "",
            "Peers: " + ", ".join(f"{name} {version}" for name, version in machine["peers"].items()) + ".",
        ]
        contenders = machine["contenders"]
        for scenario, measured in self.figures.rounds.items():
            named = [name for name in contenders if measured.get(name)]
            wide = len(contenders) > 1 and any(name != peers.OURS for name in named)
            columns = [*named, *(["to the best peer"] if wide else [])]
            lines += ["", f"**{scenario}**", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            for figure in measured[peers.OURS] if peers.OURS in measured else measured[named[0]]:
                cells = [_cell(measured[name].get(figure, [])) for name in named]
                cells += [self._ratio(scenario, figure, named)] if wide else []
                lines.append(f"| {figure} | {' | '.join(cells)} |")
        return "\n".join([*lines, *self._beside_fresh()]) + "\n"

    def _beside_fresh(self) -> list[str]:
        """How much of our rate on a fresh queue is left where others have trouble."""
        fresh = self.figures.median("drain", peers.OURS, "jobs/s")
        rates = {name: self.figures.median(name, peers.OURS, "jobs/s") for name in TROUBLES}
        rates["pinned (last of its rounds to its first)"] = self.figures.median("pinned", peers.OURS, "last, jobs/s")
        first = self.figures.median("pinned", peers.OURS, "first, jobs/s")
        lines = [
            f"| {name} | {rate / (first if 'pinned' in name and first else fresh):.2f} |"
            for name, rate in rates.items()
            if rate and fresh
        ]
        return (
            ["", "**queue_service, to its own drain of a fresh queue**", "", "| | |", "|---|---|", *lines]
            if lines
            else []
        )

    def _ratio(self, scenario: str, figure: str, named: list[str]) -> str:
        mine = self.figures.median(scenario, peers.OURS, figure)
        theirs = [self.figures.median(scenario, name, figure) for name in named if name != peers.OURS]
        others = [value for value in theirs if value is not None and not math.isnan(value)]
        if mine is None or math.isnan(mine) or not others:
            return ""
        best = min(others) if is_cost(figure) else max(others)
        return f"**{mine / best:.2f}**"

    def _chart(self, path: Path, charts: list[tuple[str, str, str]]) -> None:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot as plt

        contenders = self.machine["contenders"][::-1]
        figure, axes = plt.subplots(len(charts), 1, figsize=(8, 0.6 + 1.9 * len(charts)), squeeze=False)
        for axis, (scenario, name, title) in zip(axes[:, 0], charts, strict=True):
            values = [self.figures.median(scenario, each, name) or 0 for each in contenders]
            colours = ["#2a6f97" if each == peers.OURS else "#adb5bd" for each in contenders]
            bars = axis.barh(contenders, values, color=colours)
            axis.bar_label(bars, [number(value) for value in values], padding=4)
            axis.set_title(title, loc="left", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(0, 1.15 * max(values))
        figure.text(0.99, 0.005, f"{self.machine['date']}, {self.machine['cores']} cores", ha="right", fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def machine(command: str, contenders: list[str], rounds: int, postgres: str) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count(), "system": platform.system(),
        "python": platform.python_version(), "postgres": postgres, "contenders": contenders, "rounds": rounds,
        "command": command, "peers": peers.versions(),
    }  # fmt: skip


def is_cost(figure: str) -> bool:
    """Whether less of it is better."""
    return any(word in figure for word in COST)


def number(value: float) -> str:
    if math.isnan(value):
        return "unknown"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    low, middle, high = min(values), statistics.median(values), max(values)
    return number(middle) if len(values) == 1 else f"{number(middle)} ({number(low)} to {number(high)})"
