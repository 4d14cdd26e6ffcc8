"""`metasr_query`: MetaSR's decode, with its second layer folded into the features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import reference, registration
from .backends import OpRequest, calls, choose
from .dtypes import autocast_dtype, geometry_dtype
from .fold import metasr_fold
from .inputs import MetasrInputs
from .validation import check_cell, check_feat, check_layers, check_points, check_region


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
        coord, cell: query centers and pixel sizes, [B, Q, 2], (row, col) in [-1, 1] units.
        weights: of the MLP that predicts filters, [hidden, 3] and [9C*O, hidden]. biases: [hidden] and [9C*O].
        feat_region: (top, left, H, W): feat is the part of an H x W feature map that begins at latent (top, left). It
            must hold every latent under a query and the eight around it. None: all of it.
        latent_map: `metasr_fold(feat, weights, biases)` if precomputed.
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        [B, Q, O] in feat's dtype (float32 under autocast).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device. RuntimeError: the named backend cannot run this.

    Source: Hu et al., "Meta-SR", CVPR 2019, as the LIIF paper compares with it (`MetaSR.query_rgb` of the original).
    """
    check_feat(feat)
    check_points("coord", coord, feat)
    check_cell(cell, coord, feat)
    region = check_region(feat_region, feat)
    autocast = autocast_dtype(feat)
    if len(weights) != 2:
        raise ValueError(f"MetaSR's imnet has two layers, got {len(weights)}")
    check_layers(weights, biases, 3, feat, autocast=autocast is not None)
    if weights[1].shape[0] % (9 * feat.shape[1]):
        raise ValueError(f"weights[1] must have a multiple of 9*{feat.shape[1]} rows, got {weights[1].shape[0]}")

    others = [coord, cell, latent_map, *weights, *biases]
    name = choose(OpRequest.on(feat, "metasr_query", others=others), backend)
    if name == "reference":
        out = reference.metasr_query(feat, coord, cell, weights, biases, feat_region=region)
    else:
        if latent_map is None:
            latent_map = metasr_fold(feat, weights, biases)
        dtype = geometry_dtype(latent_map)
        inputs = MetasrInputs(latent_map, coord.to(dtype), cell.to(dtype), weights[0], biases[0], list(region))
        out = calls.metasr_query(inputs) if name == "torch" else registration.metasr_query(*inputs, name)
    return out.float() if autocast is not None else out.to(feat.dtype)
