"""`query` and `render`: the whole decode, at given coordinates or on a regular grid; `fold`: its first layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from . import reference
from . import registration as library
from . import validation as checks
from .backends import Problem, choose_fused
from .ensemble import ensemble
from .fold import convolve
from .gather import gather


def fold(feat: Tensor, weight: Tensor, *, feat_unfold: bool = True) -> Tensor:
    """The first layer's feature part as a convolution, once per latent instead of once per query and corner.

    Args:
        feat: [B, C, H, W].
        weight: imnet's first weight, [K, 9C + 2 (+ 2)], or [K, C + 2 (+ 2)] without unfolding.
        feat_unfold: a 3x3 convolution with zero padding, otherwise 1x1.

    Returns:
        latent_map, [B, H, W, K], contiguous. The bias is not in it: `query` adds it with the geometry terms.

    Source: linearity of the first layer in the unfolded latent; exact up to the order of the sum.
    """
    return _fold(feat, weight, feat_unfold, False)


def _fold(feat: Tensor, weight: Tensor, feat_unfold: bool, tf32: bool) -> Tensor:
    channels, kernel = feat.shape[1], 3 if feat_unfold else 1
    kernels = weight[:, : channels * kernel * kernel].reshape(weight.shape[0], channels, kernel, kernel)
    return convolve(feat, kernels, tf32=tf32).permute(0, 2, 3, 1).contiguous()


def _is_trained(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _folded(feat: Tensor, weight: Tensor, feat_unfold: bool, dtype: torch.dtype, operands: torch.dtype) -> Tensor:
    """The latent map in `dtype`, whatever autocast says; operands: the dtype of the other layers' products."""
    with torch.autocast(feat.device.type, enabled=False):
        return _fold(feat.to(dtype), weight.to(dtype), feat_unfold, operands.itemsize == 2)


