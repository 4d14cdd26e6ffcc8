"""Validation of the public functions' inputs: each rule once, each error one sentence with the offending value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_feat(feat: Tensor) -> None:
    if feat.dim() != 4:
        raise ValueError(f"feat must be [B, C, H, W], got shape {tuple(feat.shape)}")
    if not feat.is_floating_point():
        raise TypeError(f"feat must be a floating point tensor, got {feat.dtype}: convert it, e.g. feat.float()")
    if feat.shape[1] == 0 or feat.shape[2] == 0 or feat.shape[3] == 0:
        raise ValueError(f"feat must have at least one channel, row and column, got shape {tuple(feat.shape)}")


def check_points(name: str, points: Tensor, feat: Tensor) -> None:
    """coord or cell: [B, Q, 2], floating point, on feat's device."""
    if points.dim() != 3 or points.shape[-1] != 2:
        raise ValueError(f"{name} must be [B, Q, 2] with (row, col) last, got shape {tuple(points.shape)}")
    if not points.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor in [-1, 1] units, got {points.dtype}")
    if points.shape[0] != feat.shape[0]:
        raise ValueError(f"{name} has batch {points.shape[0]} but feat has batch {feat.shape[0]}: expand one of them")
    if points.device != feat.device:
        raise ValueError(f"{name} is on {points.device} but feat is on {feat.device}: move it there")


def check_cell(cell: Tensor, coord: Tensor, feat: Tensor) -> None:
    check_points("cell", cell, feat)
    if cell.shape != coord.shape:
        raise ValueError(f"cell must have coord's shape {tuple(coord.shape)}, got {tuple(cell.shape)}")


def check_layers(
    weights: Sequence[Tensor], biases: Sequence[Tensor], in_dim: int, feat: Tensor, *, autocast: bool
) -> None:
    """imnet's layers: they chain, begin at in_dim, and share feat's device and (without autocast) dtype."""
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"imnet needs as many biases as weights and at least one, got {len(weights)} and {len(biases)}"
        )
    width = in_dim
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"weights[{layer}] must be [out, {width}], got {tuple(weight.shape)}: "
                "check feat's channels and the flags feat_unfold, cell_decode"
            )
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"biases[{layer}] must be [{weight.shape[0]}], got {tuple(bias.shape)}")
        width = weight.shape[0]
        for name, tensor in (("weights", weight), ("biases", bias)):
            if tensor.device != feat.device:
                raise ValueError(f"{name}[{layer}] is on {tensor.device} but feat is on {feat.device}: move it there")
            if not autocast and tensor.dtype != feat.dtype:
                raise TypeError(
                    f"{name}[{layer}] is {tensor.dtype} but feat is {feat.dtype}: use one dtype or autocast"
                )


def check_general(
    latent_map: Tensor, weight_geometry: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, autocast: bool
) -> None:
    """The latent map and the layers of `decode`."""
    if latent_map.dim() != 4 or 0 in latent_map.shape[1:]:
        raise ValueError(f"latent_map must be [B, H, W, K] with latents, got shape {tuple(latent_map.shape)}")
    if not latent_map.is_floating_point():
        raise TypeError(f"latent_map must be a floating point tensor, got {latent_map.dtype}")
    width = latent_map.shape[3]
    if weight_geometry.dim() != 2 or weight_geometry.shape[0] != width or weight_geometry.shape[1] not in (2, 4):
        raise ValueError(f"weight_geometry must be [{width}, 2] or [{width}, 4], got {tuple(weight_geometry.shape)}")
    if len(biases) != len(weights) + 1:
        raise ValueError(f"decode needs a bias for each of its 1 + {len(weights)} layers, got {len(biases)}")
    layers = zip([weight_geometry, *weights], biases, strict=True)
    for layer, (weight, bias) in enumerate(layers):
        name = f"weights[{layer - 1}]" if layer else "weight_geometry"
        if layer and (weight.dim() != 2 or weight.shape[1] != width):
            raise ValueError(f"{name} must be [out, {width}], got {tuple(weight.shape)}")
        width = weight.shape[0]
        if bias.shape != (width,):
            raise ValueError(f"biases[{layer}] must be [{width}], got {tuple(bias.shape)}")
        for tensor, called in ((weight, name), (bias, f"biases[{layer}]")):
            if tensor.device != latent_map.device:
                raise ValueError(f"{called} is on {tensor.device} but latent_map is on {latent_map.device}: move it")
            if not autocast and tensor.dtype != biases[0].dtype:
                raise TypeError(f"{called} is {tensor.dtype} but biases[0] is {biases[0].dtype}: use one dtype")
    narrow = biases[0].dtype.itemsize == 2
    if not autocast and latent_map.dtype != biases[0].dtype and not (narrow and latent_map.dtype == torch.float32):
        raise TypeError(f"latent_map is {latent_map.dtype} but the layers are {biases[0].dtype}: use one dtype")


