"""Triton's query and render under the interpreter, forward and backward, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import FLAGS, SHAPES, Case, as_float64, norm_error, random_problem, range_error
from rounded_model import rounded_query, to_tf32

from liif_fast import ops
from liif_fast.ops import library, triton_launch, triton_layers, triton_query

KINDS = ("float64", "float32", "tf32", "bfloat16", "float16")  # of operands
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Of a picture's range, to the reference in the same dtype.
RENDER_TOLERANCE = {"float64": 1e-13, "float32": 1e-5, "tf32": 2e-3, "bfloat16": 2e-2, "float16": 4e-3}


def dtype_of(kind: str) -> torch.dtype:
    return torch.float32 if kind == "tf32" else getattr(torch, kind)


@contextmanager
def operands(kind: str) -> Iterator[None]:
    """PyTorch's switch for float32 products, on for tf32."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def decode(case: Case, leaves: list[torch.Tensor], how, **arguments) -> torch.Tensor:
    """how: a backend's name, or what stands in for `ops.query`."""
    feat, coord, cell, *layers = leaves
    tensors = (feat, coord, cell, layers[: len(layers) // 2], layers[len(layers) // 2 :])
    if callable(how):
        return how(*tensors, **case.flags)
    return ops.query(*tensors, backend=how, **case.flags, **arguments)


def run(case: Case, leaves: list[torch.Tensor], how, **arguments) -> list[torch.Tensor]:
    """The decode and the gradient of every leaf."""
    out = decode(case, leaves, how, **arguments)
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


def check_layers(case: Case, dtype: torch.dtype, **arguments) -> None:
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


def check_rounded(case: Case, kind: str, leaves: list[torch.Tensor], **arguments) -> None:
    """The decode as near to float64 as PyTorch's own layers, at least half; gradients as of a model that rounds where
    the kernel does."""
    narrow = torch.float16 if kind == "tf32" else dtype_of(kind)  # of PyTorch's layers; TF32 has as many bits
    rounding = to_tf32 if kind == "tf32" else lambda values: values.to(narrow).float()
    results = run(case, leaves, "triton", **arguments)
    with torch.autocast("cpu", enabled=False):
        model = run(case, leaves, lambda *tensors, **flags: rounded_query(*tensors, rounding, edges=True, **flags))
        expected = decode(case, as_float64(leaves), "reference")
    with torch.autocast("cpu", narrow):
        plain = decode(case, [leaf.detach() for leaf in leaves], "reference")
    error = norm_error(results[0], expected)
    assert error <= 2 * norm_error(plain, expected)
    if case.queries and len(case.hidden) > 1:
        assert error > 1e-5  # it did round
    bound = (1e-2 if kind == "bfloat16" else 2e-3) * max(len(case.hidden) / 3, 1)
    for position, (result, right) in enumerate(zip(results, model, strict=True)):
        assert result.dtype == (leaves[position - 1] if position else leaves[0]).dtype
        if right.norm() > 1e-6:
            assert norm_error(result, right) <= bound, position


def check(case: Case, kind: str, **arguments) -> None:
    """The decode and every gradient, against float64 or what that is when operands are rounded."""
    dtype = dtype_of(kind)
    with operands(kind):
        if kind in ("float64", "float32"):
            check_exact(case, dtype, **arguments)
        elif triton_query.is_fused((*case.hidden, case.outs), dtype):
            check_rounded(case, kind, problem(case, dtype), **arguments)
        elif kind == "tf32":  # layer by layer PyTorch multiplies, which rounds to TF32 on a GPU only
            check_exact(case, dtype, **arguments)
        else:
            check_layers(case, dtype, **arguments)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_model_that_rounds_is_the_reference_but_for_that(flags):
    ensemble, unfold, cell = flags
    case = Case(batch=2, hidden=(20, 12), queries=40, local_ensemble=ensemble, feat_unfold=unfold, cell_decode=cell)
    leaves = problem(case, torch.float32)
    same = run(case, leaves, lambda *tensors, **how: rounded_query(*tensors, torch.clone, edges=True, **how))
    for result, expected in zip(same, run(case, as_float64(leaves), "reference"), strict=True):
        assert norm_error(result, expected) <= 1e-5 or expected.norm() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "paper-width"])
