"""Nearest latents, exactly: equal to `grid_sample` on a CPU, and on the device equal except at ties.

CUDA's `grid_sample` contracts `(coord + 1) * size - 1` into one fused multiply-add and rounds once; the ops and the CPU
round twice. Where a position lies within a rounding of .5 the two may choose different neighbors, as the original does
on a CPU and on a GPU. The tests count these places and show that they are ties.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from liif_fast import ops
from tests.helpers import CORNERS, index_map, sampled, shifted

SIZES = [(1, 1), (2, 3), (16, 16), (17, 23), (48, 31), (255, 64), (256, 256), (1000, 3), (540, 960), (1023, 2049)]
SCALES = [1, 1.5, 2, 2.7, 3, 3.7, 4, 5, 6, 7.3, 9, 12, 30]
MAX_QUERIES = 1 << 20  # for one size and scale
MAX_PIXELS = 4_000_000
TIE_ULP = 2.0  # two roundings of at most one unit each, halved, and the rounding of coord + 1


def grid_coord(size: tuple[int, int], scale: float) -> Tensor:
    """Centers of all pixel rows and columns of the enlarged image, in pairs; [1, Q, 2] on the CPU."""
    counts = [max(round(side * scale), 1) for side in size]
    row, col = (ops.reference.pixel_centers(count, dtype=torch.float32) for count in counts)
    index = torch.arange(min(4 * max(counts), MAX_QUERIES))
    # Every row meets many columns. The pairs do not matter: the two axes never mix.
    return torch.stack([row[index % counts[0]], col[(index * 7 + index // counts[1]) % counts[1]]], dim=-1)[None]


def distance_to_tie(moved: Tensor, size: tuple[int, int]) -> Tensor:
    """Distance of each position from .5, in units in the last place of the size; [Q, 2], in float64."""
    sizes = torch.tensor(size, dtype=torch.float64)
    position = ((moved[0].double() + 1) * sizes - 1) / 2
    return (position - torch.floor(position) - 0.5).abs() / 2.0 ** (torch.floor(torch.log2(sizes)) - 23)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_gather_chooses_the_latents_of_grid_sample(device, gpu_backend, size, record_property):
    values, ties, indices = index_map(size), 0, 0
    for scale in SCALES:
        coord = grid_coord(size, scale)
        x, _ = ops.gather(values.to(device), coord.to(device), feat_unfold=False, backend=gpu_backend)
        for corner, sides in enumerate(CORNERS):
            found, moved = x[0, :, corner, :2].cpu(), shifted(coord, size, sides)
            assert torch.equal(found, sampled(values, moved)), f"x{scale}, corner {corner}"
            on_device = sampled(values.to(device), moved)
            differs = found != on_device
            assert (distance_to_tie(moved, size)[differs] <= TIE_ULP).all(), f"x{scale}, corner {corner}"
            assert ((found - on_device)[differs].abs() == 1).all(), f"x{scale}, corner {corner}"
            ties, indices = ties + int(differs.sum()), indices + differs.numel()
    record_property("ties", f"{ties} of {indices} indices differ from the device's own grid_sample, at ties")


@pytest.mark.parametrize("size", [(17, 23), (48, 31), (255, 64)], ids="{0[0]}x{0[1]}".format)
def test_fused_decodes_choose_the_latents_of_grid_sample(device, gpu_backend, size):
    """The imnet returns row and column unchanged, so that the result is the index of the latent."""
    feat = index_map(size).to(device)
    weights = [torch.zeros(out, inp, device=device) for inp, out in ((6, 16), (16, 2))]
    biases = [torch.zeros(out, device=device) for out in (16, 2)]
    for axis in (0, 1):
        weights[0][axis, axis] = weights[1][axis, axis] = 1.0
    latent_map = ops.fold(feat.double(), weights[0].double(), feat_unfold=False).float()  # exact
    arguments = {"local_ensemble": False, "feat_unfold": False, "latent_map": latent_map, "backend": gpu_backend}
    for scale in SCALES:
        out_size = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
        if math.prod(out_size) > MAX_PIXELS:
            continue
        coord = ops.reference.window_coord(out_size, (0, 0, *out_size), dtype=torch.float32, device="cpu")[None]
        expected = sampled(feat.cpu(), coord.clamp(-1 + 1e-6, 1 - 1e-6))
        points = (coord.to(device), torch.full_like(coord, 0.01).to(device))
        found = ops.query(feat, *points, weights, biases, **arguments)[0].cpu()
        image = ops.render(feat, out_size, weights, biases, **arguments)[0].flatten(1).T.cpu()
        assert torch.equal(found.round(), expected) and torch.equal(image.round(), expected), f"x{scale}"
        assert (found - expected).abs().max() <= 0.25
