"""Rows of the decode in Triton: where queries and latents are, and the first layer, forward and backward.

A row is one corner of one query; rows of a query stand side by side. Queries come from a list of points or from a
window of a regular grid; a program takes a tile of them: consecutive points, or a patch of the grid eight pixels wide,
whose latents are neighbours too. `flat` counts a problem's queries, and what is kept per query or row is in that order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .geometry import find_corner, held_index, pixel_center

PATCH = tl.constexpr(8)  # columns of a grid's tile


class Places(NamedTuple):
    """Where a problem's queries are, as kernels take it: whole numbers as floats (`Axis` says why), counts in two."""

    first: tuple[float, float]  # points: the first one's number, counted over the whole batch
    total: tuple[float, float]  # queries of the problem
    queries: tuple[float, float]  # points of one batch entry
    top: float  # the window in the image, for a grid
    left: float
    height: float
    width: float
    tiles_y: float  # patches of the window
    tiles_x: float


def split(count: int) -> tuple[float, float]:
    """A count below 2^44 in two floats."""
    return float(count >> 20), float(count & 0xFFFFF)


@triton.jit
def joined(parts):
    """What `split` took apart."""
    return tl.cast(parts[0], tl.int64) * 1048576 + tl.cast(parts[1], tl.int64)


@triton.jit
def relu(x):
    """As PyTorch's: NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def as_operand(value, OP: tl.constexpr, PRECISION: tl.constexpr):
    """float32 values as a product's operands, rounded to nearest; to TF32 too, where hardware may just cut off."""
    if OP == tl.float32 and PRECISION == "tf32":
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(value == value, rounded, value)
    else:
        return value.to(OP)


@triton.jit
def find_queries(tile, slot, places, GRID: tl.constexpr, QUERIES: tl.constexpr):
    """Whether the query in `slot` of a tile exists, its batch entry, pixel of the window (grid), and its flat number in
    two: the tile's first one, and the distance to it in 32 bits, which costs half the registers."""
    if GRID:
        height = tl.cast(places.height, tl.int32)
        width = tl.cast(places.width, tl.int32)
        tiles_x = tl.cast(places.tiles_x, tl.int32)
        patches = tl.cast(places.tiles_y, tl.int64) * tiles_x
        batch = tile // patches
        patch = (tile % patches).to(tl.int32)
        top = patch // tiles_x * (QUERIES // PATCH)
        left = patch % tiles_x * PATCH
        down = slot // PATCH
        right = slot % PATCH
        valid = (top + down < height) & (left + right < width)
        return valid, batch, top + down, left + right, (batch * height + top) * width + left, down * width + right
    else:
        start = tile * QUERIES
        batch = (joined(places.first) + start + slot) // joined(places.queries)
        return start + slot < joined(places.total), batch, slot, slot, start, slot


@triton.jit
def out_offset(flat, batch, output, outs, places, GRID: tl.constexpr):
    """Where output `output` of a query lies: [B, Q, O], or [B, O, height, width] of a grid."""
    if GRID:
        plane = tl.cast(places.height, tl.int64) * tl.cast(places.width, tl.int64)
        return flat + (batch * (outs - 1) + output) * plane
    else:
        return (joined(places.first) + flat) * outs + output


