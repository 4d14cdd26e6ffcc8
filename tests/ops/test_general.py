"""`decode` of any latent map, with query terms, at coordinates and on grids: every backend against float64."""

from __future__ import annotations

import re

import pytest
import torch

from liif_fast import ops
from liif_fast.ops import backends
from tests.helpers import Case, norm_error, random_problem, range_error
from tests.ops.tolerances import LIMITS

CASES = {
    "plain": Case(batch=2, hidden=(16, 16), queries=50),
    "odd-widths": Case(hidden=(13, 37, 1), outs=4, queries=41, cell_decode=False),
    "one-corner": Case(batch=2, hidden=(24, 12), queries=30, local_ensemble=False),
    "linear": Case(hidden=(), outs=5, queries=30),
    "no-query": Case(hidden=(16, 16), queries=0),
    "many-outputs": Case(hidden=(32, 48), outs=100, queries=33),
    "wide": Case(hidden=(512, 320), outs=3, queries=20),
}


def problem(case, mode, dtype, term=True):
    """(positional tensors as a flat list, options) of `decode`."""
    feat, coord, cell, weights, biases = random_problem(case, dtype)
    latent_map = ops.fold(feat.double(), weights[0].double()).to(dtype)
    tensors = {"latent_map": latent_map, "geometry": weights[0][:, -(4 if case.cell_decode else 2) :]}
    for number, weight in enumerate(weights[1:]):
        tensors[f"weight{number}"] = weight
    for number, bias in enumerate(biases):
        tensors[f"bias{number}"] = bias
    generator = torch.Generator().manual_seed(3)
    if mode == "points":
        tensors |= {"coord": coord, **({"cell": cell} if case.cell_decode else {})}
        shape = (case.batch, case.queries, latent_map.shape[-1])
    else:
        shape = (case.batch, latent_map.shape[-1], *case.window[2:])
    if term:
        tensors["term"] = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def on(backend):
    """Where `run` decodes."""
    return {"backend": backend.op_backend, "device": backend.device}


