"""The honest baseline: the same algebra as the fused kernels (design: first layer folded into a convolution, last layer
behind the blend), written with PyTorch calls only and cut into tiles of queries that stay in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2048  # queries


def query(
    feat: Tensor,  # [B, C, H, W]
    coord: Tensor,  # [B, Q, 2], float32
    cell: Tensor,  # [B, Q, 2], float32
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    tile: int | None = TILE,
) -> Tensor:
    """Decode with unfolding, local ensemble and cells -> [B, Q, O]; `tile` None takes all queries at once.

    Under gradients take them at once: each tile would add a whole latent map of gradients.
    """
    batch, channels, height, width = feat.shape
    first = weights[0]
    kernels = first[:, : 9 * channels].reshape(-1, channels, 3, 3)
    latent_map = F.conv2d(feat, kernels, padding=1).permute(0, 2, 3, 1).reshape(batch * height * width, -1)
    coord, cell = coord.reshape(-1, 2), cell.reshape(-1, 2)
    entry = torch.arange(batch, device=feat.device).repeat_interleave(coord.shape[0] // batch) * (height * width)
    step = tile or coord.shape[0]
    geometry = first[:, 9 * channels :].t()
    parts = [
        _tile(latent_map, coord[part], cell[part], entry[part], (height, width), geometry, weights[1:], biases)
        for part in (slice(at, at + step) for at in range(0, coord.shape[0], step))
    ]
    return torch.cat(parts).view(batch, -1, parts[0].shape[-1])


def _tile(
    latent_map: Tensor,  # [B*H*W, K]
    coord: Tensor,  # [Q, 2]
    cell: Tensor,  # [Q, 2]
    entry: Tensor,  # [Q], first latent of the query's map
    map_size: tuple[int, int],
    geometry: Tensor,  # [4, K], the first layer's part for rel_coord and rel_cell
    weights: Sequence[Tensor],  # after the first layer
    biases: Sequence[Tensor],  # of all layers
) -> Tensor:
    size = coord.new_tensor(map_size)
    signs = coord.new_tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    corner = (coord.unsqueeze(1) + (signs / size + 1e-6)).clamp_(-1 + 1e-6, 1 - 1e-6)  # [Q, 4, 2]
    index = torch.round(((corner + 1) * size - 1) / 2)
    rel_coord = (coord.unsqueeze(1) - (-1 + (2 * index + 1) / size)) * size
    area = (rel_coord[..., 0] * rel_coord[..., 1]).abs() + 1e-9
    area_weight = (area.flip(1) / area.sum(1, keepdim=True)).to(latent_map.dtype)
    index = index.long()
    latent = entry.unsqueeze(1) + index[..., 0] * map_size[1] + index[..., 1]

    rel = torch.cat([rel_coord, (cell * size).unsqueeze(1).expand_as(rel_coord)], dim=-1).to(latent_map.dtype)
    x = torch.addmm(biases[0], rel.view(-1, 4), geometry)
    x = F.relu(x + latent_map.index_select(0, latent.view(-1)))
    for weight, bias in zip(weights[:-1], biases[1:-1]):
        x = F.relu(F.linear(x, weight, bias))
    blended = (area_weight.unsqueeze(1) @ x.view(*area.shape, -1)).squeeze(1)
    return F.linear(blended, weights[-1], biases[-1])
