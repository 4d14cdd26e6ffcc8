"""The folded first layers: `fold` for LIIF, `metasr_fold` for MetaSR, and the convolution that computes them.

By default PyTorch rounds the operands of float32 convolutions on a GPU to TF32, but not those of float32 matrix
products. A folded layer was a matrix product, so its convolution follows the switch of matrix products
(`dtypes.allows_tf32`). It may use TF32 where the other layers multiply in 16 bits. The `cuda` backend then has a
convolution of its own, with operands in those 16 bits and a float32 map. Where the other layers multiply in bfloat16 on
a CPU that has such products, the backward does too, but the forward stays in float32 (`dtypes.latent_dtype`). In
float32 and float64 the `cpu` backend has a kernel of its own for the gradient of a 3x3 convolution's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_autograd, register_fake

from .backends import cpu, cuda
from .borders import bordered
from .dtypes import allows_tf32, autocast_dtype, cpu_multiplies, latent_dtype, needs_grad, no_autocast
from .namespace import LIBRARY, register_op
from .transforms import is_transformed

_CPU_MULTIPLIES_BF16 = cpu_multiplies(torch.bfloat16)  # a constant for torch.compile

# Registered ops, whose convolutions take their precision as an argument: torch's switch belongs to all threads, and
# plain code would read it during tracing and not when the trace runs.


def _own_dtype(feat: Tensor, kernels: Tensor, narrow: torch.dtype | None, backend: str) -> torch.dtype | None:
    """The dtype to which the `cuda` backend's convolution rounds its operands; None where PyTorch's runs."""
    return narrow if backend == "cuda" and cuda.convolves(feat, kernels, narrow) else None


def _run(feat: Tensor, kernels: Tensor, narrow: torch.dtype | None, backend: str, transposed: bool) -> Tensor:
    """F.conv2d, or with `transposed` its gradient of feat.

    narrow: the 16-bit dtype of the other layers' products, None where these are wider. The `cuda` backend's convolution
        rounds to it. In PyTorch's, float32 rounds to TF32 only with a narrow dtype or where matrices may.
    """
    if own := _own_dtype(feat, kernels, narrow, backend):
        return cuda.convolution(feat, kernels, own, transposed)
    padding, cudnn = [kernels.shape[-1] // 2] * 2, torch.backends.cudnn
    in_order = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    options = ([1, 1], padding, [1, 1], transposed, [0, 0], 1, cudnn.benchmark, in_order, cudnn.enabled)
    with no_autocast(feat.device):
        return torch.ops.aten._convolution(feat, kernels, None, *options, narrow is not None or allows_tf32())


def _grad_kernels(grad_out: Tensor, feat: Tensor, size: int, narrow: torch.dtype | None) -> Tensor:
    """The gradient of kernels [K, C, size, size]: a matrix product for each of their elements.

    Both operands get a border of zeros. Then the neighbors of all pixels are the same rows, so many rows further on.
    No op of torch takes the precision of this gradient as an argument. The products follow torch's switch of matrix
    products. With a narrow dtype, where that switch is off, a GPU rounds the operands to bfloat16 and sums in float32,
    as PyTorch does for a layer under autocast.
    """
    in_16_bits = narrow is not None and not allows_tf32() and feat.is_cuda and feat.dtype == torch.float32
    dtype, border = torch.bfloat16 if in_16_bits else feat.dtype, size // 2
    before = border * (feat.shape[3] + 2 * border + 1)  # the first neighbor of a pixel is so many rows before it
    transposed, latents = bordered(grad_out, border, dtype).t(), bordered(feat, border, dtype, around=before)
    products = []
    with no_autocast(feat.device):
        for first in (row * (feat.shape[3] + 2 * border) + col for row in range(size) for col in range(size)):
            rows = latents[first : first + transposed.shape[1]]
            products.append(
                torch.mm(transposed, rows, out_dtype=torch.float32) if in_16_bits else torch.mm(transposed, rows)
            )
    return torch.stack(products, -1).unflatten(-1, (size, size))


def _multiplies_bf16(feat: Tensor, narrow: torch.dtype | None, backend: str) -> bool:
    """Whether the backward rounds its operands to bfloat16, on a CPU."""
    is_wide = feat.device.type == "cpu" and feat.dtype == torch.float32 and backend != "cuda"
    return is_wide and narrow == torch.bfloat16 and _CPU_MULTIPLIES_BF16


def _backward_in_bf16(grad_out: Tensor, feat: Tensor, kernels: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    operands = (each.to(torch.bfloat16) for each in (grad_out, feat, kernels))
    options = (None, [1, 1], [kernels.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1, [*wanted, False])
    grads = torch.ops.aten.convolution_backward(*operands, *options)
    grad_feat, grad_kernels = (
        grad.to(like.dtype, copy=True).contiguous(memory_format=layout) if wants else like.new_empty(0)
        for grad, like, layout, wants in zip(
            grads, (feat, kernels), (torch.channels_last, torch.contiguous_format), wanted, strict=False
        )
    )
    return grad_feat, grad_kernels


@register_op("convolution(Tensor feat, Tensor kernels, ScalarType? narrow, str backend) -> Tensor")
def _convolution(feat: Tensor, kernels: Tensor, narrow: torch.dtype | None, backend: str) -> Tensor:
    return _run(feat, kernels, narrow, backend, transposed=False)


@register_fake(_convolution, lib=LIBRARY)
def _(feat: Tensor, kernels: Tensor, narrow: torch.dtype | None, backend: str) -> Tensor:
    return F.conv2d(feat, kernels, padding=kernels.shape[-1] // 2)


@register_op(
    "convolution_backward(Tensor grad_out, Tensor feat, Tensor kernels, ScalarType? narrow, str backend, "
    "bool with_feat, bool with_kernels) -> (Tensor, Tensor)"
)
def _convolution_backward(
    grad_out: Tensor,
    feat: Tensor,
    kernels: Tensor,
    narrow: torch.dtype | None,
    backend: str,
    with_feat: bool,
    with_kernels: bool,
) -> tuple[Tensor, Tensor]:
    if _multiplies_bf16(feat, narrow, backend):
        return _backward_in_bf16(grad_out, feat, kernels, [with_feat, with_kernels])
    grad_feat = _run(grad_out, kernels, narrow, backend, transposed=True) if with_feat else feat.new_empty(0)
    if not with_kernels:
        return grad_feat, kernels.new_empty(0)
    if own := _own_dtype(feat, kernels, narrow, backend):
        return grad_feat, cuda.kernel_grads(grad_out, feat, own)
    if backend == "cpu" and cpu.has_kernel_grads(feat, kernels):
        return grad_feat, cpu.kernel_grads(grad_out, feat)
    grad_kernels = _grad_kernels(grad_out, feat, kernels.shape[-1], narrow)
    return grad_feat, grad_kernels


@register_fake(_convolution_backward, lib=LIBRARY)
def _(
    grad_out: Tensor,
    feat: Tensor,
    kernels: Tensor,
    narrow: torch.dtype | None,
    backend: str,
    with_feat: bool,
    with_kernels: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(feat) if with_feat else feat.new_empty(0),
        torch.empty_like(kernels) if with_kernels else kernels.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feat, kernels, *ctx.options = inputs  # narrow, backend
    ctx.save_for_backward(feat, kernels)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    feat, kernels = ctx.saved_tensors
    with_feat, with_kernels = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():  # a backward that is differentiated itself
        with no_autocast(feat.device):
            out = F.conv2d(feat, kernels, padding=kernels.shape[-1] // 2)
            wanted = [tensor for tensor, wants in ((feat, with_feat), (kernels, with_kernels)) if wants]
            found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
        return next(found) if with_feat else None, next(found) if with_kernels else None, None, None
    grad_feat, grad_kernels = _convolution_backward(grad_out, feat, kernels, *ctx.options, with_feat, with_kernels)
    return grad_feat if with_feat else None, grad_kernels if with_kernels else None, None, None


register_autograd(_convolution, _backward, setup_context=_setup, lib=LIBRARY)


def _convolve(feat: Tensor, kernels: Tensor, narrow: torch.dtype | None = None, backend: str = "torch") -> Tensor:
    """feat [B, C, H, W] with kernels [K, C, k, k], k odd, zero padded -> [B, H, W, K], contiguous.

    narrow: the 16-bit dtype of the other layers' products. Then float32 may round to it in the convolution of
        `backend`, else to TF32 on a GPU, and in the backward to bfloat16 on a CPU that multiplies bfloat16.
    """
    transformed = is_transformed(feat, kernels)
    if not transformed:  # vmap has no rule for it
        feat = feat.contiguous(memory_format=torch.channels_last)
    on_gpu = "cuda" in (feat.device.type, backend) and not torch.is_autocast_enabled("cuda")
    trains_on_cpu = backend == "cpu" and needs_grad(feat, kernels) and cpu.has_kernel_grads(feat, kernels)
    needs_op = (on_gpu and feat.dtype == torch.float32) or _multiplies_bf16(feat, narrow, backend) or trains_on_cpu
    if needs_op and not transformed:
        out = _convolution(feat, kernels, narrow, backend)
    else:
        out = F.conv2d(feat, kernels, padding=kernels.shape[-1] // 2)
    return out.permute(0, 2, 3, 1).contiguous()


def fold_for(
    feat: Tensor, weight: Tensor, feat_unfold: bool, matmul_dtype: torch.dtype, needs_grad: bool, backend: str = "torch"
) -> Tensor:
    """`fold` for a decode that multiplies in `matmul_dtype` on `backend`, and that autograd records or not."""
    dtype = latent_dtype(feat.device, matmul_dtype, needs_grad)
    channels, kernel = feat.shape[1], 3 if feat_unfold else 1
    narrow = matmul_dtype if matmul_dtype.itemsize == 2 else None
    with no_autocast(feat.device):
        kernels = weight.to(dtype)[:, : channels * kernel * kernel].reshape(-1, channels, kernel, kernel)
        return _convolve(feat.to(dtype), kernels, narrow, backend)


def fold(feat: Tensor, weight: Tensor, *, feat_unfold: bool = True) -> Tensor:
    """The first layer's feature part as a convolution: once per latent instead of once per query and corner.

    Args:
        feat: [B, C, H, W].
        weight: imnet's first weight, [K, 9C + 2 (+ 2)], or [K, C + 2 (+ 2)] without unfolding.
        feat_unfold: a 3x3 convolution with zero padding, otherwise 1x1.

    Returns:
        latent_map, [B, H, W, K], contiguous, in the dtype that `query` and `render` read (`dtypes.latent_dtype`).
        It does not contain the bias, which they add with the geometry terms.

    Source: linearity of the first layer in the unfolded latent; exact up to the order of the sum.
    """
    return fold_for(feat, weight, feat_unfold, autocast_dtype(feat) or feat.dtype, needs_grad(feat, weight))


def metasr_fold(feat: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """MetaSR's second layer applied to the unfolded latents: one convolution instead of a predicted filter per query.

    Args:
        feat: [B, C, H, W].
        weights: [hidden, 3] and [9C*O, hidden]. biases: [hidden] and [9C*O].

    Returns:
        [B, H, W, O*(hidden + 1)]: for each output, one number per hidden unit, then the number of the bias.
    """
    channels = feat.shape[1]
    hidden = weights[0].shape[0]
    # [9C*O, hidden + 1] -> rows (channel and neighbor, output) -> kernels (output, hidden unit) over 9C
    table = torch.cat([weights[1], biases[1].unsqueeze(1)], dim=1).view(channels * 9, -1, hidden + 1)
    return _convolve(feat, table.permute(1, 2, 0).reshape(-1, channels, 3, 3))
