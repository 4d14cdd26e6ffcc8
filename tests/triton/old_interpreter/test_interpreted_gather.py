"""Triton's gather, ensemble and MetaSR under the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liif_fast import ops
from tests.helpers import FLAGS, Case, as_float64, norm_error, random_problem

CASES = {
    "plain": Case(batch=2, channels=5, height=3, width=4, queries=21),
    "one-query": Case(queries=1),
    "no-query": Case(queries=0, batch=2),
    "one-latent": Case(height=1, width=1, queries=20),
    "one-column": Case(height=8, width=1, channels=33, queries=20),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Of a gradient: one rounding of what was summed in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=[False, True], ids=["atomic", "ordered"])
def ordered(request):
    """Gradients by atomic additions, or in a fixed order."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gather_equals_the_reference(name, dtype):
    feat, coord, cell, *_ = random_problem(CASES[name], dtype)
    x, area_weight = ops.gather(feat, coord, cell, backend="triton")
    expected_x, expected_weight = ops.gather(feat, coord, cell, backend="reference")
    assert x.dtype == dtype and torch.equal(x, expected_x)
    torch.testing.assert_close(area_weight, expected_weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_gather_gradients(flags, dtype, ordered):
    ensemble, unfold, with_cell = flags
    feat, coord, cell, *_ = random_problem(CASES["plain"], dtype, requires_grad=True)
    with torch.no_grad():
        coord.mul_(0.97).add_(0.0031)  # float64 chooses the same latents
    leaves = [feat, coord] + ([cell] if with_cell else [])
    results, probes = [], None
    for tensors, backend in ((leaves, "triton"), (as_float64(leaves), "reference")):
        cell = tensors[2] if with_cell else None
        outs = ops.gather(*tensors[:2], cell, feat_unfold=unfold, local_ensemble=ensemble, backend=backend)
        if probes is None:
            probes = [torch.rand(t.shape, generator=torch.Generator().manual_seed(2)).to(t.dtype) for t in outs]
        exact = [probe.to(out.dtype) for probe, out in zip(probes, outs, strict=True)]
        results.append([*outs, *torch.autograd.grad(outs, tensors, exact)])
    for result, expected in zip(*results, strict=True):
        assert norm_error(result, expected) <= TOLERANCE[dtype]


def test_gradients_where_rounding_leaves_a_latent_out():
    """On a long axis float32 may find the neighbours two apart, so that their 3x3 places make more than 4x4."""
    feat = torch.arange(4096.0).view(1, 1, -1, 1).requires_grad_()
    coord = torch.stack([2 * torch.rand(200_000, generator=torch.Generator().manual_seed(0)) - 1, torch.zeros(200_000)])
    coord = coord.t().unsqueeze(0)
    rows = ops.gather(feat, coord, feat_unfold=False, backend="reference")[0][0, :, :, 0]
    apart = rows[:, 2] - rows[:, 0]
    far, near = (apart == 2).nonzero().flatten(), (apart == 1).nonzero().flatten()
    assert 0 < len(far) < 100
    coord = coord[:, torch.cat([far[:5], near[:30]])]
    results = []
    for backend in ("triton", "reference"):
        x, _ = ops.gather(feat, coord, backend=backend)
        probe = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
        results.append(torch.autograd.grad(x, feat, probe)[0])
    assert norm_error(*results) <= 1e-6


def test_gather_reads_any_strides():
    feat, coord, cell, *_ = random_problem(CASES["plain"], torch.float32)
    turned = feat.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)[:, :, ::2, 1:]
    out = ops.gather(turned, coord, cell, backend="triton")[0]
    assert torch.equal(out, ops.gather(turned, coord, cell, backend="reference")[0])


