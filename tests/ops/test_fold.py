"""The folded layers' convolution: in the precision of matrix products, forward and backward, traced or not."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from tests.backends import ISAS, TABLE
from tests.helpers import needs_cpu, norm_error

convolution = import_module("liif_fast.ops.fold")  # the package's `fold` is the function
OUTS = (1, 6, 13, 256)
SHAPES = {"3x3": (2, 5, 6, 7, 8, 3), "1x1": (1, 4, 5, 3, 6, 1)}


@pytest.fixture
def precision():
    """Puts torch's switches back."""
    product, switch = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = product.fp32_precision, switch.fp32_precision
    yield product, switch
    product.fp32_precision, switch.fp32_precision = before


def make(shape, dtype=torch.float64):
    batch, channels, height, width, outs, size = shape
    generator = torch.Generator().manual_seed(0)
    feat = torch.rand(batch, channels, height, width, generator=generator, dtype=dtype).requires_grad_()
    return feat, torch.rand(outs, channels, size, size, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_op_is_pytorchs_convolution(shape):
    feat, kernels = make(shape)
    out = convolution._convolution(feat, kernels, None, "torch")
    expected = F.conv2d(feat, kernels, padding=shape[-1] // 2)
    assert torch.equal(out, expected)
    grad_out = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for wanted in ([feat, kernels], [feat], [kernels]):
        grads = torch.autograd.grad(out, wanted, grad_out, retain_graph=True)
        right = torch.autograd.grad(expected, wanted, grad_out, retain_graph=True)
        assert all(norm_error(a, b) <= 1e-14 for a, b in zip(grads, right, strict=True))
    assert torch.autograd.gradcheck(lambda *t: convolution._convolution(*t, None, "torch"), (feat, kernels))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(convolution._convolution, (feat, kernels, torch.bfloat16, "torch"), test_utils=tests)


@needs_cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "size", [(1, 3, 1, 1), (2, 16, 5, 1), (1, 64, 1, 70), (3, 33, 17, 40), (1, 5, 3, 401), (0, 4, 3, 3)]
)
def test_the_cpus_own_gradient_of_the_kernels(monkeypatch, isa, dtype, size):
    """Blocks of whole rows and of parts of rows, and widths of the products with and without a rest."""
    counted = Mock(wraps=convolution.cpu.kernel_grads)
    monkeypatch.setattr(convolution.cpu, "kernel_grads", counted)
    with TABLE[f"cpu-{isa}"].activate():
        for outs in OUTS if isa != "portable" else OUTS[1:3]:
            feat, kernels = make((*size, outs, 3), dtype)
            out = convolution._convolve(feat, kernels, backend="cpu")
            probe = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=dtype) - 0.5
            calls = counted.call_count
            found = torch.autograd.grad(out, [feat, kernels], probe)
            assert counted.call_count == calls + 1
            wide = [feat.detach().double().requires_grad_(), kernels.detach().double().requires_grad_()]
            expected = F.conv2d(*wide, padding=1).permute(0, 2, 3, 1)
            expected = torch.autograd.grad(expected, wide, probe.double())
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == dtype
                assert norm_error(a, b) <= (1e-14 if dtype == torch.float64 else 2e-6)


@needs_cpu
def test_the_cpus_own_gradient_repeats_with_any_number_of_threads():
    feat, _ = make((2, 20, 9, 50, 30, 3), torch.float32)
    grad, before = torch.rand(2, 30, 9, 50, generator=torch.Generator().manual_seed(1)), torch.get_num_threads()
    expected = convolution._grad_kernels(grad.double(), feat.detach().double(), 3, None)
    try:
        for threads in range(1, 6):
            torch.set_num_threads(threads)
            first, again = (convolution.cpu.kernel_grads(grad, feat.detach()) for _ in range(2))
            assert torch.equal(first, again) and norm_error(first, expected) <= 1e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("matrices", "narrow", "expected"),
    [("ieee", None, False), ("tf32", None, True), ("ieee", torch.float16, True)],
)
def test_convolutions_follow_the_switch_of_matrix_products(monkeypatch, precision, matrices, narrow, expected):
    product, _ = precision
    product.fp32_precision = matrices
    monkeypatch.setattr(convolution, "_CPU_MULTIPLIES_BF16", False)  # a CPU takes the part of a GPU
    seen = []
    run = torch.ops.aten._convolution

    def spy(*arguments):
        seen.append(arguments[-1])
        return run(*arguments)

    monkeypatch.setattr(torch.ops.aten, "_convolution", spy)
    feat, kernels = make(SHAPES["3x3"], torch.float32)
    convolution._convolution(feat, kernels, narrow, "torch").sum().backward()
    assert seen == [expected, expected]


@pytest.mark.prove
def test_convolutions_leave_the_switches_of_the_process_alone():
    """A convolution's switch that was never set still follows the switch of the whole process."""
    script = """
import torch
from importlib import import_module
torch.backends.fp32_precision = "tf32"
feat, kernels = torch.rand(1, 2, 4, 4, requires_grad=True), torch.rand(3, 2, 3, 3, requires_grad=True)
import_module("liif_fast.ops.fold")._convolution(feat, kernels, None, "torch").sum().backward()
torch.backends.fp32_precision = "ieee"
print(torch.backends.cudnn.conv.fp32_precision)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["ieee"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_cpu_that_multiplies_bfloat16_trains_the_fold_in_it(monkeypatch, name, compiled):
    """The map is as before; gradients have at most twice the error of PyTorch's own layer under autocast."""
    monkeypatch.setattr(convolution, "_CPU_MULTIPLIES_BF16", True)
    errors = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(4):
        torch.manual_seed(seed)
        batch, channels, height, width, outs, size = SHAPES[name]
        feat = torch.randn(batch, channels, height, width, dtype=torch.float64)
        weight = torch.randn(outs, channels * size**2 + 4, dtype=torch.float64)
        grad = torch.randn(batch, height, width, outs, dtype=torch.float64)

        def plain(feat, weight, size=size):
            kernels = weight[:, :-4].unflatten(1, (-1, size, size))
            return F.conv2d(feat, kernels, padding=size // 2).permute(0, 2, 3, 1)

        def ours(feat, weight, size=size):
            return convolution.fold_for(feat, weight, size == 3, torch.bfloat16, True)

        def train(run, dtype, autocast=False, feat=feat, weight=weight, grad=grad):
            leaves = [each.to(dtype).requires_grad_() for each in (feat, weight)]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = run(*leaves)
            return out, torch.autograd.grad(out, leaves, grad.to(out.dtype))

        exact, wanted = train(plain, torch.float64)
        out, grads = train(
            torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours, torch.float32
        )
        assert norm_error(out, exact) <= 1e-6
        _, theirs = train(plain, torch.float32, autocast=True)
        for error, found in zip(errors, (grads, theirs), strict=True):
            error += torch.tensor([norm_error(a, b) ** 2 for a, b in zip(found, wanted, strict=True)])
    assert (errors[0] > 1e-7).all()  # rounded to bfloat16
    assert (errors[0].sqrt() <= 2 * errors[1].sqrt()).all(), errors.sqrt()
