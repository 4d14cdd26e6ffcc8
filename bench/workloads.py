"""The named workloads, the random tensors they run on and the work they ask for."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench import original

CHANNELS = 64  # of EDSR-baseline's features
HIDDEN = (256, 256, 256, 256)
OUTS = 3


@dataclass(frozen=True)
class Workload:
    """kind: decode | train | gather | ensemble | encoder | upscale | memory, which decides the methods.

    map_size: rows, columns of the feature map (of the image for encoder and upscale).
    out_size: rows, columns of the whole output; None where queries lie at random.
    window: (top, left, height, width) of the part of the output that is decoded; None is all of it.
    queries: number of random queries a map where out_size is None.
    quick: also part of `--quick`.
    """

    name: str
    kind: str
    about: str
    map_size: tuple[int, int]
    out_size: tuple[int, int] | None = None
    window: tuple[int, int, int, int] | None = None
    batch: int = 1
    queries: int = 0
    rounds: int = 5
    quick: bool = False

    @property
    def total_queries(self) -> int:
        """Output pixels or random queries, all maps together."""
        if self.window:
            return self.batch * self.window[2] * self.window[3]
        return self.batch * (math.prod(self.out_size) if self.out_size else self.queries)


def _scale(name: str, out: int, window: int | None = None) -> Workload:
    part = "" if window is None else f", its middle {window}x{window}"
    middle = None if window is None else ((out - window) // 2, (out - window) // 2, window, window)
    about = f"decoder, 96x96 to {out}x{out}{part}"
    return Workload(f"scale-{name}", "decode", about, (96, 96), (out, out), middle, rounds=3)


_ALL = [
    Workload("decode-64-to-256", "decode", "decoder, 64x64 to 256x256", (64, 64), (256, 256), rounds=10, quick=True),
    Workload(
        "training-step",
        "train",
        "decoder forward and backward, 16 maps of 48x48, 2304 queries each",
        (48, 48),
        batch=16,
        queries=2304,
        rounds=6,
        quick=True,
    ),
    Workload("memory-512-to-2048", "memory", "decoder, 512x512 to 2048x2048", (512, 512), (2048, 2048), quick=True),
    Workload("gather", "gather", "imnet inputs of 16384 queries on a 64x64 map", (64, 64), queries=16384, rounds=10),
    Workload("ensemble", "ensemble", "blend of 262144 queries, 3 values", (64, 64), queries=262144, rounds=10),
    # The crop is fixed; beyond x4 only a window of the output is decoded, as the work a pixel stays the same.
    _scale("x2", 192),
    _scale("x3.7", 355),
    _scale("x8", 768, 256),
    _scale("x30", 2880, 256),
    Workload("encoder", "encoder", "EDSR-baseline on a 96x96 image", (96, 96), rounds=5),
    Workload("upscale-photo", "upscale", "a 96x96 photo to 384x384, whole LIIF-EDSR-baseline", (96, 96), (384, 384)),
]
WORKLOADS = {workload.name: workload for workload in _ALL}


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


def make_problem(workload: Workload) -> Problem:
    """Random features and layers (He et al.'s uniform range, so that signals keep their size), the same every time."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    feat = torch.randn(workload.batch, CHANNELS, *workload.map_size, generator=generator)
    widths = layer_widths()
    weights = [uniform(o, i) * math.sqrt(6 / i) for i, o in itertools.pairwise(widths)]
    biases = [uniform(o) * 0.05 for o in widths[1:]]
    if workload.out_size is None:
        coord = uniform(workload.batch, workload.queries, 2)
        cell = torch.full_like(coord, 0.01)
        return Problem(feat, coord, cell, weights, biases)
    height, width = workload.out_size
    top, left, rows, cols = workload.window or (0, 0, height, width)
    grid = original.make_coord(height, width, feat)[top : top + rows, left : left + cols]
    coord = grid.reshape(1, -1, 2).expand(workload.batch, -1, 2).contiguous()
    cell = torch.ones_like(coord) * coord.new_tensor([2 / height, 2 / width])
    return Problem(feat, coord, cell, weights, biases)


def layer_widths() -> list[int]:
    """580, 256, 256, 256, 256, 3: the imnet behind EDSR-baseline with unfolding and cells."""
    return [CHANNELS * 9 + 4, *HIDDEN, OUTS]


def original_flop(workload: Workload) -> float:
    """Floating point operations of the original formulation's imnet: every layer for every query and corner."""
    return 2.0 * 4 * workload.total_queries * _products(layer_widths()) * _passes(workload)


def folded_flop(workload: Workload) -> float:
    """Of the folded formulation: a 3x3 convolution a latent; geometry terms and later layers a query and corner."""
    rows = 4 * workload.total_queries
    latents = workload.batch * math.prod(workload.map_size)
    per_row = 4 * HIDDEN[0] + _products([*HIDDEN, OUTS])
    return 2.0 * (rows * per_row + latents * 9 * CHANNELS * HIDDEN[0]) * _passes(workload)


def _products(widths: list[int]) -> int:
    return sum(i * o for i, o in itertools.pairwise(widths))


def _passes(workload: Workload) -> int:
    # Backward multiplies twice for every product of the forward. What a method recomputes is not counted.
    return 3 if workload.kind == "train" else 1
