"""`decode` on Triton's kernels.

Imnets of up to 256 channels and eight outputs run in one kernel (fused.py), with operands of 16 bits, in
float32, or in TF32 where PyTorch is told to take that. Wider ones and float64 run layer by layer (layerwise.py):
the first layer and the blend are kernels, the products between them PyTorch's own. Both ways share the first layer's
backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...decode_inputs import DecodeInputs
from ...dtypes import geometry_dtype
from .fused import OUTS, chain_backward_kernel, chain_forward_kernel, mask_bytes
from .launch import (
    CARRIED,
    DTYPES,
    Problem,
    current_device,
    launch_settings,
    on_device_of,
    padded_width,
    product_precision,
)
from .layerwise import Grads, backward_first_layer, backward_layers, forward_layers, kept_shapes, product_of_rows
from .pack import Imnet, pack
from .problem import Decode, decode_grid, decode_points, grid_rel_cell

MAX_WIDTH = 256  # of a hidden layer in the fused kernel: wider ones do not fit registers
PIECE_BYTES = 1 << 29  # of activations and their gradients where the backward computes them again


def is_fused(widths: Sequence[int], operands: torch.dtype) -> bool:
    """Whether an imnet (K, *hidden, O) runs in one kernel. Decided by nothing else: forward and backward agree."""
    taken = operands in (torch.float32, torch.bfloat16, torch.float16)
    return taken and len(widths) > 1 and max(widths[:-1]) <= MAX_WIDTH and widths[-1] <= OUTS.value


class Kept(NamedTuple):
    """What the forward keeps of a fused decode; P = padded_width of the widest hidden layer, L = hidden products."""

    acts: Tensor  # [L, rows, P], the hidden layers' inputs, in the operands' dtype
    masks: Tensor  # which activations are positive: [L + 1, rows, mask_bytes]
    blended: Tensor  # [queries, P], float32
    preds: Tensor  # [rows, 8], float32; empty without gradients of coordinates


def _kept_shapes(
    queries: int, rows: int, widths: Sequence[int], operands: torch.dtype, coord_grad: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what the forward keeps; also of symbolic sizes."""
    if not is_fused(widths, operands):
        return kept_shapes(rows, widths, operands)
    width, layers = padded_width(max(widths[:-1])), len(widths) - 2
    return [
        ((layers, rows, width), operands),
        ((layers + 1, rows, mask_bytes(width, operands == torch.float32)), torch.uint8),
        ((queries, width), torch.float32),
        ((rows if coord_grad else 0, OUTS.value), torch.float32),
    ]


def _aligned_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return (math.prod(shape) * dtype.itemsize + 255) // 256 * 256


def saved_bytes(inputs: DecodeInputs, coord_grad: bool) -> int:
    """The size of what the forward keeps for the backward."""
    parts = _kept_shapes(inputs.queries, inputs.rows, inputs.widths, inputs.matmul_dtype, coord_grad)
    return sum(_aligned_bytes(*part) for part in parts)


