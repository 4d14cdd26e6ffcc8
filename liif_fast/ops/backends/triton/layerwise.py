"""The decode layer by layer: the first layer and the blend are kernels, the products between them are PyTorch's own.

For float64 and for imnets that the fused kernel does not take. The first layer's backward is here too; the fused decode
shares it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import geometry_dtype
from ...inputs import DecodeInputs
from .ensemble import ensemble, ensemble_backward
from .gather import QUERIES, gather_backward_geometry_kernel, latent_kernel
from .launch import OPTIONS, DecodeChunk, Shapes, power_of_two, segments
from .rows import find_rows, first_layer, relu

ROWS, COLUMNS = 64, 64  # at most, of a tile of the first layer
LAYERWISE_CHUNK_BYTES = 1 << 28  # of activations and, in the backward, their gradients


@triton.jit
def first_forward_kernel(
    latent_map, first, hidden, area_weight, grid, query_term,
    RELU: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, TERMS: tl.constexpr, GRID: tl.constexpr,
    ENSEMBLE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of the first hidden layer [rows, WIDTH], and the rows' area weights."""
    blocks: tl.constexpr = STRIDE // COLS
    at = tl.program_id(0).to(tl.int64)
    found = find_rows(at // blocks, grid, TERMS, GRID, ENSEMBLE, T, ROWS)
    row = found.first_row + found.distance
    column = (at % blocks).to(tl.int32) * COLS + tl.arange(0, COLS)
    value = first_layer(latent_map, query_term, found, first, column, WIDTH, STRIDE, TERMS, T)
    if RELU:
        value = relu(value)
    inside = found.valid[:, None] & (column < WIDTH)[None, :]
    tl.store(hidden + row[:, None] * WIDTH + column[None, :], value.to(hidden.dtype.element_ty), mask=inside)
    if at % blocks == 0:
        tl.store(area_weight + row, found.area_weight, mask=found.valid)


@triton.jit
def first_backward_kernel(
    grad, first, grad_latent_map, partial, grad_rel, grid,
    SCATTER: tl.constexpr, COORD: tl.constexpr, WIDTH: tl.constexpr, GRAD_STRIDE: tl.constexpr, STRIDE: tl.constexpr,
    TERMS: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """From the gradient of a tile of rows of the first layer's output before its ReLU, [rows, GRAD_STRIDE]:

    adds to the latents' gradients in the hardware's order (SCATTER), sums the rows for the geometry terms' weights and
    the bias, partial [tiles, TERMS + 1, STRIDE], and sums the columns for the geometry terms, grad_rel [rows, TERMS].
    """
    tile = tl.program_id(0).to(tl.int64)
    found = find_rows(tile, grid, TERMS, GRID, ENSEMBLE, T, ROWS)
    valid = found.valid
    rel = found.rel
    latent = found.latent
    row = found.first_row + found.distance
    row_sums = ()
    for _ in tl.static_range(TERMS):
        row_sums = row_sums + (tl.zeros([ROWS], T),)
    for begin in range(0, STRIDE, COLS):
        column = begin + tl.arange(0, COLS)
        inside = valid[:, None] & (column < WIDTH)[None, :]
        value = tl.load(grad + row[:, None] * GRAD_STRIDE + column[None, :], mask=inside, other=0.0).to(T)
        if SCATTER:
            place = grad_latent_map + latent[:, None] * WIDTH + column[None, :]
            tl.atomic_add(place, value, mask=inside, sem="relaxed")
        sums = partial + tile * ((TERMS + 1) * STRIDE) + column
        tl.store(sums + TERMS * STRIDE, tl.sum(value, axis=0))
        for term in tl.static_range(TERMS):
            tl.store(sums + term * STRIDE, tl.sum(value * rel[term][:, None], axis=0))
        if COORD:
            new_sums = ()
            for term in tl.static_range(TERMS):
                weights = tl.load(first + term * STRIDE + column)
                new_sums = new_sums + (row_sums[term] + tl.sum(value * weights[None, :], axis=1),)
            row_sums = new_sums
    if COORD:
        for term in tl.static_range(TERMS):
            tl.store(grad_rel + row * TERMS + term, row_sums[term], mask=valid)


@triton.jit
def ordered_scatter_kernel(
    grad, order, begins, grad_latent_map,
    WIDTH: tl.constexpr, GRAD_STRIDE: tl.constexpr, T: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adds the rows of one latent to its gradient, in their order."""
    blocks: tl.constexpr = (WIDTH + COLS - 1) // COLS
    at = tl.program_id(0).to(tl.int64)
    latent = at // blocks
    column = (at % blocks).to(tl.int32) * COLS + tl.arange(0, COLS)
    inside = column < WIDTH
    total = tl.load(grad_latent_map + latent * WIDTH + column, mask=inside, other=0.0)
    for item in range(tl.load(begins + latent), tl.load(begins + latent + 1)):
        row = tl.load(order + item)
        total += tl.load(grad + row * GRAD_STRIDE + column, mask=inside, other=0.0).to(T)
    tl.store(grad_latent_map + latent * WIDTH + column, total, mask=inside)


class DecodeGrads(NamedTuple):
    """Gradients of a whole decode in the geometry dtype; chunks add to them."""

    latent_map: Tensor  # [B, h, w, K]
    geometry: Tensor  # [K, 2 or 4]
    weights: list[Tensor]
    biases: list[Tensor]
    coord: Tensor | None  # [B, Q, 2]
    cell: Tensor | None  # [B, Q, 2]
    query_term: Tensor | None  # [B, Q, K]

    @classmethod
    def zeros(cls, inputs: DecodeInputs, coord_grad: bool) -> DecodeGrads:
        dtype = geometry_dtype(inputs.latent_map)

        def zero(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)

        weights, biases = [zero(weight) for weight in inputs.weights], [zero(bias) for bias in inputs.biases]
        ends = inputs.coord, inputs.cell
        coord, cell = (None if point is None or not coord_grad else zero(point) for point in ends)
        term = None if inputs.query_term is None else zero(inputs.query_term)
        return cls(zero(inputs.latent_map), zero(inputs.weight_geometry), weights, biases, coord, cell, term)


def product_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of [rows, m] and [rows, n] -> [m, n], summed in float32 or better and not rounded back."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.mm(a.t(), b)
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return torch.mm(a.t().float(), b.float())


def saved_shapes(inputs: DecodeInputs, queries: int, rows: int, coord_grad: bool) -> Shapes:
    """Shapes and dtypes of saved activations (of all layers but the last, or of the only one), then area weights."""
    widths = inputs.widths[:-1] or inputs.widths
    geometry = torch.float64 if inputs.matmul_dtype == torch.float64 else torch.float32
    return [*(((rows, width), inputs.matmul_dtype) for width in widths), ((rows, 1), geometry)]


def backward_first_layer(chunk: DecodeChunk, grad_rows: Tensor, grad_area_weight: Tensor, grads: DecodeGrads) -> None:
    """Adds a chunk's gradients of the latent map, the geometry weights, the first bias, coord, cell and query term.

    Args:
        grad_rows: [rows, K or more], of the first layer before its ReLU.
        grad_area_weight: [rows]; read only for gradients of coord.
    """
    stride, width, terms = chunk.first.shape[1], chunk.latent_map.shape[-1], chunk.terms
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_latent_map = chunk.of_latents(grads.latent_map)
    tiles, grid = chunk.tiles(ROWS)
    partial = chunk.first.new_empty(tiles, terms + 1, stride)
    coord_grad = grads.coord is not None
    grad_rel = chunk.first.new_empty(chunk.rows if coord_grad else 0, terms)
    first_backward_kernel[(tiles,)](
        grad_rows, chunk.first, grad_latent_map, partial, grad_rel, grid,
        SCATTER=not deterministic, COORD=coord_grad, WIDTH=width, GRAD_STRIDE=grad_rows.shape[1], STRIDE=stride,
        TERMS=terms, T=chunk.kernel_dtype, COLS=min(stride, COLUMNS), **chunk.flags(ROWS),
    )  # fmt: skip
    sums = partial.sum(0)[:, :width]
    grads.geometry[:, :terms] += sums[:terms].t()
    grads.biases[0].add_(sums[terms])
    if deterministic:
        _scatter_in_order(chunk, grad_rows, grad_latent_map)
    if grads.query_term is not None:
        by_corner = grad_rows.view(chunk.queries, chunk.corners, -1)[..., :width]
        torch.sum(by_corner, 1, dtype=chunk.first.dtype, out=chunk.of_terms(grads.query_term))
    if coord_grad:
        _backward_points(chunk, grad_rel, grad_area_weight, grads)


def _scatter_in_order(chunk: DecodeChunk, grad_rows: Tensor, grad_latent_map: Tensor) -> None:
    """Adds rows to their latents in a fixed order."""
    numbers = torch.empty(chunk.rows, dtype=torch.int64, device=grad_rows.device)
    tiles, grid = chunk.tiles(128)
    latent_kernel[(tiles,)](grid, numbers, T=chunk.kernel_dtype, **chunk.flags(128))
    width = grad_latent_map.shape[-1]
    latents = grad_latent_map.numel() // width
    order, begins = segments(numbers, latents)
    columns = power_of_two(width, 16, 256)
    ordered_scatter_kernel[(latents * triton.cdiv(width, columns),)](
        grad_rows, order, begins, grad_latent_map,
        WIDTH=width, GRAD_STRIDE=grad_rows.shape[1], T=chunk.kernel_dtype, COLS=columns, **OPTIONS,
    )  # fmt: skip


def _backward_points(chunk: DecodeChunk, grad_rel: Tensor, grad_area_weight: Tensor, grads: DecodeGrads) -> None:
    """Adds the gradients of coord and cell: through relative coordinates, relative cells and area weights."""
    assert grads.coord is not None and chunk.coord is not None
    part = slice(chunk.first_query, chunk.first_query + chunk.queries)
    coord = grads.coord.view(-1, 2)[part]
    cell = coord if grads.cell is None else grads.cell.view(-1, 2)[part]
    grid = chunk.tiles(ROWS)[1]
    gather_backward_geometry_kernel[(triton.cdiv(chunk.queries, QUERIES),)](
        grad_rel, grad_area_weight, chunk.coord[part], coord, cell, chunk.queries, grid.rows, grid.cols, 0,
        chunk.terms, HAS_CELL=chunk.terms == 4, ENSEMBLE=chunk.inputs.local_ensemble, T=chunk.kernel_dtype,
        QUERIES=QUERIES, **OPTIONS,
    )  # fmt: skip


def _fill_activations(chunk: DecodeChunk, saved: Sequence[Tensor]) -> None:
    """Fills `saved`, tensors of `saved_shapes`."""
    weights, biases, dtype = chunk.inputs.weights, chunk.inputs.biases, chunk.inputs.matmul_dtype
    stride = chunk.first.shape[1]
    columns = min(stride, COLUMNS)
    tiles, grid = chunk.tiles(ROWS)
    first_forward_kernel[(tiles * (stride // columns),)](
        chunk.latent_map, chunk.first, saved[0], saved[-1], grid, query_term=chunk.query_term,
        RELU=bool(weights), WIDTH=chunk.latent_map.shape[-1], STRIDE=stride, TERMS=chunk.terms, T=chunk.kernel_dtype,
        COLS=columns, **chunk.flags(ROWS),
    )  # fmt: skip
    for layer, weight in enumerate(weights[:-1]):
        torch.addmm(biases[layer + 1].to(dtype), saved[layer], weight.to(dtype).t(), out=saved[layer + 1]).relu_()


def _with_activations(
    chunk: DecodeChunk, saved: Sequence[Tensor] | None, activations: int
) -> Iterator[tuple[DecodeChunk, Sequence[Tensor]]]:
    """Chunks of a decode with tensors for their activations; with `saved` the whole decode with these tensors.

    `activations` tensors of the widest layer take LAYERWISE_CHUNK_BYTES in a chunk.
    """
    if saved is not None:
        yield chunk, saved
        return
    row_bytes = max(chunk.inputs.widths) * chunk.inputs.matmul_dtype.itemsize * activations
    for part in chunk.chunks(LAYERWISE_CHUNK_BYTES // row_bytes):
        shapes = saved_shapes(chunk.inputs, part.queries, part.rows, False)
        yield part, [chunk.first.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


def _blend(chunk: DecodeChunk, rows: Tensor, area_weight: Tensor) -> Tensor:
    """[rows, width] -> [queries, width] in the geometry dtype."""
    shape = (1, chunk.queries, chunk.corners)
    return ensemble(rows.view(*shape, -1), area_weight.view(shape))[0]


def last_layer(chunk: DecodeChunk, blended: Tensor) -> Tensor:
    """[queries, width] -> [queries, O] in the geometry dtype."""
    weight, bias = (layers[-1].to(blended.dtype) for layers in (chunk.inputs.weights, chunk.inputs.biases))
    return torch.addmm(bias, blended, weight.t())


def forward(whole: DecodeChunk, out: Tensor, saved: Sequence[Tensor] | None) -> None:
    """Decodes to `out`; fills `saved`, tensors of `saved_shapes`."""
    weights = whole.inputs.weights
    for chunk, activations in _with_activations(whole, saved, max(len(weights), 1)):
        _fill_activations(chunk, activations)
        *_, last, area_weight = activations
        values = _blend(chunk, last, area_weight)
        chunk.put_queries(out, last_layer(chunk, values) if weights else values)


def backward(whole: DecodeChunk, grad_out: Tensor, saved: Sequence[Tensor] | None, grads: DecodeGrads) -> None:
    """Adds all gradients; without `saved` it computes the activations again."""
    for chunk, activations in _with_activations(whole, saved, 2 * len(whole.inputs.weights) + 2):
        if saved is None:
            _fill_activations(chunk, activations)
        _backward_chunk(chunk, chunk.of_queries(grad_out).contiguous(), activations, grads)


def _backward_chunk(chunk: DecodeChunk, grad_out: Tensor, saved: Sequence[Tensor], grads: DecodeGrads) -> None:
    """grad_out: [queries, O]."""
    *acts, area_weight = saved
    weights, geometry, matmul_dtype = chunk.inputs.weights, chunk.first.dtype, chunk.inputs.matmul_dtype
    grad_blended = grad_out
    if weights:
        grads.weights[-1].add_(torch.mm(grad_out.t(), _blend(chunk, acts[-1], area_weight)))
        grads.biases[-1].add_(grad_out.sum(0))
        grad_blended = torch.mm(grad_out, weights[-1].to(geometry))
    shape = (1, chunk.queries, chunk.corners)
    grad, grad_area_weight = ensemble_backward(
        grad_blended.unsqueeze(0), acts[-1].view(*shape, -1), area_weight.view(shape)
    )
    rows = grad.view(chunk.rows, -1)
    if weights:
        rows = rows.masked_fill_(acts[-1] <= 0, 0)
    rows = rows.to(matmul_dtype)
    for layer in reversed(range(len(weights) - 1)):
        grads.weights[layer].add_(product_of_rows(rows, acts[layer]))
        grads.biases[layer + 1].add_(rows.sum(0, dtype=geometry))
        rows = torch.mm(rows, weights[layer].to(matmul_dtype)).masked_fill_(acts[layer] <= 0, 0)
    backward_first_layer(chunk, rows, grad_area_weight.view(-1), grads)
