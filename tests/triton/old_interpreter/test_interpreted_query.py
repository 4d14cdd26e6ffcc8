"""Triton's query under the interpreter, forward and backward, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from liif_fast import ops
from liif_fast.ops import registration as library
from liif_fast.ops.backends.triton import decode as triton_query
from liif_fast.ops.backends.triton import launch as triton_launch
from liif_fast.ops.backends.triton import layerwise as triton_layers
from tests.helpers import FLAGS, SHAPES, Case, as_float64, norm_error, random_problem
from tests.ops.rounded_model import rounded_query
from tests.triton.interpreter.checks import KINDS, check, check_rounded, dtype_of, operands, problem, run


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
