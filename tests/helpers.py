"""Shapes, random problems and measures of error that the tests of every backend share."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from liif_fast.ops import backends


class Case(NamedTuple):
    """One decode: feature map, number of queries, imnet and flags."""

    batch: int = 1
    channels: int = 3
    height: int = 5
    width: int = 7
    queries: int = 129
    hidden: tuple[int, ...] = (16,)
    outs: int = 3
    local_ensemble: bool = True
    feat_unfold: bool = True
    cell_decode: bool = True

    @property
    def flags(self) -> dict[str, bool]:
        return {"local_ensemble": self.local_ensemble, "feat_unfold": self.feat_unfold, "cell_decode": self.cell_decode}

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of an image: three rows per latent, so that some queries lie on latents' centers."""
        return 3 * self.height, 2 * self.width + 1

    @property
    def window(self) -> tuple[int, int, int, int]:
        """(top, left, rows, columns) in the middle of the image, with about as many pixels as there are queries."""
        cols = min(self.size[1], max(self.queries // 2, 1))
        rows = min(self.size[0], self.queries // cols)
        return (self.size[0] - rows) // 2, (self.size[1] - cols) // 2, rows, cols

    @property
    def in_dim(self) -> int:
        return self.channels * (9 if self.feat_unfold else 1) + 2 + (2 if self.cell_decode else 0)


FLAGS = [(e, u, c) for e in (True, False) for u in (True, False) for c in (True, False)]

# Each is an edge case: one query, a remainder of one, no hidden layer, widths that fill no vector, one latent.
SHAPES = {
    "plain": Case(),
    "one-query": Case(queries=1, batch=2, hidden=(16, 16)),
    "no-query": Case(queries=0, batch=2, hidden=(16, 16)),
    "batch-and-width-64": Case(batch=2, channels=64, height=6, width=4, queries=60, hidden=(32, 32)),
    "linear": Case(hidden=()),
    "paper-width": Case(channels=8, hidden=(256, 256, 256, 256), queries=20),
    "mixed-widths": Case(batch=2, channels=2, hidden=(112, 16, 48), outs=16, queries=50),
    "odd-widths": Case(channels=5, hidden=(13, 37, 1), outs=4, queries=77),
    "wider-than-a-kernel": Case(hidden=(300, 12), queries=16),
    "many-outputs": Case(batch=2, outs=37, hidden=(32, 16), queries=40),
    "one-latent": Case(height=1, width=1, hidden=(64, 64), queries=33),
    "one-row": Case(batch=2, height=1, width=9, queries=50),
    "one-column-and-deep": Case(height=9, width=1, hidden=(16,) * 7, queries=40),
}


def random_problem(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, requires_grad: bool = False):
    """feat, coord (some outside [-1, 1], some on the corners), cell, weights, biases of a case."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    feat = uniform(case.batch, case.channels, case.height, case.width)
    coord = uniform(case.batch, case.queries, 2, low=-1.1, high=1.1)
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    coord[:, : min(4, case.queries)] = corners[: min(4, case.queries)]
    cell = uniform(case.batch, case.queries, 2, low=0.01, high=0.5)
    widths = [case.in_dim, *case.hidden, case.outs]
    weights = [uniform(o, i) * (3.0 / i) ** 0.5 for i, o in itertools.pairwise(widths)]
    biases = [uniform(o) * 0.3 for o in widths[1:]]
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [feat.to(dtype), coord.to(geometry), cell.to(geometry), *(t.to(dtype) for t in weights + biases)]
    if requires_grad:
        tensors = [t.requires_grad_() for t in tensors]
    feat, coord, cell, *layers = tensors
    return feat, coord, cell, layers[: len(weights)], layers[len(weights) :]


def as_float64(tensors):
    """Copies in float64 that are leaves of their own."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def range_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error as a fraction of the expected values' range (or of 1 where they are all equal)."""
    if expected.numel() == 0:
        return 0.0
    span = (expected.max() - expected.min()).item() or 1.0
    return (actual.double() - expected.double()).abs().max().item() / span


def norm_error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm, absolute where the expected norm is 0."""
    scale = expected.double().norm().item() or 1.0
    return (actual.double() - expected.double()).norm().item() / scale


def psnr(actual: Tensor, expected: Tensor) -> float:
    """PSNR in dB of a result against the exact one; the exact one's largest value is the peak."""
    mse = (actual.double() - expected.double()).square().mean()
    return (10 * torch.log10(expected.double().abs().max() ** 2 / mse)).item()


CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))


def index_map(size: tuple[int, int]) -> Tensor:
    """[1, 2, H, W]: every latent holds its own row and column."""
    return torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij")).float()[None]


def shifted(coord: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """The coordinates at which the original samples a corner."""
    moved = coord.clone()
    for axis in (0, 1):
        moved[..., axis] += corner[axis] * (1 / size[axis]) + 1e-6
    return moved.clamp_(-1 + 1e-6, 1 - 1e-6)


def sampled(values: Tensor, coord: Tensor) -> Tensor:
    """[Q, C]: PyTorch's nearest values of a map [1, C, H, W] at coord, on the CPU."""
    moved = coord.to(values.device).flip(-1).unsqueeze(1)
    return F.grid_sample(values, moved, mode="nearest", align_corners=False)[0, :, 0].T.cpu()


def reason_against(backend: str, op: str, dtype: torch.dtype, device: str = "cpu", widths: tuple[int, ...] = ()) -> str:
    """Why a backend cannot run an op here, with an imnet of these widths; '' where it can."""
    try:
        backends.BACKENDS[backend](backends.OpRequest(op, device, dtype, widths), raise_error=True)
    except RuntimeError as error:
        return str(error)
    return ""


def run_after_torch(*scripts: str) -> list[str]:
    """What each script prints, in a process of its own that begins where torch has been imported: once for all."""
    code = """
import os, sys, torch
for script in sys.argv[1:]:
    if os.fork() == 0:
        try:
            exec(script)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(0)
    os.wait()
    print(end="\\0", flush=True)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, *scripts]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [text.strip() for text in done.stdout.split("\0")[:-1]]


_NO_CPU = reason_against("cpu", "decode", torch.float32)
needs_cpu = pytest.mark.skipif(bool(_NO_CPU), reason=_NO_CPU)
