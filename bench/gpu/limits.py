"""What results are held to: the promised accuracies, and twice what PyTorch's own layers make of the same problem."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.check import Judge
from bench.gpu.problems import Case, Decode, norm_error
from tests.ops.rounded_model import rounded_query
from liif_fast import ops

# Largest error as a fraction of the range; relative norm error of a gradient. Sums here run in another order than the
# reference's, which at these sizes costs a few units in the last place.
FORWARD = {torch.float64: 1e-12, torch.float32: 1e-5}
GRADIENT = {torch.float64: 1e-11, torch.float32: 1e-5}
# Of the paper's decoder in 16 bits.
PSNR = {torch.float16: 68.0, torch.bfloat16: 52.0}
GRADIENT_16 = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Of what PyTorch's own 16-bit layers make of the same problem.
TIMES_PYTORCH = 2.0
# On small problems one ReLU that turns round, or the rounding of the result, weighs more than all else.
SLACK_16 = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
# Of a gradient of three layers, to that of a decode which rounds where kernels round: see `rounded_gradients`.
ROUNDED = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Where an activation lies this near to 0, in units of its layer, two right float32 sums may differ in whether its ReLU
# lets it pass, and then gradients differ by far more than by their rounding.
NEAR_ZERO = {torch.float64: 1e-13, torch.float32: 1e-5}
TURNED_RELU = 2e-3


def probe_like(out: Tensor, seed: int = 1) -> Tensor:
    """What gradients are taken of, sum(out * probe): the same values on every device."""
    values = torch.rand(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return values.to(out.device)


def gradients(out: Tensor, problem: Decode, dtype: torch.dtype) -> list[Tensor | None]:
    """Of a probe rounded to `dtype`, so that its rounding is no part of any error."""
    probe = probe_like(out).to(dtype).to(out.dtype)
    return list(torch.autograd.grad(out, problem.leaves, probe, allow_unused=True))


def rounded_gradients(problem: Decode, case: Case, dtype: torch.dtype, grad_out: Tensor) -> list[list]:
    """Gradients [of every leaf] of the same decode in float32 with its operands rounded to 16 bits, each way that a
    backend may do so; none in other dtypes.

    A ReLU that a rounding turns round changes a small problem's gradients by far more than all roundings; which ones
    turn is luck, PyTorch's own no less. These have the kernels' luck.
    """
    if dtype not in ROUNDED:
        return []
    found = []
    with torch.autocast(grad_out.device.type, enabled=False):
        for edges in (False, True):
            out = rounded_query(*problem, lambda values: values.to(dtype).float(), edges=edges, **case.flags)
            found.append(list(torch.autograd.grad(out, problem.leaves, grad_out.to(out.dtype), allow_unused=True)))
    return found


def judge_gradients(
    judge: Judge, grads: list, expected: list, limits: list[float], names: list[str], rounded: Sequence[list] = (),
    rounded_limit: float = 0.0,
) -> None:  # fmt: skip
    """Every gradient beside its exact one; where there is none, it must be none or zero.

    rounded: from `rounded_gradients`; all of a decode's gradients may be as near as `rounded_limit` to one of those
    instead.
    """

    def is_near(other: list) -> bool:
        pairs = [
            (grad, true) for grad, true in zip(grads, other, strict=True) if true is not None and true.norm() > 1e-9
        ]
        return all(norm_error(grad, true) <= rounded_limit for grad, true in pairs)

    exact_enough = all(
        norm_error(grad, true) <= limit
        for grad, true, limit in zip(grads, expected, limits, strict=True)
        if true is not None and true.norm() >= 1e-9
    )
    near = None if exact_enough else next((other for other in rounded if is_near(other)), None)
    if near is not None:
        expected = [None if true is None else other for true, other in zip(expected, near, strict=True)]
        limits = [rounded_limit] * len(limits)
    for name, grad, exact, limit in zip(names, grads, expected, limits, strict=True):
        if exact is None:
            judge.true(f"no gradient of {name}", grad is None or not grad.any())
        elif exact.norm() < 1e-9:  # coord without anything that depends on it
            judge.at_most(f"gradient of {name}, absolute", float(grad.double().norm()), 1e-4)
        else:
            judge.at_most(f"gradient of {name}", norm_error(grad, exact), limit)


def rounded_limit(case: Case, dtype: torch.dtype) -> float:
    """For `judge_gradients`; deep imnets round more often."""
    return ROUNDED.get(dtype, 0.0) * max(len(case.hidden) / 3, 1)


def leaf_names(problem: Decode) -> list[str]:
    """Layers share a name: the report shows the worst of them."""
    return ["feat", "coord", "cell"] + ["weights"] * len(problem.weights) + ["biases"] * len(problem.biases)


def gradient_limits(
    problem: Decode, case: Case, dtype: torch.dtype, plain: list, exact: list, *, least: float | None = None
) -> list[float]:
    """Limits of a decode's gradients: `least` (the dtype's own), or twice PyTorch's error where that is more.

    problem: the exact one, for a look at its activations. plain, exact: PyTorch's gradients in `dtype` and in float64.
    """
    if least is None:
        least = GRADIENT.get(dtype, SLACK_16.get(dtype, 0.0))
    if dtype in NEAR_ZERO and nearest_to_zero(problem, case) < NEAR_ZERO[dtype]:
        least = max(least, TURNED_RELU)
    limits = []
    for grad, true in zip(plain, exact, strict=True):
        known = grad is not None and true is not None and true.norm() > 0
        limits.append(max(least, TIMES_PYTORCH * norm_error(grad, true)) if known else least)
    return limits


def nearest_to_zero(problem: Decode, case: Case) -> float:
    """The smallest value before any ReLU of a float64 problem, as a fraction of its layer's root mean square."""
    with torch.no_grad():
        x, _ = ops.reference.gather(
            problem.feat,
            problem.coord,
            problem.cell if case.cell_decode else None,
            feat_unfold=case.feat_unfold,
            local_ensemble=case.local_ensemble,
        )
        least = math.inf
        for weight, bias in zip(problem.weights[:-1], problem.biases[:-1]):
            x = F.linear(x, weight, bias)
            if x.numel():
                least = min(least, float(x.abs().min() / x.square().mean().sqrt().clamp_min(1e-300)))
            x = F.relu(x)
    return least