def _widths(weights: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(weight.shape[0] for weight in weights)


def _in_dim(feat: Tensor, feat_unfold: bool, cell_decode: bool) -> int:
    return feat.shape[1] * (9 if feat_unfold else 1) + 2 + (2 if cell_decode else 0)


def _check_latent_map(latent_map: Tensor, feat: Tensor, weights: Sequence[Tensor]) -> None:
    shape = (feat.shape[0], feat.shape[2], feat.shape[3], weights[0].shape[0])
    if tuple(latent_map.shape) != shape or latent_map.device != feat.device:
        raise ValueError(
            f"latent_map must be {shape} on {feat.device}, got {tuple(latent_map.shape)} on {latent_map.device}: "
            "make it by fold(feat, weights[0])"
        )


def _query_by_layers(
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    local_ensemble: bool,
    feat_unfold: bool,
    cell_decode: bool,
    backend: str,
) -> Tensor:
    """The decode for any imnet: gather and ensemble of `backend` around PyTorch's own layers."""
    flags = {"local_ensemble": local_ensemble, "feat_unfold": feat_unfold}
    x, area_weight = gather(feat, coord, cell if cell_decode else None, backend=backend, **flags)
    return ensemble(reference.imnet(x, weights, biases), area_weight, backend=backend)


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
        coord: query centres, [B, Q, 2], (row, col) in [-1, 1]; outside is legal, NaN gives NaN.
        cell: query pixel sizes in the same units, [B, Q, 2]; unused, and may be None, without cell_decode.
        weights: imnet's weights, [out, in] each, at least one; ReLU stands between the layers.
        biases: imnet's biases, [out] each.
        local_ensemble, feat_unfold, cell_decode: the paper's switches.
        latent_map: `fold(feat, weights[0])` where it is at hand already, [B, H, W, K].
        recompute: whether the backward computes activations again instead of keeping them; less memory, more time. The
            cpu backend always does.
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        [B, Q, O] in feat's dtype (float32 under autocast).

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device. RuntimeError: the named backend cannot run this.

    Source: LIIF, section 3; `LIIF.query_rgb` of the original.
    """
    checks.check_feat(feat)
    checks.check_points("coord", coord, feat)
    if cell_decode:
        if cell is None:
            raise ValueError("cell is None but cell_decode is on: pass cell [B, Q, 2] or cell_decode=False")
        checks.check_cell(cell, coord, feat)
    else:
        cell = None
    autocast = checks.autocast_dtype(feat)
    in_dim = _in_dim(feat, feat_unfold, cell_decode)
    checks.check_layers(weights, biases, in_dim, feat, autocast=autocast is not None)
    flags = {"local_ensemble": local_ensemble, "feat_unfold": feat_unfold}

    name, fused = choose_fused(Problem("query", feat.device.type, feat.dtype, _widths(weights)), backend)
    few = latent_map is None and 4 * coord.shape[1] < feat.shape[2] * feat.shape[3]
    if name == "reference":
        out = reference.query(feat, coord, cell, weights, biases, cell_decode=cell_decode, **flags)
    elif few or not fused:  # few: folding the whole map would cost more than it saves
        out = _query_by_layers(feat, coord, cell, weights, biases, cell_decode=cell_decode, backend=name, **flags)
    else:
        operands = autocast or feat.dtype
        trained = _is_trained(feat, coord, *weights, *biases, *(() if cell is None else (cell,)))
        if latent_map is None:
            latent_map = _folded(feat, weights[0], feat_unfold, library.latent_dtype(name, operands, trained), operands)
        _check_latent_map(latent_map, feat, weights)
        geometry = library.compute_dtype(latent_map)
        out, _ = library.query(
            latent_map,
            coord.to(geometry),
            None if cell is None else cell.to(geometry),
            weights[0][:, in_dim - (4 if cell_decode else 2) :],
            list(weights[1:]),
            list(biases),
            local_ensemble,
            operands,
            trained and not recompute,
            _is_trained(coord) or (cell is not None and _is_trained(cell)),
            name,
        )
    return out.float() if autocast is not None else out.to(feat.dtype)


def render(
    feat: Tensor,
    size: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    window: Sequence[int] | None = None,
    cell: Sequence[float] | None = None,
    feat_region: Sequence[int] | None = None,
    local_ensemble: bool = True,
    feat_unfold: bool = True,
    cell_decode: bool = True,
    latent_map: Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Decode the regular grid of an image, or a window of it; coord and cell tensors never exist.

    Args:
        feat: encoder output, [B, C, H, W], or the part of it that `feat_region` names.
        size: rows and columns of the whole output image, in pixels.
        weights, biases: imnet's layers as in `query`.
        window: (top, left, height, width) of the part to decode, in output pixels; None is the whole image.
        cell: (row, col) size of a query pixel in [-1, 1] units; None is the grid's own, (2/rows, 2/columns).
        feat_region: (top, left, H, W): feat is the part of an H x W feature map that begins at latent (top, left). It
            must hold every latent that the window reaches, and one more on each side with feat_unfold. None: all of it.
        local_ensemble, feat_unfold, cell_decode: the paper's switches.
        latent_map: `fold(feat, weights[0])` where it is at hand already, [B, H, W, K].
        recompute: whether the backward computes activations again instead of keeping them; less memory, more time. The
            cpu backend always does.
        backend: a name of `backends.BACKENDS`; None lets the table choose.

    Returns:
        [B, O, height, width] in feat's dtype (float32 under autocast); equal to `query` at the grid's centres.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, a window outside the image, a feat_region too small for
        the window. RuntimeError: the named backend cannot run this.
    """
    checks.check_feat(feat)
    image = checks.check_size("size", size)
    area = checks.check_window(window, image)
    region = checks.check_region(feat_region, feat)
    if feat_region is not None:
        checks.check_reach(image, area, region, feat, 1 if feat_unfold else 0)
    if cell is not None and len(cell) != 2:
        raise ValueError(f"cell must be (row, col), two numbers in [-1, 1] units, got {tuple(cell)}")
    cells = (2 / image[0], 2 / image[1]) if cell is None else (float(cell[0]), float(cell[1]))
    autocast = checks.autocast_dtype(feat)
    in_dim = _in_dim(feat, feat_unfold, cell_decode)
    checks.check_layers(weights, biases, in_dim, feat, autocast=autocast is not None)

    name, fused = choose_fused(Problem("render", feat.device.type, feat.dtype, _widths(weights)), backend)
    if not fused:
        out = reference.render(
            feat,
            image,
            weights,
            biases,
            window=area,
            cell=cells,
            feat_region=region,
            local_ensemble=local_ensemble,
            feat_unfold=feat_unfold,
            cell_decode=cell_decode,
            decode=reference.query if name == "reference" else partial(_query_by_layers, backend=name),
        )
    else:
        operands = autocast or feat.dtype
        trained = _is_trained(feat, *weights, *biases)
        if latent_map is None:
            latent_map = _folded(feat, weights[0], feat_unfold, library.latent_dtype(name, operands, trained), operands)
        _check_latent_map(latent_map, feat, weights)
        out, _ = library.render(
            latent_map,
            weights[0][:, in_dim - (4 if cell_decode else 2) :],
            list(weights[1:]),
            list(biases),
            [*image, *area, *region],
            list(cells),
            local_ensemble,
            operands,
            trained and not recompute,
            name,
        )
    return out.float() if autocast is not None else out.to(feat.dtype)
