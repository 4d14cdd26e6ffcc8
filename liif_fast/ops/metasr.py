"""`metasr_query`: MetaSR's decode through its own exact folding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from . import registration as library
from . import validation as checks
from .backends import Problem, choose
from .fold import convolve


def metasr_fold(feat: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """MetaSR's second layer applied to the unfolded latents: one convolution instead of a predicted filter per query.

    Args:
        feat: [B, C, H, W].
        weights: [hidden, 3] and [9C*O, hidden]. biases: [hidden] and [9C*O].

    Returns:
        [B, H, W, O*(hidden + 1)]: for each output, one number per hidden unit, then the bias's.
    """
    channels = feat.shape[1]
    hidden = weights[0].shape[0]
    # [9C*O, hidden + 1] -> rows (channel and neighbour, output) -> kernels (output, hidden unit) over 9C
    table = torch.cat([weights[1], biases[1].unsqueeze(1)], dim=1).view(channels * 9, -1, hidden + 1)
    kernels = table.permute(1, 2, 0).reshape(-1, channels, 3, 3)
    return convolve(feat, kernels).permute(0, 2, 3, 1).contiguous()


def metasr_query(
    feat: Tensor,
    coord: Tensor,
    cell: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    feat_region: Sequence[int] | None = None,
    latent_map: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """MetaSR's decode; differentiable in feat, coord, cell and every weight and bias.

    Args:
        feat: encoder output, [B, C, H, W].
        coord, cell: query centres and pixel sizes, [B, Q, 2], (row, col) in [-1, 1] units.
        weights: the filter-predicting MLP's, [hidden, 3] and [9C*O, hidden]. biases: [hidden] and [9C*O].
        feat_region: (top, left, H, W): feat is the part of an H x W feature map that begins at latent (top, left). It
            must hold every latent under a query and the eight around it. None: all of it.
        latent_map: `metasr_fold(feat, weights, biases)` where it is at hand already.
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        [B, Q, O] in feat's dtype (float32 under autocast).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device. RuntimeError: the named backend cannot run this.

    Source: Hu et al., "Meta-SR", CVPR 2019, as the LIIF paper compares with it (`MetaSR.query_rgb` of the original).
    """
    checks.check_feat(feat)
    checks.check_points("coord", coord, feat)
    checks.check_cell(cell, coord, feat)
    region = checks.check_region(feat_region, feat)
    autocast = checks.autocast_dtype(feat)
    if len(weights) != 2:
        raise ValueError(f"MetaSR's imnet has two layers, got {len(weights)}")
    checks.check_layers(weights, biases, 3, feat, autocast=autocast is not None)
    if weights[1].shape[0] % (9 * feat.shape[1]):
        raise ValueError(f"weights[1] must have a multiple of 9*{feat.shape[1]} rows, got {weights[1].shape[0]}")

    name = choose(Problem("metasr_query", feat.device.type, feat.dtype), backend)
    if name == "reference":
        out = reference.metasr_query(feat, coord, cell, weights, biases, feat_region=region)
    else:
        if latent_map is None:
            latent_map = metasr_fold(feat, weights, biases)
        geometry = library.compute_dtype(latent_map)
        out = library.metasr_query(
            latent_map, coord.to(geometry), cell.to(geometry), weights[0], biases[0], list(region), name
        )
    return out.float() if autocast is not None else out.to(feat.dtype)
