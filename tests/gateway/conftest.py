from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from queue_service import App
from tests.gateway.served import Client, Served, serving


@pytest.fixture
async def served(app: App) -> AsyncIterator[Served]:
    async with serving(app) as running:
        yield running


@pytest.fixture
async def ann(served: Served) -> AsyncIterator[Client]:
    async with served.client("ann") as client:
        yield client


@pytest.fixture
async def bob(served: Served) -> AsyncIterator[Client]:
    async with served.client("bob") as client:
        yield client
