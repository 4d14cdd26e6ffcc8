"""One decode problem at coordinates or on a grid: run by a backend, by PyTorch's own layers, and in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liif_fast import ops
from tests.backends import Backend, Kind
from tests.helpers import Case, random_problem
from tests.ops.rounded_model import Rounding, rounded_query

MODES = ("points", "grid")  # and "fixed": points without gradients


class Problem(NamedTuple):
    """feat [B,C,H,W]; coord, cell [B,Q,2], on a grid the centers of its window; imnet's layers."""

    case: Case
    mode: str
    kind: Kind
    feat: Tensor
    coord: Tensor
    cell: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are compared; a grid has no coordinates to differentiate."""
        points = [self.coord, self.cell] if self.mode == "points" else []
        return [self.feat, *points, *self.weights, *self.biases]

    @property
    def tensors(self) -> tuple[Any, ...]:
        return self.feat, self.coord, self.cell, self.weights, self.biases

    def mapped(self, change) -> Problem:
        """The same problem with every tensor changed; leaves stay leaves."""

        def leaf(tensor: Tensor) -> Tensor:
            return change(tensor.detach()).requires_grad_(tensor.requires_grad)

        layers = [leaf(t) for t in self.weights], [leaf(t) for t in self.biases]
        return Problem(*self[:3], leaf(self.feat), leaf(self.coord), leaf(self.cell), *layers)


def make_problem(
    case: Case, kind: Kind, mode: str = "points", device: str = "cpu", *, grad: bool = True, seed: int = 0
) -> Problem:
    feat, coord, cell, weights, biases = random_problem(case, kind.dtype, seed)
    if mode == "grid":
        coord = ops.reference.window_coord(case.size, case.window, dtype=coord.dtype, device=None)
        coord = coord.expand(case.batch, -1, 2).contiguous()
        cell = coord.new_tensor([2 / size for size in case.size]).expand(coord.shape).contiguous()
    problem = Problem(case, mode, kind, feat, coord, cell, weights, biases).mapped(lambda t: t.to(device))
    for tensor in problem.leaves if grad else ():
        tensor.requires_grad_()
    return problem


def decode(problem: Problem, backend: str, **options: Any) -> Tensor:
    """[B,Q,O] by the public ops. Few queries get a latent map: without one, query would gather instead of decoding."""
    case, feat = problem.case, problem.feat
    layers = (problem.weights, problem.biases)
    with torch.autocast(feat.device.type, problem.kind.narrow, enabled=problem.kind.autocast):
        if problem.mode == "grid":
            image = ops.render(feat, case.size, *layers, window=case.window, backend=backend, **case.flags, **options)
            assert image.shape == (case.batch, case.outs, *case.window[2:])
            return image.flatten(2).transpose(1, 2)
        if backend != "reference" and 4 * case.queries < case.height * case.width:
            options.setdefault("latent_map", latent_map_of(problem))
        return ops.query(*problem.tensors, backend=backend, **case.flags, **options)


def latent_map_of(problem: Problem) -> Tensor:
    dtype = problem.coord.dtype  # at least float32, as in training
    with torch.autocast(problem.feat.device.type, enabled=False):
        weight = problem.weights[0].to(dtype)
        return ops.fold(problem.feat.to(dtype), weight, feat_unfold=problem.case.feat_unfold)


def gradients(out: Tensor, leaves: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """[out, *gradients of the leaves], zeros where there is none, of sum(out * probe); probe is rounded to `dtype`."""
    probe = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    probe = probe.to(out.device, dtype or out.dtype).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, probe, allow_unused=True)
    return [out, *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True))]


def exact(problem: Problem) -> tuple[Tensor, Sequence[Tensor]]:
    """(the decode, its leaves) in float64, with the latents that the coordinates' own dtype chooses.

    A query on a latent's center or between two chooses by rounding alone; so do weights at the border of a grid.
    """
    case, geometry = problem.case, problem.coord.dtype
    wide = problem.mapped(lambda tensor: tensor.double())
    # The latents come from a CPU, whose grid_sample rounds as the ops do; that of a GPU contracts multiply and add.
    feat, coord, cell = (t.to("cpu", geometry) for t in (wide.feat, wide.coord, wide.cell))
    switches = {"feat_unfold": case.feat_unfold, "local_ensemble": case.local_ensemble}
    x, area_weight = ops.reference.gather(feat, coord, cell if case.cell_decode else None, **switches)
    x, area_weight = (t.double().to(wide.feat.device) for t in (x, area_weight))
    return ops.reference.ensemble(ops.reference.imnet(x, wide.weights, wide.biases), area_weight), wide.leaves


def rounded(problem: Problem, rounding: Rounding, **rounds: bool) -> list[Tensor]:
    """[decode, *gradients] in float32 with the operands of hidden layers rounded, and more: see rounded_query."""
    with torch.autocast(problem.feat.device.type, enabled=False):
        out = rounded_query(*problem.tensors, rounding, **rounds, **problem.case.flags)
        return gradients(out, problem.leaves, problem.kind.dtype)


def run(problem: Problem, backend: Backend, **options: Any) -> list[Tensor]:
    """[decode, *gradients] on a backend."""
    return gradients(decode(problem, backend.op_backend, **options), problem.leaves, problem.kind.dtype)
