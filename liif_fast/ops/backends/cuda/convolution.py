"""The folded first layer's convolution on the `cuda` backend: float32 maps, products of 16-bit operands."""

from __future__ import annotations

import torch
from torch import Tensor

from ...borders import bordered
from ..extension import OPS as _C
from .decode import aligned

_CHANNEL_STEP, _MOST_CHANNELS = 4, 16384  # kMaxConvolutionChannels of csrc/cuda/launch.h
_PIXEL_STEP, _LATENT_STEP, _GRAD_STEP = 32, 64, 256  # as there


def convolves(feat: Tensor, kernels: Tensor, narrow: torch.dtype | None) -> bool:
    """Whether `convolution` takes these tensors. PyTorch's convolution is as fast for others, above all 1x1."""
    channels = kernels.shape[:2]
    return (
        narrow in (torch.bfloat16, torch.float16)
        and feat.dtype == torch.float32
        and kernels.shape[2:] == (3, 3)
        and all(count % _CHANNEL_STEP == 0 and count <= _MOST_CHANNELS for count in channels)
    )


def convolution(feat: Tensor, kernels: Tensor, narrow: torch.dtype, transposed: bool) -> Tensor:
    """feat [B, C, H, W] with kernels [K, C, 3, 3] -> [B, K, H, W], channels last.

    The operands round to `narrow`, the sums are in float32. transposed: feat is the gradient of such a result
    [B, K, H, W], and the result that of the map, [B, C, H, W].
    """
    latents = aligned(feat.permute(0, 2, 3, 1).contiguous())
    out = _C.cuda_convolution(latents, kernels.contiguous(), transposed, narrow == torch.bfloat16)
    return out.permute(0, 3, 1, 2)


def kernel_grads(grad_out: Tensor, feat: Tensor, narrow: torch.dtype) -> Tensor:
    """The gradient of kernels [K, C, 3, 3] in float32, from operands that round to `narrow`.

    The sums have a fixed order on one device.
    """
    row = feat.shape[3] + 2
    grads = bordered(grad_out, 1, narrow, step=_GRAD_STEP, rows=_PIXEL_STEP)
    latents = bordered(feat, 1, narrow, around=row + 1, step=_LATENT_STEP, rows=_PIXEL_STEP)
    return _C.cuda_kernel_grads(latents, grads, row, feat.shape[1], grad_out.shape[1])
