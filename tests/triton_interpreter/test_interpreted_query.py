"""Triton's query and render under the interpreter, forward and backward, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import FLAGS, SHAPES, Case, as_float64, norm_error, psnr, random_problem, range_error

from liif_fast import ops
from liif_fast.ops import library, triton_launch, triton_layers, triton_query

NARROW = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def run(case: Case, leaves: list[torch.Tensor], backend: str, **arguments) -> list[torch.Tensor]:
    """The decode and the gradient of every leaf."""
    feat, coord, cell, *layers = leaves
    weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
    out = ops.query(feat, coord, cell, weights, biases, backend=backend, **case.flags, **arguments)
    probe = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    grads = torch.autograd.grad(out, leaves, probe.to(out.dtype), allow_unused=True)
    return [out, *(torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True))]


def problem(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    feat, coord, cell, weights, biases = random_problem(case, dtype, requires_grad=True)
    return [feat, coord, cell, *weights, *biases]


def check_exact(case: Case, dtype: torch.dtype, **arguments) -> None:
    leaves = problem(case, dtype)
    results = run(case, leaves, "triton", **arguments)
    for position, (result, expected) in enumerate(
        zip(results, run(case, as_float64(leaves), "reference"), strict=True)
    ):
        assert result.dtype == (leaves[position - 1].dtype if position else dtype)
        if expected.numel() and expected.norm() < 1e-9:  # e.g. coord, where nothing depends on it
            assert result.norm() < 1e-4, position
        else:
            assert norm_error(result, expected) <= TOLERANCE[dtype], position


def check_narrow(case: Case, dtype: torch.dtype, **arguments) -> None:
    """At most twice the error of PyTorch's own layers in that dtype, and a ReLU that turns round now and then."""
    leaves = problem(case, dtype)
    results = run(case, leaves, "triton", **arguments)
    expected = run(case, as_float64(leaves), "reference")
    plain = run(case, leaves, "reference")
    assert norm_error(results[0], expected[0]) <= 2 * norm_error(plain[0], expected[0])
    slack = 8e-3 if dtype == torch.bfloat16 else 2e-3
    for position, (grad, exact, theirs) in enumerate(zip(results[1:], expected[1:], plain[1:], strict=True)):
        assert grad.dtype == leaves[position].dtype
        if exact.norm() > 1e-9:
            assert norm_error(grad, exact) <= 2 * norm_error(theirs, exact) + slack, position


@pytest.mark.parametrize("shape", ["plain", "one-query", "no-query", "linear", "odd-widths", "many-outputs", "one-row"])
def test_layer_by_layer(shape):
    check_exact(SHAPES[shape]._replace(queries=min(SHAPES[shape].queries, 20)), torch.float64)


def test_layer_by_layer_in_float32():
    case = Case(batch=2, hidden=(300, 12), queries=20)
    assert not triton_query.is_fused((*case.hidden, case.outs), torch.float32)
    check_exact(case, torch.float32)


@pytest.fixture
def tf32():
    """PyTorch's switch for float32 products, on."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.parametrize("shape", ["plain", "one-query", "odd-widths", "one-latent", "one-row", "deep"])
def test_fused_in_float32(shape):
    case = SHAPES[shape]._replace(queries=min(SHAPES[shape].queries, 20))
    assert triton_query.is_fused((*case.hidden, case.outs), torch.float32)
    check_exact(case, torch.float32)


def check_tf32(case: Case, **arguments) -> None:
    """Rounded, at most twice the error of PyTorch's layers in float16, which has as many bits."""
    leaves = problem(case, torch.float32)
    results = run(case, leaves, "triton", **arguments)
    expected = run(case, as_float64(leaves), "reference")
    half = [leaf.detach().half().requires_grad_() for leaf in leaves[3:]]
    plain = run(case, [leaves[0].detach().half().requires_grad_(), *leaves[1:3], *half], "reference")
    assert results[0].dtype == torch.float32
    assert 1e-5 < norm_error(results[0], expected[0]) <= 2 * norm_error(plain[0], expected[0])
    for position, (grad, exact, theirs) in enumerate(zip(results[1:], expected[1:], plain[1:], strict=True)):
        if exact.norm() > 1e-9:
            assert norm_error(grad, exact) <= 2 * norm_error(theirs, exact) + 2e-3, position


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("hidden", [(13, 37, 5), (40, 24), (16,)], ids=str)
def test_fused_in_tf32(hidden, recompute, tf32):
    check_tf32(Case(batch=2, hidden=hidden, outs=4, queries=20), recompute=recompute)


