"""Decoding problems on a device, and every op as a function that returns its result and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from liif_fast import ops
from tests.helpers import Case, norm_error, random_problem

# The paper's decoder after EDSR-baseline: 580-256-256-256-256-3.
PAPER = Case(channels=64, height=48, width=48, queries=2304, hidden=(256,) * 4)
OPS = ("query", "render", "gather_and_ensemble", "metasr_query")


class Decode(NamedTuple):
    """feat [B,C,H,W]; coord, cell [B,Q,2]; weights [out,in] and biases [out] of the imnet and of MetaSR's layers."""

    feat: Tensor
    coord: Tensor
    cell: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    metasr: list[Tensor]  # two weights, two biases
    case: Case

    @property
    def leaves(self) -> list[Tensor]:
        return [self.feat, self.coord, self.cell, *self.weights, *self.biases, *self.metasr]

    def to(self, *target: torch.device | torch.dtype | str) -> Decode:
        """Copies of all tensors that are leaves of their own."""
        copies = [leaf.detach().to(*target, copy=True).requires_grad_(leaf.requires_grad) for leaf in self.leaves]
        depth = len(self.weights)
        return Decode(*copies[:3], copies[3 : 3 + depth], copies[3 + depth : -4], copies[-4:], self.case)


def make_problem(
    case: Case, dtype: torch.dtype, device: torch.device | str, *, grad: bool = False, seed: int = 0
) -> Decode:
    """The random problem of a case; its values do not depend on the device.

    Wide imnets get the range of He et al., so that signals keep their size through four layers.
    """
    feat, coord, cell, weights, biases = random_problem(case, dtype, seed)
    if len(case.hidden) > 1 and min(case.hidden) >= 128:
        weights = [weight * 2**0.5 for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    shapes = ((29, 3), (27 * case.channels, 29), (29,), (27 * case.channels,))
    metasr = [(torch.rand(shape, generator=generator) - 0.5).to(dtype) for shape in shapes]
    problem = Decode(feat, coord, cell, weights, biases, metasr, case).to(device)
    for leaf in problem.leaves:
        leaf.requires_grad_(grad)
    return problem


def run(op: str, problem: Decode, backend: str) -> list[Tensor]:
    """[result, *gradients] of one of OPS; the result alone where gradients are off."""
    feat, coord, cell, weights, biases, metasr, case = problem
    if op == "query":
        out = ops.query(feat, coord, cell, weights, biases, backend=backend, **case.flags)
    elif op == "render":
        size, window = (2 * case.height + 3, 2 * case.width + 5), (1, 2, 2 * case.height, 2 * case.width)
        out = ops.render(feat, size, weights, biases, window=window, backend=backend, **case.flags)
    elif op == "metasr_query":
        out = ops.metasr_query(feat, coord, cell, metasr[:2], metasr[2:], backend=backend)
    else:
        cell_or_none = cell if case.cell_decode else None
        x, area_weight = ops.gather(feat, coord, cell_or_none, local_ensemble=case.local_ensemble, backend=backend)
        out = ops.ensemble(x, area_weight, backend=backend)
    if not out.requires_grad:
        return [out]
    grads = torch.autograd.grad(out.float().square().mean(), problem.leaves, allow_unused=True)
    return [out.detach(), *(grad for grad in grads if grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    """Each tensor's relative error in the 2-norm is at most `limit`."""
    errors = [norm_error(ours.to(theirs.device), theirs) for ours, theirs in zip(found, expected, strict=True)]
    assert all(error <= limit for error in errors), errors
