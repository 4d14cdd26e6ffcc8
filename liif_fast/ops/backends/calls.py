"""The `torch` backend: the folded decode in PyTorch's own calls, for every device, transform and tracer.

It has the algebra of the kernels: the first layer is folded into a convolution, and the last layer runs after the
blend. Nothing here is a registered op, a decision on data or an operation in place on an input, so PyTorch
differentiates it in both modes and any number of times, and maps, traces and exports it. Inference runs in tiles of
queries, so that its memory beside the latent map and the result is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import geometry_dtype, needs_grad, no_autocast
from ..inputs import DecodeInputs, GatherInputs, MetasrInputs
from ..transforms import is_transformed

TILE, TILE_ON_GPU = 2048, 65_536  # queries; on a CPU they fit in the cache


class _Axis(NamedTuple):
    """The latents next to queries along one axis, in the order of geometry.h; a list has one item for each side."""

    latent: list[Tensor]  # index, int64, inside the map
    rel: list[Tensor]  # (coord - center) * size


def _axes(coord: Sequence[Tensor], size: Sequence[int], local_ensemble: bool) -> tuple[_Axis, _Axis, Tensor]:
    """Of rows and columns, and where one of the coordinates is NaN: there the latent and its center are 0."""
    unknown = (coord[0].isnan() | coord[1].isnan()).detach()
    sides = (-1, 1) if local_ensemble else (0,)
    rows, cols = (_axis(each, pixels, sides, unknown) for each, pixels in zip(coord, size))
    return rows, cols, unknown


def _axis(coord: Tensor, size: int, sides: Sequence[int], unknown: Tensor) -> _Axis:
    found = _Axis([], [])
    for side in sides:
        shifted = coord.detach()
        if side:
            shifted = shifted + (side * (2 / size / 2) + 1e-6)
        nearest = _nearest(shifted, size)
        found.latent.append(nearest.long())
        found.rel.append((coord - torch.where(unknown, 0, _center(nearest, size))) * size)
    return found


def _nearest(coord: Tensor, size: int) -> Tensor:
    """The nearest latent of coordinates, ties to even, as a whole number in their dtype; 0 for NaN."""
    nearest = torch.round((((coord.clamp(-1 + 1e-6, 1 - 1e-6) + 1) * size) - 1) * 0.5)
    return torch.where(nearest > 0, nearest, 0).clamp(max=size - 1)


def _center(index: Tensor, size: int) -> Tensor:
    return (-1 + 1 / size) + (2 * (1 / size)) * index


def _area_weight(rows: _Axis, cols: _Axis) -> Tensor:
    """[..., S]: each corner gets the area toward the diagonally opposite one."""
    if len(rows.rel) == 1:
        return (rows.rel[0] * cols.rel[0] * 0 + 1).unsqueeze(-1)
    area = torch.stack([(row * col).abs() + 1e-9 for row in rows.rel for col in cols.rel], dim=-1)
    return area.flip(-1) / area.sum(dim=-1, keepdim=True)


def _rel(rows: _Axis, cols: _Axis, rel_cell: Sequence[Tensor]) -> Tensor:
    """[..., S, 2 or 4]: rel_coord and rel_cell of every corner."""
    return torch.stack([torch.stack([row, col, *rel_cell], dim=-1) for row in rows.rel for col in cols.rel], dim=-2)


def gather(inputs: GatherInputs) -> tuple[Tensor, Tensor]:
    feat, coord = inputs.feat, inputs.coord
    batch, channels, height, width = feat.shape
    rows, cols, unknown = _axes(coord.unbind(-1), (height, width), inputs.local_ensemble)
    # Padded, so that a neighbor beyond the border is a latent of zeros.
    margin, neighbors = (1, (0, 1, 2)) if inputs.feat_unfold else (0, (0,))
    padded = F.pad(feat, (margin,) * 4).permute(0, 2, 3, 1).reshape(-1, channels)
    full = height + 2 * margin, width + 2 * margin
    entry = torch.arange(batch, device=feat.device).view(-1, 1) * (full[0] * full[1])
    steps = torch.tensor([row * full[1] + col for row in neighbors for col in neighbors], device=feat.device)
    first = torch.stack([entry + row * full[1] + col for row in rows.latent for col in cols.latent], dim=-1)
    found = padded.index_select(0, (first.unsqueeze(-1) + steps).reshape(-1))
    latents = found.view(*first.shape, len(steps), channels).transpose(-1, -2).flatten(-2)
    latents = torch.where(unknown[..., None, None], 0, latents)
    cell = [] if inputs.cell is None else [inputs.cell[..., 0] * height, inputs.cell[..., 1] * width]
    return torch.cat([latents, _rel(rows, cols, cell).to(feat.dtype)], dim=-1), _area_weight(rows, cols)


def ensemble(pred: Tensor, area_weight: Tensor) -> Tensor:
    with no_autocast(pred.device):
        return _blend(pred, area_weight)


def decode(inputs: DecodeInputs) -> Tensor:
    latents = inputs.latent_map.reshape(-1, inputs.latent_map.shape[-1])
    with no_autocast(latents.device):
        out = _in_tiles(
            lambda first, last: _decode_tile(inputs, latents, first, last), inputs.queries, inputs.differentiable(True)
        )
    batch, outs = inputs.latent_map.shape[0], out.shape[-1]
    if inputs.coord is None:
        return out.view(batch, *inputs.grid[4:6], outs).permute(0, 3, 1, 2)
    return out.view(inputs.out_shape)


def _in_tiles(part: Callable[[int, int], Tensor], queries: int, tensors: Sequence[Tensor | None]) -> Tensor:
    """part(first, last) of all queries [Q, O], in tiles where only the result stays.

    With gradients there are no tiles: the backward of each one would add a whole latent map of gradients.
    """
    device = next(tensor.device for tensor in tensors if tensor is not None)
    traces = torch.compiler.is_compiling() or is_transformed(*tensors) or needs_grad(*tensors)
    tile = TILE if device.type == "cpu" else TILE_ON_GPU
    if traces or queries <= tile:
        return part(0, queries)
    # One tensor: separate results of the tiles would fragment the heap, which then grows with each tile.
    out: Tensor | None = None
    for first in range(0, queries, tile):
        last = min(first + tile, queries)
        done = part(first, last)
        out = done.new_empty(queries, done.shape[1]) if out is None else out
        out[first:last] = done
    assert out is not None
    return out


def _decode_tile(inputs: DecodeInputs, latents: Tensor, first: int, last: int) -> Tensor:
    """Some queries of the whole batch -> [last - first, O]; coord and cell are [B*Q, 2]."""
    dtype, matmul_dtype = geometry_dtype(latents), inputs.matmul_dtype
    height, width = inputs.latent_map.shape[1:3]
    query = torch.arange(first, last, device=latents.device)
    entry = query // inputs.entry_queries
    if inputs.coord is None:
        image, (top, left), columns, region = inputs.grid[:2], inputs.grid[2:4], inputs.grid[5], inputs.grid[6:]
        pixel = query - entry * inputs.entry_queries
        row = pixel // columns
        col = pixel - row * columns  # a remainder by a symbolic number has no counterpart in ONNX
        if len(inputs.grid_cell) == 2:
            coord = [_center((row + top).to(dtype), image[0]), _center((col + left).to(dtype), image[1])]
        else:
            _, _, row_origin, row_step, col_origin, col_step = inputs.grid_cell
            coord = [row_origin + row_step * (row + top).to(dtype), col_origin + col_step * (col + left).to(dtype)]
        cell = [torch.full_like(coord[0], size) for size in inputs.grid_cell[:2]]
    else:
        region = [0, 0, height, width]
        coord, cell = (
            [] if points is None else list(points.reshape(-1, 2)[first:last].unbind(-1))
            for points in (inputs.coord, inputs.cell)
        )
    rows, cols, unknown = _axes(coord, region[2:], inputs.local_ensemble)
    cell = [size * latent for size, latent in zip(cell[: inputs.weight_geometry.shape[1] - 2], region[2:])]
    place = entry * (height * width)
    local = [(index - region[0]).clamp(0, height - 1) * width + place for index in rows.latent]
    index = torch.stack([row + (col - region[1]).clamp(0, width - 1) for row in local for col in cols.latent], dim=-1)
    found = latents.index_select(0, index.view(-1)).view(*index.shape, latents.shape[1])
    if inputs.coord is not None:  # no gradient for the latent that NaN happens to select
        found = torch.where(unknown[:, None, None], 0, found)
    # In 16 bits a coordinate would lose its place.
    x = F.linear(_rel(rows, cols, cell), inputs.weight_geometry.to(dtype), inputs.biases[0].to(dtype)) + found
    if inputs.query_term is not None:
        x = x + inputs.query_term.flatten(0, 1)[first:last].unsqueeze(1)
    for weight, bias in zip(inputs.weights[:-1], inputs.biases[1:-1]):
        x = F.linear(F.relu(x).to(matmul_dtype), weight.to(matmul_dtype), bias.to(matmul_dtype))
    # The blend and the last layer, which is small, round nothing to 16 bits.
    blended = _blend(F.relu(x) if inputs.weights else x, _area_weight(rows, cols))
    if not inputs.weights:
        return blended
    return F.linear(blended, inputs.weights[-1].to(dtype), inputs.biases[-1].to(dtype))


def _blend(pred: Tensor, area_weight: Tensor) -> Tensor:
    """pred [Q, S, O] over the corners -> [Q, O], in area_weight's dtype."""
    return (area_weight.unsqueeze(-2) @ pred.to(area_weight.dtype)).squeeze(-2)


