"""The CPU kernels of query and render, forward and backward, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from liif_fast import ops
from tests.helpers import FLAGS, SHAPES, Case, as_float64, norm_error, psnr, random_problem, range_error, reason_against

pytestmark = pytest.mark.skipif(
    bool(reason_against("cpu", "query", torch.float32)), reason=reason_against("cpu", "query", torch.float32)
)

# (largest error as a fraction of the range, relative norm error of gradients)
TOLERANCE = {torch.float64: (1e-13, 1e-12), torch.float32: (1e-5, 1e-5)}


def folded(case, feat, weights):
    """The latent map, so that few queries take the fused path too."""
    return ops.fold(feat, weights[0], feat_unfold=case.feat_unfold)


def check_query(case: Case, dtype: torch.dtype) -> None:
    feat, coord, cell, weights, biases = random_problem(case, dtype, requires_grad=True)
    leaves = [feat, coord, cell, *weights, *biases]
    exact = as_float64(leaves)
    layers = len(weights)
    out = ops.query(
        feat, coord, cell, weights, biases, latent_map=folded(case, feat, weights), backend="cpu", **case.flags
    )
    expected = ops.query(*exact[:3], exact[3 : 3 + layers], exact[3 + layers :], backend="reference", **case.flags)
    tolerance, grad_tolerance = TOLERANCE[dtype]
    assert out.dtype == dtype and out.shape == expected.shape
    assert range_error(out, expected) <= tolerance

    probe = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    grads = torch.autograd.grad(out, leaves, probe.to(dtype), allow_unused=True)
    expected_grads = torch.autograd.grad(expected, exact, probe, allow_unused=True)
    for position, (grad, expected_grad) in enumerate(zip(grads, expected_grads, strict=True)):
        if expected_grad is None:
            assert grad is None or not grad.any(), position
        elif expected_grad.norm() < 1e-9:  # e.g. coord without local ensemble and geometry terms
            assert grad.norm() < 1e-4, position
        else:
            assert grad.dtype == leaves[position].dtype
            assert norm_error(grad, expected_grad) <= grad_tolerance, position


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_query_and_gradients(shape, dtype, isa):
    check_query(SHAPES[shape], dtype)


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "".join("-euc"[i + 1] for i in range(3) if not f[i]) or "full")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_flag(flags, dtype, isa):
    ensemble, unfold, cell = flags
    case = Case(batch=2, hidden=(20, 12), local_ensemble=ensemble, feat_unfold=unfold, cell_decode=cell)
    check_query(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["plain", "paper-width", "odd-widths", "linear", "batch-and-width-64"])
def test_low_precision_is_no_worse_than_pytorch(shape, dtype, isa):
    case = SHAPES[shape]._replace(queries=300)
    feat, coord, cell, weights, biases = random_problem(case, dtype, requires_grad=True)
    leaves = [feat, *weights, *biases]
    exact = as_float64([feat, coord, cell, *weights, *biases])
    layers = len(weights)
    expected = ops.query(*exact[:3], exact[3 : 3 + layers], exact[3 + layers :], backend="reference")
    out = ops.query(feat, coord, cell, weights, biases, backend="cpu")
    plain = ops.query(feat, coord, cell, weights, biases, backend="reference")
    with torch.no_grad():
        inferred = ops.query(feat, coord, cell, weights, biases, backend="cpu")
    for result in (out, inferred):
        assert result.dtype == dtype
        assert norm_error(result, expected) <= 2 * norm_error(plain, expected)
        assert psnr(result, expected) >= (35 if dtype == torch.bfloat16 else 52)

    probe = torch.rand(expected.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 0.5
    expected_grads = torch.autograd.grad(expected, [exact[0], *exact[3:]], probe)
    grads = torch.autograd.grad(out, leaves, probe.to(dtype))
    plain_grads = torch.autograd.grad(plain, leaves, probe.to(dtype))
    for grad, plain_grad, expected_grad in zip(grads, plain_grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        # The probe's own rounding is in both; a ReLU that turns round counts more than it does.
        bound = 2 * norm_error(plain_grad, expected_grad) + (4e-3 if dtype == torch.bfloat16 else 5e-4)
        assert norm_error(grad, expected_grad) <= bound


def test_bfloat16_uses_its_own_instructions_where_the_processor_has_them():
    if not torch.ops.liif_fast_C.cpu_has_bf16():
        pytest.skip("this processor has no AVX-512-BF16")
    feat, coord, cell, weights, biases = random_problem(SHAPES["paper-width"], torch.bfloat16)
    native = ops.query(feat, coord, cell, weights, biases, backend="cpu")
    torch.ops.liif_fast_C.cpu_select_isa("portable")
    try:
        widened = ops.query(feat, coord, cell, weights, biases, backend="cpu")
    finally:
        torch.ops.liif_fast_C.cpu_select_isa("auto")
    assert not torch.equal(native, widened)  # rounded between the layers, or not
    assert psnr(native, widened) >= 35


@pytest.mark.parametrize("size", [(15, 21), (10, 14), (13, 40), (3, 2), (150, 7)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ensemble", [True, False])
def test_render_is_query_on_the_grid(size, dtype, ensemble, isa):
    case = Case(batch=2, hidden=(24, 16), local_ensemble=ensemble)
    feat, _, _, weights, biases = random_problem(case, dtype)
    out = ops.render(feat, size, weights, biases, backend="cpu", local_ensemble=ensemble)
    # In the same dtype: on odd scales a border pixel's weights are ratios of rounding errors: the original's, then.
    expected = ops.render(feat, size, weights, biases, backend="reference", local_ensemble=ensemble)
    assert out.shape == (2, 3, *size)
    assert range_error(out, expected) <= TOLERANCE[dtype][0]


@pytest.mark.parametrize("scale", [1, 2, 3, 5, 30])
def test_render_picks_the_same_latents_as_the_original_on_whole_scales(scale):
    """On odd scales queries lie exactly on the latents' centres, where only the 1e-6 and the rounding decide."""
    case = Case(height=17, width=23, hidden=(8,))
    feat, _, _, weights, biases = random_problem(case, torch.float32)
    size = (17 * scale, 23 * scale)
    out = ops.render(feat, size, weights, biases, backend="cpu")
    expected = ops.render(feat, size, weights, biases, backend="reference")
    assert range_error(out, expected) <= 1e-5


