"""Training with bfloat16 operands on the CPU: products by AVX-512-BF16, everything else in float32.

`rounded_query` says what is rounded where; how far that may be from the truth, PyTorch's own autocast tells.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.rounded_model import rounded_query
from liif_fast import ops
from tests.helpers import FLAGS, SHAPES, Case, as_float64, norm_error, random_problem, reason_against


def _against() -> str:
    """Why nothing in here can run; '' where it can."""
    if reason := reason_against("cpu", "query", torch.float32):
        return reason
    return "" if torch.ops.liif_fast_C.cpu_has_bf16() else "this processor has no AVX-512-BF16"


pytestmark = pytest.mark.skipif(bool(_against()), reason=_against())

SEEDS = 8  # in small imnets a single ReLU that turns round decides which of two 16-bit results is the better one

CASES = {
    **SHAPES,
    # Rows, layers and what is left of a register tile are odd at once.
    "odd-rows": Case(batch=3, hidden=(37, 45, 33), queries=77),
    **{
        "".join("-euc"[i + 1] for i in range(3) if not flags[i]) or "full": Case(2, 3, 5, 7, 129, (20, 12), 3, *flags)
        for flags in FLAGS
    },
}
# Those that multiply; not the one with a layer of one channel, whose ReLU decides about the whole gradient.
JUDGED = [name for name, case in CASES.items() if case.queries and len(case.hidden) > 1 and min(case.hidden) > 1]


def to_bf16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def probe_like(out: Tensor) -> Tensor:
    return torch.rand(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 0.5


def backward(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """[out, *gradients], zeros where there is no gradient."""
    grads = torch.autograd.grad(out, leaves, probe_like(out).to(out.dtype), allow_unused=True)
    return [out, *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True))]


def trained(case: Case, seed: int = 0, backend: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Leaves of a float32 problem, and the autocast query's result with all gradients."""
    feat, coord, cell, weights, biases = random_problem(case, torch.float32, seed, requires_grad=True)
    leaves = [feat, coord, cell, *weights, *biases]
    # Made before, so that few queries take the fused path too.
    latent_map = ops.fold(feat, weights[0], feat_unfold=case.feat_unfold) if backend == "cpu" else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.query(feat, coord, cell, weights, biases, latent_map=latent_map, backend=backend, **case.flags)
    return leaves, backward(out, leaves)


def split(case: Case, leaves: list[Tensor]) -> tuple[Any, ...]:
    layers = len(case.hidden) + 1
    return *leaves[:3], leaves[3 : 3 + layers], leaves[3 + layers :]


@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_operands_and_nothing_else_are_rounded(name, ensemble):
    case = CASES[name]._replace(local_ensemble=ensemble)
    leaves, results = trained(case)
    if len(case.hidden) > 1:
        out = rounded_query(*split(case, leaves), to_bf16, edges=False, **case.flags)
        tolerance = 1e-3  # a sum that ends on the other side of a bfloat16 boundary moves one operand by a part in 256
    else:  # first and last layer only
        out = ops.query(*split(case, leaves), backend="reference", **case.flags)
        tolerance = 1e-5
    expected = backward(out, leaves)
    for position, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert result.dtype == torch.float32
        if wanted.norm() < 1e-9:
            assert result.norm() < 1e-4, position
        else:
            assert norm_error(result, wanted) <= tolerance, position


@pytest.mark.parametrize("name", JUDGED)
def test_no_worse_than_autocast_of_pytorch(name):
    """Squares of the relative errors, of results and every gradient, added up over problems."""
    case = CASES[name]
    ours, plain = torch.zeros(2, 4 + 2 * (len(case.hidden) + 1), dtype=torch.float64)
    for seed in range(SEEDS):
        leaves, results = trained(case, seed)
        _, plain_results = trained(case, seed, "reference")
        exact = as_float64(leaves)
        expected = backward(ops.query(*split(case, exact), backend="reference", **case.flags), exact)
        for errors, judged in ((ours, results), (plain, plain_results)):
            for position, (result, wanted) in enumerate(zip(judged, expected, strict=True)):
                if wanted.norm() >= 1e-9:
                    errors[position] += norm_error(result, wanted) ** 2
    assert ours[0] <= plain[0]  # bfloat16's features, first and last layer are not rounded here
    assert (ours.sqrt() <= 2 * plain.sqrt()).all(), (ours / plain).sqrt()


