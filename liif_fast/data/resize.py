"""Pillow's antialiased 8-bit bicubic in tensor operations, for a batch of squares of different sizes.

The same steps in the same arithmetic: weights in double precision, rounded to 22 bits behind the point; columns first,
rounded and clipped to 0..255, then rows. Whole numbers of that size are exact in float64, so the result is Pillow's.
Source: Pillow, src/libImaging/Resample.c (described, not copied).
"""

from __future__ import annotations

import torch
from torch import Tensor

_REACH = 2.0  # of the bicubic kernel, in pixels of the coarser grid
_SHARPNESS = -0.5  # Pillow's (Keys') parameter
_ONE = float(1 << 22)  # Pillow's fixed-point 1


def resize_weights(sides: Tensor, out_side: int, width: int) -> Tensor:
    """Weights that resize lines of different lengths to the same one: float64 [B, out_side, width], whole numbers.

    sides: [B] pixels of each line; out_side: pixels of the results; width: at least the longest side, the weights
    behind a line's end are 0. Every row of weights sums to about 2^22.
    """
    ratio = (sides.double() / out_side).view(-1, 1, 1)
    stretch = ratio.clamp(min=1.0)
    out = torch.arange(out_side, dtype=torch.float64, device=sides.device).view(1, -1, 1)
    pixel = torch.arange(width, dtype=torch.float64, device=sides.device)
    center = (out + 0.5) * ratio
    first = (center - _REACH * stretch + 0.5).floor().clamp(min=0.0)
    end = torch.minimum((center + _REACH * stretch + 0.5).floor(), sides.double().view(-1, 1, 1))
    weights = _bicubic((pixel - center + 0.5) * (1.0 / stretch))
    weights = torch.where((pixel >= first) & (pixel < end), weights, 0.0)
    weights = weights / weights.sum(dim=2, keepdim=True)
    # Rounded half away from zero.
    return (weights.abs() * _ONE + 0.5).floor() * weights.sign()


def _bicubic(x: Tensor) -> Tensor:
    """Keys' kernel; 0 from a distance of 2 on."""
    x = x.abs()
    near = ((_SHARPNESS + 2.0) * x - (_SHARPNESS + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _SHARPNESS
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def resize_squares(squares: Tensor, sides: Tensor, out_side: int) -> Tensor:
    """Resize squares as Pillow resizes 8-bit images: float64 [B, C, out_side, out_side], whole numbers 0..255.

    squares: [B, C, S, S] of whole numbers 0..255 in any dtype; of square b only the first sides[b] rows and columns
    count. sides: [B].
    """
    batch, colours, side, _ = squares.shape
    weights = resize_weights(sides, out_side, side)
    rows = squares.double().reshape(batch, colours * side, side)
    columns_done = _to_bytes(torch.bmm(rows, weights.transpose(1, 2))).view(batch, colours, side, out_side)
    return _to_bytes(weights.unsqueeze(1) @ columns_done)


def _to_bytes(sums: Tensor) -> Tensor:
    return ((sums + _ONE / 2) / _ONE).floor().clamp(0, 255)
