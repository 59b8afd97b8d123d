"""Exceptions that misbehave when they are looked at, made to measure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any


class HostileText(str):
    """Text that raises when it is handled like text."""

    __slots__ = ()

    def __getitem__(self, _key: object) -> str:
        raise SystemExit("text")

    def __len__(self) -> int:
        raise KeyError("text")

    def __str__(self) -> str:
        raise KeyError("text")


def _raises(error: type[BaseException]) -> Callable[..., Any]:
    def misbehave(*_args: Any, **_kwargs: Any) -> Any:
        raise error("misbehaved")

    return misbehave


def _forever(*_args: Any, **_kwargs: Any) -> Any:
    return _forever(*_args)


# What a method of an exception may do when it is called.
MISDEEDS: Mapping[str, Callable[..., Any]] = {
    "raises KeyError": _raises(KeyError),
    "raises SystemExit": _raises(SystemExit),
    "raises KeyboardInterrupt": _raises(KeyboardInterrupt),
    "raises CancelledError": _raises(asyncio.CancelledError),
    "raises GeneratorExit": _raises(GeneratorExit),
    "raises MemoryError": _raises(MemoryError),
    "recurses": _forever,
    "returns a number": lambda *_: 7,
    "returns odd text": lambda *_: HostileText("odd"),
    "returns what cannot be stored": lambda *_: "\x00 \ud800",
    "returns much": lambda *_: "x" * 1_000_000,
}

METHODS = (
    "__str__", "__repr__", "__getattr__", "__getattribute__", "__bool__", "__len__", "__eq__", "__hash__", "__iter__",
    "__format__", "__dir__", "__reduce__", "__setattr__", "__instancecheck__",
)  # fmt: skip
PROPERTIES = ("__class__", "__notes__", "__cause__", "__context__", "__traceback__", "__suppress_context__", "args")


def hostile(misdeeds: Mapping[str, str], base: type[BaseException] = Exception) -> BaseException:
    """An exception of which these methods and properties do that, once it is made. Keys are of METHODS and PROPERTIES,
    values of MISDEEDS."""
    members: dict[str, Any] = {}
    for name, misdeed in misdeeds.items():
        act = MISDEEDS[misdeed]
        members[name] = property(act) if name in PROPERTIES else act
    made: BaseException = type("Hostile", (base,), members)("hostile")
    return made