def test_render_window_and_region():
    case = Case(batch=2, height=12, width=9, hidden=(16,))
    feat, _, _, weights, biases = random_problem(case, torch.float64)
    size, window = (31, 20), (11, 6, 9, 8)
    whole = ops.render(feat, size, weights, biases, backend="cpu")
    part = ops.render(feat, size, weights, biases, window=window, backend="cpu")
    region = (2, 1, 12, 9)
    from_region = ops.render(
        feat[:, :, 2:10, 1:8], size, weights, biases, window=window, feat_region=region, backend="cpu"
    )
    assert torch.equal(part, whole[:, :, 11:20, 6:14])
    assert range_error(from_region, part) <= 1e-14
    oracle = ops.render(
        feat[:, :, 2:10, 1:8], size, weights, biases, window=window, feat_region=region, backend="reference"
    )
    assert range_error(from_region, oracle) <= 1e-13


def test_render_with_a_cell_of_its_own():
    case = Case(hidden=(16,))
    feat, _, _, weights, biases = random_problem(case, torch.float64)
    out = ops.render(feat, (20, 28), weights, biases, cell=(0.3, 0.7), backend="cpu")
    expected = ops.render(feat, (20, 28), weights, biases, cell=(0.3, 0.7), backend="reference")
    assert range_error(out, expected) <= 1e-13
    assert range_error(out, ops.render(feat, (20, 28), weights, biases, backend="cpu")) > 1e-3