@pytest.mark.parametrize("hidden", [(130,), (180, 100)], ids=str)
def test_float32_widths_of_several_blocks(hidden, tf32):
    case = Case(hidden=hidden, queries=16)
    check_tf32(case)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    check_exact(case, torch.float32)


def test_forward_and_backward_may_cut_a_layer_differently(monkeypatch):
    blocks = {"forward": 32, "save": 64, "backward": 128}
    settings = lambda kernel, *_: triton_launch.Settings(64, blocks[kernel], 4, 2)  # noqa: E731
    monkeypatch.setattr(triton_query, "launch_settings", settings)
    case = Case(hidden=(120, 100), queries=16)
    check_narrow(case, torch.float16)
    check_exact(case, torch.float32)
    blocks["save"], blocks["backward"] = 128, 64
    check_narrow(case, torch.float16)


def test_the_switch_for_tf32_may_move_between_forward_and_backward(tf32):
    case = Case(batch=2, hidden=(40, 24, 30), queries=20)
    leaves = problem(case, torch.float32)
    feat, coord, cell, *layers = leaves
    expected = torch.autograd.grad(ops.query(*leaves[:3], layers[:4], layers[4:], backend="reference").sum(), leaves)
    for recompute in (False, True):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        out = ops.query(feat, coord, cell, layers[:4], layers[4:], backend="triton", recompute=recompute)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        grads = torch.autograd.grad(out.sum(), leaves)
        assert all(norm_error(a, b) <= 1e-2 for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(("plain", dtype) for dtype in NARROW),
        ("odd-widths", torch.bfloat16),
        *((shape, torch.float16) for shape in ("one-query", "odd-widths", "one-latent", "one-row", "deep")),
    ],
    ids=str,
)
def test_fused(shape, dtype):
    case = SHAPES[shape]._replace(queries=min(SHAPES[shape].queries, 20))
    assert triton_query.is_fused((*case.hidden, case.outs), dtype)
    if shape == "deep":  # errors of seven layers: judged without the ReLUs that turn round
        leaves = problem(case, dtype)
        assert psnr(run(case, leaves, "triton")[0], run(case, as_float64(leaves), "reference")[0]) >= 35
    else:
        check_narrow(case, dtype)


@pytest.mark.parametrize("hidden", [(130,), (180, 100), (256, 256, 256)], ids=str)  # three blocks of 64, and two of 128
def test_fused_widths_of_several_blocks(hidden):
    check_narrow(Case(hidden=hidden, queries=16), torch.float16)


