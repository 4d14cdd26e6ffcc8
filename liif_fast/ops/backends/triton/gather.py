"""`gather` in Triton: the imnet's inputs of every corner in one pass, and their gradients.

A row of x is one corner of one query. A program writes a tile of rows and features. A feature (channel, place in the
3x3 neighborhood) is at the same offset from the latent of every row. The unfolded map is never stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...inputs import GatherInputs
from .geometry import Axis, area_weights_backward, find_neighbor, make_axis
from .launch import DTYPES, OPTIONS, on_device_of, point_grid, power_of_two, segments
from .rows import QueryGrid, find_rows

ROWS, QUERIES = 32, 128  # rows of a tile; queries of a program of the geometry's backward
PATCHES = 16  # queries of a program of feat's backward
_STRIDES = ["batch_stride", "channel_stride", "row_stride", "col_stride"]
_SIZES = ["count", "features", "depth", "channels", "height", "width", *_STRIDES]


@triton.jit(do_not_specialize=_SIZES)
def gather_forward_kernel(
    feat, grid, x, area_weight, batch_stride, channel_stride, row_stride, col_stride, features, depth,
    HAS_CELL: tl.constexpr, UNFOLD: tl.constexpr, ENSEMBLE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """A tile of x. The first tile of a row also writes the row's geometry."""
    blocks = tl.cdiv(features, FEATURES)
    at = tl.program_id(0).to(tl.int64)
    feature = (at % blocks).to(tl.int32) * FEATURES + tl.arange(0, FEATURES)
    found = find_rows(at // blocks, grid, 2, False, ENSEMBLE, T, ROWS)
    exists = feature < features
    if UNFOLD:
        channel = feature // 9
        dy = feature % 9 // 3 - 1
        dx = feature % 3 - 1
    else:
        channel = feature
        dy = feature * 0
        dx = feature * 0
    # Of a feature from a row's latent.
    offset = channel.to(tl.int64) * channel_stride + dy.to(tl.int64) * row_stride + dx.to(tl.int64) * col_stride
    map_row = found.map_row
    map_col = found.map_col
    latent = found.batch * batch_stride + map_row.to(tl.int64) * row_stride + map_col.to(tl.int64) * col_stride
    row = map_row[:, None] + dy[None, :]
    col = map_col[:, None] + dx[None, :]
    height = tl.cast(grid.rows.size, tl.int32)
    width = tl.cast(grid.cols.size, tl.int32)
    stored = found.valid[:, None] & exists[None, :]
    # NaN coordinates have no latent: as in torch's grid_sample, its features and its center are 0.
    coord_row = tl.load(grid.coord + 2 * found.flat, mask=found.valid, other=0.0)
    coord_col = tl.load(grid.coord + 2 * found.flat + 1, mask=found.valid, other=0.0)
    exists_there = (coord_row == coord_row) & (coord_col == coord_col)
    inside = stored & exists_there[:, None] & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    value = tl.load(feat + (latent[:, None] + offset[None, :]), mask=inside, other=0.0)
    index = at // blocks * ROWS + tl.arange(0, ROWS)  # first_row + distance would spill on sm_100
    tl.store(x + index[:, None] * depth + feature[None, :], value, mask=stored)
    if at % blocks == 0:
        tl.store(area_weight + index, found.area_weight, mask=found.valid)
        geometry = x + index * depth + features
        rel_row = tl.where(exists_there, found.rel[0], coord_row * tl.cast(grid.rows.size, T))
        rel_col = tl.where(exists_there, found.rel[1], coord_col * tl.cast(grid.cols.size, T))
        tl.store(geometry, rel_row.to(x.dtype.element_ty), mask=found.valid)
        tl.store(geometry + 1, rel_col.to(x.dtype.element_ty), mask=found.valid)
        if HAS_CELL:
            cell = grid.cell + 2 * found.flat
            cell_row = tl.load(cell, mask=found.valid, other=0.0) * tl.cast(grid.rows.size, T)
            cell_col = tl.load(cell + 1, mask=found.valid, other=0.0) * tl.cast(grid.cols.size, T)
            tl.store(geometry + 2, cell_row.to(x.dtype.element_ty), mask=found.valid)
            tl.store(geometry + 3, cell_col.to(x.dtype.element_ty), mask=found.valid)


@triton.jit(do_not_specialize=["count", "queries", "depth"])
def gather_backward_feat_kernel(
    grad_x, coord, grad_feat, count, queries, rows, cols, channels, depth,
    UNFOLD: tl.constexpr, ENSEMBLE: tl.constexpr, T: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds a tile of queries and channels to grad_feat, [B, H, W, C], in the hardware's order.

    The 3x3 neighbors of a query's four corners are 4x4 latents. Values for the same latent are summed first, so that
    memory receives 16 additions instead of 36. Where the device can, adjacent channels are one addition.
    """
    SIDE: tl.constexpr = 3 if UNFOLD else 1
    CORNERS: tl.constexpr = 4 if ENSEMBLE else 1
    blocks = tl.cdiv(channels, CHANNELS)
    at = tl.program_id(0).to(tl.int64)
    query = at // blocks * QUERIES + tl.arange(0, QUERIES)
    channel = (at % blocks).to(tl.int32) * CHANNELS + tl.arange(0, CHANNELS)
    valid = query < count
    row = tl.load(coord + 2 * query, mask=valid, other=0.0)
    col = tl.load(coord + 2 * query + 1, mask=valid, other=0.0)
    valid &= (row == row) & (col == col)
    top, _ = find_neighbor(row, False, rows, ENSEMBLE, T)
    left, _ = find_neighbor(col, False, cols, ENSEMBLE, T)
    if ENSEMBLE:  # the next latent, the same one at a border
        down = find_neighbor(row, True, rows, True, T)[0] - top
        right = find_neighbor(col, True, cols, True, T)[0] - left
    else:
        down = top * 0
        right = left * 0
    height = tl.cast(rows.size, tl.int32)
    width = tl.cast(cols.size, tl.int32)
    plane = query // queries * height
    source = grad_x + query[:, None] * CORNERS * depth + channel[None, :] * (SIDE * SIDE)
    for i in range(SIDE + tl.max(down)):
        y = top + i - SIDE // 2
        for j in range(SIDE + tl.max(right)):
            x = left + j - SIDE // 2
            inside = (y >= 0) & (y < height) & (i < SIDE + down) & (x >= 0) & (x < width) & (j < SIDE + right) & valid
            stored = inside[:, None] & (channel < channels)[None, :]
            total = tl.zeros([QUERIES, CHANNELS], T)
            for corner in tl.static_range(CORNERS):
                place_y = i - corner // 2 * down
                place_x = j - corner % 2 * right
                sent = (place_y >= 0) & (place_y < SIDE) & (place_x >= 0) & (place_x < SIDE)
                place = source + corner * depth + (place_y * SIDE + place_x)[:, None]
                total += tl.load(place, mask=stored & sent[:, None], other=0.0).to(T)
            pixel = (plane + y) * width + x
            tl.atomic_add(grad_feat + pixel[:, None] * channels + channel[None, :], total, mask=stored, sem="relaxed")


@triton.jit
def latent_kernel(grid, numbers, GRID: tl.constexpr, ENSEMBLE: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr):
    """The number of every row's latent in memory, batch entry after batch entry; -1 for none."""
    found = find_rows(tl.program_id(0).to(tl.int64), grid, 2, GRID, ENSEMBLE, T, ROWS)
    exists = (found.rel[0] == found.rel[0]) & (found.rel[1] == found.rel[1])  # not so for NaN coordinates
    tl.store(numbers + (found.first_row + found.distance), tl.where(exists, found.latent, -1), mask=found.valid)


@triton.jit(do_not_specialize=_SIZES)
def gather_backward_feat_ordered_kernel(
    grad_x, order, begins, grad_feat, channels, height, width, depth,
    UNFOLD: tl.constexpr, T: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums one pixel of grad_feat over the rows of the latents that read it, latent by latent and row by row."""
    blocks = tl.cdiv(channels, CHANNELS)
    at = tl.program_id(0).to(tl.int64)
    pixel = at // blocks
    channel = (at % blocks).to(tl.int32) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    col = (pixel % width).to(tl.int32)
    row = (pixel // width % height).to(tl.int32)
    total = tl.zeros([CHANNELS], T)
    for place in range(9 if UNFOLD else 1):
        if UNFOLD:
            dy = place // 3 - 1
            dx = place % 3 - 1
            feature = channel * 9 + place
        else:
            dy = 0
            dx = 0
            feature = channel
        if (row - dy >= 0) & (row - dy < height) & (col - dx >= 0) & (col - dx < width):
            latent = pixel - dy * width - dx
            for item in range(tl.load(begins + latent), tl.load(begins + latent + 1)):
                source = tl.load(order + item)
                total += tl.load(grad_x + source * depth + feature, mask=exists, other=0.0).to(T)
    plane = pixel // width // height * channels + channel
    tl.store(grad_feat + (plane * height + row) * width + col, total, mask=exists)


@triton.jit(do_not_specialize=_SIZES)
def gather_backward_geometry_kernel(
    grad_x, grad_area_weight, coord, grad_coord, grad_cell, count, rows, cols, features, depth,
    HAS_CELL: tl.constexpr, ENSEMBLE: tl.constexpr, T: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Gradients of each query's coord and cell, through relative coordinates, relative cells and area weights."""
    at = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    valid = at < count
    height = tl.cast(rows.size, T)
    width = tl.cast(cols.size, T)
    grad_row = tl.zeros([QUERIES], T)
    grad_col = tl.zeros([QUERIES], T)
    cell_row = tl.zeros([QUERIES], T)
    cell_col = tl.zeros([QUERIES], T)
    CORNERS: tl.constexpr = 4 if ENSEMBLE else 1
    for corner in tl.static_range(CORNERS):
        geometry = grad_x + (at * CORNERS + corner) * depth + features
        grad_row += tl.load(geometry, mask=valid, other=0.0).to(T)
        grad_col += tl.load(geometry + 1, mask=valid, other=0.0).to(T)
        if HAS_CELL:
            cell_row += tl.load(geometry + 2, mask=valid, other=0.0).to(T)
            cell_col += tl.load(geometry + 3, mask=valid, other=0.0).to(T)
    if ENSEMBLE:
        weights = grad_area_weight + at * 4
        row = tl.load(coord + 2 * at, mask=valid, other=0.0)
        col = tl.load(coord + 2 * at + 1, mask=valid, other=0.0)
        row0, row1, col0, col1 = area_weights_backward(
            find_neighbor(row, False, rows, True, T)[1],
            find_neighbor(row, True, rows, True, T)[1],
            find_neighbor(col, False, cols, True, T)[1],
            find_neighbor(col, True, cols, True, T)[1],
            tl.load(weights, mask=valid, other=0.0),
            tl.load(weights + 1, mask=valid, other=0.0),
            tl.load(weights + 2, mask=valid, other=0.0),
            tl.load(weights + 3, mask=valid, other=0.0),
        )
        grad_row += row0 + row1
        grad_col += col0 + col1
    tl.store(grad_coord + 2 * at, grad_row * height, mask=valid)
    tl.store(grad_coord + 2 * at + 1, grad_col * width, mask=valid)
    if HAS_CELL:
        tl.store(grad_cell + 2 * at, cell_row * height, mask=valid)
        tl.store(grad_cell + 2 * at + 1, cell_col * width, mask=valid)


def _axes(feat: Tensor) -> tuple[Axis, Axis]:
    return make_axis(feat.shape[2]), make_axis(feat.shape[3])


def _grid(feat: Tensor, coord: Tensor, cell: Tensor | None) -> QueryGrid:
    batch, queries = coord.shape[:2]
    return point_grid(coord, coord if cell is None else cell, feat.shape[2:], queries, batch * queries)


def gather(inputs: GatherInputs) -> tuple[Tensor, Tensor]:
    """x [B, Q, corners, depth] and area_weight [B, Q, corners]."""
    feat, coord, cell, feat_unfold, local_ensemble = inputs.for_kernels()
    x, area_weight = feat.new_empty(inputs.x_shape), coord.new_empty(inputs.x_shape[:3])
    count, tile = area_weight.numel(), power_of_two(inputs.features, 16, 64)
    if count == 0:
        return x, area_weight
    with on_device_of(feat):
        gather_forward_kernel[(triton.cdiv(count, ROWS) * triton.cdiv(inputs.features, tile),)](
            feat, _grid(feat, coord, cell), x, area_weight, *feat.stride(), inputs.features, x.shape[-1],
            HAS_CELL=cell is not None, UNFOLD=feat_unfold, ENSEMBLE=local_ensemble, T=DTYPES[coord.dtype],
            ROWS=ROWS, FEATURES=tile, num_warps=8, **OPTIONS,
        )  # fmt: skip
    return x, area_weight


def launch_gather_backward_feat(grad_x: Tensor, inputs: GatherInputs) -> Tensor:
    """grad_feat [B, C, H, W]: by atomic additions, or in a fixed order if deterministic algorithms are on."""
    feat, coord, _, feat_unfold, local_ensemble = inputs
    (batch, queries, corners, depth), (channels, height, width) = inputs.x_shape, feat.shape[1:]
    flags = {"UNFOLD": feat_unfold, "T": DTYPES[coord.dtype], **OPTIONS}
    if not torch.are_deterministic_algorithms_enabled():
        grad_feat = coord.new_zeros(batch, height, width, channels)
        count, tile = batch * queries, power_of_two(channels, 16, 64)
        gather_backward_feat_kernel[(triton.cdiv(count, PATCHES) * triton.cdiv(channels, tile),)](
            grad_x, coord, grad_feat, count, queries, *_axes(feat), channels, depth,
            ENSEMBLE=local_ensemble, QUERIES=PATCHES, CHANNELS=tile, **flags,
        )  # fmt: skip
        return grad_feat.permute(0, 3, 1, 2).contiguous()
    grad_feat, count = coord.new_zeros(feat.shape), batch * queries * corners
    numbers = torch.empty(count, dtype=torch.int64, device=feat.device)
    latent_kernel[(triton.cdiv(count, 128),)](
        _grid(feat, coord, None), numbers, GRID=False, ENSEMBLE=local_ensemble, T=flags["T"], ROWS=128, **OPTIONS
    )
    order, begins = segments(numbers, batch * height * width)
    tile = power_of_two(channels, 16, 128)
    gather_backward_feat_ordered_kernel[(batch * height * width * triton.cdiv(channels, tile),)](
        grad_x, order, begins, grad_feat, channels, height, width, depth, CHANNELS=tile, **flags
    )
    return grad_feat


def gather_backward(grad_x: Tensor, grad_area_weight: Tensor, inputs: GatherInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of feat, coord and cell in the geometry dtype."""
    inputs = inputs.for_kernels()
    feat, coord, cell = inputs[:3]
    grad_coord = torch.zeros_like(coord)
    grad_cell = coord.new_zeros(0 if cell is None else coord.shape)
    if coord.numel() == 0:
        return coord.new_zeros(feat.shape), grad_coord, grad_cell
    grad_x, count = grad_x.contiguous(), coord.shape[0] * coord.shape[1]
    with on_device_of(feat):
        grad_feat = launch_gather_backward_feat(grad_x, inputs)
        gather_backward_geometry_kernel[(triton.cdiv(count, QUERIES),)](
            grad_x, grad_area_weight.contiguous(), coord, grad_coord, grad_cell, count,
            *_axes(feat), inputs.features, grad_x.shape[-1],
            HAS_CELL=cell is not None, ENSEMBLE=inputs.local_ensemble, T=DTYPES[coord.dtype], QUERIES=QUERIES,
            **OPTIONS,
        )  # fmt: skip
    return grad_feat, grad_coord, grad_cell
