"""The ops inside PyTorch, on every backend: gradcheck, opcheck, torch.compile, autocast, any imnet."""

from __future__ import annotations

import pytest
import torch

from liif_fast import ops
from liif_fast.ops import backends, registration
from tests.helpers import Case, as_float64, norm_error, random_problem, range_error
from tests.ops.test_metasr import problem as metasr_problem

SMALL = Case(channels=2, height=3, width=4, queries=5, hidden=(16, 16), outs=2)


def problem_on(backend, case, dtype=torch.float32):
    """[feat, coord, cell, *weights, *biases], leaves on the backend's device."""
    feat, coord, cell, weights, biases = random_problem(case, dtype)
    return [t.to(backend.device).requires_grad_() for t in (feat, coord, cell, *weights, *biases)]


def mapped(leaves, name="cpu"):
    """What makes few queries take the fused decode."""
    return None if name == "reference" else ops.fold(leaves[0], leaves[3])


@pytest.mark.with_reference
@pytest.mark.one_isa
def test_gradcheck(backend):
    name = backend.op_backend
    if backend.name == "triton-interpreted":
        pytest.skip("gradcheck takes minutes under the interpreter; the gradients are compared with the reference's")
    leaves = problem_on(backend, SMALL._replace(hidden=(4, 3)), torch.float64)
    with torch.no_grad():  # away from the borders, where a difference quotient would step over a change of latent
        leaves[1].copy_(torch.tensor([[0.11, 0.23], [-0.41, 0.62], [0.55, -0.7], [-0.05, -0.3], [0.9, 0.8]]))
    inner = leaves[1].detach() * 0.7 + 0.013
    assert torch.autograd.gradcheck(
        lambda *t: ops.gather(*t, backend=name), (leaves[0], inner.requires_grad_(), leaves[2])
    )
    pred, area_weight = (torch.rand(*shape, device=backend.device).double() for shape in ((1, 3, 4, 2), (1, 3, 4)))
    blend = (pred.requires_grad_(), area_weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda *t: ops.ensemble(*t, backend=name), blend)
    tensors = [
        t.to(backend.device) for t in metasr_problem(torch.float64, batch=1, size=(2, 3), queries=3, hidden=3, outs=1)
    ]
    tensors[1].mul_(0.6).add_(0.013)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda *t: ops.metasr_query(*t[:3], t[3:5], t[5:], backend=name), tensors, fast_mode=True
    )
    if reason := backend.reason_against("decode", torch.float64):
        pytest.skip(reason)

    def query(*t):
        return ops.query(*t[:3], t[3:6], t[6:], latent_map=mapped(t, name), backend=name)

    def render(feat, *layers):
        return ops.render(feat, (5, 6), layers[:3], layers[3:], window=(1, 1, 3, 2), backend=name)

    assert torch.autograd.gradcheck(query, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(render, [leaves[0], *leaves[3:]], fast_mode=True)


def decode_arguments(leaves, mode):
    """Of the registered op: DecodeInputs' fields at coordinates or on a grid."""
    latent_map = ops.fold(leaves[0], leaves[3]).detach().requires_grad_()
    geometry = leaves[3][:, -4:].detach().requires_grad_()
    points, grid = (
        (leaves[1:3], ([], [])) if mode == "points" else ((None, None), ([6, 8, 0, 0, 4, 5, 0, 0, 3, 4], [0.3, 0.2]))
    )
    term = torch.rand(1, 20, 16, device=latent_map.device, requires_grad=True) if mode == "term" else None
    return latent_map, *points, geometry, leaves[4:6], leaves[6:], *grid, True, term


def require_registered(backend):
    if backend.op_backend == "torch":
        pytest.skip("PyTorch's own calls are no registered op")


@pytest.mark.one_isa
@pytest.mark.parametrize("mode", ["points", "grid", "term"])
@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck_of_decode(backend, mode, matmul_dtype):
    require_registered(backend)
    arguments = decode_arguments(problem_on(backend, SMALL), mode)
    for save in (True, False):
        tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
        if backend.op_backend == "cpu" and not save:  # saved activations have padding, which is not the same twice
            tests.append("test_aot_dispatch_dynamic")
        options = (matmul_dtype, save, mode == "points", backend.op_backend)
        torch.library.opcheck(registration.decode, (*arguments, *options), test_utils=tests)


@pytest.mark.one_isa
def test_opcheck_of_the_others(backend):
    require_registered(backend)
    feat, coord, cell, *_ = problem_on(backend, SMALL)
    name = backend.op_backend
    torch.library.opcheck(registration.gather, (feat, coord, cell, True, True, name))
    torch.library.opcheck(registration.gather, (feat, coord, None, False, False, name))
    shapes = ((1, 3, 4, 2), (1, 3, 4), (1, 3, 4, 15), (4, 3), (4,))
    pred, area_weight, latent_map, weight, bias = (
        torch.rand(shape, device=backend.device, requires_grad=True) for shape in shapes
    )
    torch.library.opcheck(registration.ensemble, (pred, area_weight, name))
    torch.library.opcheck(registration.metasr_query, (latent_map, coord, cell, weight, bias, [0, 0, 3, 4], name))


@pytest.mark.one_isa
def test_compile_does_not_change_the_result(backend):
    torch._dynamo.reset()
    name = backend.op_backend
    leaves = problem_on(backend, Case(queries=20, hidden=(16, 16)))

    def run(feat, coord, cell, *layers):
        x, area_weight = ops.gather(feat, coord, cell, backend=name)
        blended = ops.ensemble(x[..., :3], area_weight, backend=name)
        decoded = ops.query(feat * 2, coord, cell, layers[:3], layers[3:], backend=name)
        image = ops.render(feat, (4, 5), layers[:3], layers[3:], backend=name)
        return blended.sum() + (decoded + 1).square().sum() + image.square().sum()

    dynamic = name != "torch"  # PyTorch's own calls take minutes of symbolic shapes
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries in (20, 13) if dynamic else (20,):
        feat, coord, cell, *layers = leaves
        tensors = [feat, coord[:, :queries], cell[:, :queries], *layers]
        outs = [compiled(*tensors), run(*tensors)]
        torch.testing.assert_close(*outs)
        grads = [torch.autograd.grad(out, leaves) for out in outs]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.with_reference
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_keeps_coordinates_exact_and_returns_float32(backend, dtype):
    name, queries = backend.op_backend, 3000 if backend.every <= 3 else 60
    case = Case(height=40, width=40, queries=queries, hidden=(32, 32))
    feat, coord, cell, *layers = leaves = problem_on(backend, case)
    weights, biases = layers[:3], layers[3:]
    latent_map = None if queries > 1000 else ops.fold(feat, weights[0])
    exact = ops.query(feat, coord, cell, weights, biases, backend="reference")
    with torch.autocast(backend.device, dtype):
        trained = ops.query(feat, coord, cell, weights, biases, latent_map=latent_map, backend=name)
        with torch.no_grad():
            inferred = ops.query(feat, coord, cell, weights, biases, latent_map=latent_map, backend=name)
            image = ops.render(feat, (50, 60), weights, biases, window=(20, 20, 5, 6), backend=name)
        x, area_weight = ops.gather(feat, coord[:, :50], cell[:, :50], backend=name)
        blended = ops.ensemble(x[..., :2].to(dtype), area_weight, backend=name)
    assert all(result.dtype == torch.float32 for result in (trained, inferred, image, blended, area_weight))
    # 16-bit products, but no latent chosen differently. The CPU kernels round where the processor multiplies bfloat16.
    assert range_error(inferred, exact) < 0.05 and range_error(trained, exact) < 0.05
    if name != "cpu":
        assert range_error(inferred, exact) > 1e-5
    grads = torch.autograd.grad(trained.sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("hidden", [(24, 40), (), (512,)], ids=str)
def test_other_imnets_run_between_gather_and_ensemble(backend, hidden, monkeypatch):
    """Without a backend's name every imnet runs: where no kernel takes it, through PyTorch's layers."""

    def gathers_only(request, raise_error=False):
        return request.op in ("gather", "ensemble")

    for name in ("cuda", "triton", "cpu"):
        monkeypatch.setitem(
            backends.BACKENDS, name, gathers_only if name == backend.op_backend else lambda *_, **__: False
        )
    leaves = problem_on(backend, Case(queries=30, hidden=hidden))
    layers = len(hidden) + 1
    feat, coord, cell, *rest = leaves
    weights, biases = rest[:layers], rest[layers:]
    wide = as_float64(leaves)
    expected = ops.reference.query(*wide[:3], wide[3 : 3 + layers], wide[3 + layers :])
    assert range_error(ops.query(feat, coord, cell, weights, biases), expected) <= 1e-5
    image = ops.render(feat, (9, 12), weights, biases, window=(2, 3, 4, 5))
    whole = ops.render(feat, (9, 12), weights, biases, window=(2, 3, 4, 5), backend="reference")
    assert norm_error(image, whole) <= 1e-5


@pytest.mark.with_reference
def test_an_empty_window(backend):
    feat, _, _, *layers = problem_on(backend, SMALL)
    image = ops.render(feat, (8, 9), layers[:3], layers[3:], window=(0, 0, 0, 9), backend=backend.op_backend)
    assert image.shape == (1, 2, 0, 9)
    assert not any(grad.any() for grad in torch.autograd.grad(image.sum(), [feat, *layers]))
