"""The paper in plain PyTorch: differentiable, any device, any float dtype, no optimizations.

The tests compare every other backend with this file, so it imports nothing from liif_fast. It repeats the original's
formulation step by step: unfold, one `grid_sample` per corner, concatenation, MLP, area-weighted sum (Chen et al.,
"Learning Continuous Image Representation with Local Implicit Image Function", CVPR 2021, section 3; the MetaSR baseline
is Hu et al., CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS_SHIFT = 1e-6
_EPS_AREA = 1e-9
_RENDER_CHUNK = 16384  # queries per step of `render`: bounds its memory without changing its result


def geometry_dtype(feat: Tensor) -> torch.dtype:
    """The dtype in which coordinates are computed: float64 for float64 features, otherwise float32."""
    return torch.float64 if feat.dtype == torch.float64 else torch.float32


def pixel_centers(size: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """Centers of `size` pixels that tile [-1, 1]. [size]; the original's `make_coord` along one axis."""
    half = 1 / size
    return -1 + half + (2 * half) * torch.arange(size, device=device).to(dtype)


def unfold3x3(feat: Tensor) -> Tensor:
    """feat [B,C,H,W] -> [B,9C,H,W], channel-major (c*9 + ky*3 + kx), zero padded."""
    batch, channels, height, width = feat.shape
    return F.unfold(feat, 3, padding=1).view(batch, channels * 9, height, width)


def _nearest(values: Tensor, coord: Tensor) -> Tensor:
    """values [B,C,H,W] at the nearest latent of coord [B,Q,2] -> [B,Q,C]; 0 at NaN, also on a GPU."""
    grid = coord.flip(-1).unsqueeze(1)
    found = F.grid_sample(values, grid, mode="nearest", align_corners=False)[:, :, 0, :].permute(0, 2, 1)
    return torch.where(coord.isnan().any(-1, keepdim=True), 0, found)


def _center_map(feat: Tensor, dtype: torch.dtype, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Centers of all latents as a [B,2,H,W] map, moved by `shift`."""
    batch, _, height, width = feat.shape
    rows = pixel_centers(height, dtype=dtype, device=feat.device) - shift[0]
    cols = pixel_centers(width, dtype=dtype, device=feat.device) - shift[1]
    grid = torch.stack(torch.meshgrid(rows, cols, indexing="ij"))
    return grid.unsqueeze(0).expand(batch, 2, height, width)


def gather(
    feat: Tensor,  # [B, C, H, W]
    coord: Tensor,  # [B, Q, 2]
    cell: Tensor | None = None,  # [B, Q, 2]
    *,
    feat_unfold: bool = True,
    local_ensemble: bool = True,
) -> tuple[Tensor, Tensor]:
    """imnet inputs of every corner [B,Q,S,D] and their blending weights [B,Q,S]; see `liif_fast.ops.gather`."""
    geometry = geometry_dtype(feat)
    coord = coord.to(geometry)
    height, width = feat.shape[-2:]
    size = coord.new_tensor([height, width])
    source = (unfold3x3(feat) if feat_unfold else feat).to(geometry)
    centers = _center_map(feat, geometry)

    sides = (-1, 1) if local_ensemble else (0,)
    eps = _EPS_SHIFT if local_ensemble else 0.0
    inputs, areas = [], []
    for row_side in sides:
        for col_side in sides:
            row = coord[..., 0] + (row_side * (2 / height / 2) + eps)
            col = coord[..., 1] + (col_side * (2 / width / 2) + eps)
            corner = torch.stack([row, col], dim=-1).clamp(-1 + 1e-6, 1 - 1e-6).detach()
            rel_coord = (coord - _nearest(centers, corner)) * size
            parts = [_nearest(source, corner), rel_coord]
            if cell is not None:
                parts.append(cell.to(geometry) * size)
            inputs.append(torch.cat(parts, dim=-1).to(feat.dtype))
            areas.append((rel_coord[..., 0] * rel_coord[..., 1]).abs() + _EPS_AREA)
    area = torch.stack(areas, dim=-1)
    # Each corner is weighted by the area of the rectangle toward the corner diagonally opposite.
    area_weight = area.flip(-1) / area.sum(dim=-1, keepdim=True)
    return torch.stack(inputs, dim=2), area_weight


def ensemble(pred: Tensor, area_weight: Tensor) -> Tensor:
    """Blend pred [B,Q,S,O] with area_weight [B,Q,S] over the corners -> [B,Q,O]."""
    return (pred.to(area_weight.dtype) * area_weight.unsqueeze(-1)).sum(dim=2)


def imnet(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Linear layers with ReLU between them: x [..., in] -> [..., out]."""
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x, weight, bias)
        if layer + 1 < len(weights):
            x = F.relu(x)
    return x


def query(
    feat: Tensor,  # [B, C, H, W]
    coord: Tensor,  # [B, Q, 2]
    cell: Tensor | None,  # [B, Q, 2]
    weights: Sequence[Tensor],  # weights[i]: [out, in]
    biases: Sequence[Tensor],  # biases[i]: [out]
    *,
    local_ensemble: bool = True,
    feat_unfold: bool = True,
    cell_decode: bool = True,
) -> Tensor:
    """The whole decode at given coordinates -> [B,Q,O]; see `liif_fast.ops.query`."""
    x, area_weight = gather(
        feat, coord, cell if cell_decode else None, feat_unfold=feat_unfold, local_ensemble=local_ensemble
    )
    return ensemble(imnet(x, weights, biases), area_weight)


