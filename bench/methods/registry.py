"""The methods of every workload: baselines, and every backend of the ops in every dtype.

The backends come from the ops' own table, and the table's `can_run` decides which of them take part: a backend added
there is added here. A backend that is refused stays in the result with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.methods import decode, gather, train, upscale
from bench.methods.method import SHORT, Job, Method, matmul_dtypes, refusal
from bench.workloads import Workload
from liif_fast.benchmark.problem import DecodeProblem, layer_widths
from liif_fast.benchmark.runs import DTYPES, is_16_bit
from liif_fast.benchmark.timing import Clock
from liif_fast.ops import backends

_LABEL = "backend {}"


def with_backends(op: str, device: str, prepare: Callable[..., Any], *, label: str, label_16: str = "") -> list[Method]:
    """A method for every backend and dtype; tf32 is a choice where the op multiplies matrices.

    label: of the methods in a table, with the backend's name for {}; label_16: of those of 16 bits, if they differ.
    """
    multiplies = op == "decode"
    dtypes = matmul_dtypes(device) if multiplies else ["float32", "bfloat16", "float16"]
    widths = tuple(layer_widths()[1:]) if multiplies else ()
    found = []
    for backend, can_run in backends.BACKENDS.items():
        reference = backend == "reference"
        for dtype in dtypes:
            why_not = refusal(dtype, device) if reference and multiplies else ""
            try:
                can_run(backends.OpRequest(op, device, DTYPES[dtype], widths), raise_error=True)
            except RuntimeError as error:
                why_not = str(error)
            found.append(
                Method(
                    f"{backend}-{SHORT[dtype]}",
                    (label_16 or label if is_16_bit(dtype) else label).format(backend),
                    dtype,
                    partial(prepare, backend=backend, dtype=dtype),
                    folded=multiplies and not reference,
                    refusal=why_not,
                    late=reference,
                    few=not reference and dtype in ("float32", "bfloat16"),
                )
            )
    return found


def _decode(device: str) -> list[Method]:
    return [*decode.baselines(device), *with_backends("decode", device, decode.fused, label=_LABEL)]


def _train(device: str) -> list[Method]:
    fused = with_backends("decode", device, train.fused, label=_LABEL, label_16=f"{_LABEL}, autocast")
    return [*train.baselines(device), *fused]


def _gather(device: str) -> list[Method]:
    first = Method("original", "original, eager", "float32", gather.gather_original)
    return [first, *with_backends("gather", device, gather.gather, label=_LABEL)]


def _ensemble(device: str) -> list[Method]:
    first = Method("original", "original, eager", "float32", gather.ensemble_original)
    return [first, *with_backends("ensemble", device, gather.ensemble, label=_LABEL)]


def _upscale(device: str) -> list[Method]:
    autocast = partial(upscale.upscale_original, dtype="bfloat16")
    fused = with_backends("decode", device, upscale.upscale_fused, label="liif_fast.upscale")
    return [
        Method("original", "original, eager", "float32", upscale.upscale_original),
        Method("original-bf16", "original, eager, autocast", "bfloat16", autocast),
        *(method for method in fused if method.few),
    ]


_BY_KIND = {
    "decode": _decode,
    "size": _decode,
    "train": _train,
    "gather": _gather,
    "ensemble": _ensemble,
    "upscale": _upscale,
}


def methods_for(workload: Workload, device: str) -> list[Method]:
    """The methods that a workload compares on a device type; the original in float32 comes first."""
    found = _BY_KIND[workload.kind](device)
    return [method for method in found if method.few] if workload.compared == "few" else found


def exact(workload: Workload, problem: DecodeProblem, clock: Clock) -> Any:
    """The float64 result of the original formulation, which the methods' accuracy is measured against."""
    first = methods_for(workload, clock.device.type)[0]
    return first.prepare(Job(workload, problem.to(torch.float64), clock))[0]()
