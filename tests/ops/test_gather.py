"""gather and ensemble on every backend: the reference's numbers, grid_sample's own indices, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liif_fast import ops
from tests.helpers import CORNERS, FLAGS, Case, as_float64, index_map, random_problem, range_error, sampled, shifted
from tests.ops.test_decode import flag_name, strided
from tests.ops.tolerances import LIMITS, assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
both_orders = pytest.mark.parametrize("deterministic", [False, True], ids=["any-order", "ordered"], indirect=True)
CASES = {
    "plain": Case(batch=2, channels=5, height=6, width=9, queries=20),
    "one-query": Case(queries=1),
    "no-query": Case(queries=0, batch=2),
    "one-latent": Case(height=1, width=1, queries=30),
    "one-column": Case(height=8, width=1, channels=33, queries=30),
    "two-columns": Case(height=3, width=2, queries=30),
    "many-channels": Case(channels=64, height=4, width=3, queries=19),
    "half-a-step": Case(channels=24, height=3, width=5, queries=11, batch=2),  # of a warp's channels in CUDA
    "two-steps": Case(channels=72, height=2, width=4, queries=7),
}

# [B, Q, S, O] of the predictions that ensemble blends.
BLENDS = [(2, 75, 1, 1), (2, 75, 4, 3), (1, 20, 3, 5), (1, 20, 4, 16), (1, 9, 4, 300), (1, 0, 4, 3), (1, 5, 4, 0)]


def gather(leaves, case, backend):
    cell = leaves[2] if case.cell_decode else None
    flags = {"feat_unfold": case.feat_unfold, "local_ensemble": case.local_ensemble}
    return ops.gather(*leaves[:2], cell, backend=backend, **flags)


def probes_of(outs):
    generator = torch.Generator().manual_seed(2)
    return [(torch.rand(out.shape, generator=generator, dtype=torch.float64) - 0.3).to(out.dtype) for out in outs]


def check_gather(backend, case: Case, dtype: torch.dtype) -> None:
    """x bit for bit, since nothing is rounded differently; area weights and gradients within their limits."""
    feat, coord, cell, *_ = random_problem(case, dtype)
    with torch.no_grad():
        coord.mul_(0.97).add_(0.0031)  # float64 chooses the same latents
    leaves = [feat, coord, cell][: 3 if case.cell_decode else 2]
    here = [t.to(backend.device).requires_grad_() for t in leaves]
    outs = gather(here, case, backend.op_backend)
    expected = gather(leaves, case, "reference")
    assert [(t.shape, t.dtype) for t in outs] == [(t.shape, t.dtype) for t in expected]
    assert torch.equal(outs[0].cpu(), expected[0])
    torch.testing.assert_close(outs[1].cpu(), expected[1], rtol=1e-6, atol=1e-7)
    probes = probes_of(expected)
    grads = torch.autograd.grad(outs, here, [probe.to(backend.device) for probe in probes])
    wide = [t.double().requires_grad_() for t in leaves]
    right = torch.autograd.grad(gather(wide, case, "reference"), wide, [probe.double() for probe in probes])
    for grad, wanted, leaf in zip(grads, right, here, strict=True):
        limit = LIMITS.get((leaf.dtype, "rounding")) or LIMITS[leaf.dtype, "gradient"]
        assert grad.dtype == leaf.dtype
        assert_close([grad.cpu()], [wanted], limit)


@both_orders
@dtypes
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_shape(backend, case, dtype, deterministic):
    check_gather(backend, case, dtype)


@both_orders
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@pytest.mark.parametrize("flags", FLAGS, ids=flag_name)
def test_every_flag(backend, flags, dtype, deterministic):
    check_gather(backend, Case(2, 5, 6, 9, 20, (16,), 3, *flags), dtype)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16), (17, 23), (48, 31), (255, 64), (1000, 3)], ids=str)
@pytest.mark.parametrize("scale", [1, 2, 3, 3.7, 5, 30])
@pytest.mark.with_reference
def test_indices_are_exactly_those_of_grid_sample(backend, size, scale):
    """A map that holds its own indices, sampled at pixel centers, against torch's CPU code."""
    feat = index_map(size)
    count = 4000 if backend.every <= 3 else 200
    axes = [ops.reference.pixel_centers(max(round(side * scale), 1), dtype=torch.float32) for side in size]
    coord = torch.stack([axis[torch.linspace(0, len(axis) - 1, count).long()] for axis in axes], dim=-1)[None]
    x, _ = ops.gather(feat.to(backend.device), coord.to(backend.device), feat_unfold=False, backend=backend.op_backend)
    for corner, sides in enumerate(CORNERS):
        assert torch.equal(x[0, :, corner, :2].cpu(), sampled(feat, shifted(coord, size, sides)))


