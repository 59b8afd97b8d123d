"""Who works for everybody has to see everybody's runs."""

from __future__ import annotations

import shlex

from queue_service.db.query import Fetch
from queue_service.errors import ConfigError
from queue_service.runs.queries import hidden_from


async def require_sight(fetch: Fetch, who: str) -> None:
    """Raise ConfigError where row security hides runs from the role of this process, which is `who`."""
    role = await fetch(hidden_from())
    if role is not None:
        raise ConfigError(
            f"Row security hides runs from the role {role!r}, and a {who} works for all organizations. As the owner of the "
            f"schema, exempt this role: queue-service db rls enable --exempt {shlex.quote(role)}."
        )