def test_every_shape(shape, kind):
    check(SHAPES[shape]._replace(queries=min(SHAPES[shape].queries, 80)), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_flag(flags, kind):
    ensemble, unfold, cell = flags
    case = Case(batch=2, hidden=(20, 12), queries=11, local_ensemble=ensemble, feat_unfold=unfold, cell_decode=cell)
    check(case, kind)
    check(case, kind, recompute=True)


@pytest.mark.parametrize("hidden", [(40,), (70, 100), (112, 30)], ids=str)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_memory_holds_fewer_columns_than_a_tile(hidden, kind):
    assert triton_launch.padded_width(max(hidden)) < triton_launch.tile_width(max(hidden))
    check(Case(batch=2, hidden=hidden, queries=13), kind)


def test_what_is_fused():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert triton_query.is_fused((256, 13, 8), dtype) and triton_query.is_fused((1, 1), dtype)
        assert not any(triton_query.is_fused(widths, dtype) for widths in ((257, 3), (16, 9), (3,)))
    assert not triton_query.is_fused((16, 3), torch.float64)


def test_layer_by_layer_in_float32():
    case = Case(batch=2, hidden=(300, 12), queries=20)
    assert not triton_query.is_fused((*case.hidden, case.outs), torch.float32)
    check_exact(case, torch.float32)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("hidden", [(130,), (180, 100)], ids=str)  # three blocks of 64 columns
def test_widths_of_several_blocks(hidden, kind):
    check(Case(hidden=hidden, queries=16), kind)


def test_forward_and_backward_may_cut_a_layer_differently(monkeypatch):
    blocks = {"forward": 32, "save": 64, "backward": 128}
    settings = lambda problem, _: triton_launch.Settings(64, blocks[problem.kernel], 4, 2)  # noqa: E731
    monkeypatch.setattr(triton_query, "launch_settings", settings)
    case = Case(hidden=(120, 100), queries=16)
    check(case, "float16")
    check(case, "float32")
    blocks["save"], blocks["backward"] = 128, 64
    check(case, "float16")


def test_the_switch_for_tf32_may_move_between_forward_and_backward():
    case = Case(batch=2, hidden=(40, 24, 30), queries=20)
    leaves = problem(case, torch.float32)
    feat, coord, cell, *layers = leaves
    expected = torch.autograd.grad(ops.query(*leaves[:3], layers[:4], layers[4:], backend="reference").sum(), leaves)
    for recompute in (False, True):
        with operands("tf32"):
            out = ops.query(feat, coord, cell, layers[:4], layers[4:], backend="triton", recompute=recompute)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert all(norm_error(a, b) <= 1e-2 for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_the_papers_widths(kind):
    check(Case(hidden=(256, 256, 256), queries=16), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_wider_imnets_run_layer_by_layer(kind):
    check(Case(batch=2, hidden=(300, 12), queries=16), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_and_computing_again_agree_bit_for_bit(kind, monkeypatch):
    case = Case(batch=2, hidden=(20, 12), queries=24, height=3, width=4)
    leaves = problem(case, dtype_of(kind))
    torch.use_deterministic_algorithms(True)
    with operands(kind):
        check_that_runs_agree(case, leaves, monkeypatch)


def check_that_runs_agree(case: Case, leaves: list[torch.Tensor], monkeypatch) -> None:
    try:
        kept = run(case, leaves, "triton")
        again = run(case, leaves, "triton", recompute=True)
        monkeypatch.setattr(triton_query, "PIECE_BYTES", 20_000)
        monkeypatch.setattr(triton_layers, "PIECE_BYTES", 20_000)
        in_pieces = run(case, leaves, "triton", recompute=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    close = 4e-3 if leaves[0].dtype == torch.bfloat16 else 1e-3
    assert all(norm_error(a, b) <= close for a, b in zip(in_pieces, kept, strict=True))
    assert torch.equal(in_pieces[0], kept[0])
    by_atomics = run(case, leaves, "triton")
    assert all(norm_error(a, b) <= close for a, b in zip(by_atomics, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
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


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(dtype, flags):
    ensemble, unfold, cell = flags
    case = Case(hidden=(20, 12), queries=11, local_ensemble=ensemble, feat_unfold=unfold, cell_decode=cell)
    leaves = problem(case, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        check_rounded(case, str(dtype).removeprefix("torch."), leaves)


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


@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_nan_out_and_only_there(ensemble, kind):
    case = Case(hidden=(16, 16), local_ensemble=ensemble, queries=40)
    feat, coord, cell, weights, biases = random_problem(case, dtype_of(kind))
    arguments = {"backend": "triton", "local_ensemble": ensemble}
    with operands(kind):
        check_nan(feat, coord, cell, weights, biases, arguments)


def check_nan(feat, coord, cell, weights, biases, arguments) -> None:
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
