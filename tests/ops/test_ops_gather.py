"""gather and ensemble: against the reference, against grid_sample's own indices, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liif_fast import ops
from tests.helpers import FLAGS, Case, norm_error, random_problem, reason_against

pytestmark = pytest.mark.skipif(
    bool(reason_against("cpu", "gather", torch.float32)), reason=reason_against("cpu", "gather", torch.float32)
)

CASES = {
    "plain": Case(batch=2, channels=5, height=6, width=9, queries=70),
    "one-query": Case(queries=1),
    "no-query": Case(queries=0, batch=2),
    "one-latent": Case(height=1, width=1),
    "one-column": Case(height=8, width=1, channels=33),
    "two-columns": Case(height=3, width=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gather_equals_the_reference(case, flags, dtype):
    ensemble, unfold, with_cell = flags
    feat, coord, cell, *_ = random_problem(case, dtype)
    arguments = {"feat_unfold": unfold, "local_ensemble": ensemble}
    cell = cell if with_cell else None
    x, area_weight = ops.gather(feat, coord, cell, backend="cpu", **arguments)
    expected_x, expected_weight = ops.gather(feat, coord, cell, backend="reference", **arguments)
    assert x.dtype == dtype and x.shape == expected_x.shape
    assert torch.equal(x, expected_x)  # copies and the original's arithmetic: nothing is rounded differently
    torch.testing.assert_close(area_weight, expected_weight, rtol=1e-6, atol=1e-7)
    assert area_weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16), (17, 23), (48, 31), (255, 64), (1000, 3)], ids=str)
@pytest.mark.parametrize("scale", [1, 2, 3, 3.7, 5, 30])
def test_indices_are_exactly_those_of_grid_sample(size, scale):
    """A map that holds its own indices, sampled at every pixel centre of a row and a column."""
    height, width = size
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    feat = torch.stack([rows, cols]).float().unsqueeze(0)
    count = min(max(round(height * scale), round(width * scale)), 4000)
    row = ops.reference.pixel_centers(max(round(height * scale), 1), dtype=torch.float32)
    col = ops.reference.pixel_centers(max(round(width * scale), 1), dtype=torch.float32)
    coord = torch.stack([row.repeat(count // len(row) + 1)[:count], col.repeat(count // len(col) + 1)[:count]], -1)[
        None
    ]
    x, _ = ops.gather(feat, coord, feat_unfold=False, backend="cpu")
    for corner, (row_side, col_side) in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1))):
        moved = coord.clone()
        moved[..., 0] += row_side * (1 / height) + 1e-6
        moved[..., 1] += col_side * (1 / width) + 1e-6
        moved.clamp_(-1 + 1e-6, 1 - 1e-6)
        sampled = F.grid_sample(feat, moved.flip(-1).unsqueeze(1), mode="nearest", align_corners=False)
        assert torch.equal(x[0, :, corner, :2], sampled[0, :, 0].T)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_gather_gradients(flags):
    ensemble, unfold, with_cell = flags
    feat, coord, cell, *_ = random_problem(CASES["plain"], torch.float64, requires_grad=True)
    leaves = [feat, coord] + ([cell] if with_cell else [])
    grads = []
    for backend in ("cpu", "reference"):
        x, area_weight = ops.gather(
            feat, coord, cell if with_cell else None, feat_unfold=unfold, local_ensemble=ensemble, backend=backend
        )
        probes = [
            torch.rand(t.shape, generator=torch.Generator().manual_seed(2), dtype=t.dtype) for t in (x, area_weight)
        ]
        grads.append(torch.autograd.grad([x, area_weight], leaves, probes))
    for grad, expected in zip(*grads, strict=True):
        assert norm_error(grad, expected) <= 1e-13


def test_gather_gradient_of_one_output_only():
    feat, coord, cell, *_ = random_problem(CASES["plain"], torch.float64, requires_grad=True)
    grads = []
    for backend in ("cpu", "reference"):
        _, area_weight = ops.gather(feat, coord, cell, backend=backend)
        grads.append(torch.autograd.grad(area_weight.square().sum(), coord)[0])
    assert norm_error(*grads) <= 1e-13


@pytest.mark.parametrize("corners", [1, 4, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ensemble_equals_the_reference(corners, dtype):
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(2, 150, corners, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    area_weight = torch.rand(2, 150, corners, generator=generator, dtype=geometry).requires_grad_()
    out = ops.ensemble(pred, area_weight, backend="cpu")
    expected = ops.ensemble(pred, area_weight, backend="reference")
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
    grads, expected_grads = (
        torch.autograd.grad(value.float().square().sum(), [pred, area_weight]) for value in (out, expected)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad,
            expected_grad,
            rtol=2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5,
            atol=2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-6,
        )


def test_gather_layers_ensemble_is_query():
    case = Case(batch=2, hidden=(16, 8))
    feat, coord, cell, weights, biases = random_problem(case, torch.float64)
    x, area_weight = ops.gather(feat, coord, cell)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x if layer == 0 else F.relu(x), weight, bias)
    torch.testing.assert_close(ops.ensemble(x, area_weight), ops.query(feat, coord, cell, weights, biases))
