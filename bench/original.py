"""The original formulation of LIIF's decoder as a baseline: the structure of yinboc/liif in plain PyTorch.

Per chunk of queries it unfolds the whole feature map anew; per corner it makes two `grid_sample` calls, concatenates
features, relative coordinates and cells, and runs the imnet; the four predictions are blended by area. Nothing is done
slower than that structure asks for. It shares no code with the package, and tests/test_bench.py holds it to the
original's golden numbers.
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
    """Pixel centres of a height x width grid, [height, width, 2], (row, col) in [-1, 1]."""
    axes = [-1 + 1 / n + (2 / n) * torch.arange(n, device=like.device).to(like.dtype) for n in (height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def corner_inputs(
    feat: Tensor,  # [B, C, H, W], before unfolding
    coord: Tensor,  # [B, Q, 2]
    cell: Tensor | None,  # [B, Q, 2], None without cell decoding
    *,
    local_ensemble: bool = True,
    feat_unfold: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """For every corner the imnet's input [B, Q, D] and the area between the query and that corner [B, Q]."""
    batch, _, height, width = feat.shape
    if feat_unfold:
        feat = F.unfold(feat, 3, padding=1).view(batch, -1, height, width)
    centers = make_coord(height, width, coord).permute(2, 0, 1).unsqueeze(0).expand(batch, 2, height, width)
    sides, eps = ((-1, 1), 1e-6) if local_ensemble else ((0,), 0.0)
    size = coord.new_tensor([height, width])
    inputs, areas = [], []
    for row_side in sides:
        for col_side in sides:
            moved = coord + coord.new_tensor([row_side / height + eps, col_side / width + eps])
            grid = moved.clamp_(-1 + 1e-6, 1 - 1e-6).flip(-1).unsqueeze(1)
            latent = _nearest(feat, grid)
            rel_coord = (coord - _nearest(centers, grid)) * size
            parts = [latent, rel_coord]
            if cell is not None:
                parts.append(cell * size)
            inputs.append(torch.cat(parts, dim=-1))
            areas.append((rel_coord[..., 0] * rel_coord[..., 1]).abs() + 1e-9)
    return inputs, areas


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
    inputs, areas = corner_inputs(feat, coord, cell, local_ensemble=local_ensemble, feat_unfold=feat_unfold)
    batch, queries = coord.shape[:2]
    preds = [imnet(x.view(batch * queries, -1)).view(batch, queries, -1) for x in inputs]
    return blend(preds, areas)


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


def _nearest(values: Tensor, grid: Tensor) -> Tensor:
    """values [B, C, H, W] at grid [B, 1, Q, 2] (x, y) -> [B, Q, C]."""
    return F.grid_sample(values, grid, mode="nearest", align_corners=False)[:, :, 0, :].permute(0, 2, 1)
