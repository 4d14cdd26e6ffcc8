"""Maps with a border of zeros as rows of pixels: a pixel's neighbors are always the same number of rows away."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bordered(
    values: Tensor, border: int, dtype: torch.dtype, *, around: int = 0, step: int = 1, rows: int = 1
) -> Tensor:
    """[B, C, H, W] -> [around + pixels + around, channels] of `dtype`, zero outside of the maps.

    Args:
        border: pixels on each side of a map.
        around: rows of zeros before the first pixel and after the last one.
        step, rows: channels and pixels are padded to multiples of these.
    """
    batch, channels, height, width = values.shape
    frame = (batch, height + 2 * border, width + 2 * border)
    pixels = math.prod(frame)
    out = values.new_zeros((2 * around - (-pixels // rows) * rows, -(-channels // step) * step), dtype=dtype)
    maps = out[around : around + pixels].view(*frame, out.shape[1])
    maps[:, border : border + height, border : border + width, :channels] = values.permute(0, 2, 3, 1)
    return out