def test_operands_are_rounded_at_all_and_only_where_the_processor_multiplies_them(isa):
    case = SHAPES["paper-width"]
    _, results = trained(case)
    feat, coord, cell, weights, biases = random_problem(case, torch.float32, requires_grad=True)
    leaves = [feat, coord, cell, *weights, *biases]
    latent_map = ops.fold(feat, weights[0])
    in_float32 = backward(ops.query(feat, coord, cell, weights, biases, latent_map=latent_map, backend="cpu"), leaves)
    same = [torch.equal(a, b) for a, b in zip(results, in_float32, strict=True)]
    assert not any(same[:-1]) if isa == "avx512" else all(same)


@pytest.mark.parametrize("which", ["coord", "cell", "neither"])
def test_gradients_do_not_depend_on_what_else_is_differentiated(which):
    case = Case(batch=2, hidden=(20, 12))
    leaves, (_, *expected) = trained(case)
    points = {"coord": leaves[1], "cell": leaves[2]}
    for name, tensor in points.items():
        tensor.requires_grad_(name == which)
    feat, coord, cell, weights, biases = split(case, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent_map = ops.fold(feat.double(), weights[0].double()).float()
        out = ops.query(feat, coord, cell, weights, biases, latent_map=latent_map, backend="cpu")
    wanted = [position for position, leaf in enumerate(leaves) if leaf.requires_grad]
    _, *grads = backward(out, [leaves[position] for position in wanted])
    for grad, position in zip(grads, wanted, strict=True):
        assert norm_error(grad, expected[position]) <= 1e-3, position


def test_render_is_trained_like_query():
    case = Case(batch=2, hidden=(24, 45))
    feat, _, _, weights, biases = random_problem(case, torch.float32, requires_grad=True)
    leaves = [feat, *weights, *biases]
    window, size = (3, 1, 11, 17), (16, 19)
    rows, columns = ((torch.arange(count) + 0.5) * 2 / count - 1 for count in size)
    coord = torch.tensor(
        list(itertools.product(rows[window[0] : window[0] + window[2]], columns[window[1] : window[1] + window[3]]))
    )
    coord = coord.expand(2, -1, -1)
    cell = torch.tensor([2 / size[0], 2 / size[1]]).expand_as(coord)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = ops.render(feat, size, weights, biases, window=window, backend="cpu")
        out = ops.query(feat, coord, cell, weights, biases, backend="cpu")
    results = backward(image.flatten(2).transpose(1, 2), leaves)
    for result, expected in zip(results, backward(out, leaves), strict=True):
        assert norm_error(result, expected) <= 1e-3


def test_a_bfloat16_map_is_trained_with_the_activations_of_its_forward():
    """Whoever hands in a rounded map gets the gradient of just that map's decode."""
    case = SHAPES["odd-widths"]
    feat, coord, cell, weights, biases = random_problem(case, torch.bfloat16)
    latent_map = ops.fold(feat, weights[0]).requires_grad_()
    wide_map = latent_map.detach().float().requires_grad_()
    out, wide = (
        ops.query(feat, coord, cell, weights, biases, latent_map=each, backend="cpu") for each in (latent_map, wide_map)
    )
    assert torch.equal(out, wide)
    grad, wide_grad = (torch.autograd.grad(o.sum(), m)[0] for o, m in ((out, latent_map), (wide, wide_map)))
    assert grad.any() and torch.equal(grad, wide_grad.bfloat16())


@pytest.mark.parametrize("bad", [(0, 7), (1, 9)], ids=["row", "column"])
def test_nan_stays_in_its_query(bad):
    case = Case(hidden=(18, 21), queries=40)
    feat, coord, cell, weights, biases = random_problem(case, torch.float32, requires_grad=True)
    axis, query = bad
    rest = [q for q in range(40) if q != query]
    broken = coord.detach().clone()
    broken[0, query, axis] = float("nan")
    results = []
    for points in (coord, broken.requires_grad_()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ops.query(feat, points, cell, weights, biases, backend="cpu")
        results.append([out, *torch.autograd.grad(out.sum(), [points, cell])])  # a query's own, unlike other gradients
    assert results[1][0][0, query].isnan().all()
    for clean, result in zip(*results, strict=True):
        assert torch.equal(clean[0, rest], result[0, rest])


def test_results_do_not_depend_on_the_number_of_threads():
    case = Case(batch=3, channels=6, height=9, width=11, queries=701, hidden=(41, 24))
    results = []
    for threads in (1, 2, 5, 2):
        torch.set_num_threads(threads)
        try:
            results.append(trained(case)[1])
        finally:
            torch.set_num_threads(2)
    for other in results[1:]:
        assert all(norm_error(a, b) <= 1e-5 for a, b in zip(results[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))  # and runs repeat bit for bit
