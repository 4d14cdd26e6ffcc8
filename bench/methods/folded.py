"""The folded baseline: the algebra of the fused kernels in PyTorch calls, in tiles of queries.

The first layer is folded into a convolution, and the last layer runs after the blend. On a CPU tiles that fit in the
cache are fastest, on a GPU large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2048  # queries, on a CPU


def latent_map(feat: Tensor, first: Tensor) -> Tensor:
    """feat [B, C, H, W] through the first layer's feature part -> [B*H*W, K]."""
    channels = feat.shape[1]
    kernels = first[:, : 9 * channels].reshape(-1, channels, 3, 3)
    return F.conv2d(feat, kernels, padding=1).permute(0, 2, 3, 1).reshape(-1, first.shape[0])


def decode_tile(
    latents: Tensor,  # [B*H*W, K]
    coord: Tensor,  # [Q, 2]
    cell: Tensor,  # [Q, 2]
    entry: Tensor,  # [Q], index of the first latent of the query's map
    map_size: tuple[int, int],
    geometry: Tensor,  # [4, K], the first layer's part for rel_coord and rel_cell
    weights: Sequence[Tensor],  # after the first layer
    biases: Sequence[Tensor],  # of all layers
) -> Tensor:
    """Decode some queries -> [Q, O]."""
    rows, row_areas = _neighbors(coord[:, 0], map_size[0])
    cols, col_areas = _neighbors(coord[:, 1], map_size[1])
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    latent = torch.stack([entry + rows[r] * map_size[1] + cols[c] for r, c in corners], dim=1)  # [Q, 4]
    area = torch.stack([(row_areas[r] * col_areas[c]).abs() + 1e-9 for r, c in corners], dim=1)
    area_weight = (area.flip(1) / area.sum(1, keepdim=True)).to(latents.dtype)
    rel_cell = [cell[:, 0] * map_size[0], cell[:, 1] * map_size[1]]
    rel = torch.stack([torch.stack([row_areas[r], col_areas[c], *rel_cell], dim=-1) for r, c in corners], dim=1)

    x = torch.addmm(biases[0], rel.to(latents.dtype).view(-1, 4), geometry)
    x = F.relu(x + latents.index_select(0, latent.view(-1)))
    for weight, bias in zip(weights[:-1], biases[1:-1]):
        x = F.relu(F.linear(x, weight, bias))
    blended = (area_weight.unsqueeze(1) @ x.view(*area.shape, -1)).squeeze(1)
    return F.linear(blended, weights[-1], biases[-1])


def query(
    feat: Tensor,  # [B, C, H, W]
    coord: Tensor,  # [B, Q, 2], float32
    cell: Tensor,  # [B, Q, 2], float32
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    tile: int | None = TILE,
    decode: Callable[..., Tensor] = decode_tile,
) -> Tensor:
    """Decode with unfolding, local ensemble and cells -> [B, Q, O]; without `tile`, all queries at once.

    With gradients use no tiles: the backward of each tile would add a whole latent map of gradients. `decode` may be a
    compiled `decode_tile`.
    """
    batch, channels, height, width = feat.shape
    latents = latent_map(feat, weights[0])
    coord, cell = coord.reshape(-1, 2), cell.reshape(-1, 2)
    entry = (torch.arange(batch, device=feat.device) * (height * width)).repeat_interleave(coord.shape[0] // batch)
    geometry = weights[0][:, 9 * channels :].t()

    def decode_part(part: slice) -> Tensor:
        return decode(latents, coord[part], cell[part], entry[part], (height, width), geometry, weights[1:], biases)

    if tile is None:
        return decode_part(slice(None)).view(batch, -1, weights[-1].shape[0])
    # One output tensor: separate results of the tiles would fragment the heap, which then grows with each tile.
    out = latents.new_empty(coord.shape[0], weights[-1].shape[0])
    for at in range(0, coord.shape[0], tile):
        out[at : at + tile] = decode_part(slice(at, at + tile))
    return out.view(batch, -1, out.shape[1])


def _neighbors(coord: Tensor, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """The two nearest latents of each query [Q] along one axis, and the query's offset from each."""
    index, offset = [], []
    for side in (-1, 1):
        corner = (coord + (side / size + 1e-6)).clamp(-1 + 1e-6, 1 - 1e-6)
        nearest = torch.round(((corner + 1) * size - 1) / 2)
        index.append(nearest.long())
        offset.append((coord - (-1 + (2 * nearest + 1) / size)) * size)
    return index, offset