def run(case, mode, tensors, *, device="cpu", **options):
    """The decode of tensors on the CPU, on a device."""
    tensors = {name: tensor if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
    weights = [tensor for name, tensor in tensors.items() if name.startswith("weight")]
    biases = [tensor for name, tensor in tensors.items() if name.startswith("bias")]
    if mode == "points":
        options |= {"coord": tensors["coord"], "cell": tensors.get("cell")}
    elif mode == "grid":
        options |= {"size": case.size, "window": case.window}
    else:
        options |= {"size": case.size, "window": case.window, "source": (-0.7, 1.3, 4.4, 8.9)}
    options |= {"query_term": tensors.get("term"), "local_ensemble": case.local_ensemble}
    return ops.decode(tensors["latent_map"], tensors["geometry"], weights, biases, **options).cpu()


def with_gradients(out, tensors):
    probe = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    grads = torch.autograd.grad(out, list(tensors.values()), probe.to(out.dtype), allow_unused=True)
    zeros = (torch.zeros_like(tensor) if grad is None else grad for grad, tensor in zip(grads, tensors.values()))
    return [out, *zeros]


def reason_against(backend, case, mode, term, dtype=torch.float32):
    widths = (*case.hidden, case.outs)
    request = backends.OpRequest("decode", backend.device, dtype, widths, has_query_term=term)
    try:
        backends.BACKENDS[backend.op_backend](request, raise_error=True)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("term", [True, False], ids=["term", "no-term"])
@pytest.mark.parametrize("mode", ["points", "grid", "source"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_forward_and_backward(backend, name, mode, term):
    case = CASES[name]
    tensors = problem(case, mode, torch.float32, term)
    if reason := reason_against(backend, case, mode, term):
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            run(case, mode, tensors, **on(backend))
        return
    wide = problem(case, mode, torch.float64, term)
    for key, tensor in wide.items():  # the same numbers
        tensor.data.copy_(tensors[key])
    found = with_gradients(run(case, mode, tensors, **on(backend)), tensors)
    expected = with_gradients(run(case, mode, wide, backend="reference"), wide)
    assert found[0].shape == expected[0].shape and found[0].dtype == torch.float32
    assert range_error(found[0], expected[0]) <= LIMITS[torch.float32, "result"]
    for key, grad, exact in zip(tensors, found[1:], expected[1:]):
        assert norm_error(grad, exact) <= 5 * LIMITS[torch.float32, "gradient"], key
    with torch.no_grad():
        assert range_error(run(case, mode, tensors, **on(backend)), expected[0]) <= 1e-4
    again = with_gradients(run(case, mode, tensors, **on(backend), recompute=True), tensors)
    for one, other in zip(found, again):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


SOURCES = ((1.25, 2.5, 3.3, 2.75), (-2.0, -1.5, 5.0, 13.7), (9.0, 4.0, 2.0, 20.0), (0, 0, 8, 9))


@pytest.mark.hopper
@pytest.mark.one_isa
@pytest.mark.parametrize("size", [(11, 14), (24, 27)])  # of the latter, pixels lie on latents and between two
def test_every_pixel_of_a_source_window_reads_its_own_latent(backend, size):
    """The same as in PyTorch's calls: layers that pass the latent's number through, which bfloat16 holds exactly."""
    one = torch.eye(16, dtype=torch.bfloat16, device=backend.device)
    latent_map = (torch.arange(72.0).view(1, 8, 9, 1) * torch.eye(16)[0]).to(one)
    layers = one.new_zeros(16, 4), [one, one[:1]], [one.new_zeros(16), one.new_zeros(16), one.new_zeros(1)]
    for source in (None, *SOURCES):
        options = {"size": size, "source": source, "local_ensemble": False}
        if source and (reason := reason_against(backend, Case(hidden=(16, 16)), "source", False)):
            pytest.skip(reason)
        found = ops.decode(latent_map, *layers, **options, backend=backend.op_backend)
        expected = ops.decode(latent_map, *layers, **options, backend="torch")
        assert torch.equal(found, expected) and expected.unique().numel() > 3


@pytest.mark.parametrize("unfold", [True, False], ids=["unfold", "plain"])
def test_a_source_window_is_query_at_its_float64_centers(backend, unfold):
    """Sub-pixel windows inside, across and beyond the border; of a part of the features too."""
    case = Case(batch=2, height=8, width=9, hidden=(16, 16), feat_unfold=unfold)
    feat, _, _, weights, biases = random_problem(case, torch.float64)
    size, window = (11, 14), (2, 3, 6, 9)

    def render(feat, **options):
        layers = ([tensor.to(backend.device) for tensor in each] for each in (weights, biases))
        options |= {"feat_unfold": unfold, "backend": backend.op_backend}
        return ops.render(feat.to(backend.device), size, *layers, **options).cpu()

    for source in SOURCES:
        if reason := reason_against(backend, case, "source", False, torch.float64):
            with pytest.raises(RuntimeError, match=re.escape(reason)):
                render(feat, window=window, source=source)
            return
        steps = [source[2 + axis] / size[axis] for axis in (0, 1)]
        rows, cols = (
            2 * (source[axis] + (torch.arange(window[2 + axis]) + window[axis] + 0.5).double() * steps[axis]) / side - 1
            for axis, side in enumerate((8, 9))
        )
        coord = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).view(1, -1, 2).expand(2, -1, 2)
        cell = coord.new_tensor([2 * steps[0] / 8, 2 * steps[1] / 9]).expand(coord.shape)
        expected = ops.reference.query(feat, coord, cell, weights, biases, feat_unfold=unfold)
        expected = expected.transpose(1, 2).unflatten(2, window[2:])
        assert range_error(render(feat, window=window, source=source), expected) < 1e-11
    assert range_error(render(feat, window=window), expected) < 1e-11  # the last source is the whole map
    options = {"source": (3.5, 2.5, 2.0, 3.0)}
    expected = render(feat, **options)
    options["feat_region"] = (2, 1, 8, 9)
    assert range_error(render(feat[:, :, 2:7, 1:7], **options), expected) < 1e-11
    with pytest.raises(ValueError, match="the window needs feature rows"):
        render(feat[:, :, 2:5, 1:7], **options)


@pytest.mark.one_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sixteen_bits_and_autocast(backend, dtype):
    case = Case(batch=2, hidden=(32, 32), queries=60)
    tensors = problem(case, "points", torch.float32, not reason_against(backend, case, "points", True))
    exact = run(case, "points", tensors, backend="reference")
    layers = {name: t if name in ("coord", "cell", "latent_map") else t.to(dtype) for name, t in tensors.items()}
    found = [run(case, "points", layers, **on(backend))]  # a float32 map under layers of 16 bits
    found.append(run(case, "points", {**layers, "latent_map": tensors["latent_map"].to(dtype)}, **on(backend)))
    with torch.autocast(backend.device, dtype):
        found.append(run(case, "points", tensors, **on(backend)))
    assert [out.dtype for out in found] == [dtype, dtype, torch.float32]
    assert all(range_error(out, exact) < 0.03 for out in found)


def test_query_and_render_are_decodes_of_the_folded_map():
    feat, coord, cell, weights, biases = random_problem(Case(hidden=(16, 16)), torch.float32)
    latent_map, others = ops.fold(feat, weights[0]), (weights[0][:, -4:], weights[1:], biases)
    found = ops.decode(latent_map, *others, coord=coord, cell=cell)
    assert torch.equal(found, ops.query(feat, coord, cell, weights, biases, latent_map=latent_map))
    options = {"window": (1, 2, 5, 6), "cell": (0.1, 0.2)}
    found = ops.decode(latent_map, *others, size=(9, 11), **options)
    assert torch.equal(found, ops.render(feat, (9, 11), weights, biases, **options))


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"latent_map": torch.rand(1, 3, 16)}, r"latent_map must be \[B, H, W, K\]"),
        (
            {"latent_map": torch.rand(1, 3, 4, 16).double()},
            "latent_map is torch.float64 but the layers are",
        ),
        ({"weight_geometry": torch.rand(16, 3)}, r"weight_geometry must be \[16, 2\] or \[16, 4\], got \(16, 3\)"),
        ({"weights": [torch.rand(3, 8)]}, r"weights\[0\] must be \[out, 16\], got \(3, 8\)"),
        ({"biases": [torch.rand(16)]}, "a bias for each of its 1 \\+ 1 layers, got 1"),
        ({"biases": [torch.rand(16), torch.rand(4)]}, r"biases\[1\] must be \[3\], got \(4,\)"),
        ({"size": (3, 4)}, "decode takes either coord or size"),
        ({"coord": None}, "decode takes either coord or size"),
        ({"coord": None, "size": (3, 4)}, "cell is a tensor, but on a grid it is"),
        ({"cell": None}, r"weight_geometry is \(16, 4\) but cell is no tensor"),
        ({"weight_geometry": torch.rand(16, 2)}, r"weight_geometry is \(16, 2\) but cell is given"),
        ({"query_term": torch.rand(1, 5, 8)}, r"query_term must be \(1, 5, 16\) on cpu, got \(1, 5, 8\)"),
        ({"coord": None, "cell": None, "size": (3, 4), "source": (0, 0, 0, 1)}, "source must be .* a positive height"),
        (
            {"coord": None, "cell": None, "size": (3, 4), "query_term": torch.rand(1, 12, 16)},
            r"must be \(1, 16, 3, 4\)",
        ),
    ],
)
def test_wrong_arguments_are_one_sentence(changes, error):
    arguments = {
        "latent_map": torch.rand(1, 3, 4, 16),
        "weight_geometry": torch.rand(16, 4),
        "weights": [torch.rand(3, 16)],
        "biases": [torch.rand(16), torch.rand(3)],
        "coord": torch.rand(1, 5, 2),
        "cell": torch.rand(1, 5, 2),
    }
    ops.decode(**arguments)
    with pytest.raises((ValueError, TypeError), match=error):
        ops.decode(**(arguments | changes))
