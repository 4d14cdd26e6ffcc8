"""`gather`: imnet inputs for every corner, the op to build other decoders on."""

from __future__ import annotations

from torch import Tensor

from . import reference, registration
from .backends import OpRequest, calls, choose
from .dtypes import geometry_dtype
from .inputs import GatherInputs
from .validation import check_cell, check_feat, check_points


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
        coord: query centers, [B, Q, 2], (row, col) in [-1, 1]; outside is legal. NaN in one of them gives latents of 0,
            a relative coordinate and area weights of NaN, and no gradient of feat, as in the original on a CPU.
        cell: query pixel sizes in the same units, [B, Q, 2]; None leaves them out (no cell decoding).
        feat_unfold: concatenate each latent with its eight neighbors (9C channels, c*9 + ky*3 + kx, zero padded).
        local_ensemble: four corners around each query instead of the one nearest latent.
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        x: [B, Q, S, D] in feat's dtype, S = 4 or 1 corners, D = (9)C + 2 (+ 2): latent, rel_coord, rel_cell.
        area_weight: [B, Q, S], float32 (float64 for float64 feat), sums to 1 over the corners.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device. RuntimeError: the named backend cannot run this.

    Source: LIIF, section 3 and figure 2; `LIIF.query_rgb` of the original up to the imnet.
    """
    check_feat(feat)
    check_points("coord", coord, feat)
    if cell is not None:
        check_cell(cell, coord, feat)
    name = choose(OpRequest.on(feat, "gather", others=[coord, cell]), backend)
    return gather_on(name, feat, coord, cell, feat_unfold=feat_unfold, local_ensemble=local_ensemble)


def gather_on(
    backend: str, feat: Tensor, coord: Tensor, cell: Tensor | None, *, feat_unfold: bool, local_ensemble: bool
) -> tuple[Tensor, Tensor]:
    """`gather` of validated tensors on a chosen backend."""
    if backend == "reference":
        return reference.gather(feat, coord, cell, feat_unfold=feat_unfold, local_ensemble=local_ensemble)
    dtype = geometry_dtype(feat)
    cell = None if cell is None else cell.to(dtype)
    inputs = GatherInputs(feat, coord.to(dtype), cell, feat_unfold, local_ensemble)
    return calls.gather(inputs) if backend == "torch" else registration.gather(*inputs, backend)
