"""Registries: names for classes and functions, so that a configuration or a checkpoint can refer to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

_Made = TypeVar("_Made")
_Factory = TypeVar("_Factory", bound=Callable[..., Any])


class Registry(Generic[_Made]):
    """Names of factories that make one kind of object. kind: the word for messages, such as 'model'."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._factories: dict[str, Callable[..., _Made]] = {}

    def register(self, name: str) -> Callable[[_Factory], _Factory]:
        """Decorate a class or function to register it as `name`. A later registration of a name replaces the first."""

        def decorate(factory: _Factory) -> _Factory:
            self._factories[name] = factory
            return factory

        return decorate

    def registered(self) -> dict[str, Callable[..., _Made]]:
        """Every registered factory by name, as a copy."""
        return dict(self._factories)

    def find(self, name: object) -> Callable[..., _Made]:
        """The factory of a name; raises ValueError with all known names if there is none."""
        if not isinstance(name, str) or name not in self._factories:
            known = ", ".join(sorted(self._factories))
            raise ValueError(
                f"no {self._kind} is registered as {name!r}: choose one of {known}, or import the Python file that "
                "registers it (--imports FILE, `imports` in a configuration)"
            )
        return self._factories[name]
