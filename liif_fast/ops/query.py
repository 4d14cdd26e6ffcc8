"""`query` and `render`: the whole decode, at given coordinates or on a regular grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import first_use, reference
from .backends import OpRequest, choose
from .decode import Layers, Place, check_with, choose_decode, decode, decode_on, grid_place
from .dtypes import autocast_dtype, needs_grad
from .ensemble import ensemble_on
from .fold import fold, fold_for
from .gather import gather_on
from .validation import check_cell, check_feat, check_latent_map, check_layers, check_points, in_dim


def _checked_layers(
    feat: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    latent_map: Tensor | None,
    switches: tuple[bool, bool, bool],  # local_ensemble, feat_unfold, cell_decode
) -> Layers:
    local_ensemble, feat_unfold, cell_decode = switches
    autocast = autocast_dtype(feat) is not None
    check_layers(weights, biases, in_dim(feat, feat_unfold, cell_decode), feat, autocast=autocast)
    if latent_map is not None:
        check_latent_map(latent_map, feat, weights)
    return Layers.of(weights[0][:, -(4 if cell_decode else 2) :], weights[1:], biases, local_ensemble, feat)


def _gather_is_cheaper(feat: Tensor, coord: Tensor) -> bool:
    """Whether few queries gather their latents faster than feat is folded; a traced program serves any number."""
    sizes = (coord.shape[1], *feat.shape[2:])
    if torch.compiler.is_exporting() or any(isinstance(size, torch.SymInt) for size in sizes):
        return False
    return 4 * sizes[0] < sizes[1] * sizes[2]


def _query_by_layers(
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    backend: str,
    **flags: bool,
) -> Tensor:
    """The decode with any imnet: gather and ensemble of `backend` around PyTorch's own layers."""
    cell = cell if flags.pop("cell_decode") else None
    x, area_weight = gather_on(backend, feat, coord, cell, **flags)
    return ensemble_on(backend, reference.imnet(x, weights, biases), area_weight)


def _decode(
    backend: str,
    feat: Tensor,
    first: Tensor,  # weights[0]
    latent_map: Tensor | None,
    layers: Layers,
    place: Place,
    feat_unfold: bool,
    keep: bool,
) -> Tensor:
    """`decode_on` of the latent map, which is made of feat unless it is given."""
    recorded = needs_grad(feat, *place.tensors, first, *layers.tensors)
    if latent_map is None:
        latent_map = fold_for(feat, first, feat_unfold, layers.matmul_dtype, recorded)
    return decode_on(backend, latent_map, layers, place, keep, recorded)


