"""Nearest latents, bit for bit: against `grid_sample` on a CPU, and on the device, where every difference is a tie.

A CUDA `grid_sample` contracts `(coord + 1) * size - 1` into one fused multiply-add, this package nowhere does: two
roundings against one. Where the position lies within a rounding of .5 they may choose different neighbours, as a CPU
and a GPU do in the original. Such places are counted here, and shown to be ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.check import Check, Context, Judge
from bench.gpu.problems import layers_from
from liif_fast import ops

SIZES = [(1, 1), (2, 3), (16, 16), (17, 23), (48, 31), (255, 64), (256, 256), (1000, 3), (540, 960), (1023, 2049)]
SCALES = [1, 1.5, 2, 2.7, 3, 3.7, 4, 5, 6, 7.3, 9, 12, 30]
_MOST = 1 << 20  # queries of one size and scale
_TIE_ULP = 2.0  # two roundings of at most one unit each, halved, and that of coord + 1
_CORNERS = ((-1, -1), (-1, 1), (1, -1), (1, 1))
_FUSED_SIZES = [(17, 23), (48, 31), (255, 64)]


def checks() -> Iterator[Check]:
    for size in SIZES:
        yield Check(f"gather's latents of {size[0]}x{size[1]}", partial(gather, size=size))
    for size in _FUSED_SIZES:
        yield Check(f"query's and render's latents of {size[0]}x{size[1]}", partial(fused, size=size))


def index_map(size: tuple[int, int], device: torch.device) -> Tensor:
    """[1, 2, H, W]: every latent holds its own row and column."""
    rows, cols = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return torch.stack([rows, cols]).float().unsqueeze(0).to(device)


def grid_coord(size: tuple[int, int], scale: float, most: int) -> Tensor:
    """Centres of all pixel rows and columns of the enlarged image, paired off; [1, Q, 2] on the CPU."""
    counts = [max(round(side * scale), 1) for side in size]
    row, col = (ops.reference.pixel_centers(count, dtype=torch.float32) for count in counts)
    queries = min(4 * max(counts), most)
    index = torch.arange(queries)
    # Every row meets many columns; which ones does not matter, as the two axes never mix.
    return torch.stack([row[index % counts[0]], col[(index * 7 + index // counts[1]) % counts[1]]], dim=-1).unsqueeze(0)


def shifted(coord: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """The coordinates at which the original samples a corner."""
    moved = coord.clone()
    for axis in (0, 1):
        moved[..., axis] += corner[axis] * (1 / size[axis]) + 1e-6
    return moved.clamp_(-1 + 1e-6, 1 - 1e-6)


def sampled(values: Tensor, moved: Tensor) -> Tensor:
    """[Q, 2]: PyTorch's nearest latents."""
    return F.grid_sample(values, moved.flip(-1).unsqueeze(1), mode="nearest", align_corners=False)[0, :, 0].T


def distance_to_tie(moved: Tensor, size: tuple[int, int]) -> Tensor:
    """How far a position lies from .5, in units in the last place of the size; [Q, 2], in float64."""
    sizes = torch.tensor(size, dtype=torch.float64)
    position = ((moved[0].double() + 1) * sizes - 1) / 2
    ulp = 2.0 ** (torch.floor(torch.log2(sizes)) - 23)
    return (position - torch.floor(position) - 0.5).abs() / ulp


def gather(context: Context, judge: Judge, size: tuple[int, int]) -> None:
    """All scales of one size: exactly a CPU's indices; on the device differences at ties only, which are counted."""
    most = 2000 if context.small else _MOST
    on_cpu, on_device = index_map(size, torch.device("cpu")), index_map(size, context.device)
    looked_at, ties = 0, 0
    for scale in SCALES:
        coord = grid_coord(size, scale, most)
        x, _ = ops.gather(on_device, coord.to(context.device), feat_unfold=False, backend=context.backend)
        found = x[0, :, :, :2].cpu()
        for corner, sides in enumerate(_CORNERS):
            moved = shifted(coord, size, sides)
            judge.at_most(
                "differences from grid_sample on a CPU", int((found[:, corner] != sampled(on_cpu, moved)).sum()), 0
            )
            there = sampled(on_device, moved.to(context.device)).cpu()
            differs = found[:, corner] != there
            distance = distance_to_tie(moved, size)[differs]
            looked_at, ties = looked_at + differs.numel(), ties + int(differs.sum())
            judge.at_most(
                "differences from grid_sample on the device: units in the last place from a tie",
                float(distance.max()) if distance.numel() else 0.0,
                _TIE_ULP,
            )
            off = (found[:, corner] - there)[differs].abs()
            judge.at_most("and latents apart", float(off.max()) if off.numel() else 0.0, 1.0)
    judge.note(f"{ties} of {looked_at} indices differ from the device's own grid_sample, at ties")


def fused(context: Context, judge: Judge, size: tuple[int, int]) -> None:
    """The fused decodes choose the same latents: an imnet that hands row and column through."""
    feat = index_map(size, context.device)
    weights, biases = layers_from([2 + 4, 16, 2], torch.float32, context.device)
    for axis in (0, 1):
        weights[0][axis, axis] = weights[1][axis, axis] = 1.0
    arguments = {"local_ensemble": False, "feat_unfold": False, "backend": context.backend}
    with torch.no_grad():
        latent_map = ops.fold(feat.double(), weights[0].double(), feat_unfold=False).float()  # exact
        for scale in SCALES:
            if math.prod(size) * scale**2 > (40_000 if context.small else 4_000_000):
                continue
            out_size = tuple(max(round(side * scale), 1) for side in size)
            coord = ops.reference.window_coord(out_size, (0, 0, *out_size), dtype=torch.float32, device="cpu")[None]
            expected = sampled(feat.cpu(), coord.clamp(-1 + 1e-6, 1 - 1e-6))
            cell = torch.full_like(coord, 0.01)
            found = ops.query(
                feat,
                coord.to(context.device),
                cell.to(context.device),
                weights,
                biases,
                latent_map=latent_map,
                **arguments,
            )[0].cpu()
            image = ops.render(feat, out_size, weights, biases, latent_map=latent_map, **arguments)
            rendered = image[0].flatten(1).T.cpu()
            judge.at_most("query: differences from a CPU", int((found.round() != expected).sum()), 0)
            judge.at_most("render: differences from a CPU", int((rendered.round() != expected).sum()), 0)
            judge.at_most("query: the handed through values' error", float((found - expected).abs().max()), 0.25)
