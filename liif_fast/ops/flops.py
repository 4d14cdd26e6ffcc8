"""The registered ops in `torch.utils.flop_counter`: the matrix products of the formulation that the kernels compute.

As in the counter's own formulas, a product counts twice its multiplications, and sums, ReLUs and gathers count nothing.
Activations that a backward computes again are not counted.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch

from .inputs import DecodeInputs, MetasrInputs
from .namespace import NAMESPACE

_COUNTER = "torch.utils.flop_counter"


def _decode(inputs: DecodeInputs) -> tuple[int, int, int]:
    """Multiplications of the layers after the first, of the first one's geometry terms, of the blend."""
    widths, rows = inputs.widths, inputs.rows
    layers = rows * sum(a * b for a, b in itertools.pairwise(widths[:-1]))
    if inputs.weights:
        layers += inputs.queries * widths[-2] * widths[-1]
    return layers, rows * prod(inputs.weight_geometry.shape), rows * widths[-2 if inputs.weights else -1]


def decode(*arguments: Any, **_: Any) -> int:
    return 2 * sum(_decode(DecodeInputs(*arguments[: len(DecodeInputs._fields)])))


def decode_backward(grad_out: Any, saved: Any, *arguments: Any, **_: Any) -> int:
    fields = len(DecodeInputs._fields)
    layers, geometry, blend = _decode(DecodeInputs(*arguments[:fields]))
    coord_grad = arguments[fields]
    return 2 * (2 * layers + (geometry + blend) * (2 if coord_grad else 1))


def ensemble(pred: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(pred.shape)


def ensemble_backward(grad_out: Any, pred: Any, *_: Any, **__: Any) -> int:
    return 2 * ensemble(pred)


def metasr_query(*arguments: Any, **_: Any) -> int:
    inputs = MetasrInputs(*arguments[: len(MetasrInputs._fields)])
    batch, queries, outs = inputs.out_shape
    return 2 * batch * queries * (prod(inputs.weight.shape) + outs * (inputs.weight.shape[0] + 1))


def metasr_query_backward(grad_out: Any, *arguments: Any, **_: Any) -> int:
    return 2 * metasr_query(*arguments)


def convolution(feat: Any, kernels: Any, *_: Any, **__: Any) -> int:
    return 2 * feat.shape[0] * prod(feat.shape[2:]) * prod(kernels.shape)


def convolution_backward(
    grad_out: Any, feat: Any, kernels: Any, narrow: Any, backend: Any, *wanted: bool, **_: Any
) -> int:
    return sum(wanted) * convolution(feat, kernels)


_FORMULAS: list[Callable[..., int]] = [
    decode,
    decode_backward,
    ensemble,
    ensemble_backward,
    metasr_query,
    metasr_query_backward,
    convolution,
    convolution_backward,
]


def _register(counter: ModuleType) -> None:
    for formula in _FORMULAS:
        counter.register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), formula.__name__), get_raw=True)(formula)


class _Finder(MetaPathFinder):
    """Registers the formulas when the counter is imported. The counter imports Triton, which takes a second."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register(module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Register the formulas now if the counter is imported, otherwise when it is."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())
