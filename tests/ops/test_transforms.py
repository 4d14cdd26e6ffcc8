"""PyTorch's transforms and tracers through the ops: right without a backend's name, refused where one is named."""

from __future__ import annotations

import io

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from liif_fast import ops
from liif_fast.models import LIIF
from liif_fast.ops import backends
from tests.helpers import Case, norm_error, random_problem
from tests.ops.test_metasr import problem as metasr_problem

CASE = Case(channels=2, height=3, width=4, queries=20, hidden=(8, 8), outs=2)


def leaves():
    """[feat, coord, cell, *weights, *biases] in float64, coordinates away from borders between latents."""
    feat, coord, cell, weights, biases = random_problem(CASE, torch.float64)
    row, col = ((index + 0.21) / size * 2 - 1 for index, size in ((torch.arange(20) % 3, 3), (torch.arange(20) % 4, 4)))
    return [feat, torch.stack([row, col], -1)[None].to(coord).expand_as(coord), cell, *weights, *biases]


def metasr_leaves():
    tensors = metasr_problem(torch.float64, batch=1, size=(3, 4), queries=5)
    tensors[1].mul_(0.6).add_(0.013)
    return tensors


def functions(backend=None):
    """name -> (function of tensors, its tensors, which of them are differentiated)."""
    points, metasr = leaves(), metasr_leaves()
    blend = [torch.rand(shape, dtype=torch.float64) for shape in ((1, 5, 4, 2), (1, 5, 4))]

    def render(feat, *layers):
        return ops.render(feat, (7, 9), layers[:3], layers[3:], window=(1, 2, 5, 6), backend=backend)

    def decode(latent_map, coord, cell, geometry, term, *layers):
        weights, biases = layers[:2], layers[2:]
        options = {"coord": coord, "cell": cell, "query_term": term, "backend": backend}
        return ops.decode(latent_map, geometry, weights, biases, **options)

    general = [ops.fold(points[0], points[3]), *points[1:3], points[3][:, -4:].clone(), torch.rand(1, 20, 8).double()]
    return {
        "decode": (decode, [*general, *points[4:]]),
        "gather": (lambda *t: ops.gather(*t, backend=backend)[0], points[:3]),
        "weights": (lambda *t: ops.gather(*t, backend=backend)[1], points[:3]),
        "ensemble": (lambda *t: ops.ensemble(*t, backend=backend), blend),
        "query": (lambda *t: ops.query(*t[:3], t[3:6], t[6:], backend=backend), points),
        "render": (render, [points[0], *points[3:]]),
        "metasr": (lambda *t: ops.metasr_query(*t[:3], t[3:5], t[5:], backend=backend), metasr),
    }


