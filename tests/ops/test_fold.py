"""The folded layers' convolution: in the precision of matrix products, forward and backward, traced or not."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

convolution = import_module("liif_fast.ops.fold")  # the package's `fold` is the function
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
    out = convolution._convolution(feat, kernels, False)
    expected = F.conv2d(feat, kernels, padding=shape[-1] // 2)
    assert torch.equal(out, expected)
    grad_out = torch.rand(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for wanted in ([feat, kernels], [feat], [kernels]):
        grads = torch.autograd.grad(out, wanted, grad_out, retain_graph=True)
        right = torch.autograd.grad(expected, wanted, grad_out, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, right, strict=True))
    assert torch.autograd.gradcheck(lambda *t: convolution._convolution(*t, False), (feat, kernels))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(convolution._convolution, (feat, kernels, True), test_utils=tests)


@pytest.mark.parametrize(
    ("matrices", "tf32", "expected"), [("ieee", False, "ieee"), ("tf32", False, "tf32"), ("ieee", True, "tf32")]
)
@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_convolutions_follow_the_switch_of_matrix_products(monkeypatch, precision, matrices, tf32, expected, before):
    product, switch = precision
    product.fp32_precision, switch.fp32_precision = matrices, before
    seen = []
    convolve, backward = F.conv2d, torch.ops.aten.convolution_backward

    def spy(run):
        def call(*arguments, **keywords):
            seen.append(switch.fp32_precision)
            return run(*arguments, **keywords)

        return call

    monkeypatch.setattr(convolution.F, "conv2d", spy(convolve))
    monkeypatch.setattr(torch.ops.aten, "convolution_backward", spy(backward))
    feat, kernels = make(SHAPES["3x3"], torch.float32)
    convolution._convolution(feat, kernels, tf32).sum().backward()
    assert seen == [expected, expected]
    assert switch.fp32_precision == before
