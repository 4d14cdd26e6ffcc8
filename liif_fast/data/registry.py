"""Names of dataset and wrapper classes, for configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from liif_fast.data.errors import naming
from liif_fast.utils.registry import Registry

_datasets: Registry[Any] = Registry("dataset")
register, registered, dataset_class = _datasets.register, _datasets.registered, _datasets.find


def make_dataset(spec: Mapping[str, Any], args: Mapping[str, Any] | None = None) -> Any:
    """Build a registered dataset or wrapper from `{'name', 'args'}`; `args` override a deep copy of `spec['args']`.

    Raises ValueError for a name that is not registered and for arguments that its class does not accept.
    Source: original datasets/datasets.py, make.
    """
    name = spec.get("name")
    make = dataset_class(name)
    merged = copy.deepcopy(dict(spec.get("args") or {}))
    merged.update(args or {})
    with naming(f"dataset {name!r}"):
        try:
            return make(**merged)
        except TypeError as error:
            raise ValueError(f"it cannot be made with {', '.join(sorted(merged))}: {error}") from error


def build(section: Mapping[str, Any]) -> Any:
    """The wrapper over the dataset that a section of a configuration describes: {'dataset': spec, 'wrapper': spec}."""
    return make_dataset(section["wrapper"], {"dataset": make_dataset(section["dataset"])})