def _views(saved: Tensor, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """The parts of `saved`, bytes, as tensors."""
    views, begin = [], 0
    for shape, dtype in shapes:
        size = math.prod(shape) * dtype.itemsize
        views.append(saved[begin : begin + size].view(dtype).view(shape))
        begin += _aligned_bytes(shape, dtype)
    return views


def _chain_forward(decode: Decode, imnet: Imnet, operands: torch.dtype, out: Tensor, kept: Kept | None) -> None:
    """Decodes to `out`, the whole problem's for points, the piece's own for a grid; fills `kept`."""
    width, dummy = imnet.first.shape[1], imnet.first
    problem = Problem("forward" if kept is None else "save", width, operands, imnet.precision)
    settings = launch_settings(problem, current_device())
    tiles, where = decode.tiles(settings.rows)
    acts, masks, blended, preds = (dummy,) * 4 if kept is None else kept
    chain_forward_kernel[(tiles,)](
        decode.latent_map, decode.points, dummy if decode.cell is None else decode.cell, imnet.first,
        imnet.weights, imnet.biases, imnet.last, imnet.last_bias, out, acts, masks, blended, preds,
        *where, imnet.weights.shape[0],
        WIDTH=decode.width, NUMBER=imnet.outs, TERMS=decode.terms, SAVE=kept is not None,
        COORD=kept is not None and kept.preds.numel() > 0, OP=DTYPES[operands], CARRY=CARRIED[operands],
        PRECISION=imnet.precision, KEPT=width if kept is None else kept.blended.shape[1],
        NB=width // settings.block, BLOCK=settings.block, num_stages=settings.stages, num_warps=settings.warps,
        **decode.flags(settings.rows),
    )  # fmt: skip


def _chain_backward(
    decode: Decode, imnet: Imnet, operands: torch.dtype, grad_out: Tensor, kept: Kept, grads: Grads
) -> None:
    """Adds a piece's gradients; grad_out is [queries, O]."""
    width, layers = imnet.first.shape[1], imnet.weights.shape[0]
    settings = launch_settings(Problem("backward", width, operands, imnet.precision), current_device())
    tiles, where = decode.tiles(settings.rows)
    grad_rows = grad_out.new_empty(layers + 1, decode.rows, kept.blended.shape[1], dtype=operands)
    partial = grad_out.new_empty(tiles, layers, width)
    grad_area_weight = grad_out.new_empty(decode.rows if grads.coord is not None else 0)
    chain_backward_kernel[(tiles,)](
        grad_out, decode.points, imnet.weights, imnet.last, kept.masks, kept.preds, grad_rows, partial,
        grad_area_weight, *where, layers,
        NUMBER=imnet.outs, COORD=grads.coord is not None, OP=DTYPES[operands], CARRY=CARRIED[operands],
        PRECISION=imnet.precision, KEPT=kept.blended.shape[1],
        NB=width // settings.block, BLOCK=settings.block, num_stages=settings.stages, num_warps=settings.warps,
        **decode.flags(settings.rows),
    )  # fmt: skip
    sums = partial.sum(0)
    for layer in range(layers):
        weight, bias = grads.weights[layer], grads.biases[layer + 1]
        product = product_of_rows(grad_rows[layer + 1], kept.acts[layer])
        weight += product[: weight.shape[0], : weight.shape[1]]
        bias += sums[layer, : bias.shape[0]]
    grads.weights[-1].add_(torch.mm(grad_out.t(), kept.blended)[:, : grads.weights[-1].shape[1]])
    grads.biases[-1].add_(grad_out.sum(0))
    backward_first_layer(decode, grad_rows[0], grad_area_weight, grads)


def _forward(
    decode: Decode, weights: Sequence[Tensor], biases: Sequence[Tensor], operands: torch.dtype, out: Tensor,
    coord_grad: bool, saved: Tensor,
) -> Tensor:  # fmt: skip
    if out.numel() == 0:
        return out
    widths = [decode.width, *(weight.shape[0] for weight in weights)]
    shapes = _kept_shapes(decode.queries, decode.rows, widths, operands, coord_grad)
    views = _views(saved, shapes) if saved.numel() else None
    with on_device_of(out):
        if is_fused(widths, operands):
            imnet = pack(decode, weights, biases, operands, product_precision(operands))
            _chain_forward(decode, imnet, operands, out, None if views is None else Kept(*views))
        else:
            forward_layers(decode, weights, biases, operands, out, views)
    return out


def _fused_backward(
    decode: Decode, weights: Sequence[Tensor], biases: Sequence[Tensor], operands: torch.dtype, grad_out: Tensor,
    saved: Tensor, grads: Grads,
) -> None:  # fmt: skip
    widths = [decode.width, *(weight.shape[0] for weight in weights)]
    precision = product_precision(operands)
    imnet = pack(decode, weights, biases, operands, precision, backward=True)
    again = None if saved.numel() else pack(decode, weights, biases, operands, precision)
    coord_grad = grads.coord is not None
    bytes_of_row = padded_width(max(widths[:-1])) * operands.itemsize * (2 * len(weights) + 1)
    pieces = [decode] if saved.numel() else decode.pieces(PIECE_BYTES // bytes_of_row)
    for piece in pieces:
        shapes = _kept_shapes(piece.queries, piece.rows, widths, operands, coord_grad)
        if again is None:
            kept = Kept(*_views(saved, shapes))
        else:
            kept = Kept(*(grad_out.new_empty(shape, dtype=dtype) for shape, dtype in shapes))
            _chain_forward(piece, again, operands, torch.empty_like(grad_out), kept)
        _chain_backward(piece, imnet, operands, piece.of_queries(grad_out).contiguous(), kept, grads)


def _backward(
    decode: Decode, weights: Sequence[Tensor], biases: Sequence[Tensor],
    operands: torch.dtype, grad_out: Tensor,
    saved: Tensor, grads: Grads,
) -> None:  # fmt: skip
    if grad_out.numel() == 0:
        return
    grad_out = grad_out.to(geometry_dtype(decode.latent_map)).contiguous()
    widths = [decode.width, *(weight.shape[0] for weight in weights)]
    with on_device_of(grad_out):
        if is_fused(widths, operands):
            _fused_backward(decode, weights, biases, operands, grad_out, saved, grads)
            return
        views = _views(saved, kept_shapes(decode.rows, widths, operands)) if saved.numel() else None
        backward_layers(decode, weights, biases, operands, grad_out, views, grads)


def _locate(inputs: DecodeInputs) -> Decode:
    latent_map, coord, cell, weight_geometry, _, biases, grid, grid_cell, ensemble, _ = inputs
    if coord is None:
        return decode_grid(latent_map, weight_geometry, biases[0], grid, grid_cell, ensemble)
    return decode_points(latent_map, coord, cell, weight_geometry, biases[0], ensemble)


def decode(inputs: DecodeInputs, saved: Tensor, coord_grad: bool) -> Tensor:
    out = inputs.latent_map.new_empty(inputs.out_shape, dtype=geometry_dtype(inputs.latent_map))
    return _forward(_locate(inputs), inputs.weights, inputs.biases, inputs.matmul_dtype, out, coord_grad, saved)


def decode_backward(grad_out: Tensor, saved: Tensor, inputs: DecodeInputs, coord_grad: bool) -> list[Tensor]:
    latent_map, coord, cell, weight_geometry, weights, biases = inputs[:6]
    grads = Grads.zeros(latent_map, weight_geometry, weights, biases, coord if coord_grad else None, cell)
    _backward(_locate(inputs), weights, biases, inputs.matmul_dtype, grad_out, saved, grads)
    if coord is None and weight_geometry.shape[1] == 4:  # every query has the same cell, which went into the bias
        for column, rel_cell in zip((2, 3), grid_rel_cell(inputs.grid, inputs.grid_cell)):
            grads.geometry[:, column] = grads.biases[0] * rel_cell
    points = [grad for grad in (grads.coord, grads.cell) if grad is not None]
    return [grads.latent_map, grads.geometry, *grads.weights, *grads.biases, *points]
