"""Random problems on a device and their exact results, from the tests' one home of shapes and tolerances."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from liif_fast import ops
from tests.helpers import FLAGS, SHAPES, Case, norm_error, psnr, random_problem, range_error

__all__ = [
    "DTYPES",
    "FLAGS",
    "PAPER",
    "SHAPES",
    "Case",
    "Decode",
    "decode",
    "exact_query",
    "flag_name",
    "norm_error",
    "psnr",
    "random_problem",
    "range_error",
    "short",
]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# The paper's decoder behind EDSR-baseline: 580-256-256-256-256-3.
PAPER = Case(channels=64, height=48, width=48, queries=2304, hidden=(256,) * 4)


class Decode(NamedTuple):
    """A problem on the device. feat [B,C,H,W]; coord, cell [B,Q,2]; weights [out,in] and biases [out] of each layer."""

    feat: Tensor
    coord: Tensor
    cell: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.feat, self.coord, self.cell, *self.weights, *self.biases]

    def exact(self) -> Decode:
        """The same values in float64, as leaves of their own."""
        return self._mapped(lambda tensor: tensor.detach().double())

    def to(self, device: torch.device | str) -> Decode:
        return self._mapped(lambda tensor: tensor.detach().to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Decode:
        def leaf(tensor: Tensor) -> Tensor:
            return change(tensor).requires_grad_(tensor.requires_grad)

        weights, biases = [leaf(t) for t in self.weights], [leaf(t) for t in self.biases]
        return Decode(leaf(self.feat), leaf(self.coord), leaf(self.cell), weights, biases)


def decode(case: Case, dtype: torch.dtype, device: torch.device, *, grad: bool = False, seed: int = 0) -> Decode:
    """The tests' random problem of a case on the device; its values do not depend on the device.

    The widest case gets He et al.'s range, so that signals keep their size through four layers: the accuracies that are
    promised in dB are promised of such an imnet.
    """
    feat, coord, cell, weights, biases = random_problem(case, dtype, seed)
    if len(case.hidden) > 1 and min(case.hidden) >= 128:
        weights = [weight * 2**0.5 for weight in weights]
    problem = Decode(feat, coord, cell, weights, biases).to(device)
    for tensor in problem.leaves if grad else ():
        tensor.requires_grad_()
    return problem


def exact_query(problem: Decode, case: Case) -> Tensor:
    """The decode in float64 of values already rounded, [B, Q, O]; latents chosen as the coordinates' dtype rounds.

    The indices come from a CPU, whose `grid_sample` rounds as the ops do; a GPU's contracts multiply and add.
    """
    feat, coord, cell = (t.detach().cpu() for t in (problem.feat, problem.coord, problem.cell))
    geometry = torch.float64 if feat.dtype == torch.float64 else torch.float32
    x, area_weight = ops.reference.gather(
        feat.to(geometry),
        coord,
        cell if case.cell_decode else None,
        feat_unfold=case.feat_unfold,
        local_ensemble=case.local_ensemble,
    )
    device = problem.feat.device
    layers = [[t.detach().double() for t in tensors] for tensors in (problem.weights, problem.biases)]
    return ops.reference.ensemble(ops.reference.imnet(x.double().to(device), *layers), area_weight.double().to(device))


def flag_name(flags: Sequence[bool]) -> str:
    """The paper's names of an ablation: -e without ensemble, -u without unfolding, -c without cells."""
    return "".join(f"-{letter}" for letter, on in zip("euc", flags) if not on) or "full"


def short(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def layers_from(widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """An imnet of zeros, for checks that write their own weights."""
    weights = [torch.zeros(o, i, dtype=dtype, device=device) for i, o in itertools.pairwise(widths)]
    return weights, [torch.zeros(o, dtype=dtype, device=device) for o in widths[1:]]
