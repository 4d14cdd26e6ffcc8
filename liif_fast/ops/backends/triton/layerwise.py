"""The decode layer by layer: the first layer and the blend are kernels, the products between them PyTorch's own.

For float32 and float64, and for imnets that the fused kernel does not take. The first layer's backward, which the fused
decode shares, is here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...dtypes import geometry_dtype
from .ensemble import ensemble, ensemble_backward
from .gather import QUERIES, gather_backward_geometry_kernel
from .launch import OPTIONS, power_of_two, segments
from .problem import Decode, kernel_dtype
from .rows import first_backward_kernel, first_forward_kernel, latent_kernel, ordered_scatter_kernel

ROWS = 64  # of a tile of the first layer
PIECE_BYTES = 1 << 28  # of activations at a time


class Grads(NamedTuple):
    """Gradients to add to, in the compute dtype."""

    latent_map: Tensor  # [B, h, w, K]
    geometry: Tensor  # [K, 2 or 4]
    weights: list[Tensor]
    biases: list[Tensor]
    coord: Tensor | None  # [B, Q, 2]
    cell: Tensor | None  # [B, Q, 2]

    @classmethod
    def zeros(
        cls,
        latent_map: Tensor,
        weight_geometry: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        coord: Tensor | None,
        cell: Tensor | None,
    ) -> Grads:
        dtype = geometry_dtype(latent_map)

        def zero(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)

        return cls(
            zero(latent_map),
            zero(weight_geometry),
            [zero(weight) for weight in weights],
            [zero(bias) for bias in biases],
            None if coord is None else zero(coord),
            None if coord is None or cell is None else zero(cell),
        )


def product_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of [rows, m] and [rows, n] -> [m, n], summed in float32 or better and not rounded back."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(a.t(), b)
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return torch.mm(a.t().float(), b.float())


def activation_widths(widths: Sequence[int]) -> Sequence[int]:
    """Widths of the activations that the backward reads: of all layers but the last, or of the only one."""
    return widths[:-1] if len(widths) > 1 else widths


def kept_shapes(rows: int, widths: Sequence[int], operands: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what the forward keeps: those activations, then the area weights."""
    geometry = torch.float64 if operands == torch.float64 else torch.float32
    return [*(((rows, width), operands) for width in activation_widths(widths)), ((rows, 1), geometry)]


def _columns(stride: int) -> int:
    """Of a tile: a power of two that divides the padded width."""
    return min(stride, 64)


