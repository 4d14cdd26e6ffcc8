"""`gather`, `ensemble` and `metasr_query` against the reference, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.check import Check, Context, Judge
from bench.gpu.limits import FORWARD, GRADIENT, SLACK_16, TIMES_PYTORCH, judge_gradients, probe_like
from bench.gpu.problems import DTYPES, FLAGS, SHAPES, Case, decode, flag_name, norm_error, range_error, short
from liif_fast import ops

GATHER_SHAPES = {
    "plain": Case(batch=2, channels=5, height=6, width=9, queries=70),
    "one-query": SHAPES["one-query"],
    "no-query": SHAPES["no-query"],
    "one-latent": SHAPES["one-latent"],
    "one-column": Case(height=8, width=1, channels=33),
    "two-columns": Case(height=3, width=2),
    "wide": Case(channels=64, height=17, width=23, queries=3000),
}
METASR_SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"hidden": 256},
    "one-query": {"queries": 1, "size": (1, 1)},
    "no-query": {"queries": 0},
    "one-output": {"outs": 1},
}


def checks() -> Iterator[Check]:
    for dtype in DTYPES.values():
        for shape, case in GATHER_SHAPES.items():
            yield Check(f"gather {shape} {short(dtype)}", partial(gather, case=case, dtype=dtype))
        for flags in FLAGS:
            ensemble_on, unfold, cell = flags
            case = GATHER_SHAPES["plain"]._replace(local_ensemble=ensemble_on, feat_unfold=unfold, cell_decode=cell)
            yield Check(f"gather {flag_name(flags)} {short(dtype)}", partial(gather, case=case, dtype=dtype))
        for corners in (1, 4, 3):
            yield Check(f"ensemble of {corners} {short(dtype)}", partial(ensemble, corners=corners, dtype=dtype))
        for shape, changes in METASR_SHAPES.items():
            yield Check(f"metasr {shape} {short(dtype)}", partial(metasr, dtype=dtype, **changes))
    yield Check("gather strides", gather_strides)
    yield Check("gather, layers, ensemble is query", gather_layers_ensemble)
    yield Check("metasr on a part of the map", metasr_region)


def _run_gather(tensors: list[Tensor], case: Case, backend: str) -> tuple[Tensor, Tensor]:
    feat, coord, cell = tensors
    return ops.gather(
        feat,
        coord,
        cell if case.cell_decode else None,
        feat_unfold=case.feat_unfold,
        local_ensemble=case.local_ensemble,
        backend=backend,
    )


def gather(context: Context, judge: Judge, case: Case, dtype: torch.dtype) -> None:
    """Bit for bit what the reference gathers on a CPU; gradients against float64."""
    problem = decode(case, dtype, context.device, grad=True)
    leaves = problem.leaves[:3]
    x, area_weight = _run_gather(leaves, case, context.backend)
    on_cpu = [leaf.detach().cpu() for leaf in leaves]
    expected_x, expected_weight = _run_gather(on_cpu, case, "reference")
    judge.true("shape and dtype", x.shape == expected_x.shape and x.dtype == dtype)
    # Copies, and the original's arithmetic: nothing is rounded differently.
    judge.at_most("different inputs", int((x.cpu() != expected_x).sum()), 0)
    judge.at_most("area weights", _largest(area_weight.cpu() - expected_weight), 1e-6)

    grads = []
    for tensors, backend in ((leaves, context.backend), ([leaf.double() for leaf in on_cpu], "reference")):
        values = [t.detach().requires_grad_() for t in tensors]
        outs = _run_gather(values, case, backend)
        probes = [
            probe_like(out, 2 + index).to(expected_out.dtype).to(out.dtype)  # rounded alike in both
            for index, (out, expected_out) in enumerate(zip(outs, (x, area_weight)))
        ]
        grads.append(torch.autograd.grad(outs, values, probes, allow_unused=True))
    limit = GRADIENT.get(dtype, SLACK_16.get(dtype, 0.0))
    expected = [None if grad is None else grad.to(context.device) for grad in grads[1]]
    judge_gradients(judge, list(grads[0]), expected, [limit] * 3, ["feat", "coord", "cell"])


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def ensemble(context: Context, judge: Judge, corners: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for outs in (5, 3, 64):
        pred = torch.rand(2, 150, corners, outs, generator=generator, dtype=torch.float64).to(dtype)
        geometry = torch.float64 if dtype == torch.float64 else torch.float32
        area_weight = torch.rand(2, 150, corners, generator=generator, dtype=torch.float64).to(geometry)
        values = [t.to(context.device).requires_grad_() for t in (pred, area_weight)]
        exact = [t.detach().double().requires_grad_() for t in values]
        out, expected = ops.ensemble(*values, backend=context.backend), ops.ensemble(*exact, backend="reference")
        judge.true("shape and dtype", out.shape == expected.shape and out.dtype == dtype)
        limit = FORWARD.get(dtype, 2 * torch.finfo(dtype).eps)
        judge.at_most("error of the range", range_error(out, expected), limit)
        probe = probe_like(expected)
        grads = torch.autograd.grad(out, values, probe.to(out.dtype))
        exact_grads = torch.autograd.grad(expected, exact, probe)
        limit = GRADIENT.get(dtype, 2 * torch.finfo(dtype).eps)
        judge_gradients(judge, list(grads), list(exact_grads), [limit] * 2, ["pred", "area_weight"])


def _metasr_problem(
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 2,
    channels: int = 4,
    size: tuple[int, int] = (5, 7),
    queries: int = 90,
    hidden: int = 29,
    outs: int = 3,
) -> list[Tensor]:
    """feat, coord, cell, two weights, two biases."""
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    points = [1.1 * uniform(batch, queries, 2), uniform(batch, queries, 2).abs() / 4]
    layers = [uniform(hidden, 3), uniform(9 * channels * outs, hidden) * 0.3]
    layers += [0.2 * uniform(hidden), 0.2 * uniform(9 * channels * outs)]
    tensors = [uniform(batch, channels, *size).to(dtype), *(t.to(geometry) for t in points)]
    return [t.to(device).requires_grad_() for t in (*tensors, *(t.to(dtype) for t in layers))]


def _run_metasr(tensors: list[Tensor], backend: str) -> Tensor:
    feat, coord, cell, w0, w1, b0, b1 = tensors
    return ops.metasr_query(feat, coord, cell, [w0, w1], [b0, b1], backend=backend)


def metasr(context: Context, judge: Judge, dtype: torch.dtype, **changes: Any) -> None:
    tensors = _metasr_problem(dtype, context.device, **changes)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, expected, plain = (
        _run_metasr(values, backend)
        for values, backend in ((tensors, context.backend), (exact, "reference"), (tensors, "reference"))
    )
    judge.true("shape and dtype", out.shape == expected.shape and out.dtype == dtype)
    probe = probe_like(expected)
    grads, plain_grads = (torch.autograd.grad(value, tensors, probe.to(value.dtype)) for value in (out, plain))
    exact_grads = torch.autograd.grad(expected, exact, probe)
    if dtype in FORWARD:
        judge.at_most("error of the range", range_error(out, expected), FORWARD[dtype])
        limits = [GRADIENT[dtype]] * len(grads)
    else:
        floor = SLACK_16[dtype]
        judge.at_most("norm error", norm_error(out, expected), TIMES_PYTORCH * norm_error(plain, expected) + floor)
        limits = [TIMES_PYTORCH * norm_error(grad, true) + floor for grad, true in zip(plain_grads, exact_grads)]
    names = ["feat", "coord", "cell", "weights", "weights", "biases", "biases"]
    judge_gradients(judge, list(grads), list(exact_grads), limits, names)


def metasr_region(context: Context, judge: Judge) -> None:
    feat, _, _, w0, w1, b0, b1 = (t.detach() for t in _metasr_problem(torch.float32, context.device, size=(60, 9)))
    size, band = (150, 20), (60, 0, 31, 20)
    coord = ops.reference.window_coord(size, band, dtype=torch.float32, device=context.device).expand(2, -1, 2)
    cell = coord.new_tensor([2 / size[0], 2 / size[1]]).expand(coord.shape)
    arguments = {"weights": [w0, w1], "biases": [b0, b1], "backend": context.backend}
    whole = ops.metasr_query(feat, coord, cell, **arguments)
    out = ops.metasr_query(feat[:, :, 20:42], coord, cell, feat_region=(20, 0, 60, 9), **arguments)
    judge.at_most("error of the range", range_error(out, whole), 1e-6)


def gather_strides(context: Context, judge: Judge) -> None:
    """Channels last, transposed and sliced maps give what the contiguous one gives."""
    case = GATHER_SHAPES["wide"]
    for dtype in DTYPES.values():
        problem = decode(case, dtype, context.device)
        feat, coord, cell = problem.leaves[:3]
        expected, _ = _run_gather([feat, coord, cell], case, context.backend)
        wide = torch.zeros(1, 64, 19, 30, dtype=dtype, device=context.device)
        wide[:, :, 1:18, 3:26] = feat
        for view in (
            feat.contiguous(memory_format=torch.channels_last),
            feat.transpose(2, 3).contiguous().transpose(2, 3),
            wide[:, :, 1:18, 3:26],
        ):
            x, _ = _run_gather([view, coord, cell], case, context.backend)
            judge.true(f"{short(dtype)} the same", torch.equal(x, expected))


def gather_layers_ensemble(context: Context, judge: Judge) -> None:
    """The three ops in turn are the fourth."""
    case = Case(batch=2, hidden=(16, 32))
    problem = decode(case, torch.float64, context.device)
    x, area_weight = _run_gather(problem.leaves[:3], case, context.backend)
    blended = ops.ensemble(
        ops.reference.imnet(x, problem.weights, problem.biases), area_weight, backend=context.backend
    )
    expected = ops.query(*problem, backend="reference")
    judge.at_most("error of the range", range_error(blended, expected), 1e-12)