@triton.jit
def find_rows(
    tile, coord, cell, places, rows, cols, image_rows, image_cols,
    TERMS: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every row of a tile: (exists, query's flat number, latent number, area weight), its geometry inputs, TERMS of
    them (rel_coord and, where queries have cells of their own, rel_cell), and the row's number in two, as queries'."""
    CORNERS: tl.constexpr = 4 if ENSEMBLE else 1
    index = tl.arange(0, ROWS)
    corner = index % CORNERS
    valid, batch, y, x, start, apart = find_queries(tile, index // CORNERS, places, GRID, ROWS // CORNERS)
    flat = start + apart
    if GRID:
        row = pixel_center(tl.cast(places.top, tl.int32) + y, image_rows, T)
        col = pixel_center(tl.cast(places.left, tl.int32) + x, image_cols, T)
    else:
        at = joined(places.first) + flat
        row = tl.load(coord + 2 * at, mask=valid, other=0.0)
        col = tl.load(coord + 2 * at + 1, mask=valid, other=0.0)
    map_row, map_col, rel_row, rel_col, weight = find_corner(row, col, corner, rows, cols, ENSEMBLE, T)
    plane = batch * tl.cast(rows.held, tl.int32) + held_index(map_row, rows)
    latent = plane * tl.cast(cols.held, tl.int32) + held_index(map_col, cols)
    if TERMS == 4:
        at = joined(places.first) + flat
        rel_cell_row = tl.load(cell + 2 * at, mask=valid, other=0.0) * tl.cast(rows.size, T)
        rel_cell_col = tl.load(cell + 2 * at + 1, mask=valid, other=0.0) * tl.cast(cols.size, T)
        rel = (rel_row, rel_col, rel_cell_row, rel_cell_col)
    else:
        rel = (rel_row, rel_col)
    return valid, flat, latent, weight, rel, start * CORNERS, apart * CORNERS + corner


@triton.jit
def first_layer(
    latent_map, latent, rel, first, column,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, TERMS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The first layer before its ReLU, at `column`: folded latent, bias and geometry terms. 0 behind WIDTH.

    first: [TERMS + 1, STRIDE], the weights of each geometry term, then the bias.
    """
    place = latent_map + latent[:, None] * WIDTH + column[None, :]
    if WIDTH == STRIDE:
        total = tl.load(place).to(T)
    else:
        total = tl.load(place, mask=(column < WIDTH)[None, :], other=0.0).to(T)
    total += tl.load(first + TERMS * STRIDE + column)[None, :]
    for term in tl.static_range(TERMS):
        total = tl.fma(rel[term][:, None], tl.load(first + term * STRIDE + column)[None, :], total)
    return total


@triton.jit
def first_forward_kernel(
    latent_map, coord, cell, first, hidden, area_weight, places, rows, cols, image_rows, image_cols,
    RELU: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, TERMS: tl.constexpr, GRID: tl.constexpr,
    ENSEMBLE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of the first hidden layer [rows, WIDTH], and the rows' area weights."""
    blocks: tl.constexpr = STRIDE // COLS
    at = tl.program_id(0).to(tl.int64)
    valid, _, latent, weight, rel, first_row, apart = find_rows(
        at // blocks, coord, cell, places, rows, cols, image_rows, image_cols, TERMS, GRID, ENSEMBLE, T, ROWS
    )
    row = first_row + apart
    latent = tl.where(valid, latent, 0)
    column = (at % blocks).to(tl.int32) * COLS + tl.arange(0, COLS)
    value = first_layer(latent_map, latent, rel, first, column, WIDTH, STRIDE, TERMS, T)
    if RELU:
        value = relu(value)
    inside = valid[:, None] & (column < WIDTH)[None, :]
    tl.store(hidden + row[:, None] * WIDTH + column[None, :], value.to(hidden.dtype.element_ty), mask=inside)
    if at % blocks == 0:
        tl.store(area_weight + row, weight, mask=valid)


@triton.jit
def first_backward_kernel(
    grad, first, coord, cell, grad_latent_map, partial, grad_rel, places, rows, cols, image_rows, image_cols,
    SCATTER: tl.constexpr, COORD: tl.constexpr, WIDTH: tl.constexpr, GRAD_STRIDE: tl.constexpr, STRIDE: tl.constexpr,
    TERMS: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """From the gradient of the first layer's output before its ReLU, [rows, GRAD_STRIDE], a tile of rows:

    adds to the latents' gradients in the hardware's order (SCATTER), sums the rows for the geometry terms' weights and
    the bias, partial [tiles, TERMS + 1, STRIDE], and sums the columns for the geometry terms, grad_rel [rows, TERMS].
    """
    tile = tl.program_id(0).to(tl.int64)
    valid, _, latent, weight, rel, first_row, apart = find_rows(
        tile, coord, cell, places, rows, cols, image_rows, image_cols, TERMS, GRID, ENSEMBLE, T, ROWS
    )
    row = first_row + apart
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
            grown = ()
            for term in tl.static_range(TERMS):
                weights = tl.load(first + term * STRIDE + column)
                grown = grown + (row_sums[term] + tl.sum(value * weights[None, :], axis=1),)
            row_sums = grown
    if COORD:
        for term in tl.static_range(TERMS):
            tl.store(grad_rel + row * TERMS + term, row_sums[term], mask=valid)


@triton.jit
def latent_kernel(
    coord, latent_numbers, places, rows, cols, image_rows, image_cols,
    GRID: tl.constexpr, ENSEMBLE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The number of every row's latent."""
    tile = tl.program_id(0).to(tl.int64)
    valid, _, latent, weight, rel, first_row, apart = find_rows(
        tile, coord, coord, places, rows, cols, image_rows, image_cols, 2, GRID, ENSEMBLE, T, ROWS
    )
    row = first_row + apart
    tl.store(latent_numbers + row, latent, mask=valid)


@triton.jit
def ordered_scatter_kernel(
    grad, order, begins, grad_latent_map,
    WIDTH: tl.constexpr, GRAD_STRIDE: tl.constexpr, T: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adds the rows of one latent, in their order, to its gradient."""
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
