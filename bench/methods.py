"""The methods that compete in a workload: baselines, and every backend of the ops in every dtype.

Backends come from the ops' own table, and whether one takes part is what its `can_run` says: adding a backend there
adds it here. One that is refused stays in the result with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import decoding, models, pieces, training
from bench.method import SHORT, Job, Method, is_16_bit, product_dtypes, refusal
from bench.workloads import Workload
from liif_fast.benchmark.problem import Problem, layer_widths
from liif_fast.benchmark.timing import Clock
from liif_fast.benchmark.yardsticks import DTYPES
from liif_fast.ops import backends

_OPS = {"decode": "render", "size": "render", "parts": "render", "upscale": "render", "train": "query"}


def with_backends(
    op: str, device: str, prepare: Callable[..., Any], *, folded: bool, products: bool = True, label: str = ""
) -> list[Method]:
    """A method for every backend and dtype; `products`: the op multiplies matrices, so that tf32 is a choice."""
    dtypes = product_dtypes(device) if products else ["float32", "bfloat16", "float16"]
    widths = tuple(layer_widths()[1:]) if op in ("query", "render") else ()
    found = []
    for backend, can_run in backends.BACKENDS.items():
        reference = backend == "reference"
        for dtype in dtypes:
            why_not = refusal(dtype, device) if reference and products else ""
            try:
                can_run(
                    backends.OpRequest("decode" if op in ("query", "render") else op, device, DTYPES[dtype], widths),
                    raise_error=True,
                )
            except RuntimeError as error:
                why_not = str(error)
            found.append(
                Method(
                    f"{backend}-{SHORT[dtype]}",
                    label or f"backend {backend}" + (", autocast" if op == "query" and is_16_bit(dtype) else ""),
                    dtype,
                    folded and not reference,
                    partial(prepare, backend=backend, dtype=dtype),
                    why_not,
                    late=2 if reference else 0,
                    few=not reference and dtype in ("float32", "bfloat16"),
                    quick=not reference and dtype in ("float32", "bfloat16"),
                )
            )
    return found


def _decode(device: str) -> list[Method]:
    return [*decoding.baselines(device), *with_backends("render", device, decoding.render, folded=True)]


def _train(device: str) -> list[Method]:
    return [*training.baselines(device), *with_backends("query", device, training.query, folded=True)]


def _gather(device: str) -> list[Method]:
    first = Method("original", "original, eager", "float32", False, pieces.gather_original)
    return [first, *with_backends("gather", device, pieces.gather, folded=False, products=False)]


def _ensemble(device: str) -> list[Method]:
    first = Method("original", "original, eager", "float32", False, pieces.ensemble_original)
    return [first, *with_backends("ensemble", device, pieces.ensemble, folded=False, products=False)]


def _encoder(device: str) -> list[Method]:
    return [
        Method("eager", "PyTorch", "float32", False, models.encode),
        Method("eager-bf16", "PyTorch, autocast", "bfloat16", False, partial(models.encode, dtype="bfloat16")),
    ]


def _upscale(device: str) -> list[Method]:
    autocast = partial(models.upscale_original, dtype="bfloat16")
    return [
        Method("original", "original, eager", "float32", False, models.upscale_original),
        Method("original-bf16", "original, eager, autocast", "bfloat16", False, autocast),
        *(
            method
            for method in with_backends("render", device, models.upscale, folded=True, label="liif_fast.upscale")
            if method.few
        ),
    ]


def _parts(device: str) -> list[Method]:
    fused = with_backends("render", device, pieces.fused, folded=True)
    return pieces.parts([method for method in fused if method.few])


_BY_KIND = {
    "decode": _decode,
    "size": _decode,
    "train": _train,
    "gather": _gather,
    "ensemble": _ensemble,
    "encoder": _encoder,
    "upscale": _upscale,
    "parts": _parts,
}


def methods_for(workload: Workload, device: str, *, quick: bool = False) -> list[Method]:
    """The methods a workload compares on a device type; the original, where it takes part, comes first."""
    found = _BY_KIND[workload.kind](device)
    if workload.compared == "few":
        found = [method for method in found if method.few]
    return [method for method in found if method.quick] if quick else found


def exact(workload: Workload, problem: Problem, clock: Clock) -> Any:
    """The float64 result of the original formulation: what accuracy is judged by. None for what has no result."""
    if workload.kind in ("parts", "size"):
        return None
    first = methods_for(workload, clock.device.type)[0]
    return first.prepare(Job(workload, problem.to(torch.float64), clock))[0]()
