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


def run(case, mode, tensors, **options):
    weights = [tensor for name, tensor in tensors.items() if name.startswith("weight")]
    biases = [tensor for name, tensor in tensors.items() if name.startswith("bias")]
    if mode == "points":
        options |= {"coord": tensors["coord"], "cell": tensors.get("cell")}
    elif mode == "grid":
        options |= {"size": case.size, "window": case.window}
    else:
        options |= {"size": case.size, "window": case.window, "source": (-0.7, 1.3, 4.4, 8.9)}
    options |= {"query_term": tensors.get("term"), "local_ensemble": case.local_ensemble}
    return ops.decode(tensors["latent_map"], tensors["geometry"], weights, biases, **options)


def with_gradients(out, tensors):
    probe = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    grads = torch.autograd.grad(out, list(tensors.values()), probe.to(out.dtype), allow_unused=True)
    zeros = (torch.zeros_like(tensor) if grad is None else grad for grad, tensor in zip(grads, tensors.values()))
    return [out, *zeros]


def reason_against(backend, case, mode, term):
    extras = (*(["a query term"] if term else []), *(["a source window"] if mode == "source" else []))
    widths = (*case.hidden, case.outs)
    request = backends.OpRequest("decode", backend.device, torch.float32, widths, extras=extras)
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
            run(case, mode, tensors, backend=backend.op_backend)
        return
    wide = problem(case, mode, torch.float64, term)
    for key, tensor in wide.items():  # the same numbers
        tensor.data.copy_(tensors[key])
    found = with_gradients(run(case, mode, tensors, backend=backend.op_backend), tensors)
    expected = with_gradients(run(case, mode, wide, backend="reference"), wide)
    assert found[0].shape == expected[0].shape and found[0].dtype == torch.float32
    assert range_error(found[0], expected[0]) <= LIMITS[torch.float32, "result"]
    for key, grad, exact in zip(tensors, found[1:], expected[1:]):
        assert norm_error(grad, exact) <= 5 * LIMITS[torch.float32, "gradient"], key
    with torch.no_grad():
        assert range_error(run(case, mode, tensors, backend=backend.op_backend), expected[0]) <= 1e-4
    again = with_gradients(run(case, mode, tensors, backend=backend.op_backend, recompute=True), tensors)
    for one, other in zip(found, again):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
