"""The `cuda` backend: hands tensors to the CUDA kernels in the layout and dtype these take.

So far it has `gather` and `ensemble`, one function for each of their ops in `library.py`; `backends.can_run_cuda`
refuses the others. Features and predictions stay in their own dtype, geometry and sums are float64 or float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import compute_dtype

_C = torch.ops.liif_fast_C


def gather(
    feat: Tensor, coord: Tensor, cell: Tensor | None, feat_unfold: bool, local_ensemble: bool
) -> tuple[Tensor, Tensor]:
    cell = None if cell is None else cell.contiguous()
    x, area_weight = _C.gather(feat, coord.contiguous(), cell, feat_unfold, local_ensemble)  # any strides of feat
    return x, area_weight


def gather_backward(
    grad_x: Tensor,
    grad_area_weight: Tensor,
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    feat_unfold: bool,
    local_ensemble: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    height, width = feat.shape[2:]
    grad_feat, grad_coord, grad_cell = _C.cuda_gather_backward(
        grad_x.to(feat.dtype).contiguous(),
        grad_area_weight.contiguous(),
        coord.contiguous(),
        feat.shape[1],
        height,
        width,
        cell is not None,
        feat_unfold,
        local_ensemble,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grad_feat, grad_coord, grad_cell


def ensemble(pred: Tensor, area_weight: Tensor) -> Tensor:
    return _C.ensemble(pred.contiguous(), area_weight.contiguous())


def ensemble_backward(grad_out: Tensor, pred: Tensor, area_weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_pred, grad_area_weight = _C.ensemble_backward(
        grad_out.to(compute_dtype(pred)).contiguous(), pred.contiguous(), area_weight.contiguous()
    )
    return grad_pred, grad_area_weight
