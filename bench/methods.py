"""The methods that compete: the original formulation, the same algebra in plain PyTorch, and this package's backends.

A `Method.prepare(workload, problem)` does everything that is done once (casts, compiling, tuning) and returns what is
timed, a function of no arguments, and a note for the result file ('' for none). Adding a backend is adding an entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from bench import folded, models, original
from bench.workloads import Problem, Workload
from liif_fast import ops

Run = Callable[[], Any]  # -> Tensor or list of Tensors
Prepared = tuple[Run, str]


@dataclass(frozen=True)
class Method:
    """dtype: what its matrix products are done in. folded: whether its first layer is a convolution of the map."""

    name: str
    label: str
    dtype: str
    folded: bool
    prepare: Callable[[Workload, Problem], Prepared]
    quick: bool = False


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------- decode


def _original(workload: Workload, problem: Problem, chunk: int = original.CHUNK) -> Prepared:
    feat, coord, cell, weights, biases = problem
    imnet = original.make_imnet(weights, biases)
    return lambda: original.predict(feat, coord, cell, imnet, chunk=chunk), ""


def _original_tuned(workload: Workload, problem: Problem) -> Prepared:
    times = {}
    for chunk in (1024, 2048, 4096, 8192, 16384, original.CHUNK, 65536):
        run, _ = _original(workload, problem, chunk)
        begin = perf_counter()
        run()
        times[chunk] = perf_counter() - begin
    best = min(times, key=lambda chunk: times[chunk])
    return _original(workload, problem, best)[0], f"chunks of {best}"


def _original_autocast(workload: Workload, problem: Problem) -> Prepared:
    run, note = _original(workload, problem)

    def run_in_bfloat16() -> Tensor:
        with _autocast():
            return run()

    return run_in_bfloat16, note


def _original_compiled(workload: Workload, problem: Problem) -> Prepared:
    torch._dynamo.reset()
    feat, coord, cell, weights, biases = problem
    imnet = original.make_imnet(weights, biases)
    chunk = min(32768, coord.shape[1])  # a power of two, for sizes that leave no smaller last chunk
    query = torch.compile(original.query, dynamic=False)
    return lambda: original.predict(feat, coord, cell, imnet, chunk=chunk, query=query), f"chunks of {chunk}"


def _folded(workload: Workload, problem: Problem, dtype: torch.dtype) -> Prepared:
    problem = problem.to(dtype)

    def run() -> Tensor:
        with torch.no_grad():
            return folded.query(*problem)

    return run, f"tiles of {folded.TILE}"


def _render(workload: Workload, problem: Problem, backend: str, dtype: torch.dtype) -> Prepared:
    feat, _, _, weights, biases = problem.to(dtype)
    size = workload.out_size
    assert size is not None

    def run() -> Tensor:
        with torch.no_grad():
            return ops.render(feat, size, weights, biases, window=workload.window, backend=backend)

    return run, ""


_FP32, _BF16 = torch.float32, torch.bfloat16

_DECODE = [
    Method("original", "original, eager", "float32", False, _original, quick=True),
    Method("original-tuned", "original, eager, best chunk", "float32", False, _original_tuned),
    Method("original-bf16-autocast", "original, eager, autocast", "bfloat16", False, _original_autocast),
    Method("original-compiled", "original, torch.compile", "float32", False, _original_compiled),
    Method("folded-eager", "folded, PyTorch calls", "float32", True, partial(_folded, dtype=_FP32)),
    Method("folded-eager-bf16", "folded, PyTorch calls", "bfloat16", True, partial(_folded, dtype=_BF16)),
    Method("reference", "backend reference", "float32", False, partial(_render, backend="reference", dtype=_FP32)),
    Method("cpu-fp32", "backend cpu", "float32", True, partial(_render, backend="cpu", dtype=_FP32), quick=True),
    Method("cpu-bf16", "backend cpu", "bfloat16", True, partial(_render, backend="cpu", dtype=_BF16), quick=True),
]
_IN_SWEEP = ("original", "cpu-fp32", "cpu-bf16")
IN_MEMORY = ("original", "folded-eager", "cpu-fp32", "cpu-bf16")

# -------------------------------------------------------------------------------------------------------------- train


def _probe(workload: Workload) -> Tensor:
    """What the gradients are the gradients of: sum(out * probe). [B, Q, 3]"""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(workload.batch, workload.queries, 3, generator=generator)


def _train_original(
    workload: Workload,
    problem: Problem,
    query: Callable[..., Tensor] = original.query,
    autocast: bool = False,
) -> Prepared:
    feat = problem.feat.detach().clone().requires_grad_()
    imnet = original.make_imnet(problem.weights, problem.biases)
    layers = [layer for layer in imnet if isinstance(layer, nn.Linear)]
    leaves = [feat, *(layer.weight for layer in layers), *(layer.bias for layer in layers)]
    probe = _probe(workload).to(feat.dtype)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = query(feat, problem.coord, problem.cell, imnet)
        return list(torch.autograd.grad(out, leaves, probe.to(out.dtype)))

    return run, ""


def _train_compiled(workload: Workload, problem: Problem) -> Prepared:
    torch._dynamo.reset()
    return _train_original(workload, problem, torch.compile(original.query, dynamic=False))


def _train(workload: Workload, problem: Problem, query: Callable[..., Tensor]) -> Prepared:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in problem.leaves()]
    layers = len(problem.weights)
    feat, weights, biases = leaves[0], leaves[1 : 1 + layers], leaves[1 + layers :]
    probe = _probe(workload)

    def run() -> list[Tensor]:
        out = query(feat, problem.coord, problem.cell, weights, biases)
        return list(torch.autograd.grad(out, leaves, probe))

    return run, ""


def _train_with(query: Callable[..., Tensor], **options: Any) -> Callable[[Workload, Problem], Prepared]:
    return partial(_train, query=partial(query, **options))


_TRAIN = [
    Method("original", "original, eager", "float32", False, _train_original, quick=True),
    Method("original-bf16-autocast", "original, autocast", "bfloat16", False, partial(_train_original, autocast=True)),
    Method("original-compiled", "original, torch.compile", "float32", False, _train_compiled),
    Method("folded-eager", "folded, PyTorch calls", "float32", True, _train_with(folded.query, tile=None)),
    Method("reference", "backend reference", "float32", False, _train_with(ops.query, backend="reference")),
    Method("cpu-fp32", "backend cpu", "float32", True, _train_with(ops.query, backend="cpu"), quick=True),
]

# ------------------------------------------------------------------------------------------------ gather and ensemble


def _gather_original(workload: Workload, problem: Problem) -> Prepared:
    def run() -> Tensor:
        with torch.no_grad():
            return torch.stack(original.corner_inputs(problem.feat, problem.coord, problem.cell)[0], dim=2)

    return run, ""


def _gather(workload: Workload, problem: Problem, backend: str, dtype: torch.dtype) -> Prepared:
    problem = problem.to(dtype)

    def run() -> Tensor:
        with torch.no_grad():
            return ops.gather(problem.feat, problem.coord, problem.cell, backend=backend)[0]

    return run, ""


def _predictions(workload: Workload) -> tuple[Tensor, Tensor]:
    """pred [B, Q, 4, 3] and areas [B, Q, 4]."""
    generator = torch.Generator().manual_seed(1)
    shape = (workload.batch, workload.queries, 4)
    return torch.randn(*shape, 3, generator=generator), torch.rand(shape, generator=generator) + 0.01


def _ensemble_original(workload: Workload, problem: Problem) -> Prepared:
    pred, area = _predictions(workload)
    dtype = problem.feat.dtype
    preds = [corner.contiguous().to(dtype) for corner in pred.unbind(2)]
    areas = [corner.contiguous().to(dtype) for corner in area.unbind(2)]
    return lambda: original.blend(preds, areas), ""


def _ensemble(workload: Workload, problem: Problem, backend: str) -> Prepared:
    pred, area = _predictions(workload)
    area_weight = area.flip(2) / area.sum(2, keepdim=True)
    return lambda: ops.ensemble(pred, area_weight, backend=backend), ""


_GATHER = [
    Method("original", "original, eager", "float32", False, _gather_original),
    Method("reference", "backend reference", "float32", False, partial(_gather, backend="reference", dtype=_FP32)),
    Method("cpu-fp32", "backend cpu", "float32", False, partial(_gather, backend="cpu", dtype=_FP32)),
    Method("cpu-bf16", "backend cpu", "bfloat16", False, partial(_gather, backend="cpu", dtype=_BF16)),
]
_ENSEMBLE = [
    Method("original", "original, eager", "float32", False, _ensemble_original),
    Method("reference", "backend reference", "float32", False, partial(_ensemble, backend="reference")),
    Method("cpu-fp32", "backend cpu", "float32", False, partial(_ensemble, backend="cpu")),
]

# ------------------------------------------------------------------------------------------------------- whole models

_ENCODER = [
    Method("eager", "PyTorch", "float32", False, models.encode),
    Method("eager-bf16-autocast", "PyTorch, autocast", "bfloat16", False, partial(models.encode, autocast=True)),
]
_UPSCALE = [
    Method("original", "original, eager", "float32", False, models.upscale_original),
    Method("cpu-fp32", "liif_fast.upscale", "float32", True, partial(models.upscale, dtype=_FP32)),
    Method("cpu-bf16", "liif_fast.upscale", "bfloat16", True, partial(models.upscale, dtype=_BF16)),
]

# ----------------------------------------------------------------------------------------------------------------- all

BY_KIND = {
    "decode": _DECODE,
    "memory": [method for method in _DECODE if method.name in IN_MEMORY],
    "train": _TRAIN,
    "gather": _GATHER,
    "ensemble": _ENSEMBLE,
    "encoder": _ENCODER,
    "upscale": _UPSCALE,
}


def methods_for(workload: Workload, quick: bool) -> list[Method]:
    """The methods a workload compares; the original, where it takes part, comes first."""
    found = BY_KIND[workload.kind]
    if workload.name.startswith("scale-"):
        found = [method for method in found if method.name in _IN_SWEEP]
    return [method for method in found if method.quick] if quick else found


def exact(workload: Workload, problem: Problem) -> Any:
    """The float64 result of the original formulation: what accuracy is judged by."""
    return BY_KIND[workload.kind][0].prepare(workload, problem.to(torch.float64))[0]()
