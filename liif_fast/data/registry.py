"""Names for dataset and wrapper classes, so that a configuration file can ask for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_registry: dict[str, Callable[..., Any]] = {}
_Class = TypeVar("_Class", bound=Callable[..., Any])


def register(name: str) -> Callable[[_Class], _Class]:
    """Let configurations name a dataset or wrapper class: `@register('my-folder')`. A later one of a name wins."""

    def decorate(cls: _Class) -> _Class:
        _registry[name] = cls
        return cls

    return decorate


def registered() -> dict[str, Callable[..., Any]]:
    """What is registered by which name: datasets and wrappers. A copy."""
    return dict(_registry)


def dataset_class(name: object) -> Callable[..., Any]:
    """The class registered under `name`; raises ValueError, naming those there are, where nobody registered it."""
    if not isinstance(name, str) or name not in _registry:
        raise ValueError(f"no dataset is named {name!r}; choose one of {', '.join(sorted(_registry))} or register it")
    return _registry[name]


def make_dataset(spec: Mapping[str, Any], args: Mapping[str, Any] | None = None) -> Any:
    """Build a registered dataset or wrapper from `{'name', 'args'}`; `args` override a deep copy of `spec['args']`.

    Raises ValueError for a name nobody registered and for arguments that its class does not take.
    Source: original datasets/datasets.py, make.
    """
    name = spec.get("name")
    make = dataset_class(name)
    merged = copy.deepcopy(dict(spec.get("args") or {}))
    merged.update(args or {})
    try:
        return make(**merged)
    except TypeError as error:
        raise ValueError(f"dataset {name!r} cannot be made with {', '.join(sorted(merged))}: {error}") from error


def build(section: Mapping[str, Any]) -> Any:
    """The wrapper over the dataset that a section of a configuration describes: {'dataset': spec, 'wrapper': spec}."""
    return make_dataset(section["wrapper"], {"dataset": make_dataset(section["dataset"])})
