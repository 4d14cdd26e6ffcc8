"""MetaSR's folded decode on every backend, against the reference that never folds."""

from __future__ import annotations

import pytest
import torch

from liif_fast import ops
from tests.helpers import norm_error, range_error
from tests.ops.test_gather import both_orders, dtypes
from tests.ops.tolerances import LIMITS, TIMES_PYTORCH, assert_close

# In CUDA a lane holds 2 to 8 hidden units, so that a warp holds 64, 128 or 256 of them, and three outputs at a time.
SHAPES = {
    "plain": {},
    "paper-width": {"hidden": 256},
    "one-unit-more": {"hidden": 257},
    "two-chunks": {"hidden": 512, "queries": 9, "outs": 1},
    "one-unit": {"hidden": 1},
    "two-output-groups": {"outs": 4, "hidden": 64},
    "seven-outputs": {"outs": 7, "hidden": 130, "queries": 11},
    "one-query": {"queries": 1, "batch": 1},
    "no-query": {"queries": 0},
    "one-latent": {"size": (1, 1), "queries": 75},
    "one-row": {"size": (1, 9)},
}


def problem(dtype, *, batch=2, channels=4, size=(3, 4), queries=20, hidden=29, outs=3):
    """feat, coord (some outside the image), cell, the two layers' weights and biases."""
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape):
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    points = (1.1 * uniform(batch, queries, 2)).to(geometry), (uniform(batch, queries, 2).abs() / 4).to(geometry)
    weights = [uniform(hidden, 3), uniform(9 * channels * outs, hidden) * 0.3]
    biases = [0.2 * uniform(hidden), 0.2 * uniform(9 * channels * outs)]
    return [uniform(batch, channels, *size).to(dtype), *points, *(t.to(dtype) for t in weights + biases)]


def decode(tensors, backend, **options):
    return ops.metasr_query(*tensors[:3], tensors[3:5], tensors[5:], backend=backend, **options)


def check_metasr(backend, tensors) -> None:
    dtype = tensors[0].dtype
    here = [t.to(backend.device).requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    plain = [t.detach().clone().requires_grad_() for t in tensors]
    results, probe = [], None
    for leaves, name in ((here, backend.op_backend), (wide, "reference"), (plain, "reference")):
        out = decode(leaves, name)
        if probe is None:
            probe = torch.rand(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
        results.append([t.cpu() for t in (out, *torch.autograd.grad(out, leaves, probe.to(out)))])
    ours, expected, pytorch = results
    assert [t.dtype for t in ours] == [dtype, *(t.dtype for t in tensors)]
    limit = LIMITS.get((dtype, "rounding")) or LIMITS[dtype, "gradient"]
    assert_close(ours, expected, limit, pytorch=lambda: pytorch)


@both_orders
@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_and_gradients(backend, shape, dtype, deterministic):
    queries = min(shape.get("queries", 20), backend.most_queries)
    check_metasr(backend, problem(dtype, **{**shape, "queries": queries}))


@both_orders
@pytest.mark.parametrize("scale", [1, 3, 4])
def test_neighbors_that_share_a_latent(backend, scale, deterministic):
    """At the pixel centers of an image, row by row, neighbors share latents, rows and cells."""
    tensors = problem(torch.float64, hidden=70)
    size = [scale * side for side in tensors[0].shape[2:]]
    coord = ops.reference.window_coord(size, (0, 0, *size), dtype=torch.float64, device=None)[:40].expand(2, -1, 2)
    cell = coord.new_tensor([2 / side for side in size]).expand(coord.shape)
    check_metasr(backend, [tensors[0], coord, cell, *tensors[3:]])


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 23), (255, 64), (1000, 3)], ids=str)
@pytest.mark.parametrize("scale", [1, 2, 3, 3.7, 30])
def test_latents_are_exactly_those_of_grid_sample(backend, size, scale):
    """Against torch's CPU code, on a map that holds its own indices and reaches the output unchanged."""
    count = 400 if backend.every <= 3 else 60
    feat = torch.arange(float(size[0] * size[1])).view(1, 1, *size)
    axes = [ops.reference.pixel_centers(round(side * scale), dtype=torch.float32) for side in size]
    coord = torch.stack([axis[torch.linspace(0, len(axis) - 1, count).long()] for axis in axes], dim=-1).unsqueeze(0)
    cell = torch.tensor([2 / round(side * scale) for side in size]).expand(coord.shape)
    center = torch.zeros(9)
    center[4] = 1  # the filter's bias: the center of the 3x3
    tensors = [feat, coord, cell, torch.zeros(1, 3), torch.zeros(9, 1), torch.zeros(1), center]
    found = decode([t.to(backend.device) for t in tensors], backend.op_backend)
    assert torch.equal(found.cpu(), decode(tensors, "reference"))