NAMES = ["decode", "gather", "weights", "ensemble", "query", "render", "metasr"]


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_the_difference_quotient(name):
    function, tensors = functions()[name]
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    step = 1e-6
    after, before = (function(*(t + s * d for t, d in zip(tensors, tangents))) for s in (step, -step))
    expected = (after - before) / (2 * step)
    value, tangent = jvp(function, tuple(tensors), tangents)
    assert norm_error(value, function(*tensors)) < 1e-12
    assert norm_error(tangent, expected) < 1e-6 and tangent.norm() > 1e-3
    with forward_ad.dual_level():
        function(*tensors)  # no tangent: the kernels run
        duals = [forward_ad.make_dual(tensor, each) for tensor, each in zip(tensors, tangents)]
        assert norm_error(forward_ad.unpack_dual(function(*duals)).tangent, expected) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_gradients(name):
    """By autograd twice, by torch.func twice, and forward over reverse: all of them against a difference quotient."""
    function, tensors = functions()[name]
    if name == "weights":  # they depend on the coordinates alone
        inner = function
        feat, *tensors = tensors

        def function(coord, cell):
            return inner(feat, coord, cell)

    def loss(first, *others):
        return function(first, *others).square().sum()

    direction, step = torch.randn_like(tensors[0]), 1e-5
    quotient = (grad(loss)(tensors[0] + step * direction, *tensors[1:])
                - grad(loss)(tensors[0] - step * direction, *tensors[1:])) / (2 * step)  # fmt: skip
    leaf = tensors[0].clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(leaf, *tensors[1:]), leaf, create_graph=True)
    (plain,) = torch.autograd.grad(loss(leaf, *tensors[1:]), leaf)
    assert norm_error(once, plain) < 1e-12 and norm_error(grad(loss)(*tensors), plain) < 1e-12
    (twice,) = torch.autograd.grad((once * direction).sum(), leaf, allow_unused=True)
    if quotient.norm() < 1e-6:  # linear
        assert twice is None or twice.norm() < 1e-9
        return
    assert norm_error(twice, quotient) < 1e-5
    forward = jvp(lambda first: grad(loss)(first, *tensors[1:]), (tensors[0],), (direction,))[1]
    assert norm_error(forward, quotient) < 1e-5
    if name == "ensemble":
        square = hessian(loss)(*tensors).flatten(4).flatten(0, 3)
        assert norm_error(square @ direction.flatten(), quotient.flatten()) < 1e-5


