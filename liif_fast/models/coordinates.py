"""Pixel grids as coordinates: the centers and the sizes of pixels that tile [-1, 1], rows first.

This module shares no code with the ops. Every function follows the original's order of operations, so that float32
results agree with it to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def make_coord(
    shape: Sequence[int],
    ranges: Sequence[tuple[float, float]] | None = None,
    flatten: bool = True,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Centers of a grid of pixels: [prod(shape), len(shape)], or [*shape, len(shape)] if `flatten` is False.

    shape: pixels along each axis, (rows, cols) for an image.
    ranges: (low, high) of each axis, in coordinates; None = (-1, 1) for every axis.
    Raises ValueError if shape and ranges differ in length or a size is negative.
    Source: `make_coord` in utils.py of yinboc/liif.
    """
    if ranges is not None and len(ranges) != len(shape):
        raise ValueError(f"ranges has {len(ranges)} entries for a shape of {len(shape)} axes: give one pair per axis")
    axes = []
    for axis, size in enumerate(shape):
        low, high = (-1.0, 1.0) if ranges is None else ranges[axis]
        axes.append(_centers(size, low, high, dtype=dtype, device=device))
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return grid.view(-1, len(axes)) if flatten else grid


def make_cell(coord: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixel size (2/h, 2/w) of an image of `size` (h, w), repeated for every coordinate: [..., 2] like coord."""
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least (1, 1), not ({height}, {width})")
    return torch.ones_like(coord) * coord.new_tensor([2 / height, 2 / width])


def window_coord(
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    *,
    ranges: Sequence[tuple[float, float]] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Centers of the pixels in `window` (top, left, height, width) of an image of `size` (h, w): [height*width, 2].

    ranges: (low, high) of rows and columns that the image shows, computed in float64; None = (-1, 1).
    Without ranges equal bit for bit to the rows of `make_coord(size)` in the window; the rest is not computed.
    """
    top, left, height, width = window
    if ranges is None:
        rows, cols = (_centers(pixels, dtype=dtype, device=device) for pixels in size)
    else:
        rows, cols = (
            _centers(pixels, low, high, dtype=torch.float64, device=device).to(dtype)
            for pixels, (low, high) in zip(size, ranges, strict=True)
        )
    grid = torch.meshgrid(rows[top : top + height], cols[left : left + width], indexing="ij")
    return torch.stack(grid, dim=-1).view(-1, 2)


def to_pixel_samples(img: Tensor) -> tuple[Tensor, Tensor]:
    """(coord [H*W,2], rgb [H*W,C]) of an image [C,H,W]. Source: `to_pixel_samples` in utils.py of yinboc/liif."""
    if img.dim() != 3:
        raise ValueError(f"img must be [C,H,W], not of shape {list(img.shape)}")
    coord = make_coord(img.shape[-2:], device=img.device)
    return coord, img.reshape(img.shape[0], -1).permute(1, 0)


def _centers(
    size: int, low: float = -1.0, high: float = 1.0, *, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    if size < 0:
        raise ValueError(f"a grid cannot have {size} pixels along an axis")
    half = (high - low) / (2 * size) if size else 0.0
    return low + half + (2 * half) * torch.arange(size, device=device).to(dtype)
