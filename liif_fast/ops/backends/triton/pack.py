"""A fused decode's layers as its kernels take them, packed by one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import OUTS, pack_kernel
from .launch import DTYPES, OPTIONS, tile_width
from .problem import Decode


class Imnet(NamedTuple):
    """P is the tile width of the widest hidden layer."""

    first: Tensor  # [terms + 1, P], float32
    weights: Tensor  # [L, P, P] (out, in), for float32's backward (in, out); operands
    biases: Tensor  # [L, P], float32
    last: Tensor  # [P, 16]: the last layer's columns rounded, and what rounding left over; operands
    last_bias: Tensor  # [8], float32
    outs: int
    precision: str  # of float32 operands


def pack(
    decode: Decode, weights: Sequence[Tensor], biases: Sequence[Tensor], operands: torch.dtype, precision: str,
    *, backward: bool = False,
) -> Imnet:  # fmt: skip
    """The layers after the first one, and that one's geometry. Tensor cores read TF32 along a product's sum only."""
    transposed = backward and operands == torch.float32
    widths = (decode.width, *(weight.shape[0] for weight in weights))
    hidden, width = len(weights) - 1, tile_width(max(widths[:-1]))
    tile = min(width, 64)
    first = decode.first
    if first.shape[1] < width:
        first = F.pad(first, (0, width - first.shape[1]))
    imnet = Imnet(
        first=first,
        weights=first.new_empty(hidden, width, width, dtype=operands),
        biases=first.new_empty(hidden, width),
        last=first.new_empty(width, 2 * OUTS.value, dtype=operands),
        last_bias=first.new_empty(OUTS.value),
        outs=widths[-1],
        precision=precision,
    )
    pack_kernel[(hidden * (width // tile) ** 2 + width // tile,)](
        tuple(weight.contiguous() for weight in weights), tuple(bias.contiguous() for bias in biases),
        imnet.weights, imnet.biases, imnet.last, imnet.last_bias,
        WIDTHS=widths, TRANSPOSED=transposed, OP=DTYPES[operands], PRECISION=precision, P=width, TILE=tile, **OPTIONS,
    )  # fmt: skip
    return imnet
