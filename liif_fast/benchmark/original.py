"""The original formulation of LIIF's decoder as a baseline: the structure of yinboc/liif in plain PyTorch.

Every chunk of queries unfolds the whole feature map again. Every corner takes two `grid_sample` calls, a concatenation
of features, relative coordinates and cells, and a run of the imnet. The four predictions are blended by area. The
baseline is not slower than this structure requires: no tensor is made on the host, coordinates stay on their device,
and one call concatenates all parts. It shares no code with the ops. The tests compare it with the original's golden
numbers and count its calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 30_000  # queries at a time: the public code's default


def make_imnet(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> nn.Sequential:
    """Linear and ReLU modules whose parameters share the given tensors' memory."""
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases):
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_coord(height: int, width: int, like: Tensor) -> Tensor:
    """Pixel centers of a height x width grid, [height, width, 2], (row, col) in [-1, 1]."""
    axes = [-1 + 1 / n + (2 / n) * torch.arange(n, device=like.device).to(like.dtype) for n in (height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def make_cell(height: int, width: int, coord: Tensor) -> Tensor:
    """Sizes of the pixels of a height x width grid for coord [B, Q, 2] -> [B, Q, 2]."""
    cell = torch.ones_like(coord)
    cell[..., 0] *= 2 / height
    cell[..., 1] *= 2 / width
    return cell


def unfold(feat: Tensor) -> Tensor:
    """feat [B, C, H, W] -> every latent with its eight neighbors, [B, 9C, H, W]."""
    batch, _, height, width = feat.shape
    return F.unfold(feat, 3, padding=1).view(batch, -1, height, width)


def corner_inputs(
    feat: Tensor,  # [B, C, H, W], unfolded before where needed
    coord: Tensor,  # [B, Q, 2]
    cell: Tensor | None,  # [B, Q, 2], None without cell decoding
    *,
    local_ensemble: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Of every corner the imnet's input [B, Q, D] and the area between the query and that corner [B, Q]."""
    batch, _, height, width = feat.shape
    centers = make_coord(height, width, coord).permute(2, 0, 1).unsqueeze(0).expand(batch, 2, height, width)
    sides, eps = ((-1, 1), 1e-6) if local_ensemble else ((0,), 0.0)
    rel_cell = None if cell is None else _times_size(cell.clone(), height, width)
    inputs, areas = [], []
    for row_side in sides:
        for col_side in sides:
            moved = coord.clone()
            moved[..., 0] += row_side / height + eps
            moved[..., 1] += col_side / width + eps
            grid = moved.clamp_(-1 + 1e-6, 1 - 1e-6).flip(-1).unsqueeze(1)
            rel_coord = _times_size(coord - _nearest(centers, grid), height, width)
            parts = [_nearest(feat, grid), rel_coord]
            if rel_cell is not None:
                parts.append(rel_cell)
            inputs.append(torch.cat(parts, dim=-1))
            areas.append((rel_coord[..., 0] * rel_coord[..., 1]).abs() + 1e-9)
    return inputs, areas


def apply_imnet(imnet: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The imnet on every corner's input [B, Q, D] -> [B, Q, O] each."""
    return [imnet(x.view(-1, x.shape[-1])).view(*x.shape[:2], -1) for x in inputs]


def query(
    feat: Tensor,  # [B, C, H, W]
    coord: Tensor,  # [B, Q, 2]
    cell: Tensor | None,  # [B, Q, 2]
    imnet: nn.Module,
    *,
    local_ensemble: bool = True,
    feat_unfold: bool = True,
) -> Tensor:
    """Decode one chunk of queries -> [B, Q, O]."""
    inputs, areas = corner_inputs(unfold(feat) if feat_unfold else feat, coord, cell, local_ensemble=local_ensemble)
    return blend(apply_imnet(imnet, inputs), areas)


def blend(preds: Sequence[Tensor], areas: Sequence[Tensor]) -> Tensor:
    """preds [B, Q, O] of each corner, weighted by the area on the opposite side [B, Q] -> [B, Q, O]."""
    total = torch.stack(list(areas)).sum(dim=0)
    out = preds[0] * (areas[-1] / total).unsqueeze(-1)
    for pred, opposite in zip(preds[1:], areas[-2::-1]):
        out = out + pred * (opposite / total).unsqueeze(-1)
    return out


def predict(
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    imnet: nn.Module,
    *,
    chunk: int = CHUNK,
    query: Callable[..., Tensor] = query,
) -> Tensor:
    """Decode any number of queries without gradients, `chunk` at a time -> [B, Q, O]."""
    with torch.no_grad():
        parts = [
            query(feat, coord[:, at : at + chunk], None if cell is None else cell[:, at : at + chunk], imnet)
            for at in range(0, coord.shape[1], chunk)
        ]
        return torch.cat(parts, dim=1)


def _times_size(offsets: Tensor, height: int, width: int) -> Tensor:
    """offsets [B, Q, 2] in units of latents, in place."""
    offsets[..., 0] *= height
    offsets[..., 1] *= width
    return offsets


def _nearest(values: Tensor, grid: Tensor) -> Tensor:
    """values [B, C, H, W] at grid [B, 1, Q, 2] (x, y) -> [B, Q, C]."""
    return F.grid_sample(values, grid, mode="nearest", align_corners=False)[:, :, 0, :].permute(0, 2, 1)
