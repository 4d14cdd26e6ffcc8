"""`metasr_query` in Triton, forward and backward.

With r = (rel_row, rel_col, rel_cell) of a query and the latent under it: hidden = relu(weight r + bias) and
out_o = sum_j hidden_j latent[o, j] + latent[o, hidden].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dtypes import geometry_dtype
from ...inputs import MetasrInputs
from .geometry import Axis, clamp_to_region, find_metasr_neighbor, make_axis
from .launch import DTYPES, OPTIONS, on_device_of, power_of_two, segments
from .rows import relu

QUERIES, COLS = 16, 64  # queries and hidden units of a tile
_SIZES = ["count", "queries", "hidden", "outs"]


@triton.jit
def find_inputs(coord, cell, at, valid, queries, rows, cols, T: tl.constexpr):
    """Number of the latent under each query, and the three inputs of its filter."""
    cell_row = tl.load(cell + 2 * at, mask=valid, other=0.0)
    row, rel_row = find_metasr_neighbor(tl.load(coord + 2 * at, mask=valid, other=0.0), cell_row, rows, T)
    cell_col = tl.load(cell + 2 * at + 1, mask=valid, other=0.0)
    col, rel_col = find_metasr_neighbor(tl.load(coord + 2 * at + 1, mask=valid, other=0.0), cell_col, cols, T)
    plane = at // queries * tl.cast(rows.held, tl.int32) + clamp_to_region(row, rows)
    latent = plane * tl.cast(cols.held, tl.int32) + clamp_to_region(col, cols)
    return latent, rel_row, rel_col, cell_row * (tl.cast(rows.size, T) * 0.5)


@triton.jit
def hidden_units(weight, bias, unit, exists, rel_row, rel_col, rel_cell):
    """A tile of hidden units [queries, units] and their weights for the three inputs."""
    by_row = tl.load(weight + 3 * unit, mask=exists, other=0.0)
    by_col = tl.load(weight + 3 * unit + 1, mask=exists, other=0.0)
    by_cell = tl.load(weight + 3 * unit + 2, mask=exists, other=0.0)
    total = tl.fma(rel_row[:, None], by_row[None, :], tl.load(bias + unit, mask=exists, other=0.0)[None, :])
    total = tl.fma(rel_col[:, None], by_col[None, :], total)
    return relu(tl.fma(rel_cell[:, None], by_cell[None, :], total)), by_row, by_col, by_cell


@triton.jit(do_not_specialize=_SIZES)
def metasr_forward_kernel(
    latent_map, coord, cell, weight, bias, out, count, queries, rows, cols, hidden, outs,
    T: tl.constexpr, QUERIES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One output of a tile of queries."""
    at = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    output = tl.program_id(1)
    valid = at < count
    latent, rel_row, rel_col, rel_cell = find_inputs(coord, cell, at, valid, queries, rows, cols, T)
    place = latent_map + (latent * outs + output) * (hidden + 1)
    total = tl.load(place + hidden, mask=valid, other=0.0).to(T)
    for begin in range(0, hidden, COLS):
        unit = begin + tl.arange(0, COLS)
        units = hidden_units(weight, bias, unit, unit < hidden, rel_row, rel_col, rel_cell)[0]
        inside = valid[:, None] & (unit < hidden)[None, :]
        value = tl.load(place[:, None] + unit[None, :], mask=inside, other=0.0).to(T)
        total += tl.sum(tl.where((unit < hidden)[None, :], units, 0.0) * value, axis=1)
    tl.store(out + at * outs + output, total, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def metasr_backward_kernel(
    grad_out, latent_map, coord, cell, weight, bias, grad_latent_map, grad_coord, grad_cell, partial, latent_numbers,
    count, queries, rows, cols, hidden, outs,
    SCATTER: tl.constexpr, T: tl.constexpr, QUERIES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """All gradients of a tile of queries; those of weights and bias as sums over the tile, partial [tiles, 4, hidden].

    Without SCATTER the kernel writes the number of each query's latent instead of the latents' gradients.
    """
    tile = tl.program_id(0).to(tl.int64)
    at = tile * QUERIES + tl.arange(0, QUERIES)
    valid = at < count
    latent, rel_row, rel_col, rel_cell = find_inputs(coord, cell, at, valid, queries, rows, cols, T)
    latent = latent * outs
    grad_row = tl.zeros([QUERIES], T)
    grad_col = tl.zeros([QUERIES], T)
    grad_rel_cell = tl.zeros([QUERIES], T)
    for begin in range(0, hidden, COLS):
        unit = begin + tl.arange(0, COLS)
        exists = unit < hidden
        inside = valid[:, None] & exists[None, :]
        units, by_row, by_col, by_cell = hidden_units(weight, bias, unit, exists, rel_row, rel_col, rel_cell)
        grad_units = tl.zeros([QUERIES, COLS], T)
        for output in range(outs):
            grad = tl.load(grad_out + at * outs + output, mask=valid, other=0.0)
            place = ((latent + output) * (hidden + 1))[:, None] + unit[None, :]
            value = tl.load(latent_map + place, mask=inside, other=0.0).to(T)
            grad_units = tl.fma(grad[:, None], value, grad_units)
            if SCATTER:
                tl.atomic_add(grad_latent_map + place, grad[:, None] * units, mask=inside, sem="relaxed")
        grad_units = tl.where(inside & (units > 0.0), grad_units, 0.0)
        grad_row += tl.sum(grad_units * by_row[None, :], axis=1)
        grad_col += tl.sum(grad_units * by_col[None, :], axis=1)
        grad_rel_cell += tl.sum(grad_units * by_cell[None, :], axis=1)
        sums = partial + tile * 4 * hidden + unit
        tl.store(sums, tl.sum(grad_units * rel_row[:, None], axis=0), mask=exists)
        tl.store(sums + hidden, tl.sum(grad_units * rel_col[:, None], axis=0), mask=exists)
        tl.store(sums + 2 * hidden, tl.sum(grad_units * rel_cell[:, None], axis=0), mask=exists)
        tl.store(sums + 3 * hidden, tl.sum(grad_units, axis=0), mask=exists)
    if SCATTER:
        for output in range(outs):
            grad = tl.load(grad_out + at * outs + output, mask=valid, other=0.0)
            place = grad_latent_map + (latent + output) * (hidden + 1) + hidden
            tl.atomic_add(place, grad, mask=valid, sem="relaxed")
    else:
        tl.store(latent_numbers + at, latent // outs, mask=valid)
    half_height = tl.cast(rows.size, T) * 0.5
    half_width = tl.cast(cols.size, T) * 0.5
    tl.store(grad_coord + 2 * at, grad_row * half_height, mask=valid)
    tl.store(grad_coord + 2 * at + 1, grad_col * half_width, mask=valid)
    tl.store(grad_cell + 2 * at, (grad_rel_cell - grad_row * 0.5) * half_height, mask=valid)
    tl.store(grad_cell + 2 * at + 1, grad_col * -0.5 * half_width, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def metasr_scatter_ordered_kernel(
    grad_out, coord, cell, weight, bias, order, begins, grad_latent_map, queries, rows, cols, hidden, outs,
    T: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradient of one output of one latent, summed over its queries in their order."""
    latent = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1)
    one = tl.arange(0, 1)
    for begin in range(0, hidden + 1, COLS):
        unit = begin + tl.arange(0, COLS)
        total = tl.zeros([1, COLS], T)
        for item in range(tl.load(begins + latent), tl.load(begins + latent + 1)):
            at = tl.load(order + item) + one
            _, rel_row, rel_col, rel_cell = find_inputs(coord, cell, at, at >= 0, queries, rows, cols, T)
            units = hidden_units(weight, bias, unit, unit < hidden, rel_row, rel_col, rel_cell)[0]
            grad = tl.load(grad_out + at * outs + output)
            total += grad[:, None] * tl.where((unit == hidden)[None, :], 1.0, units)
        place = (latent * outs + output) * (hidden + 1) + unit
        tl.store(grad_latent_map + place[None, :], total, mask=(unit <= hidden)[None, :])


def _axes(latent_map: Tensor, region: list[int]) -> tuple[Axis, Axis]:
    top, left, height, width = region
    return make_axis(height, top, latent_map.shape[1]), make_axis(width, left, latent_map.shape[2])


def metasr_query(inputs: MetasrInputs) -> Tensor:
    """[B, Q, O] in the geometry dtype."""
    latent_map, coord, cell, weight, bias, region = inputs.for_kernels(inputs.latent_map)
    (batch, queries, outs), hidden = inputs.out_shape, weight.shape[0]
    out = coord.new_empty(inputs.out_shape)
    if out.numel() == 0:
        return out
    with on_device_of(out):
        metasr_forward_kernel[(triton.cdiv(batch * queries, QUERIES), outs)](
            latent_map, coord, cell, weight, bias, out, batch * queries, queries, *_axes(latent_map, region), hidden,
            outs, T=DTYPES[out.dtype], QUERIES=QUERIES, COLS=power_of_two(hidden, 16, COLS), **OPTIONS,
        )  # fmt: skip
    return out


def metasr_query_backward(grad_out: Tensor, inputs: MetasrInputs) -> list[Tensor]:
    """Gradients of latent_map, coord, cell, weight and bias in the geometry dtype."""
    latent_map, *points_and_filter, region = inputs.for_kernels(inputs.latent_map)
    dtype, hidden = geometry_dtype(latent_map), inputs.weight.shape[0]
    grads = [torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for tensor in inputs[:5]]
    if grad_out.numel() == 0:
        return grads
    grad_latent_map, grad_coord, grad_cell = grads[:3]
    batch, queries, outs = grad_out.shape
    count, exact = batch * queries, torch.are_deterministic_algorithms_enabled()
    grad_out = grad_out.to(dtype).contiguous()
    axes, tile = _axes(latent_map, region), power_of_two(hidden, 16, COLS)
    partial = grad_out.new_empty(triton.cdiv(count, QUERIES), 4, hidden)
    numbers = torch.empty(count if exact else 0, dtype=torch.int64, device=grad_out.device)
    with on_device_of(grad_out):
        metasr_backward_kernel[(partial.shape[0],)](
            grad_out, latent_map, *points_and_filter, grad_latent_map, grad_coord, grad_cell, partial, numbers,
            count, queries, *axes, hidden, outs, SCATTER=not exact, T=DTYPES[dtype], QUERIES=QUERIES, COLS=tile,
            **OPTIONS,
        )  # fmt: skip
        if exact:
            latents = grad_latent_map.numel() // grad_latent_map.shape[-1]
            order, begins = segments(numbers, latents)
            metasr_scatter_ordered_kernel[(latents, outs)](
                grad_out, *points_and_filter, order, begins, grad_latent_map, queries, *axes, hidden, outs,
                T=DTYPES[dtype], COLS=tile, **OPTIONS,
            )  # fmt: skip
    sums = partial.sum(0)
    # Clones: with one hidden unit the transposed view is contiguous and shares the memory of the bias gradient.
    weight_grad = sums[:3].t().clone(memory_format=torch.contiguous_format)
    return [grad_latent_map, grad_coord, grad_cell, weight_grad, sums[3].clone()]
