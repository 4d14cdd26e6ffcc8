"""Random decoding problems of the paper's size, and the work they ask for."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from liif_fast.benchmark import original

CHANNELS = 64  # of EDSR-baseline's features
HIDDEN = (256, 256, 256, 256)
OUTS = 3


class Problem(NamedTuple):
    """What a decoder gets. feat [B,C,H,W]; coord, cell [B,Q,2]; weights [out,in] and biases [out] of each layer."""

    feat: Tensor
    coord: Tensor
    cell: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    def to(self, dtype: torch.dtype) -> Problem:
        """Features and layers in `dtype`; coordinates never below float32."""
        geometry = torch.float64 if dtype == torch.float64 else torch.float32
        return Problem(
            self.feat.to(dtype),
            self.coord.to(geometry),
            self.cell.to(geometry),
            [weight.to(dtype) for weight in self.weights],
            [bias.to(dtype) for bias in self.biases],
        )

    def leaves(self) -> list[Tensor]:
        """What a training step differentiates."""
        return [self.feat, *self.weights, *self.biases]


def random_problem(
    map_size: tuple[int, int],
    *,
    out_size: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
    queries: int = 0,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> Problem:
    """Random features and layers (He et al.'s uniform range, so that signals keep their size), the same every time.

    Args:
        map_size: rows, columns of the feature map.
        out_size: rows, columns of the image whose pixels are the queries; None: `queries` random ones a map.
        window: (top, left, height, width) of that image's part; None is all of it.
        queries: see out_size.
        batch: number of maps.
        device: where the tensors are made; its type decides which random numbers.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device) * 2 - 1

    feat = torch.randn(batch, CHANNELS, *map_size, generator=generator, device=device)
    widths = layer_widths()
    weights = [uniform(o, i) * math.sqrt(6 / i) for i, o in itertools.pairwise(widths)]
    biases = [uniform(o) * 0.05 for o in widths[1:]]
    if out_size is None:
        coord = uniform(batch, queries, 2)
        return Problem(feat, coord, torch.full_like(coord, 0.01), weights, biases)
    top, left, rows, cols = window or (0, 0, *out_size)
    grid = original.make_coord(*out_size, feat)[top : top + rows, left : left + cols]
    coord = grid.reshape(1, -1, 2).expand(batch, -1, 2).contiguous()
    return Problem(feat, coord, original.make_cell(*out_size, coord), weights, biases)


def layer_widths() -> list[int]:
    """580, 256, 256, 256, 256, 3: the imnet behind EDSR-baseline with unfolding and cells."""
    return [CHANNELS * 9 + 4, *HIDDEN, OUTS]


def original_flop(queries: int) -> float:
    """Floating point operations of the original formulation's imnet: every layer for every query and corner."""
    return 2.0 * 4 * queries * _products(layer_widths())


def folded_flop(queries: int, latents: int) -> float:
    """Of the folded formulation: a 3x3 convolution a latent; geometry terms and later layers a query and corner."""
    per_row = 4 * HIDDEN[0] + _products([*HIDDEN, OUTS])
    return 2.0 * (4 * queries * per_row + latents * 9 * CHANNELS * HIDDEN[0])


def _products(widths: list[int]) -> int:
    return sum(i * o for i, o in itertools.pairwise(widths))