@pytest.mark.parametrize("cell_decode", [True, False])
def test_render_gradients(cell_decode, isa):
    case = Case(batch=2, hidden=(12, 20), cell_decode=cell_decode)
    feat, _, _, weights, biases = random_problem(case, torch.float64, requires_grad=True)
    leaves = [feat, *weights, *biases]
    arguments = {"window": (3, 0, 12, 19), "cell_decode": cell_decode}
    grads, expected = (
        torch.autograd.grad(
            ops.render(feat, (16, 19), weights, biases, backend=backend, **arguments).square().sum(), leaves
        )
        for backend in ("cpu", "reference")
    )
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert norm_error(grad, expected_grad) <= 1e-12


def test_few_queries_on_a_large_map_gather_instead_of_folding():
    case = Case(height=40, width=50, queries=9, hidden=(16, 16))
    feat, coord, cell, weights, biases = random_problem(case, torch.float64)
    out = ops.query(feat, coord, cell, weights, biases, backend="cpu")
    assert range_error(out, ops.query(feat, coord, cell, weights, biases, backend="reference")) <= 1e-13


@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("hidden", [(), (16,), (16, 16)], ids=str)
def test_nan_in_nan_out_and_only_there(ensemble, hidden, isa):
    case = Case(hidden=hidden, local_ensemble=ensemble, queries=40)
    feat, coord, cell, weights, biases = random_problem(case, torch.float32)
    clean = ops.query(feat, coord, cell, weights, biases, backend="cpu", local_ensemble=ensemble)
    coord[0, 7, 0] = float("nan")
    coord[0, 9, 1] = float("nan")
    out = ops.query(feat, coord, cell, weights, biases, backend="cpu", local_ensemble=ensemble)
    assert out[0, [7, 9]].isnan().all()
    rest = [q for q in range(40) if q not in (7, 9)]
    assert torch.equal(out[0, rest], clean[0, rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_and_huge_coordinates_stay_inside_the_map(dtype):
    case = Case(queries=6)
    feat, coord, cell, weights, biases = random_problem(case, dtype)
    coord[0, :, 0] = torch.tensor([1e30, -1e30, 3e9, -3e9, float("inf"), -float("inf")])
    out = ops.query(feat, coord, cell, weights, biases, backend="cpu", local_ensemble=False)
    assert out.shape == (1, 6, 3)


def test_results_do_not_depend_on_the_number_of_threads():
    case = Case(batch=3, channels=6, height=9, width=11, queries=700, hidden=(40, 24))
    feat, coord, cell, weights, biases = random_problem(case, torch.float32, requires_grad=True)
    leaves = [feat, coord, cell, *weights, *biases]
    results = []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        try:
            latent_map = folded(case, feat, weights)
            out = ops.query(feat, coord, cell, weights, biases, latent_map=latent_map, backend="cpu")
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        finally:
            torch.set_num_threads(2)
    for other in results[1:]:
        assert all(norm_error(a, b) <= 1e-5 for a, b in zip(results[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))  # and runs repeat bit for bit


def test_inputs_are_not_changed_and_may_have_any_strides():
    case = Case(batch=2, channels=4, queries=60, hidden=(24, 8))
    feat, coord, cell, weights, biases = random_problem(case, torch.float32)
    expected = ops.query(feat, coord, cell, weights, biases, backend="cpu")

    def strided(tensor):
        """The same values, neither contiguous nor at the beginning of their memory."""
        wide = torch.full([2 * size + 1 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        view.copy_(tensor)
        return view

    inputs = [strided(t) for t in (feat.transpose(2, 3).contiguous().transpose(2, 3), coord, cell, *weights, *biases)]
    before = [t.clone() for t in inputs]
    out = ops.query(*inputs[:3], inputs[3:6], inputs[6:], backend="cpu")
    assert range_error(out, expected) <= 1e-6
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    expanded = ops.query(
        feat[:1].expand(3, -1, -1, -1),
        coord[:1].expand(3, -1, -1),
        cell[:1].expand(3, -1, -1),
        weights,
        biases,
        backend="cpu",
    )
    assert range_error(expanded, expected[:1].expand(3, -1, -1)) <= 1e-6
