"""`query` and `render`: the whole decode, at given coordinates or on a regular grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import first_use, reference, registration
from .backends import OpRequest, calls, choose
from .dtypes import autocast_dtype, geometry_dtype, needs_grad
from .ensemble import ensemble_on
from .fold import fold, fold_for
from .gather import gather_on
from .inputs import DecodeInputs
from .validation import (
    check_cell,
    check_feat,
    check_latent_map,
    check_layers,
    check_points,
    check_reach,
    check_region,
    check_size,
    check_window,
    in_dim,
)


class _Imnet(NamedTuple):
    """The imnet of a decode and the paper's switches, validated."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    local_ensemble: bool
    feat_unfold: bool
    cell_decode: bool
    matmul_dtype: torch.dtype  # autocast's, otherwise feat's
    out_dtype: torch.dtype  # float32 under autocast, otherwise feat's

    @property
    def switches(self) -> tuple[bool, bool, bool]:
        return self.local_ensemble, self.feat_unfold, self.cell_decode

    @property
    def flags(self) -> dict[str, bool]:
        return dict(zip(("local_ensemble", "feat_unfold", "cell_decode"), self.switches))


def _checked_imnet(
    feat: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    latent_map: Tensor | None,
    switches: tuple[bool, bool, bool],  # local_ensemble, feat_unfold, cell_decode
) -> _Imnet:
    autocast = autocast_dtype(feat)
    check_layers(weights, biases, in_dim(feat, *switches[1:]), feat, autocast=autocast is not None)
    if latent_map is not None:
        check_latent_map(latent_map, feat, weights)
    matmul_dtype, out_dtype = (feat.dtype, feat.dtype) if autocast is None else (autocast, torch.float32)
    return _Imnet(weights, biases, *switches, matmul_dtype, out_dtype)


def _choose(
    feat: Tensor, imnet: _Imnet, others: Sequence[Tensor | None], recompute: bool, backend: str | None, queries: int
) -> str:
    """As `choose`, for a decode with these arguments; checks a GPU's kernels at their first use.

    others: latent_map, and coord and cell if they are tensors.
    """
    widths = tuple(weight.shape[0] for weight in imnet.weights)
    layer_grads = needs_grad(feat, *imnet.weights, *imnet.biases)
    point_grads = needs_grad(*others[1:])
    request = OpRequest.on(feat, "decode", widths, [*others, *imnet.weights, *imnet.biases])
    request = request._replace(matmul_dtype=imnet.matmul_dtype, trains=layer_grads or point_grads, queries=queries)
    kernels = first_use.Combination(
        "",
        request.device,
        request.device_index,
        feat.dtype,
        imnet.matmul_dtype,
        imnet.switches,
        layer_grads,
        point_grads,
        recompute,
        widths,
    )

    def against(name: str, _: OpRequest) -> str:
        return first_use.against(kernels._replace(backend=name), first_use.Decoders(query, render))

    return choose(request, backend, against)


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
    feat: Tensor,
    imnet: _Imnet,
    latent_map: Tensor | None,
    points: tuple[Tensor | None, Tensor | None],
    grid: tuple[list[int], list[float]],
    keep: bool,
    backend: str,
) -> Tensor:
    """The registered op: either points are (coord, cell) and grid is empty, or the reverse.

    keep: whether the forward keeps activations for its backward.
    """
    weights, biases = imnet.weights, imnet.biases
    recorded = needs_grad(feat, *points, *weights, *biases)
    if latent_map is None:
        latent_map = fold_for(feat, weights[0], imnet.feat_unfold, imnet.matmul_dtype, recorded)
    dtype = geometry_dtype(latent_map)
    coord, cell = (None if tensor is None else tensor.to(dtype) for tensor in points)
    inputs = DecodeInputs(
        latent_map,
        coord,
        cell,
        weights[0][:, -(4 if imnet.cell_decode else 2) :],
        list(weights[1:]),
        list(biases),
        *grid,
        imnet.local_ensemble,
        imnet.matmul_dtype,
    )
    if backend == "torch":
        return calls.decode(inputs)
    return registration.decode(*inputs, keep if recorded else None, needs_grad(*points), backend)[0]


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
    imnet = _checked_imnet(feat, weights, biases, latent_map, (local_ensemble, feat_unfold, cell_decode))

    queries = coord.shape[0] * coord.shape[1]
    name = _choose(feat, imnet, (latent_map, coord, cell), recompute, backend, queries)
    if name == "reference":
        out = reference.query(feat, coord, cell, weights, biases, **imnet.flags)
    elif latent_map is None and _gather_is_cheaper(feat, coord):
        out = _query_by_layers(feat, coord, cell, weights, biases, backend=name, **imnet.flags)
    else:
        out = _decode(feat, imnet, latent_map, (coord, cell), ([], []), not recompute, name)
    return out.to(imnet.out_dtype)


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
    """Decode the regular grid of an image, or a window of it, without tensors of coordinates and cells.

    Args:
        feat: encoder output, [B, C, H, W], or the part of it that `feat_region` names.
        size: rows and columns of the whole output image, in pixels.
        weights, biases: imnet's layers as in `query`.
        window: (top, left, height, width) of the part to decode, in output pixels; None is the whole image.
        cell: (row, col) size of a query pixel in [-1, 1] units; None is the grid's own, (2/rows, 2/columns).
        feat_region: (top, left, H, W): feat is the part of an H x W feature map that begins at latent (top, left). It
            must hold every latent that the window reaches, and one more on each side with feat_unfold. None: all of it.
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
    image = check_size("size", size)
    area = check_window(window, image)
    region = check_region(feat_region, feat)
    if feat_region is not None:
        check_reach(image, area, region, feat, 1 if feat_unfold else 0)
    if cell is not None and len(cell) != 2:
        raise ValueError(f"cell must be (row, col), two numbers in [-1, 1] units, got {tuple(cell)}")
    cells = (2 / image[0], 2 / image[1]) if cell is None else (float(cell[0]), float(cell[1]))
    imnet = _checked_imnet(feat, weights, biases, latent_map, (local_ensemble, feat_unfold, cell_decode))

    name = _choose(feat, imnet, (latent_map,), recompute, backend, feat.shape[0] * area[2] * area[3])
    if name == "reference":
        place: dict[str, Any] = {"window": area, "cell": cells, "feat_region": region, **imnet.flags}
        out = reference.render(feat, image, weights, biases, **place)
    else:
        grid = ([*image, *area, *region], list(cells))
        out = _decode(feat, imnet, latent_map, (None, None), grid, not recompute, name)
    return out.to(imnet.out_dtype)


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
