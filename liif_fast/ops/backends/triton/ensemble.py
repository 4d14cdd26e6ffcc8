"""`ensemble` in Triton: the area-weighted blend of the corners' predictions, and its gradients.

It takes any number of corners.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DTYPES, OPTIONS, on_device_of, power_of_two

_SIZES = ["count", "corners", "outs"]


@triton.jit(do_not_specialize=_SIZES)
def ensemble_forward_kernel(
    pred, area_weight, out, count, corners, outs, T: tl.constexpr, QUERIES: tl.constexpr, OUTS: tl.constexpr
):
    """A tile of queries and outputs, summed over the corners in their order."""
    blocks = tl.cdiv(outs, OUTS)
    at = tl.program_id(0).to(tl.int64)
    query = at // blocks * QUERIES + tl.arange(0, QUERIES)
    output = (at % blocks).to(tl.int32) * OUTS + tl.arange(0, OUTS)
    inside = (query < count)[:, None] & (output < outs)[None, :]
    total = tl.zeros([QUERIES, OUTS], T)
    for corner in range(corners):
        row = query * corners + corner
        value = tl.load(pred + row[:, None] * outs + output[None, :], mask=inside, other=0.0).to(T)
        total += value * tl.load(area_weight + row, mask=query < count, other=0.0)[:, None]
    tl.store(out + query[:, None] * outs + output[None, :], total, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def ensemble_backward_kernel(
    grad_out, pred, area_weight, grad_pred, grad_area_weight, count, corners, outs,
    T: tl.constexpr, QUERIES: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """Gradients of a few queries' predictions and of their area weights, which are sums over all outputs."""
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    valid = query < count
    for corner in range(corners):
        row = query * corners + corner
        weight = tl.load(area_weight + row, mask=valid, other=0.0)
        total = tl.zeros([QUERIES], T)
        for begin in range(0, outs, OUTS):
            output = begin + tl.arange(0, OUTS)
            inside = valid[:, None] & (output < outs)[None, :]
            grad = tl.load(grad_out + query[:, None] * outs + output[None, :], mask=inside, other=0.0).to(T)
            place = row[:, None] * outs + output[None, :]
            total += tl.sum(grad * tl.load(pred + place, mask=inside, other=0.0).to(T), axis=1)
            tl.store(grad_pred + place, grad * weight[:, None], mask=inside)
        tl.store(grad_area_weight + row, total, mask=valid)


def _tile(outs: int) -> tuple[int, int]:
    """Queries and outputs of a tile: about 1024 values."""
    columns = power_of_two(outs, 4, 256)
    return max(1024 // columns, 4), columns


def ensemble(pred: Tensor, area_weight: Tensor) -> Tensor:
    """[B, Q, S, O] and [B, Q, S] -> [B, Q, O] in area_weight's dtype."""
    batch, queries, corners, outs = pred.shape
    out = area_weight.new_zeros(batch, queries, outs)
    if pred.numel() == 0:
        return out
    rows, columns = _tile(outs)
    with on_device_of(pred):
        ensemble_forward_kernel[(triton.cdiv(batch * queries, rows) * triton.cdiv(outs, columns),)](
            pred.contiguous(), area_weight.contiguous(), out, batch * queries, corners, outs,
            T=DTYPES[out.dtype], QUERIES=rows, OUTS=columns, **OPTIONS,
        )  # fmt: skip
    return out


def ensemble_backward(grad_out: Tensor, pred: Tensor, area_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of pred and area_weight in area_weight's dtype."""
    batch, queries, corners, outs = pred.shape
    grad_pred = torch.zeros_like(pred, dtype=area_weight.dtype, memory_format=torch.contiguous_format)
    grad_area_weight = torch.zeros_like(area_weight, memory_format=torch.contiguous_format)
    if pred.numel() == 0:
        return grad_pred, grad_area_weight
    rows, columns = _tile(outs)
    with on_device_of(pred):
        ensemble_backward_kernel[(triton.cdiv(batch * queries, rows),)](
            grad_out.contiguous(), pred.contiguous(), area_weight.contiguous(), grad_pred, grad_area_weight,
            batch * queries, corners, outs, T=DTYPES[area_weight.dtype], QUERIES=rows, OUTS=columns, **OPTIONS,
        )  # fmt: skip
    return grad_pred, grad_area_weight
