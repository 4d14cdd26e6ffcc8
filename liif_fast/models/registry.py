"""Names for model classes, so that a model can be described by a plain dictionary (a spec)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from liif_fast.utils.registry import Registry

_models: Registry[nn.Module] = Registry("model")
register, registered = _models.register, _models.registered


def make_model(spec: dict[str, Any], args: dict[str, Any] | None = None, load_sd: bool = False) -> nn.Module:
    """Build the module that a spec describes.

    spec: {'name': registered name, 'args': keyword arguments (optional), 'sd': state_dict (only for load_sd)}. It is
        not changed.
    args: override or extend spec['args'].
    load_sd: load spec['sd'] into the new module.
    The module keeps {'name', 'args'} as `.spec`; `liif_fast.save` stores it.
    Raises ValueError for a spec without a known name, TypeError for arguments that the named class does not take.
    Source: `models.make` of yinboc/liif.
    """
    if not isinstance(spec, dict) or "name" not in spec:
        raise ValueError(f"a model spec is a dictionary with 'name' and 'args', not {_shorten(spec)}")
    name = spec["name"]
    factory = _models.find(name)
    if load_sd and "sd" not in spec:
        raise ValueError(f"the spec of {name!r} has no 'sd' to load: leave load_sd out or add the state_dict")
    merged = {**(spec.get("args") or {}), **(args or {})}
    module = factory(**merged)
    module.spec = {"name": name, "args": copy.deepcopy(merged)}  # type: ignore[assignment]
    if load_sd:
        module.load_state_dict(spec["sd"])
    return module


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