@both_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_corners_that_a_rounding_moved_apart(backend, dtype, deterministic):
    """On a long axis a tie can move neighboring corners two latents apart: then 4x4 latents are not enough."""
    if deterministic and backend.name == "triton-interpreted":
        pytest.skip("one program per latent takes the interpreter minutes")
    height = 4096
    rows = 2 * torch.rand(200_000, generator=torch.Generator().manual_seed(0)) - 1
    index = torch.arange(float(height)).view(1, 1, height, 1)
    coord = torch.stack([rows, torch.zeros_like(rows)], dim=-1).unsqueeze(0)
    found = ops.gather(index, coord, feat_unfold=False, backend="reference")[0][0, :, :, 0]
    apart = (found[:, 2] - found[:, 0] == 2).nonzero().flatten()
    assert 0 < len(apart) < 100
    coord = coord[:, torch.cat([apart[:3], torch.arange(9)])]
    feat = (index * 7 % 1009).to(dtype).expand(1, 4, height, 1).contiguous(memory_format=torch.channels_last)
    results = []
    for device, name in ((backend.device, backend.op_backend), ("cpu", "reference")):
        leaf = feat.to(device).requires_grad_()
        x, _ = ops.gather(leaf, coord.to(device), backend=name)
        probe = torch.arange(x.numel()).view(x.shape).remainder(17).to(x)  # their sums need no rounding
        results.append([t.cpu() for t in (x, *torch.autograd.grad(x, leaf, probe))])
    assert results[0][1].count_nonzero()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_gradient_of_one_output_only(backend):
    feat, coord, cell, *_ = random_problem(CASES["plain"], torch.float64, requires_grad=True)
    grads = []
    for device, name in ((backend.device, backend.op_backend), ("cpu", "reference")):
        points = coord.detach().to(device).requires_grad_()
        _, area_weight = ops.gather(feat.to(device), points, cell.to(device), backend=name)
        grads.append(torch.autograd.grad(area_weight.square().sum(), points)[0].cpu())
    assert_close([grads[0]], [grads[1]], 1e-13)


@dtypes
def test_inputs_of_any_layout(backend, dtype):
    case = CASES["half-a-step"]
    feat, coord, cell = (t.to(backend.device) for t in random_problem(case, dtype)[:3])
    layouts = {
        "channels-last": feat.contiguous(memory_format=torch.channels_last),
        "transposed": feat.transpose(2, 3).contiguous().transpose(2, 3),
        "permuted": feat.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
        "strided": strided(feat),
        "sliced": F.pad(feat, (1, 2, 3, 4))[..., 3 : 3 + feat.shape[2], 1 : 1 + feat.shape[3]],
        "expanded": feat[:, :1].expand(feat.shape),
    }
    coord, cell = strided(coord), cell[:, :1].expand(cell.shape)
    for name, layout in layouts.items():
        found = ops.gather(layout, coord, cell, backend=backend.op_backend)
        expected = ops.gather(layout.cpu().contiguous(), coord.cpu(), cell.cpu(), backend="reference")
        assert not layout.is_contiguous() and torch.equal(found[0].cpu(), expected[0]), name
        torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ensemble", [True, False], ids=["ensemble", "nearest"])
@both_orders
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels-last"])
def test_nan_and_far_coordinates(backend, ensemble, layout, deterministic):
    """NaN has no latent: features and center are 0, as in grid_sample on a CPU."""
    feat, coord, cell, *_ = random_problem(CASES["half-a-step"], torch.float32)
    coord[0, 0, 0] = coord[1, 5, 1] = coord[1, 6] = cell[1, 2, 1] = float("nan")
    coord[0, 1] = torch.tensor([1e30, -1e30])
    coord[1, 3] = torch.tensor([float("inf"), 0.3])
    results = []
    for device, name in ((backend.device, backend.op_backend), ("cpu", "reference")):
        leaf = feat.to(device).contiguous(memory_format=layout).requires_grad_()
        x, area_weight = ops.gather(leaf, coord.to(device), cell.to(device), local_ensemble=ensemble, backend=name)
        probe = torch.arange(x.numel(), device=device).view(x.shape).remainder(17).to(x)  # sums need no rounding
        results.append([t.detach().cpu() for t in (x, area_weight, *torch.autograd.grad(x, leaf, probe))])
    (x, area_weight, grad), (expected_x, expected_weight, expected_grad) = results
    torch.testing.assert_close(x, expected_x, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(area_weight, expected_weight, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert torch.equal(grad, expected_grad)
    unknown = coord.isnan().any(-1)
    assert (x[unknown][..., : 9 * feat.shape[1]] == 0).all() and area_weight[unknown].isnan().all()


@dtypes
@pytest.mark.parametrize("shape", BLENDS, ids=str)
def test_ensemble(backend, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    pred = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)
    area_weight = torch.rand(shape[:3], generator=generator, dtype=geometry)
    leaves = [t.to(backend.device).requires_grad_() for t in (pred, area_weight)]
    out = ops.ensemble(*leaves, backend=backend.op_backend)
    wide = as_float64(leaves)
    expected = ops.ensemble(*wide, backend="reference")
    assert out.dtype == dtype
    rounding = LIMITS.get((dtype, "rounding"), 0)
    assert range_error(out, expected) <= rounding + LIMITS[geometry, "result"]
    (probe,) = probes_of([out.cpu()])
    grads = torch.autograd.grad(out, leaves, probe.to(backend.device))
    right = torch.autograd.grad(expected, wide, probe.double().to(backend.device))
    for grad, wanted, leaf in zip(grads, right, leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert_close([grad], [wanted], LIMITS[geometry, "gradient"] + (rounding if leaf is leaves[0] else 0))


def test_gather_layers_ensemble_is_query(backend):
    case = Case(batch=2, hidden=(16, 8), queries=20)
    feat, coord, cell, weights, biases = random_problem(case, torch.float64)
    here = [t.to(backend.device) for t in (feat, coord, cell)]
    x, area_weight = (t.cpu() for t in ops.gather(*here, backend=backend.op_backend))
    pred = ops.reference.imnet(x, weights, biases).to(backend.device)
    blended = ops.ensemble(pred, area_weight.to(backend.device), backend=backend.op_backend)
    expected = ops.query(feat, coord, cell, weights, biases, backend="reference")
    assert range_error(blended.cpu(), expected) <= LIMITS[torch.float64, "result"]
