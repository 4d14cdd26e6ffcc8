"""`decode` on Triton's kernels.

Imnets of up to 256 channels (512 in inference in 16 bits) run in one kernel (fused.py): in 16 bits, in float32, or in
TF32 if PyTorch allows it. Wider imnets and float64 run layer by layer (layerwise.py). Both modules have the same
functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ...dtypes import geometry_dtype
from ...inputs import DecodeInputs
from . import fused, layerwise
from .launch import DecodeChunk, grid_rel_cell, on_device_of
from .layerwise import DecodeGrads


def _kernels(inputs: DecodeInputs, infers: bool = False) -> ModuleType:
    """The module that decodes. The choice depends on widths and dtype only, so that forward and backward agree.

    infers: whether no backward follows.
    """
    return fused if fused.can_fuse(inputs.widths, inputs.matmul_dtype, infers) else layerwise


def _aligned_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return (math.prod(shape) * dtype.itemsize + 255) // 256 * 256


def saved_bytes(inputs: DecodeInputs, coord_grad: bool) -> int:
    """The size of what the forward saves for the backward; sizes may be symbolic."""
    shapes = _kernels(inputs).saved_shapes(inputs, inputs.queries, inputs.rows, coord_grad)
    return sum(_aligned_bytes(*part) for part in shapes)


def _views(saved: Tensor, inputs: DecodeInputs, coord_grad: bool) -> list[Tensor] | None:
    """The parts of `saved`, a tensor of bytes, as tensors; None if it is empty."""
    if saved.numel() == 0:
        return None
    views, begin = [], 0
    for shape, dtype in _kernels(inputs).saved_shapes(inputs, inputs.queries, inputs.rows, coord_grad):
        size = math.prod(shape) * dtype.itemsize
        views.append(saved[begin : begin + size].view(dtype).view(shape))
        begin += _aligned_bytes(shape, dtype)
    return views


def decode(inputs: DecodeInputs, save: bool | None, coord_grad: bool) -> tuple[Tensor, Tensor]:
    saved = inputs.empty_saved(saved_bytes(inputs, coord_grad) if save else 0)
    out = inputs.latent_map.new_empty(inputs.out_shape, dtype=geometry_dtype(inputs.latent_map))
    if out.numel() > 0:
        with on_device_of(out):
            _kernels(inputs, save is None).forward(DecodeChunk.whole(inputs), out, _views(saved, inputs, coord_grad))
    return out, saved


def decode_backward(grad_out: Tensor, saved: Tensor, inputs: DecodeInputs, coord_grad: bool) -> list[Tensor]:
    grads = DecodeGrads.zeros(inputs, coord_grad)
    if grad_out.numel() > 0:
        grad_out = grad_out.to(geometry_dtype(inputs.latent_map)).contiguous()
        with on_device_of(grad_out):
            views = _views(saved, inputs, coord_grad)
            _kernels(inputs).backward(DecodeChunk.whole(inputs), grad_out, views, grads)
    if inputs.coord is None and inputs.weight_geometry.shape[1] == 4:
        # Every query has the same rel_cell, which was added to the bias.
        for column, rel_cell in zip((2, 3), grid_rel_cell(inputs)):
            grads.geometry[:, column] = grads.biases[0] * rel_cell
    others = [grad for grad in (grads.coord, grads.cell, grads.query_term) if grad is not None]
    return [grads.latent_map, grads.geometry, *grads.weights, *grads.biases, *others]