def decode(
    latent_map: Tensor,  # [B, H, W, K]
    coord: Tensor,  # [B, Q, 2]
    cell: Tensor | None,  # [B, Q, 2]
    weight_geometry: Tensor,  # [K, 2 or 4]
    weights: Sequence[Tensor],  # of the layers after the first
    biases: Sequence[Tensor],  # of all layers
    query_term: Tensor | None,  # [B, Q, K]
    *,
    local_ensemble: bool = True,
) -> Tensor:
    """The decode of any latent map -> [B,Q,O]; see `liif_fast.ops.decode`."""
    width = latent_map.shape[-1]
    cell = cell if weight_geometry.shape[1] == 4 else None
    feat = latent_map.permute(0, 3, 1, 2)
    x, area_weight = gather(feat, coord, cell, feat_unfold=False, local_ensemble=local_ensemble)
    x = x[..., :width] + F.linear(x[..., width:].to(weight_geometry.dtype), weight_geometry, biases[0])
    if query_term is not None:
        x = x + query_term.unsqueeze(2)
    x = x.to(biases[0].dtype)
    return ensemble(imnet(F.relu(x), weights, biases[1:]) if weights else x, area_weight)


def window_coord(
    size: Sequence[int],
    window: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device | str | None,
    source: tuple[Sequence[float], Sequence[int]] | None = None,
) -> Tensor:
    """Pixel centers [h*w, 2] of window (top, left, h, w) of an image of `size`, row by row.

    source: ((top, left, height, width), (H, W)): the part of an H x W map that the image shows; None: all of it.
    """
    top, left, height, width = window
    axes = []
    for axis in (0, 1):
        if source is None:
            axes.append(pixel_centers(size[axis], dtype=dtype, device=device))
            continue
        box, pixels = source
        index = torch.arange(size[axis], dtype=torch.float64, device=device)
        latent = box[axis] + (index + 0.5) * box[2 + axis] / size[axis]  # from the map's edge
        axes.append((latent / pixels[axis] * 2 - 1).to(dtype))
    rows, cols = axes[0][top : top + height], axes[1][left : left + width]
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).view(-1, 2)


def _whole_map(feat: Tensor, feat_region: tuple[int, int, int, int]) -> Tensor:
    """feat at its place (top, left) in an H x W map of zeros; feat_region = (top, left, H, W)."""
    top, left, full_height, full_width = feat_region
    return F.pad(feat, (left, full_width - left - feat.shape[-1], top, full_height - top - feat.shape[-2]))


def render(
    feat: Tensor,  # [B, C, h, w], the part of the feature map that begins at feat_region[:2]
    size: tuple[int, int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    window: tuple[int, int, int, int],
    cell: tuple[float, float],
    feat_region: tuple[int, int, int, int],
    source: Sequence[float] | None = None,
    local_ensemble: bool = True,
    feat_unfold: bool = True,
    cell_decode: bool = True,
) -> Tensor:
    """The whole decode on a window of a regular grid -> [B,O,h,w]; see `liif_fast.ops.render`."""
    feat = _whole_map(feat, feat_region)
    box = None if source is None else (source, feat_region[2:])
    coord = window_coord(size, window, dtype=geometry_dtype(feat), device=feat.device, source=box)
    coord = coord.unsqueeze(0).expand(feat.shape[0], -1, 2)
    cells = coord.new_tensor(cell).expand(coord.shape)
    parts = [
        query(
            feat,
            coord[:, begin : begin + _RENDER_CHUNK],
            cells[:, begin : begin + _RENDER_CHUNK],
            weights,
            biases,
            local_ensemble=local_ensemble,
            feat_unfold=feat_unfold,
            cell_decode=cell_decode,
        )
        for begin in range(0, max(coord.shape[1], 1), _RENDER_CHUNK)
    ]
    return torch.cat(parts, dim=1).transpose(1, 2).reshape(feat.shape[0], weights[-1].shape[0], window[2], window[3])


def metasr_query(
    feat: Tensor,  # [B, C, H, W]
    coord: Tensor,  # [B, Q, 2]
    cell: Tensor,  # [B, Q, 2]
    weights: Sequence[Tensor],  # [hidden, 3], [9C*O, hidden]
    biases: Sequence[Tensor],
    *,
    feat_region: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """MetaSR: a predicted filter for every query, applied to the unfolded latent under it -> [B,Q,O]."""
    if feat_region is not None:
        feat = _whole_map(feat, feat_region)
    geometry = geometry_dtype(feat)
    coord, cell = coord.to(geometry), cell.to(geometry)
    batch, queries = coord.shape[:2]
    height, width = feat.shape[-2:]
    half_size = coord.new_tensor([height / 2, width / 2])

    corner = coord - cell / 2
    nearest = (corner + 1e-6).clamp(-1 + 1e-6, 1 - 1e-6).detach()
    latent = _nearest(unfold3x3(feat).to(geometry), nearest).to(feat.dtype)
    centers = _center_map(feat, geometry, shift=(1 / height, 1 / width))
    rel_coord = (corner - _nearest(centers, nearest)) * half_size
    x = torch.cat([rel_coord, cell[..., :1] * half_size[0]], dim=-1).to(feat.dtype)
    depth, outs = latent.shape[-1], weights[1].shape[0] // latent.shape[-1]
    filters = imnet(x, weights, biases).view(batch * queries, depth, outs)
    out = torch.bmm(latent.reshape(batch * queries, 1, depth), filters.to(latent.dtype))
    return out.view(batch, queries, outs)
