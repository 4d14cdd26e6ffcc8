"""torch.utils.flop_counter counts a registered op as it counts the same decode in PyTorch's calls."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from liif_fast import ops
from liif_fast.ops.fold import _convolution, _convolution_backward
from tests.helpers import Case, random_problem, run_after_torch
from tests.ops.test_metasr import problem as metasr_problem


def count(run, leaves):
    with FlopCounterMode(display=False) as forward:
        out = run()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward(inputs=leaves)
    return forward.get_total_flops(), backward.get_total_flops()


CASES = [
    Case(queries=40),
    Case(queries=40, hidden=(16, 32, 16), batch=2, cell_decode=False),
    Case(queries=40, local_ensemble=False, hidden=(16,)),
    Case(queries=40, hidden=(), outs=5),
]


@pytest.mark.one_isa
@pytest.mark.parametrize("points", [True, False], ids=["points-train", "points-fixed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_decode(backend, case, points):
    if reason := backend.reason_against("decode", torch.float32, case):
        pytest.skip(reason)
    feat, coord, cell, weights, biases = random_problem(case, torch.float32)
    leaves = [feat, *([coord, cell][: 2 if case.cell_decode else 1] if points else []), *weights, *biases]
    for leaf in leaves:
        leaf.requires_grad_()

    def query(name):
        return lambda: ops.query(feat, coord, cell, weights, biases, backend=name, **case.flags)

    def render(name):
        return lambda: ops.render(feat, case.size, weights, biases, backend=name, **case.flags)

    name = backend.op_backend
    assert count(query(name), leaves) == count(query("torch"), leaves)
    layers = [feat, *weights, *biases]
    assert count(render(name), layers) == count(render("torch"), layers)
    assert count(render(name), layers)[0] > 1000


@pytest.mark.one_isa
def test_the_other_ops(backend):
    name = backend.op_backend
    leaves = [tensor.requires_grad_() for tensor in metasr_problem(torch.float32)]

    def metasr(name):
        return lambda: ops.metasr_query(*leaves[:3], leaves[3:5], leaves[5:], backend=name)

    blend = [torch.rand(shape, requires_grad=True) for shape in ((2, 30, 4, 3), (2, 30, 4))]
    assert count(metasr(name), leaves) == count(metasr("torch"), leaves)
    counts = [count(lambda name=each: ops.ensemble(*blend, backend=name), blend) for each in (name, "torch")]
    assert counts[0] == counts[1] == (2 * 2 * 30 * 4 * 3, 2 * 2 * 2 * 30 * 4 * 3)


@pytest.mark.parametrize("size", [1, 3])
def test_the_convolution_that_keeps_its_precision(size):
    feat, kernels = torch.rand(2, 3, 5, 6), torch.rand(8, 3, size, size)
    plain = [tensor.clone().requires_grad_() for tensor in (feat, kernels)]
    expected = count(lambda: torch.nn.functional.conv2d(*plain, padding=size // 2), plain)
    with FlopCounterMode(display=False) as forward:
        out = _convolution(feat, kernels, None, "torch")
    with FlopCounterMode(display=False) as backward:
        _convolution_backward(out, feat, kernels, None, "torch", True, True)
    assert (forward.get_total_flops(), backward.get_total_flops()) == expected


@pytest.mark.prove
def test_the_order_of_imports_does_not_matter():
    check = """
import {}
import sys
assert torch.ops.liif_fast.decode in torch.utils.flop_counter.flop_registry
assert not any("flops" in type(finder).__module__ for finder in sys.meta_path)
"""
    orders = ("liif_fast, torch.utils.flop_counter", "torch.utils.flop_counter, liif_fast")
    assert run_after_torch(*map(check.format, orders)) == ["", ""]