@pytest.mark.one_isa
def test_a_backward_of_every_backend_is_differentiable(backend):
    """With create_graph=True the gradients come from PyTorch's calls, whatever computed the values."""
    name, small = backend.op_backend, CASE._replace(hidden=(16, 16), queries=6)
    feat, coord, cell, weights, biases = random_problem(small, torch.float32)
    tensors = [t.to(backend.device).requires_grad_() for t in (feat, coord, cell, *weights, *biases)]

    def gradients(which):
        out = ops.query(
            *tensors[:3], tensors[3:6], tensors[6:], latent_map=ops.fold(tensors[0], tensors[3]), backend=which
        )
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum((each * each).sum() for each in first), tensors)

    for found, expected in zip(gradients(name), gradients("torch")):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name):
    function, tensors = functions()[name]
    several = [torch.stack([tensor, tensor * 0.9, tensor * 1.01]) for tensor in tensors]
    expected = torch.stack([function(*(tensor[index] for tensor in several)) for index in range(3)])
    torch.testing.assert_close(vmap(function)(*several), expected, rtol=1e-9, atol=1e-9)
    only_first = [several[0], *(tensor for tensor in tensors[1:])]
    expected = torch.stack([function(each, *tensors[1:]) for each in several[0]])
    found = vmap(function, in_dims=(0, *[None] * (len(tensors) - 1)))(*only_first)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_functional_call_and_gradients_per_sample():
    model = LIIF({"name": "edsr-baseline", "args": {"no_upsampling": True, "n_resblocks": 1, "n_feats": 4}},
                 {"name": "mlp", "args": {"out_dim": 3, "hidden_list": [16]}}).double()  # fmt: skip
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    inp = torch.rand(2, 3, 5, 6, dtype=torch.float64)
    coord, cell = torch.rand(2, 40, 2, dtype=torch.float64) - 0.5, torch.full((2, 40, 2), 0.1, dtype=torch.float64)
    doubled = {name: tensor * 2 for name, tensor in state.items()}
    model.load_state_dict(doubled)
    expected = model(inp, coord, cell)
    model.load_state_dict(state)
    torch.testing.assert_close(functional_call(model, doubled, (inp, coord, cell)), expected)

    def loss(parameters, *sample):
        return functional_call(model, parameters, tuple(each[None] for each in sample)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(state, inp, coord, cell)
    for index in range(2):
        trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
        out = model(*(each[index : index + 1] for each in (inp, coord, cell)))
        for name, each in zip(trained, torch.autograd.grad(out.square().sum(), list(trained.values()))):
            torch.testing.assert_close(found[name][index], each, rtol=1e-8, atol=1e-8)


def test_a_traced_render_is_the_same_after_saving():
    feat, _, _, *layers = leaves()
    file = io.BytesIO()

    def render(feat):
        return ops.render(feat, (7, 9), layers[:3], layers[3:])

    torch.jit.save(torch.jit.trace(render, (feat,)), file)
    file.seek(0)
    other = torch.rand_like(feat)
    torch.testing.assert_close(torch.jit.load(file)(other), render(other))


def test_the_meta_device_has_shapes():
    for name, (function, tensors) in functions().items():
        out = function(*(tensor.to("meta") for tensor in tensors))
        assert out.is_meta and out.shape == function(*tensors).shape, name
        assert out.dtype == torch.float64


@pytest.mark.one_isa
def test_a_named_backend_of_kernels_is_refused(backend):
    name = backend.op_backend
    if name == "torch":
        pytest.skip("it runs under every transform")
    sentence = f"backend '{name}' has no rules for forward-mode AD, torch.func and torch.jit.trace: use 'torch'"
    for function, tensors in functions(name).values():
        tensors = [tensor.float().to(backend.device) for tensor in tensors]
        with pytest.raises(RuntimeError, match=sentence):
            jvp(function, tuple(tensors), tuple(torch.ones_like(tensor) for tensor in tensors))
        with pytest.raises(RuntimeError, match=sentence):
            vmap(function)(*(tensor[None] for tensor in tensors))
        with pytest.raises(RuntimeError, match=sentence):
            grad(lambda *t, run=function: run(*t).sum())(*tensors)
        with pytest.raises(RuntimeError, match=sentence):
            torch.jit.trace(function, tuple(tensors))


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_a_named_backend_of_kernels_refuses_the_meta_device(name):
    for function, tensors in functions(name).values():
        with pytest.raises(RuntimeError, match=f"backend '{name}' takes .*, these are on 'meta'"):
            function(*(tensor.to("meta") for tensor in tensors))


@pytest.mark.one_isa
def test_an_exported_program_takes_few_queries_and_many(backend):
    """No guard compares the number of queries with the size of the map."""
    feat, coord, cell, weights, biases = random_problem(CASE._replace(hidden=(16, 16)), torch.float32)
    feat, coord, cell, *layers = (t.to(backend.device) for t in (feat, coord, cell, *weights, *biases))

    class Decoder(torch.nn.Module):
        def forward(self, feat, coord, cell):
            return ops.query(feat, coord, cell, layers[:3], layers[3:], backend=backend.op_backend)

    queries = torch.export.Dim("queries", min=2)
    shapes = {"feat": None, "coord": {1: queries}, "cell": {1: queries}}
    program = torch.export.export(Decoder(), (feat, coord, cell), dynamic_shapes=shapes).module()
    for count in (2, 7, 20):
        expected = ops.query(feat, coord[:, :count], cell[:, :count], layers[:3], layers[3:], backend="reference")
        torch.testing.assert_close(program(feat, coord[:, :count], cell[:, :count]), expected, rtol=1e-4, atol=1e-5)


def test_a_symbolic_trace_does_not_compare_queries_with_the_map():
    function, (feat, coord, cell, *layers) = functions("torch")["query"]
    feat = feat.repeat(1, 1, 7, 11)
    traced = make_fx(function, tracing_mode="symbolic")(feat, coord[:, :5], cell[:, :5], *layers)
    assert not [guard for guard in traced.shape_env.guards if "4*" in str(guard.expr)]
    torch.testing.assert_close(traced(feat, coord, cell, *layers), function(feat, coord, cell, *layers))


def test_the_table_ends_with_pytorchs_calls(monkeypatch):
    for name in ("cuda", "triton", "cpu"):
        monkeypatch.setitem(backends.BACKENDS, name, lambda *_, **__: False)
    assert backends.choose(backends.OpRequest("decode", "cpu", torch.float32, (64, 256, 3))) == "torch"
