"""`gather`: imnet inputs for every corner, the op to build other decoders on."""

from __future__ import annotations

from torch import Tensor

from . import reference
from . import registration as library
from . import validation as checks
from .backends import Problem, choose


def gather(
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None = None,
    *,
    feat_unfold: bool = True,
    local_ensemble: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Unfolding, nearest latents, relative coordinates and cells in one pass; differentiable in feat, coord and cell.

    Args:
        feat: encoder output, [B, C, H, W].
        coord: query centres, [B, Q, 2], (row, col) in [-1, 1]; outside is legal, NaN gives NaN.
        cell: query pixel sizes in the same units, [B, Q, 2]; None leaves them out (no cell decoding).
        feat_unfold: concatenate each latent with its eight neighbours (9C channels, c*9 + ky*3 + kx, zero padded).
        local_ensemble: four corners around each query instead of the one nearest latent.
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        x: [B, Q, S, D] in feat's dtype, S = 4 or 1 corners, D = (9)C + 2 (+ 2): latent, rel_coord, rel_cell.
        area_weight: [B, Q, S], float32 (float64 for float64 feat), sums to 1 over the corners.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device. RuntimeError: the named backend cannot run this.

    Source: LIIF, section 3 and figure 2; `LIIF.query_rgb` of the original up to the imnet.
    """
    checks.check_feat(feat)
    checks.check_points("coord", coord, feat)
    if cell is not None:
        checks.check_cell(cell, coord, feat)
    name = choose(Problem("gather", feat.device.type, feat.dtype), backend)
    if name == "reference":
        return reference.gather(feat, coord, cell, feat_unfold=feat_unfold, local_ensemble=local_ensemble)
    geometry = library.compute_dtype(feat)
    cell = None if cell is None else cell.to(geometry)
    return library.gather(feat, coord.to(geometry), cell, feat_unfold, local_ensemble, name)
