"""What the workers of an App call when they start and when they stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from queue_service.errors import ConfigError

# Without parameters; what it returns is awaited where it can be.
Hook = Callable[[], object]
HookT = TypeVar("HookT", bound=Hook)


@dataclass(slots=True)
class Hooks:
    on_start: list[Hook] = field(default_factory=list)
    on_stop: list[Hook] = field(default_factory=list)


def check_hook(hook: object) -> None:
    """ConfigError for what cannot be called."""
    if not callable(hook):
        raise ConfigError(
            f"A hook is a function without parameters, not {hook!r}. Write @app.on_start, without brackets."
        )