@pytest.mark.parametrize(
    ("size", "scale"),
    [((1, 1), 3), ((2, 3), 30), ((17, 23), 1), ((17, 23), 3), ((48, 31), 3.7), ((255, 64), 3)],
    ids=str,
)
def test_indices_are_exactly_those_of_grid_sample(size, scale):
    height, width = size
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    feat = torch.stack([rows, cols]).float().unsqueeze(0)
    count = min(max(round(height * scale), round(width * scale)), 200)
    row = ops.reference.pixel_centers(max(round(height * scale), 1), dtype=torch.float32)
    col = ops.reference.pixel_centers(max(round(width * scale), 1), dtype=torch.float32)
    coord = torch.stack([row.repeat(count)[:count], col.repeat(count)[:count]], -1)[None]
    x, _ = ops.gather(feat, coord, feat_unfold=False, backend="triton")
    for corner, (row_side, col_side) in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1))):
        moved = coord.clone()
        moved[..., 0] += row_side * (1 / height) + 1e-6
        moved[..., 1] += col_side * (1 / width) + 1e-6
        moved.clamp_(-1 + 1e-6, 1 - 1e-6)
        sampled = F.grid_sample(feat, moved.flip(-1).unsqueeze(1), mode="nearest", align_corners=False)
        assert torch.equal(x[0, :, corner, :2], sampled[0, :, 0].T)


@pytest.mark.parametrize(("corners", "outs"), [(1, 5), (4, 3), (3, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ensemble_equals_the_reference(corners, outs, dtype):
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(2, 20, corners, outs, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    area_weight = torch.rand(2, 20, corners, generator=generator, dtype=geometry).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        out = ops.ensemble(pred, area_weight, backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [pred, area_weight])])
    narrow = dtype in (torch.bfloat16, torch.float16)
    for result, expected in zip(*results, strict=True):
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, rtol=2e-2 if narrow else 1e-5, atol=2e-2 if narrow else 1e-5)


def metasr_problem(dtype, batch=2, channels=4, size=(2, 3), queries=12, hidden=29, outs=3):
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape):
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    feat = uniform(batch, channels, *size).to(dtype)
    coord, cell = (1.1 * uniform(batch, queries, 2)).to(geometry), (uniform(batch, queries, 2).abs() / 4).to(geometry)
    weights = [uniform(hidden, 3).to(dtype), (uniform(9 * channels * outs, hidden) * 0.3).to(dtype)]
    biases = [(0.2 * uniform(hidden)).to(dtype), (0.2 * uniform(9 * channels * outs)).to(dtype)]
    return [t.requires_grad_() for t in (feat, coord, cell, *weights, *biases)]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float64, {}),
        (torch.float64, {"hidden": 70, "outs": 1, "queries": 9}),
        (torch.float64, {"queries": 1, "size": (1, 1)}),
        (torch.float64, {"queries": 0}),
        (torch.float32, {"queries": 7, "outs": 2}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.float16, {"queries": 7, "outs": 2}),
    ],
    ids=str,
)
def test_metasr_and_gradients(dtype, shape, ordered):
    """In 16 bits at most twice the error of PyTorch's own layers in that dtype."""
    tensors = metasr_problem(dtype, **shape)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    results, probe = [], None
    for values, backend in ((tensors, "triton"), (exact, "reference"), (tensors, "reference")):
        feat, coord, cell, w0, w1, b0, b1 = values
        out = ops.metasr_query(feat, coord, cell, [w0, w1], [b0, b1], backend=backend)
        if probe is None:
            probe = torch.rand(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
        results.append([out, *torch.autograd.grad(out, values, probe.to(out.dtype))])
    assert results[0][0].dtype == dtype
    for result, expected, plain in zip(*results, strict=True):
        bound = TOLERANCE[dtype] if dtype.itemsize > 2 else 2 * norm_error(plain, expected)
        assert norm_error(result, expected) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_metasr_low_precision_on_a_part_of_the_map(dtype):
    feat, _, _, w0, w1, b0, b1 = metasr_problem(dtype, size=(30, 5), queries=1)
    size, band = (60, 8), (24, 0, 10, 8)
    coord = ops.reference.window_coord(size, band, dtype=torch.float32, device=None).expand(2, -1, 2)
    cell = torch.tensor([2 / size[0], 2 / size[1]]).expand(coord.shape)
    arguments = (coord, cell, [w0, w1], [b0, b1])
    part, region = feat[:, :, 10:20], (10, 0, 30, 5)
    out = ops.metasr_query(part, *arguments, feat_region=region, backend="triton")
    exact = [t.detach().double() for t in (feat, coord, cell, w0, w1, b0, b1)]
    expected = ops.metasr_query(*exact[:3], exact[3:5], exact[5:], backend="reference")
    plain = ops.metasr_query(part, *arguments, feat_region=region, backend="reference")
    assert out.dtype == dtype
    assert norm_error(out, expected) <= 2 * norm_error(plain, expected)
