"""Random decodes of the paper's size, and the number of operations they need."""

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


class DecodeProblem(NamedTuple):
    """A decoder's inputs. feat [B,C,H,W]; coord, cell [B,Q,2]; weights [out,in] and biases [out] of each layer."""

    feat: Tensor
    coord: Tensor
    cell: Tensor
    weights: list[Tensor]
    biases: list[Tensor]

    def to(self, dtype: torch.dtype) -> DecodeProblem:
        """Features and layers in `dtype`; coordinates never below float32."""
        geometry = torch.float64 if dtype == torch.float64 else torch.float32
        return DecodeProblem(
            self.feat.to(dtype),
            self.coord.to(geometry),
            self.cell.to(geometry),
            [weight.to(dtype) for weight in self.weights],
            [bias.to(dtype) for bias in self.biases],
        )

    def leaves(self) -> list[Tensor]:
        """The tensors that a training step differentiates."""
        return [self.feat, *self.weights, *self.biases]

    def with_gradients(self) -> DecodeProblem:
        """The same values, with copies of the leaves that require gradients."""
        leaves = [leaf.detach().clone().requires_grad_() for leaf in self.leaves()]
        layers = len(self.weights)
        return self._replace(feat=leaves[0], weights=leaves[1 : 1 + layers], biases=leaves[1 + layers :])


def random_problem(
    map_size: tuple[int, int],
    *,
    out_size: tuple[int, int] | None = None,
    window: tuple[int, int, int, int] | None = None,
    queries: int = 0,
    batch: int = 1,
    device: torch.device | str = "cpu",
    hidden: tuple[int, ...] = HIDDEN,
) -> DecodeProblem:
    """Random features and layers (in He et al.'s uniform range, which preserves the signals' size), always the same.

    Args:
        map_size: rows, columns of the feature map.
        out_size: rows, columns of the image whose pixels are the queries; None: `queries` random ones per map.
        window: (top, left, height, width) of the part of that image to decode; None is the whole image.
        queries: number of random queries per map, used without out_size.
        batch: number of maps.
        device: device of the tensors; the random numbers depend on its type.
        hidden: widths of the imnet's hidden layers.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device) * 2 - 1

    feat = torch.randn(batch, CHANNELS, *map_size, generator=generator, device=device)
    widths = layer_widths(hidden)
    weights = [uniform(o, i) * math.sqrt(6 / i) for i, o in itertools.pairwise(widths)]
    biases = [uniform(o) * 0.05 for o in widths[1:]]
    if out_size is None:
        coord = uniform(batch, queries, 2)
        return DecodeProblem(feat, coord, torch.full_like(coord, 0.01), weights, biases)
    top, left, rows, cols = window or (0, 0, *out_size)
    grid = original.make_coord(*out_size, feat)[top : top + rows, left : left + cols]
    coord = grid.reshape(1, -1, 2).expand(batch, -1, 2).contiguous()
    return DecodeProblem(feat, coord, original.make_cell(*out_size, coord), weights, biases)


def layer_widths(hidden: tuple[int, ...] = HIDDEN) -> list[int]:
    """580, 256, 256, 256, 256, 3: the imnet after EDSR-baseline with unfolding and cells."""
    return [CHANNELS * 9 + 4, *hidden, OUTS]


def original_flop(queries: int) -> float:
    """Floating-point operations of the original formulation's imnet: every layer for every query and corner."""
    return 2.0 * 4 * queries * _products(layer_widths())


def folded_flop(queries: int, latents: int) -> float:
    """Floating-point operations of the folded formulation.

    A 3x3 convolution per latent, the geometry terms and the later layers per query and corner.
    """
    per_row = 4 * HIDDEN[0] + _products([*HIDDEN, OUTS])
    return 2.0 * (4 * queries * per_row + latents * 9 * CHANNELS * HIDDEN[0])


def _products(widths: list[int]) -> int:
    return sum(i * o for i, o in itertools.pairwise(widths))