def check_query_term(query_term: Tensor, shape: Sequence[int], latent_map: Tensor) -> None:
    if tuple(query_term.shape) != tuple(shape) or query_term.device != latent_map.device:
        raise ValueError(
            f"query_term must be {tuple(shape)} on {latent_map.device}, got {tuple(query_term.shape)} on "
            f"{query_term.device}"
        )
    if not query_term.is_floating_point():
        raise TypeError(f"query_term must be a floating point tensor, got {query_term.dtype}")


def check_source(source: Sequence[float] | None) -> tuple[float, float, float, float] | None:
    """source (top, left, height, width), in latents; any place, but not empty."""
    if source is None:
        return None
    if len(source) != 4 or not all(map(math.isfinite, source)) or min(source[2:]) <= 0:
        raise ValueError(
            f"source must be (top, left, height, width) in input pixels with a positive height and width, got "
            f"{tuple(source)}"
        )
    top, left, height, width = map(float, source)
    return top, left, height, width


def in_dim(feat: Tensor, feat_unfold: bool, with_cell: bool) -> int:
    """Inputs of an imnet: the latent (with its eight neighbors), rel_coord and rel_cell."""
    return feat.shape[1] * (9 if feat_unfold else 1) + 2 + (2 if with_cell else 0)


def check_latent_map(latent_map: Tensor, feat: Tensor, weights: Sequence[Tensor]) -> None:
    shape = (feat.shape[0], feat.shape[2], feat.shape[3], weights[0].shape[0])
    if tuple(latent_map.shape) != shape or latent_map.device != feat.device:
        raise ValueError(
            f"latent_map must be {shape} on {feat.device}, got {tuple(latent_map.shape)} on {latent_map.device}: "
            "make it by fold(feat, weights[0])"
        )


def check_size(name: str, size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2:
        raise ValueError(f"{name} must be (rows, columns), got {tuple(size)}")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"{name} must be at least 1x1, got {height}x{width}")
    return height, width


def check_window(window: Sequence[int] | None, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """window (top, left, height, width) inside an image of `size`; None is the whole image."""
    if window is None:
        return 0, 0, size[0], size[1]
    if len(window) != 4:
        raise ValueError(f"window must be (top, left, height, width), got {tuple(window)}")
    top, left, height, width = window
    if min(top, left, height, width) < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"window {tuple(window)} (top, left, height, width) exceeds the {size[0]}x{size[1]} image")
    return top, left, height, width


def check_region(region: Sequence[int] | None, feat: Tensor) -> tuple[int, int, int, int]:
    """feat_region (top, left, H, W): feat fits into an H x W map at (top, left); None is feat itself."""
    if region is None:
        return 0, 0, feat.shape[2], feat.shape[3]
    if len(region) != 4:
        raise ValueError(f"feat_region must be (top, left, H, W), got {tuple(region)}")
    top, left, height, width = region
    if top < 0 or left < 0 or top + feat.shape[2] > height or left + feat.shape[3] > width:
        raise ValueError(
            f"feat_region {tuple(region)} (top, left, H, W) does not hold feat of {feat.shape[2]}x{feat.shape[3]}"
        )
    return top, left, height, width


def latent_range(
    first: int, count: int, pixels: int, latents: int, reach: int, shown: tuple[float, float] | None = None
) -> tuple[int, int]:
    """First and last latent that `count` pixels from `first` touch along an axis, widened by `reach` latents.

    The center of pixel p is at (p + 0.5) * latents / pixels - 0.5, in latents, and the pixel reads the latents on both
    sides of it. The margin covers centers that coincide: there the shift of 1e-6 and the rounding of float32 decide.
    shown: (first, number) of the latents that all pixels show, which need not be whole; None: all of them.
    """
    margin = 0.01
    start, extent = shown or (0, latents)
    low = start + (first + 0.5) * extent / pixels - 0.5 - margin
    high = start + (first + count - 0.5) * extent / pixels - 0.5 + margin
    last = latents - 1
    return min(max(math.floor(low) - reach, 0), last), max(min(math.floor(high) + 1 + reach, last), 0)


def check_reach(
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    region: tuple[int, int, int, int],
    feat: Tensor,
    reach: int,
    source: tuple[float, float, float, float] | None = None,
) -> None:
    """Every latent the window needs lies in feat."""
    if window[2] == 0 or window[3] == 0:
        return
    for axis, name in enumerate(("rows", "columns")):
        shown = None if source is None else (source[axis], source[2 + axis])
        low, high = latent_range(window[axis], window[2 + axis], size[axis], region[2 + axis], reach, shown)
        first, last = region[axis], region[axis] + feat.shape[2 + axis] - 1
        if low < first or high > last:
            raise ValueError(
                f"the window needs feature {name} {low} to {high}, but feat holds {first} to {last}: widen feat or "
                "shrink the window"
            )
