"""Triton's render under the interpreter, forward and backward, against the reference."""

from __future__ import annotations

import pytest
import torch

from liif_fast import ops
from tests.helpers import FLAGS, Case, norm_error, random_problem, range_error
from tests.triton.interpreter.checks import KINDS, RENDER_TOLERANCE, dtype_of, operands


@pytest.mark.parametrize("size", [(5, 7), (6, 11)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_render_is_query_on_the_grid(size, kind, flags):
    flags = dict(zip(("local_ensemble", "feat_unfold", "cell_decode"), flags, strict=True))
    feat, _, _, weights, biases = random_problem(Case(batch=2, hidden=(24, 16), **flags), dtype_of(kind))
    with operands(kind):
        out = ops.render(feat, size, weights, biases, backend="triton", **flags)
    expected = ops.render(feat, size, weights, biases, backend="reference", **flags)
    assert out.shape == (2, 3, *size) and out.dtype == feat.dtype
    assert range_error(out, expected) <= RENDER_TOLERANCE[kind]


@pytest.mark.parametrize("scale", [1, 3, 5])
def test_render_picks_the_same_latents_as_the_original_on_whole_scales(scale):
    case = Case(height=5, width=4, hidden=(8,))
    feat, _, _, weights, biases = random_problem(case, torch.float32)
    size = (5 * scale, 4 * scale)
    expected = ops.render(feat, size, weights, biases, backend="reference")
    assert range_error(ops.render(feat, size, weights, biases, backend="triton"), expected) <= 1e-5
    half = [[t.half() for t in group] for group in (weights, biases)]
    assert range_error(ops.render(feat.half(), size, *half, backend="triton"), expected) <= 5e-3


@pytest.mark.parametrize("cell_decode", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_render_window_region_and_gradients(kind, cell_decode):
    case = Case(batch=2, hidden=(24, 16), height=12, width=9, cell_decode=cell_decode)
    feat, _, _, weights, biases = random_problem(case, dtype_of(kind), requires_grad=True)
    leaves = [feat, *weights, *biases]
    place = {"window": (11, 6, 9, 8), "feat_region": (2, 1, 12, 9), "cell": (0.3, 0.2), "cell_decode": cell_decode}
    results = []
    for backend, recompute in (("reference", False), ("triton", False), ("triton", True)):
        with operands(kind):
            out = ops.render(
                feat[:, :, 2:10, 1:8], (31, 20), weights, biases, backend=backend, recompute=recompute, **place
            )
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for expected, *others in zip(*results, strict=True):
        for other in others:
            assert norm_error(other, expected) <= 10 * RENDER_TOLERANCE[kind]