def metasr_query(inputs: MetasrInputs) -> Tensor:
    batch, height, width, columns = inputs.latent_map.shape
    latents = inputs.latent_map.reshape(-1, columns)
    queries, hidden = inputs.coord.shape[1], inputs.weight.shape[0]
    top, left, *size = inputs.region
    flat = inputs._replace(coord=inputs.coord.reshape(-1, 2), cell=inputs.cell.reshape(-1, 2))
    dtype = geometry_dtype(latents)
    weight, bias = inputs.weight.to(dtype), inputs.bias.to(dtype)

    def part(first: int, last: int) -> Tensor:
        coord, cell = flat.coord[first:last], flat.cell[first:last]
        corner = coord - cell * 0.5
        nearest = [_nearest(corner[:, axis].detach() + 1e-6, size[axis]) for axis in (0, 1)]
        rel = [
            (corner[:, axis] - (_center(each, size[axis]) - 1 / size[axis])) * (size[axis] / 2)
            for axis, each in enumerate(nearest)
        ]
        x = torch.stack([*rel, cell[:, 0] * (size[0] / 2)], dim=-1)
        filters = F.pad(F.relu(F.linear(x, weight, bias)), (0, 1), value=1.0).unsqueeze(-1)
        row, col = (each.long() for each in nearest)
        entry = torch.arange(first, last, device=latents.device) // queries
        index = (entry * height + (row - top).clamp(0, height - 1)) * width + (col - left).clamp(0, width - 1)
        found = latents.index_select(0, index).view(last - first, columns // (hidden + 1), hidden + 1)
        found = torch.where(coord.isnan().any(-1)[:, None, None], 0, found)
        return (found.to(dtype) @ filters).squeeze(-1)

    with no_autocast(latents.device):
        out = _in_tiles(
            part, batch * queries, [inputs.latent_map, inputs.coord, inputs.cell, inputs.weight, inputs.bias]
        )
    return out.view(*inputs.out_shape)
