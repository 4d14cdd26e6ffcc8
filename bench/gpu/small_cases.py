"""A small case of every kernel, for compute-sanitizer: `python -m bench.gpu.small_cases [--backend cuda]`.

It runs under the sanitizer, where everything is ten to a hundred times slower, so results are only looked at for NaN;
the checks judge them. Few PyTorch kernels run beside ours: the sanitizer instruments those too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from bench.gpu.check import refused
from bench.gpu.problems import Case, Decode, decode
from liif_fast import ops

# A remainder in every direction: rows that fill no tile, columns that fill no vector, two maps.
_CASES = (
    Case(batch=2, channels=3, height=5, width=7, queries=37, hidden=(32, 16)),
    Case(channels=16, height=4, width=3, queries=70, hidden=(256, 256), local_ensemble=False, cell_decode=False),
)


def runs(device: torch.device, backend: str) -> Iterator[str]:
    """Runs one kernel family after the other, forward and backward; yields what has run or why not."""
    for case in _CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for name in ("query", "render", "gather"):
                try:
                    _run(name, case, dtype, device, backend)
                    yield f"{name} {dtype}"
                except RuntimeError as error:
                    if not refused(error, backend):
                        raise
                    yield f"{name} {dtype} refused: {error}"
    try:
        _run_metasr(device, backend)
        yield "metasr_query"
    except RuntimeError as error:
        if not refused(error, backend):
            raise
        yield f"metasr_query refused: {error}"


def _run(name: str, case: Case, dtype: torch.dtype, device: torch.device, backend: str) -> None:
    problem = decode(case, dtype, device, grad=True)
    layers = (problem.weights, problem.biases)
    flags = case.flags
    if name == "query":
        latent_map = ops.fold(problem.feat, problem.weights[0])
        out = ops.query(*problem, latent_map=latent_map, backend=backend, **flags)
        leaves = [problem.feat, problem.coord, *layers[0], *layers[1]]
    elif name == "render":
        out = ops.render(problem.feat, (9, 13), *layers, window=(1, 2, 8, 11), backend=backend, **flags)
        leaves = [problem.feat, *layers[0], *layers[1]]
    else:
        cell = problem.cell if case.cell_decode else None
        x, area_weight = ops.gather(
            problem.feat, problem.coord, cell, local_ensemble=case.local_ensemble, backend=backend
        )
        out = ops.ensemble(x, area_weight, backend=backend)
        leaves = [problem.feat, problem.coord]
    grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
    with torch.no_grad():
        inferred = out if name == "gather" else _infer(name, case, problem, backend)
    results = [out, inferred, *(grad for grad in grads if grad is not None)]
    if any(result.isnan().any() for result in results):
        raise AssertionError(f"{name} {dtype} gave NaN")


def _infer(name: str, case: Case, problem: Decode, backend: str) -> torch.Tensor:
    if name == "query":
        return ops.query(*problem, backend=backend, **case.flags)
    return ops.render(problem.feat, (10, 14), problem.weights, problem.biases, backend=backend, **case.flags)


def _run_metasr(device: torch.device, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 5, 7), (1, 40, 2), (1, 40, 2), (29, 3), (81, 29), (29,), (81,)]
    tensors = [(torch.rand(*shape, generator=generator) - 0.5).to(device).requires_grad_() for shape in shapes]
    feat, coord, cell, w0, w1, b0, b1 = tensors
    out = ops.metasr_query(feat, coord, cell, [w0, w1], [b0, b1], backend=backend)
    grads = torch.autograd.grad(out.sum(), tensors)
    if out.isnan().any() or any(grad.isnan().any() for grad in grads):
        raise AssertionError("metasr_query gave NaN")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    for line in runs(device, args.backend):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(f"ran {line}", flush=True)
    print("all small cases ran", flush=True)


if __name__ == "__main__":
    main()
