"""The methods of every workload: baselines, and every backend of the ops in every dtype.

The backends are those of the ops' table, `backends.BACKENDS`, so a backend that is added there is measured here. A
backend that cannot run stays in the result with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.methods import decode, gather, peers, train
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
        own_products = multiplies and backend in ("torch", "reference")
        for dtype in dtypes:
            why_not = refusal(dtype, device) if own_products else ""
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


def _baselines(device: str, prepare: dict[str, Callable[..., Any]]) -> list[Method]:
    """The original in every dtype, float32 first, then the original and the `torch` backend compiled.

    prepare: by original, torch and, for decodes without gradients, tuned. On a CPU compiling the backward of the
    backend takes longer than the whole run.
    """
    gpu, gradients = device == "cuda", "tuned" not in prepare
    found = []
    for dtype in matmul_dtypes(device):
        how = ", autocast" if is_16_bit(dtype) else ""
        short, why_not = SHORT[dtype], refusal(dtype, device)
        name = "original" if dtype == "float32" else f"original-{short}"
        few = dtype == "float32" or (gpu and dtype == "bfloat16")
        eager = partial(prepare["original"], dtype=dtype)
        found.append(Method(name, f"original, eager{how}", dtype, eager, refusal=why_not, few=few))
        if not gradients:
            tuned = partial(prepare["tuned"], dtype=dtype)
            label = f"original, eager{how}, best chunk"
            found.append(Method(f"original-tuned-{short}", label, dtype, tuned, refusal=why_not))
    for dtype in ("tf32", "bfloat16") if gpu else ("float32",):
        short, how = SHORT[dtype], ", torch.compile" + (", autocast" if is_16_bit(dtype) else "")
        run = partial(prepare["original"], dtype=dtype, compile_it=True)
        found.append(Method(f"original-compiled-{short}", f"original{how}", dtype, run, late=True))
        if gpu or not gradients:
            run = partial(prepare["torch"], dtype=dtype)
            found.append(
                Method(f"torch-compiled-{short}", f"{_LABEL.format('torch')}{how}", dtype, run, True, late=True)
            )
    return found


def _decode(device: str) -> list[Method]:
    prepare = {"original": decode.original_decode, "tuned": decode.original_tuned, "torch": decode.torch_compiled}
    engines = peers.methods() if device == "cpu" else []
    return [*_baselines(device, prepare), *engines, *with_backends("decode", device, decode.fused, label=_LABEL)]


def _train(device: str) -> list[Method]:
    prepare = {"original": train.original_training, "torch": train.torch_compiled}
    fused = with_backends("decode", device, train.fused, label=_LABEL, label_16=f"{_LABEL}, autocast")
    return [*_baselines(device, prepare), *fused]


def _pieces(op: str, original: Callable[..., Any], fused: Callable[..., Any], device: str) -> list[Method]:
    first = Method("original", "original, eager", "float32", original)
    return [first, *with_backends(op, device, fused, label=_LABEL)]


_BY_KIND = {
    "decode": _decode,
    "size": _decode,
    "train": _train,
    "gather": partial(_pieces, "gather", gather.gather_original, gather.gather),
    "ensemble": partial(_pieces, "ensemble", gather.ensemble_original, gather.ensemble),
}


def methods_for(workload: Workload, device: str) -> list[Method]:
    """The methods that a workload compares on a device type; the original in float32 comes first."""
    found = _BY_KIND[workload.kind](device)
    if workload.compared == "engines":
        return [method for method in found if method.name in peers.NAMES or (method.few and method.dtype == "float32")]
    return [method for method in found if method.few] if workload.compared == "few" else found


def exact(workload: Workload, problem: DecodeProblem, clock: Clock) -> Any:
    """The float64 result of the original formulation, which the methods' accuracy is measured against."""
    first = methods_for(workload, clock.device.type)[0]
    return first.prepare(Job(workload, problem.to(torch.float64), clock))[0]()