@pytest.mark.with_reference
@dtypes
def test_a_part_of_the_map(backend, dtype):
    tensors = [t.to(backend.device) for t in problem(dtype, size=(60, 9), queries=1)]
    size, band = (150, 20), (60, 0, 8, 6)
    coord = ops.reference.window_coord(size, band, dtype=tensors[1].dtype, device=backend.device).expand(2, -1, 2)
    cell = coord.new_tensor([2 / side for side in size]).expand(coord.shape)
    whole, part = [tensors[0], coord, cell, *tensors[3:]], [tensors[0][:, :, 20:42], coord, cell, *tensors[3:]]
    expected = decode(whole, backend.op_backend)
    out = decode(part, backend.op_backend, feat_region=(20, 0, 60, 9))
    exact = decode([t.double() for t in whole], "reference")
    assert range_error(out, expected) <= 1e-6
    limit = LIMITS.get((dtype, "rounding")) or LIMITS[dtype, "result"]
    assert norm_error(out, exact) <= max(limit, TIMES_PYTORCH * norm_error(decode(whole, "reference"), exact))


def test_a_region_without_the_latents_reads_only_itself(backend):
    tensors = [t.to(backend.device) for t in problem(torch.float32)]
    tensors[0] = tensors[0][:, :, :2]
    assert decode(tensors, backend.op_backend, feat_region=(3, 1, 9, 11)).isfinite().all()


def test_nan_in_nan_out_and_far_coordinates(backend):
    tensors = [t.to(backend.device) for t in problem(torch.float32, hidden=40)]
    clean = decode(tensors, backend.op_backend)
    tensors[1][0, 5, 0] = tensors[1][0, 13, 1] = tensors[2][1, 7, 0] = float("nan")
    tensors[1][0, 1] = torch.tensor([1e30, -1e30])
    tensors[1][1, 2] = torch.tensor([-40.0, 40.0])
    leaves = [t.requires_grad_() for t in tensors]
    results = []
    for name in (backend.op_backend, "reference"):
        out = decode(leaves, name)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    (out, _, *grads), (expected, _, *right) = results
    broken, far = torch.zeros(2, out.shape[0], 20, dtype=torch.bool, device=out.device)
    broken[0, 5] = broken[0, 13] = broken[1, 7] = far[0, 1] = far[1, 2] = True
    assert out[broken].isnan().all()
    assert torch.equal(out[~broken & ~far], clean[~broken & ~far])
    torch.testing.assert_close(out[far], expected[far], rtol=1e-3, atol=1e-5)
    for grad, wanted in zip(grads[:2], right[:2], strict=True):
        torch.testing.assert_close(grad[~broken & ~far], wanted[~broken & ~far], rtol=1e-4, atol=1e-4)
    assert grads[2].isnan().all() and right[2].isnan().all()  # the first weight, through its three inputs
    with torch.no_grad():
        tensors[3][17, 1] = float("nan")
    assert decode(tensors, backend.op_backend).isnan().all()
