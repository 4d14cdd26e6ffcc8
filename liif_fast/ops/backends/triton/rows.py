"""Device functions that several kernels share: where the queries of a tile and their latents are, and the first layer.

A row is one corner of one query; the rows of a query are consecutive. Queries come from a list of points or from a
window of a regular grid. A program takes one tile of them: consecutive points, or a patch of the grid that is eight
pixels wide, whose latents are neighbors. `flat` numbers the queries of a launch; saved tensors and outputs are in that
order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .geometry import Axis, clamp_to_region, find_corner, pixel_center

PATCH = tl.constexpr(8)  # columns of a grid's tile


class QueryGrid(NamedTuple):
    """Where the queries of a launch are. `Axis` says why whole numbers are floats; large ones are split in two."""

    coord: Any  # points: pointer to [queries, 2]; for a grid any pointer, which is not read
    cell: Any  # points with cells: pointer to [queries, 2]; otherwise any pointer, which is not read
    rows: Axis  # of the latent map
    cols: Axis
    image_rows: Axis  # of the grid's image; for points those of the latent map, which are not read
    image_cols: Axis
    total: tuple[float, float]  # queries of the launch
    first: tuple[float, float] = (0.0, 0.0)  # points: number of the first one in coord
    points: tuple[float, float] = (0.0, 0.0)  # points of one batch entry
    top: float = 0.0  # grid: the window in the image
    left: float = 0.0
    height: float = 0.0
    width: float = 0.0
    tiles_y: float = 0.0  # patches of the window
    tiles_x: float = 0.0


class TileRows(NamedTuple):
    """The rows of one tile, an element each. Row numbers are `first_row` plus a distance of 32 bits, which needs half
    the registers of a number of 64 bits."""

    valid: Any  # whether the row exists
    batch: Any
    flat: Any  # number of the query
    map_row: Any  # of the latent, in the whole map
    map_col: Any
    latent: Any  # number of the latent in memory
    area_weight: Any
    rel: Any  # tuple of geometry inputs: rel_coord and, if wanted, rel_cell
    first_query: Any  # number of the tile's first query
    query: Any  # distance from it
    first_row: Any
    distance: Any


def split(number: int) -> tuple[float, float]:
    """A whole number below 2^44 as two floats."""
    return float(number >> 20), float(number & 0xFFFFF)


@triton.jit
def joined(parts):
    """The number that `split` took apart."""
    return tl.cast(parts[0], tl.int64) * 1048576 + tl.cast(parts[1], tl.int64)


@triton.jit
def relu(x):
    """As PyTorch's: NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def as_operand(value, OP: tl.constexpr, PRECISION: tl.constexpr):
    """float32 values as operands of a product, rounded to nearest. This includes TF32, where hardware may truncate."""
    if OP == tl.float32 and PRECISION == "tf32":
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(value == value, rounded, value)
    else:
        return value.to(OP)


@triton.jit
def find_queries(tile, slot, grid, GRID: tl.constexpr, QUERIES: tl.constexpr):
    """The query in each `slot` of a tile: whether it exists, its batch entry, its pixel in the window (grid), and its
    flat number as that of the tile's first query plus a distance."""
    if GRID:
        height = tl.cast(grid.height, tl.int32)
        width = tl.cast(grid.width, tl.int32)
        tiles_x = tl.cast(grid.tiles_x, tl.int32)
        patches = tl.cast(grid.tiles_y, tl.int64) * tiles_x
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
        batch = (joined(grid.first) + start + slot) // joined(grid.points)
        return start + slot < joined(grid.total), batch, slot, slot, start, slot


@triton.jit
def out_offset(flat, batch, output, outs, grid, GRID: tl.constexpr):
    """Offset of output number `output` of a query in [B, Q, O], or in [B, O, height, width] of a grid."""
    if GRID:
        plane = tl.cast(grid.height, tl.int64) * tl.cast(grid.width, tl.int64)
        return flat + (batch * (outs - 1) + output) * plane
    else:
        return (joined(grid.first) + flat) * outs + output


@triton.jit
def find_rows(
    tile, grid, TERMS: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr
):
    """TileRows of a tile; TERMS is the number of geometry inputs, 4 if queries have cells of their own, otherwise 2."""
    CORNERS: tl.constexpr = 4 if ENSEMBLE else 1
    index = tl.arange(0, ROWS)
    corner = index % CORNERS
    valid, batch, y, x, start, distance = find_queries(tile, index // CORNERS, grid, GRID, ROWS // CORNERS)
    flat = start + distance
    rows = grid.rows
    cols = grid.cols
    if GRID:
        row = pixel_center(tl.cast(grid.top, tl.int32) + y, grid.image_rows, T)
        col = pixel_center(tl.cast(grid.left, tl.int32) + x, grid.image_cols, T)
    else:
        at = joined(grid.first) + flat
        row = tl.load(grid.coord + 2 * at, mask=valid, other=0.0)
        col = tl.load(grid.coord + 2 * at + 1, mask=valid, other=0.0)
    map_row, map_col, rel_row, rel_col, weight = find_corner(row, col, corner, rows, cols, ENSEMBLE, T)
    plane = batch * tl.cast(rows.held, tl.int32) + clamp_to_region(map_row, rows)
    latent = plane * tl.cast(cols.held, tl.int32) + clamp_to_region(map_col, cols)
    if TERMS == 4:
        at = joined(grid.first) + flat
        rel_cell_row = tl.load(grid.cell + 2 * at, mask=valid, other=0.0) * tl.cast(rows.size, T)
        rel_cell_col = tl.load(grid.cell + 2 * at + 1, mask=valid, other=0.0) * tl.cast(cols.size, T)
        rel = (rel_row, rel_col, rel_cell_row, rel_cell_col)
    else:
        rel = (rel_row, rel_col)
    return TileRows(
        valid, batch, flat, map_row, map_col, latent, weight, rel,
        start, distance, start * CORNERS, distance * CORNERS + corner,
    )  # fmt: skip


@triton.jit
def load_columns(table, row, valid, column, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """Rows of `table`, [.., WIDTH], at `column`; row 0 for rows that do not exist; 0 from column WIDTH on."""
    place = table + tl.where(valid, row, 0)[:, None] * WIDTH + column[None, :]
    if WIDTH == STRIDE:
        return tl.load(place)
    else:
        return tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def first_layer(
    latent_map, query_term, found, first, column,
    WIDTH: tl.constexpr, STRIDE: tl.constexpr, TERMS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The first layer of `found`, TileRows, before its ReLU at `column`; 0 from column WIDTH on.

    It is the sum of latent, bias, geometry terms and query term. query_term: [queries, WIDTH] of the launch, or None.
    first: [TERMS + 1, STRIDE], the weights of each geometry term, then the bias.
    """
    total = load_columns(latent_map, found.latent, found.valid, column, WIDTH, STRIDE).to(T)
    total += tl.load(first + TERMS * STRIDE + column)[None, :]
    if query_term is not None:
        query_term += found.first_query * WIDTH
        total += load_columns(query_term, found.query, found.valid, column, WIDTH, STRIDE).to(T)
    for term in tl.static_range(TERMS):
        total = tl.fma(found.rel[term][:, None], tl.load(first + term * STRIDE + column)[None, :], total)
    return total
