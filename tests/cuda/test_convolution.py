"""The folded first layer's own convolution, its sources compiled for the CPU: values, gradients, and when it runs."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from liif_fast.ops.backends import cuda
from tests.backends import emulated
from tests.cuda.emulator import build
from tests.cuda.test_ring import check_seen, sound_outcome
from tests.helpers import norm_error, range_error

fold = import_module("liif_fast.ops.fold")  # the package's `fold` is the function
NARROW = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.prove)]
# Batch, channels, height, width, outputs. A block makes 64 outputs of 12 x 16 pixels from slices of 64 channels.
SHAPES = {
    "one-pixel": (1, 4, 1, 1, 4),
    "one-block": (1, 64, 12, 16, 64),
    "padded": (2, 20, 13, 3, 12),
    "slices-and-parts": (1, 68, 2, 17, 68),
    "empty": (0, 8, 3, 3, 8),
}


@pytest.fixture
def kernels():
    with emulated():
        yield build.load()


def make(shape):
    batch, channels, height, width, outs = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, channels, height, width), (outs, channels, 3, 3), (batch, outs, height, width))
    return [torch.randn(size, generator=generator) for size in sizes]


def convolve(feat, kernels, narrow, grad):
    """[result, gradient of feat, gradient of kernels] by the registered op."""
    leaves = [feat.clone().requires_grad_(), kernels.clone().requires_grad_()]
    out = fold._convolution(*leaves, narrow, "cuda")
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact_kernel_grads(feat, grad):
    return torch.nn.grad.conv2d_weight(feat, (grad.shape[1], feat.shape[1], 3, 3), grad, padding=1)


@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_rounded_operands(kernels, shape, narrow):
    feat, weights, grad = make(shape)
    out, grad_feat, grad_kernels = convolve(feat, weights, narrow, grad)
    wide = [tensor.to(narrow).double() for tensor in (feat, weights, grad)]
    assert out.dtype == torch.float32
    assert range_error(out, F.conv2d(*wide[:2], padding=1)) <= 1e-6
    assert range_error(grad_feat, F.conv_transpose2d(wide[2], wide[1], padding=1)) <= 1e-6
    assert range_error(grad_kernels, exact_kernel_grads(*wide[::2])) <= 1e-6


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_the_error_is_at_most_that_of_pytorchs_layer_under_autocast(kernels, narrow):
    feat, weights, grad = make((2, 64, 9, 11, 64))
    found = convolve(feat, weights, narrow, grad)
    leaves = [feat.clone().requires_grad_(), weights.clone().requires_grad_()]
    with torch.autocast("cpu", narrow):
        out = F.conv2d(*leaves, padding=1)
    theirs = [out.float(), *torch.autograd.grad(out, leaves, grad.to(narrow))]
    leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
    exact = F.conv2d(*leaves, padding=1)
    exact = [exact, *torch.autograd.grad(exact, leaves, grad.double())]
    for mine, other, right in zip(found, theirs, exact, strict=True):
        assert 0 < norm_error(mine, right) <= norm_error(other, right)


@pytest.mark.parametrize(
    "shape",
    [pytest.param((1, 4, 14, 14, 4), marks=pytest.mark.prove), (1, 68, 1, 2, 260)],
    ids=["parts-of-pixels", "blocks-of-both"],
)
def test_gradients_of_kernels_are_sums_over_all_blocks(kernels, shape):
    kernels.set_device(20, 227 << 10, 228 << 10, 9, 0)  # 20 processors
    feat, _, grad = (tensor.bfloat16() for tensor in make(shape))
    found = cuda.kernel_grads(grad, feat, torch.bfloat16)
    assert range_error(found, exact_kernel_grads(feat.double(), grad.double())) <= 1e-6
    kernels.set_schedule(3, True, 1)
    assert torch.equal(cuda.kernel_grads(grad, feat, torch.bfloat16), found)


@pytest.mark.parametrize("seed", [1, 2])  # copies arrive at random, and as late as the rules allow
def test_no_order_of_threads_and_copies_changes_a_bit(kernels, seed):
    arguments = *make((1, 68, 4, 5, 8))[:2], torch.bfloat16, False
    expected = cuda.convolution(*arguments)
    kernels.set_schedule(0, False, seed)
    assert torch.equal(cuda.convolution(*arguments), expected)


def test_layouts_and_places_of_the_arguments_do_not_matter(kernels):
    feat, weights, _ = make((1, 8, 3, 5, 12))
    expected = cuda.convolution(feat, weights, torch.bfloat16, False)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    moved = torch.empty(feat.numel() + 1)[1:].view(1, 3, 5, 8).permute(0, 3, 1, 2).copy_(feat)
    assert moved.data_ptr() % 16
    weights = weights.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(cuda.convolution(moved, weights, torch.bfloat16, False), expected)


@pytest.mark.prove
def test_a_compiled_fold_trains_to_the_bit_and_gradients_have_gradients(kernels):
    generator = torch.Generator().manual_seed(0)
    feat, weight = torch.randn(1, 4, 3, 5, generator=generator), torch.randn(8, 40, generator=generator)

    def train(run, **options):
        leaves = [feat.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = run(*leaves, True, torch.bfloat16, True, "cuda")
        return [out, *torch.autograd.grad(out.square().sum(), leaves, **options)], leaves

    found, _ = train(fold.fold_for)
    compiled, _ = train(torch.compile(fold.fold_for, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(compiled, found, strict=True))
    twice, leaves = train(fold.fold_for, create_graph=True)
    assert all(norm_error(a, b) <= 2e-2 for a, b in zip(twice, found, strict=True))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(twice[1].sum(), leaves))


def test_what_pays_runs_on_it():
    feat, weights, _ = make((1, 8, 3, 5, 12))
    assert cuda.convolves(feat, weights, torch.bfloat16) and cuda.convolves(feat, weights, torch.float16)
    assert not cuda.convolves(feat, weights, None)
    assert not cuda.convolves(feat.double(), weights.double(), torch.bfloat16)
    assert not cuda.convolves(feat, weights[..., :1, :1], torch.bfloat16)
    assert not cuda.convolves(feat[:, :7], weights[:, :7], torch.bfloat16)
    assert not cuda.convolves(feat, weights[:10], torch.bfloat16)
    assert not cuda.convolves(feat, torch.empty(1, 1, 3, 3).expand(4, 16388, 3, 3), torch.bfloat16)


# The text that is replaced, and what replaces it; then a part of the emulator's message, "" for wrong values.
MISTAKES = {
    "multiplies before the patch is there": ("memory.patch);\n    __syncthreads();\n", "memory.patch);\n", ""),
    "overwrites the patch before it is read": (
        "    if (slice > 0) __syncthreads();  // the patch has been read\n",
        "",
        "",
    ),
    "gives a chunk back before it is read": ("if (step == T::kChunkSteps - 1 && tap == 2)", "if (step + tap == 0)", ""),
    "reads units without the swizzle": ("(unit ^ col % 8)", "unit", ""),
    "ends with copies under way": ("  stream.finish();\n", "", "before its copies"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> str:
    return sound_outcome(tmp_path_factory.mktemp("sound"), program="convolution")


@pytest.mark.prove
@pytest.mark.parametrize(
    ("old", "new", "message"), MISTAKES.values(), ids=[name.replace(" ", "-") for name in MISTAKES]
)
def test_a_planted_mistake_is_seen(sound, tmp_path, old, new, message):
    check_seen(tmp_path, [("../convolution.cu", old, new)], sound, message, program="convolution")
