"""Scenarios of our own, which no peer has anything to set against."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from queue_service import App

Scenario = Callable[[App, int], Awaitable[dict[str, float]]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


async def measured(conninfo: str, name: str, count: int) -> dict[str, float]:
    async with App(conninfo) as app:
        return await SCENARIOS[name](app, count)