@pytest.mark.parametrize("case", [Case(hidden=(24,), outs=37), Case(hidden=(300, 20)), Case(hidden=())], ids=str)
def test_what_the_fused_kernel_does_not_take_runs_layer_by_layer(case):
    assert not triton_query.is_fused((*case.hidden, case.outs), torch.float16)
    check_narrow(case._replace(queries=16), torch.float16)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_flag(flags):
    ensemble, unfold, cell = flags
    case = Case(batch=2, hidden=(20, 12), queries=11, local_ensemble=ensemble, feat_unfold=unfold, cell_decode=cell)
    check_exact(case, torch.float64)
    check_exact(case, torch.float32)
    check_narrow(case, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_keeping_and_computing_again_agree_bit_for_bit(dtype, monkeypatch):
    case = Case(batch=2, hidden=(20, 12), queries=24, height=3, width=4)
    leaves = problem(case, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        kept = run(case, leaves, "triton")
        again = run(case, leaves, "triton", recompute=True)
        monkeypatch.setattr(triton_query, "PIECE_BYTES", 20_000)
        monkeypatch.setattr(triton_layers, "PIECE_BYTES", 20_000)
        in_pieces = run(case, leaves, "triton", recompute=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(norm_error(a, b) <= 1e-3 for a, b in zip(in_pieces, kept, strict=True))
    assert torch.equal(in_pieces[0], kept[0])
    by_atomics = run(case, leaves, "triton")
    assert all(norm_error(a, b) <= 1e-3 for a, b in zip(by_atomics, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inference_reads_a_narrow_map(dtype):
    case = SHAPES["plain"]._replace(hidden=(20, 16), queries=40)
    feat, coord, cell, weights, biases = random_problem(case, dtype)
    out = ops.query(feat, coord, cell, weights, biases, backend="triton")
    exact = [t.double() for t in (feat, coord, cell, *weights, *biases)]
    expected = ops.query(*exact[:3], exact[3:6], exact[6:], backend="reference")
    plain = ops.query(feat, coord, cell, weights, biases, backend="reference")
    assert out.dtype == dtype
    assert norm_error(out, expected) <= 2 * norm_error(plain, expected)


def test_autocast_and_noncontiguous_inputs():
    case = Case(batch=2, hidden=(20, 16), queries=30)
    feat, coord, cell, weights, biases = random_problem(case, torch.float32)
    turned = feat.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    expected = ops.query(feat, coord, cell, weights, biases, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.query(turned, coord[:, ::2], cell[:, ::2], [w.t().contiguous().t() for w in weights], biases)
    assert out.dtype == torch.float32
    assert 0 < norm_error(out, expected[:, ::2]) <= 1e-2


@pytest.mark.parametrize("size", [(5, 7), (6, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("ensemble", [True, False])
def test_render_is_query_on_the_grid(size, dtype, ensemble):
    case = Case(batch=2, hidden=(24, 16), local_ensemble=ensemble)
    feat, _, _, weights, biases = random_problem(case, dtype)
    arguments = (size, weights, biases)
    out = ops.render(feat, *arguments, backend="triton", local_ensemble=ensemble)
    expected = ops.render(feat, *arguments, backend="reference", local_ensemble=ensemble)
    assert out.shape == (2, 3, *size)
    assert range_error(out, expected) <= (1e-13 if dtype == torch.float64 else 4e-3)


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_render_window_region_and_gradients(dtype, cell_decode):
    case = Case(batch=2, hidden=(24, 16), height=12, width=9, cell_decode=cell_decode)
    feat, _, _, weights, biases = random_problem(case, dtype, requires_grad=True)
    leaves = [feat, *weights, *biases]
    place = {"window": (11, 6, 9, 8), "feat_region": (2, 1, 12, 9), "cell": (0.3, 0.2), "cell_decode": cell_decode}
    results = []
    for backend, recompute in (("reference", False), ("triton", False), ("triton", True)):
        out = ops.render(
            feat[:, :, 2:10, 1:8], (31, 20), weights, biases, backend=backend, recompute=recompute, **place
        )
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for expected, *others in zip(*results, strict=True):
        for other in others:
            assert norm_error(other, expected) <= (1e-12 if dtype == torch.float64 else 4e-3)


@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_in_nan_out_and_only_there(ensemble, dtype):
    case = Case(hidden=(16, 16), local_ensemble=ensemble, queries=40)
    feat, coord, cell, weights, biases = random_problem(case, dtype)
    arguments = {"backend": "triton", "local_ensemble": ensemble}
    clean = ops.query(feat, coord, cell, weights, biases, **arguments)
    coord[0, 7, 0] = float("nan")
    coord[0, 9, 1] = float("nan")
    out = ops.query(feat, coord, cell, weights, biases, **arguments)
    assert out[0, [7, 9]].isnan().all()
    rest = [q for q in range(40) if q not in (7, 9)]
    assert torch.equal(out[0, rest], clean[0, rest])
    coord[0, :6, 0] = torch.tensor([1e30, -1e30, 3e9, -3e9, float("inf"), -float("inf")])
    assert ops.query(feat, coord, cell, weights, biases, **arguments).shape == (1, 40, 3)


@pytest.mark.parametrize("operands", [torch.float32, torch.float16], ids=str)
def test_opcheck(operands):
    case = Case(batch=2, hidden=(8, 8), queries=9)
    feat, coord, cell, weights, biases = random_problem(case, torch.float32, requires_grad=True)
    latent_map = ops.fold(feat, weights[0]).detach().requires_grad_()
    geometry = weights[0][:, -4:].detach().requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    hidden, layers = list(weights[1:]), list(biases)
    how = (True, operands, True, True, "triton")
    torch.library.opcheck(library.query, (latent_map, coord, cell, geometry, hidden, layers, *how), test_utils=tests)
    grid = [4, 5, 0, 0, 4, 5, 0, 0, 5, 7]
    how = (grid, [0.1, 0.2], True, operands, True, "triton")
    torch.library.opcheck(library.render, (latent_map, geometry, hidden, layers, *how), test_utils=tests)
    torch.library.opcheck(library.gather, (feat, coord, cell, True, True, "triton"), test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic):
    case = Case(hidden=(16,), queries=20)
    feat, coord, cell, weights, biases = random_problem(case, torch.float16, requires_grad=True)

    def decode(feat, coord, cell):
        return ops.query(feat * 2, coord, cell, weights, biases) + 1

    compiled = torch.compile(decode, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for _ in range(2):
        out, expected = compiled(feat, coord, cell), decode(feat, coord, cell)
        assert torch.equal(out, expected)
        grads = [torch.autograd.grad(value.float().sum(), [feat, weights[0]]) for value in (out, expected)]
        assert all(norm_error(a, b) <= 1e-3 for a, b in zip(*grads, strict=True))
        coord, cell = coord[:, :13], cell[:, :13]
