"""Methods of gather alone and of ensemble alone: the original's calls, and the ops' backends."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.methods.method import Job, Prepared
from liif_fast import ops
from liif_fast.benchmark import original
from liif_fast.benchmark.runs import DTYPES, with_passes


def _leaves(job: Job, *tensors: Tensor) -> list[Tensor]:
    """Copies of the tensors, which require gradients where the workload has a backward pass."""
    return [tensor.clone().requires_grad_(job.workload.passes != "forward") for tensor in tensors]


def gather_original(job: Job) -> Prepared:
    feat, coord, cell = leaves = _leaves(job, *job.problem[:3])

    def forward() -> Tensor:
        return torch.stack(original.corner_inputs(original.unfold(feat), coord, cell)[0], dim=2)

    return with_passes(forward, leaves, job.workload.passes), ""


def gather(job: Job, backend: str, dtype: str) -> Prepared:
    feat, coord, cell = leaves = _leaves(job, *job.problem.to(DTYPES[dtype])[:3])
    return with_passes(lambda: ops.gather(feat, coord, cell, backend=backend)[0], leaves, job.workload.passes), ""


def _predictions(job: Job) -> tuple[Tensor, Tensor]:
    """pred [B, Q, 4, 3] and areas [B, Q, 4], in the problem's dtype."""
    generator = torch.Generator(device=job.device).manual_seed(1)
    shape = (job.workload.batch, job.workload.queries, 4)
    pred = torch.randn(*shape, 3, generator=generator, device=job.device)
    area = torch.rand(shape, generator=generator, device=job.device) + 0.01
    return pred.to(job.problem.feat.dtype), area.to(job.problem.coord.dtype)


def ensemble_original(job: Job) -> Prepared:
    pred, area = _predictions(job)
    # Corner by corner, as the imnet returns them.
    preds = _leaves(job, *(corner.contiguous() for corner in pred.unbind(2)))
    areas = [corner.contiguous() for corner in area.unbind(2)]
    return with_passes(lambda: original.blend(preds, areas), preds, job.workload.passes), ""


def ensemble(job: Job, backend: str, dtype: str) -> Prepared:
    pred, area = _predictions(job)
    area_weight = area.flip(2) / area.sum(2, keepdim=True)
    leaves = _leaves(job, pred.to(DTYPES[dtype]))
    run = with_passes(lambda: ops.ensemble(leaves[0], area_weight, backend=backend), leaves, job.workload.passes)
    if job.workload.passes == "forward":
        return run, ""
    return lambda: list(run()[0].unbind(2)), ""  # views with the shapes of the original's gradients