def _forward_first_layer(decode: Decode, hidden: Tensor, area_weight: Tensor, activate: bool) -> None:
    """Fills hidden [rows, K] and area_weight [rows, 1]."""
    stride = decode.first.shape[1]
    columns = _columns(stride)
    tiles, where = decode.tiles(ROWS)
    first_forward_kernel[(tiles * (stride // columns),)](
        decode.latent_map, decode.points, decode.first if decode.cell is None else decode.cell, decode.first,
        hidden, area_weight, *where,
        RELU=activate, WIDTH=decode.width, STRIDE=stride, TERMS=decode.terms, T=kernel_dtype(decode), COLS=columns,
        **decode.flags(ROWS),
    )  # fmt: skip


def backward_first_layer(decode: Decode, grad_rows: Tensor, grad_area_weight: Tensor, grads: Grads) -> None:
    """Adds a piece's gradients of the latent map, the geometry weights, the first bias, coord and cell.

    Args:
        grad_rows: [rows, K or more], of the first layer before its ReLU.
        grad_area_weight: [rows]; read only where gradients of coord are wanted.
    """
    stride, width, terms = decode.first.shape[1], decode.width, decode.terms
    exact = torch.are_deterministic_algorithms_enabled()
    grad_latent_map = decode.latents_of(grads.latent_map)
    tiles, where = decode.tiles(ROWS)
    partial = decode.first.new_empty(tiles, terms + 1, stride)
    wants_coord = grads.coord is not None
    grad_rel = decode.first.new_empty(decode.rows if wants_coord else 0, terms)
    dtype = kernel_dtype(decode)
    first_backward_kernel[(tiles,)](
        grad_rows, decode.first, decode.points, decode.first if decode.cell is None else decode.cell,
        grad_latent_map, partial, grad_rel, *where,
        SCATTER=not exact, COORD=wants_coord, WIDTH=width, GRAD_STRIDE=grad_rows.shape[1], STRIDE=stride, TERMS=terms,
        T=dtype, COLS=_columns(stride), **decode.flags(ROWS),
    )  # fmt: skip
    sums = partial.sum(0)[:, :width]
    grads.geometry[:, :terms] += sums[:terms].t()
    grads.biases[0].add_(sums[terms])
    if exact:
        _scatter_in_order(decode, grad_rows, grad_latent_map)
    if wants_coord:
        _backward_points(decode, grad_rel, grad_area_weight, grads)


def _scatter_in_order(decode: Decode, grad_rows: Tensor, grad_latent_map: Tensor) -> None:
    """Adds rows to their latents in a fixed order."""
    numbers = torch.empty(decode.rows, dtype=torch.int64, device=grad_rows.device)
    tiles, where = decode.tiles(128)
    dtype = kernel_dtype(decode)
    latent_kernel[(tiles,)](decode.points, numbers, *where, T=dtype, **decode.flags(128))
    latents = grad_latent_map.numel() // decode.width
    order, begins = segments(numbers, latents)
    columns = power_of_two(decode.width, 16, 256)
    ordered_scatter_kernel[(latents * triton.cdiv(decode.width, columns),)](
        grad_rows, order, begins, grad_latent_map,
        WIDTH=decode.width, GRAD_STRIDE=grad_rows.shape[1], T=dtype, COLS=columns, **OPTIONS,
    )  # fmt: skip


def _backward_points(decode: Decode, grad_rel: Tensor, grad_area_weight: Tensor, grads: Grads) -> None:
    """Through relative coordinates, relative cells and area weights to coord and cell."""
    assert grads.coord is not None
    part = slice(decode.first_query, decode.first_query + decode.queries)
    coord = grads.coord.view(-1, 2)[part]
    cell = coord if grads.cell is None else grads.cell.view(-1, 2)[part]
    gather_backward_geometry_kernel[(triton.cdiv(decode.queries, QUERIES),)](
        grad_rel, grad_area_weight, decode.points[part], coord, cell, decode.queries, *decode.axes[:2], 0,
        decode.terms, HAS_CELL=decode.terms == 4, ENSEMBLE=decode.ensemble, T=kernel_dtype(decode), QUERIES=QUERIES,
        **OPTIONS,
    )  # fmt: skip


def _activations(
    decode: Decode, weights: Sequence[Tensor], biases: Sequence[Tensor], operands: torch.dtype, kept: Sequence[Tensor]
) -> None:
    """Fills `kept`: activations of all layers but the last (or of the only one), and the area weights."""
    _forward_first_layer(decode, kept[0], kept[-1], bool(weights))
    for layer, weight in enumerate(weights[:-1]):
        torch.addmm(biases[layer + 1].to(operands), kept[layer], weight.to(operands).t(), out=kept[layer + 1]).relu_()


def _make_activations(
    decode: Decode, weights: Sequence[Tensor], biases: Sequence[Tensor], operands: torch.dtype
) -> list[Tensor]:
    """The same in tensors of their own."""
    widths = [decode.width, *(weight.shape[0] for weight in weights)]
    shapes = kept_shapes(decode.rows, widths, operands)
    kept = [decode.first.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    _activations(decode, weights, biases, operands, kept)
    return kept


def _blend(decode: Decode, rows: Tensor, area_weight: Tensor) -> Tensor:
    """[rows, width] -> [queries, width] in the compute dtype."""
    shape = (1, decode.queries, decode.corners)
    return ensemble(rows.view(*shape, -1), area_weight.view(shape))[0]


def _piece_rows(weights: Sequence[Tensor], width: int, operands: torch.dtype, layers: int) -> int:
    """Rows of a piece: so many that `layers` activations of the widest layer fill PIECE_BYTES."""
    widest = max([width, *(weight.shape[0] for weight in weights)])
    return PIECE_BYTES // (widest * operands.itemsize * layers)


def forward_layers(
    decode: Decode, weights: Sequence[Tensor], biases: Sequence[Tensor], operands: torch.dtype, out: Tensor,
    kept: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """Decodes to `out`, the whole problem's; fills `kept`, tensors of `kept_shapes`."""
    dtype = decode.first.dtype
    limit = _piece_rows(weights, decode.width, operands, max(len(weights), 1))
    for piece in [decode] if kept is not None else decode.pieces(limit):
        if kept is None:
            *_, last, area_weight = _make_activations(piece, weights, biases, operands)
        else:
            _activations(piece, weights, biases, operands, kept)
            *_, last, area_weight = kept
        values = _blend(piece, last, area_weight)
        if weights:
            values = torch.addmm(biases[-1].to(dtype), values, weights[-1].to(dtype).t())
        piece.put_queries(out, values)


def backward_layers(
    decode: Decode, weights: Sequence[Tensor], biases: Sequence[Tensor], operands: torch.dtype, grad_out: Tensor,
    kept: Sequence[Tensor] | None, grads: Grads,
) -> None:  # fmt: skip
    """Adds all gradients; computes the activations again without `kept`."""
    limit = _piece_rows(weights, decode.width, operands, 2 * len(weights) + 2)
    for piece in [decode] if kept is not None else decode.pieces(limit):
        acts = _make_activations(piece, weights, biases, operands) if kept is None else kept
        _backward_piece(piece, weights, operands, piece.of_queries(grad_out).contiguous(), acts[:-1], acts[-1], grads)


def _backward_piece(
    decode: Decode, weights: Sequence[Tensor], operands: torch.dtype, grad_out: Tensor, acts: Sequence[Tensor],
    area_weight: Tensor, grads: Grads,
) -> None:  # fmt: skip
    """grad_out: [queries, O]; acts: of all layers but the last (or of the only one); area_weight: [rows, 1]."""
    dtype = decode.first.dtype
    grad_blended = grad_out
    if weights:
        grads.weights[-1].add_(torch.mm(grad_out.t(), _blend(decode, acts[-1], area_weight)))
        grads.biases[-1].add_(grad_out.sum(0))
        grad_blended = torch.mm(grad_out, weights[-1].to(dtype))
    shape = (1, decode.queries, decode.corners)
    grad, grad_area_weight = ensemble_backward(
        grad_blended.unsqueeze(0), acts[-1].view(*shape, -1), area_weight.view(shape)
    )
    rows = grad.view(decode.rows, -1)
    if weights:
        rows = rows.masked_fill_(acts[-1] <= 0, 0)
    rows = rows.to(operands)
    for layer in reversed(range(len(weights) - 1)):
        grads.weights[layer].add_(product_of_rows(rows, acts[layer]))
        grads.biases[layer + 1].add_(rows.sum(0, dtype=dtype))
        rows = torch.mm(rows, weights[layer].to(operands)).masked_fill_(acts[layer] <= 0, 0)
    backward_first_layer(decode, rows, grad_area_weight.view(-1), grads)