def query(
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    local_ensemble: bool = True,
    feat_unfold: bool = True,
    cell_decode: bool = True,
    latent_map: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Decode every coordinate to O values; differentiable in feat, coord, cell and every weight and bias.

    Args:
        feat: encoder output, [B, C, H, W].
        coord: query centers, [B, Q, 2], (row, col) in [-1, 1]; outside is legal, NaN gives NaN and no gradient of feat.
        cell: query pixel sizes in the same units, [B, Q, 2]; unused, and may be None, without cell_decode.
        weights: imnet's weights, [out, in] each, at least one; ReLU stands between the layers.
        biases: imnet's biases, [out] each.
        local_ensemble, feat_unfold, cell_decode: the paper's switches.
        latent_map: `fold(feat, weights[0])` if precomputed, [B, H, W, K].
        recompute: whether the backward computes activations again instead of keeping them: less memory, more time.
            The cpu backend keeps at most 1 GiB, or an eighth of the machine's memory, and computes the rest again.
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        [B, Q, O] in feat's dtype (float32 under autocast).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device. RuntimeError: the named backend cannot run this.

    Source: LIIF, section 3; `LIIF.query_rgb` of the original.
    """
    check_feat(feat)
    check_points("coord", coord, feat)
    if cell_decode:
        if cell is None:
            raise ValueError("cell is None but cell_decode is on: pass cell [B, Q, 2] or cell_decode=False")
        check_cell(cell, coord, feat)
    else:
        cell = None
    layers = _checked_layers(feat, weights, biases, latent_map, (local_ensemble, feat_unfold, cell_decode))
    place = Place(coord, cell)
    name = choose_decode(feat, layers, place, latent_map, feat_unfold, recompute, backend)
    flags = {"local_ensemble": local_ensemble, "feat_unfold": feat_unfold, "cell_decode": cell_decode}
    if name == "reference":
        out = reference.query(feat, coord, cell, weights, biases, **flags)
    elif latent_map is None and _gather_is_cheaper(feat, coord):
        out = _query_by_layers(feat, coord, cell, weights, biases, backend=name, **flags)
    else:
        out = _decode(name, feat, weights[0], latent_map, layers, place, feat_unfold, not recompute)
    return out.to(layers.out_dtype)


def render(
    feat: Tensor,
    size: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    window: Sequence[int] | None = None,
    cell: Sequence[float] | None = None,
    feat_region: Sequence[int] | None = None,
    source: Sequence[float] | None = None,
    local_ensemble: bool = True,
    feat_unfold: bool = True,
    cell_decode: bool = True,
    latent_map: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Decode the regular grid of an image, or a window of it, without tensors of coordinates and cells.

    Args:
        feat: encoder output, [B, C, H, W], or the part of it that `feat_region` names.
        size: rows and columns of the whole output image, in pixels.
        weights, biases: imnet's layers as in `query`.
        window: (top, left, height, width) of the part to decode, in output pixels; None is the whole image.
        cell: (row, col) size of a query pixel in [-1, 1] units; None is the grid's own, (2/rows, 2/columns).
        feat_region: (top, left, H, W): feat is the part of an H x W feature map that begins at latent (top, left). It
            must hold every latent that the window reaches, and one more on each side with feat_unfold. None: all of it.
        source: (top, left, height, width) of the part of the input that the image of `size` shows, in input pixels
            (latents of the whole map). The numbers need not be whole; the part may lie beyond the border. None: all.
        local_ensemble, feat_unfold, cell_decode: the paper's switches.
        latent_map: `fold(feat, weights[0])` if precomputed, [B, H, W, K].
        recompute: whether the backward computes activations again instead of keeping them: less memory, more time.
            The cpu backend keeps at most 1 GiB, or an eighth of the machine's memory, and computes the rest again.
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        [B, O, height, width] in feat's dtype (float32 under autocast); equal to `query` at the grid's centers.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, a window outside the image, a feat_region too small for
        the window. RuntimeError: the named backend cannot run this.
    """
    check_feat(feat)
    place = grid_place(feat, size, window, cell, source, feat_region, 1 if feat_unfold else 0)
    layers = _checked_layers(feat, weights, biases, latent_map, (local_ensemble, feat_unfold, cell_decode))
    name = choose_decode(feat, layers, place, latent_map, feat_unfold, recompute, backend)
    if name == "reference":
        image, area, region = (tuple(place.grid[part]) for part in (slice(2), slice(2, 6), slice(6, 10)))
        flags = {"local_ensemble": local_ensemble, "feat_unfold": feat_unfold, "cell_decode": cell_decode}
        where: dict[str, Any] = {"window": area, "cell": place.grid_cell[:2], "feat_region": region, "source": source}
        out = reference.render(feat, image, weights, biases, **where, **flags)  # type: ignore[arg-type]
    else:
        out = _decode(name, feat, weights[0], latent_map, layers, place, feat_unfold, not recompute)
    return out.to(layers.out_dtype)


check_with(first_use.Decoders(query, render, decode))


def latent_map_for(
    feat: Tensor, weights: Sequence[Tensor], *, feat_unfold: bool = True, backend: str | None = None
) -> Tensor | None:
    """The latent map that `query` and `render` would make of feat, or None where they would not make one.

    Args:
        feat: encoder output, [B, C, H, W].
        weights: imnet's weights, as for `query`.
        feat_unfold: the paper's switch.
        backend: as for `query`. The reference has no latent map.

    Returns:
        [B, H, W, K], the argument `latent_map` of `query` and `render` as long as feat and weights[0] stay the same.

    Raises:
        RuntimeError: the named backend cannot run this.
    """
    widths = tuple(weight.shape[0] for weight in weights)
    if choose(OpRequest.on(feat, "decode", widths, weights), backend) == "reference":
        return None
    return fold(feat, weights[0], feat_unfold=feat_unfold)
