"""Holes of an image: pixels without a value take that of the nearest pixel that has one."""

from __future__ import annotations

import torch
from torch import Tensor

_FAR = 1 << 62
_INDEX_BITS = 40  # of a pixel's index; the squared distance is above them


def fill_from_nearest(values: Tensor, valid: Tensor, reach: int) -> Tensor:
    """Replace every invalid value by the nearest valid one, at most `reach` rows and `reach` columns away.

    The nearest is that of the smallest Euclidean distance; of several, the uppermost, then the leftmost. Values without
    a valid one in reach become 0. So a result depends only on the values that are in reach of it.

    Args:
        values: [B, C, H, W].
        valid: bool, [B, C, H, W], or [B, 1, H, W] for all channels.
        reach: a whole number from 0 to 1000.
    """
    height, width = valid.shape[-2:]
    rows = torch.arange(height, device=valid.device).view(-1, 1)
    above = torch.where(valid, rows, -_FAR).cummax(-2).values
    below = torch.where(valid, rows, _FAR).flip(-2).cummin(-2).values.flip(-2)
    nearest = torch.where(rows - above <= below - rows, above, below)
    distance = (nearest - rows).abs()
    index = nearest * width + torch.arange(width, device=valid.device)
    # The distance in the upper bits and the index in the lower ones: the smaller key is the better pixel.
    column = torch.where(distance <= reach, (distance * distance << _INDEX_BITS) + index, _FAR)
    best = column.clone()
    for away in range(1, min(reach, width - 1) + 1):
        step = away * away << _INDEX_BITS
        if step > int(best.max()):
            break
        for here, there in ((best[..., away:], column[..., :-away]), (best[..., :-away], column[..., away:])):
            torch.minimum(here, there + step, out=here)
    found = best < _FAR
    chosen = torch.where(found, best & ((1 << _INDEX_BITS) - 1), 0).flatten(2).expand(-1, values.shape[1], -1)
    filled = torch.where(found, values.flatten(2).gather(2, chosen).view_as(values), 0)
    return torch.where(valid, values, filled)
