"""MetaSR's folded decode against its reference, forward and backward."""

from __future__ import annotations

import pytest
import torch

from liif_fast import ops
from tests.helpers import norm_error, range_error, reason_against

pytestmark = pytest.mark.skipif(
    bool(reason_against("cpu", "metasr_query", torch.float32)),
    reason=reason_against("cpu", "metasr_query", torch.float32),
)


def problem(dtype, batch=2, channels=4, size=(5, 7), queries=90, hidden=29, outs=3):
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape):
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    geometry = torch.float64 if dtype == torch.float64 else torch.float32
    feat = uniform(batch, channels, *size).to(dtype)
    coord, cell = (1.1 * uniform(batch, queries, 2)).to(geometry), (uniform(batch, queries, 2).abs() / 4).to(geometry)
    weights = [uniform(hidden, 3).to(dtype), (uniform(9 * channels * outs, hidden) * 0.3).to(dtype)]
    biases = [(0.2 * uniform(hidden)).to(dtype), (0.2 * uniform(9 * channels * outs)).to(dtype)]
    return [t.requires_grad_() for t in (feat, coord, cell, *weights, *biases)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [{}, {"hidden": 256}, {"queries": 1, "size": (1, 1)}, {"queries": 0}, {"outs": 1}], ids=str
)
def test_metasr_and_gradients(dtype, shape, isa):
    tensors = problem(dtype, **shape)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    outs = []
    for values, backend in ((tensors, "cpu"), (exact, "reference")):
        feat, coord, cell, w0, w1, b0, b1 = values
        outs.append(ops.metasr_query(feat, coord, cell, [w0, w1], [b0, b1], backend=backend))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert outs[0].dtype == dtype
    assert range_error(outs[0], outs[1]) <= tolerance
    probe = torch.rand(outs[1].shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    grads = torch.autograd.grad(outs[0], tensors, probe.to(dtype))
    expected = torch.autograd.grad(outs[1], exact, probe)
    for position, (grad, expected_grad) in enumerate(zip(grads, expected, strict=True)):
        assert norm_error(grad, expected_grad) <= tolerance, position


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_metasr_low_precision(dtype):
    feat, coord, cell, w0, w1, b0, b1 = problem(dtype)
    out = ops.metasr_query(feat, coord, cell, [w0, w1], [b0, b1], backend="cpu")
    exact = [t.detach().double() for t in (feat, coord, cell, w0, w1, b0, b1)]
    expected = ops.metasr_query(*exact[:3], exact[3:5], exact[5:], backend="reference")
    plain = ops.metasr_query(feat, coord, cell, [w0, w1], [b0, b1], backend="reference")
    assert out.dtype == dtype
    assert norm_error(out, expected) <= 2 * norm_error(plain, expected)


def test_metasr_does_not_depend_on_threads():
    tensors = problem(torch.float32, queries=500)
    feat, coord, cell, w0, w1, b0, b1 = tensors
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            out = ops.metasr_query(feat, coord, cell, [w0, w1], [b0, b1], backend="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        finally:
            torch.set_num_threads(2)
    for other in results[1:]:
        assert all(norm_error(a, b) <= 1e-5 for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_metasr_on_a_part_of_the_map(backend):
    feat, _, _, w0, w1, b0, b1 = problem(torch.float32, size=(60, 9))
    size, band = (150, 20), (60, 0, 31, 20)
    coord = ops.reference.window_coord(size, band, dtype=torch.float32, device=None).expand(2, -1, 2)
    cell = torch.tensor([2 / size[0], 2 / size[1]]).expand(coord.shape)
    whole = ops.metasr_query(feat, coord, cell, [w0, w1], [b0, b1], backend=backend)
    part = feat[:, :, 20:42]
    out = ops.metasr_query(part, coord, cell, [w0, w1], [b0, b1], feat_region=(20, 0, 60, 9), backend=backend)
    assert range_error(out, whole) <= 1e-6
