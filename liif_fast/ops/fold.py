"""The convolution behind the folded first layers, in the precision that matrix products have.

PyTorch lets float32 convolutions on a GPU round their operands to TF32 unless told otherwise, float32 products of
matrices do not. What is folded here were such products, so the convolution follows their switch
(`library.allows_tf32`), or TF32 where a caller's other operands have 16 bits anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registration import allows_tf32


@contextmanager
def _precision(tf32: bool) -> Iterator[None]:
    switch = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made at run time
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if tf32 or allows_tf32() else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


# Ops, because a switch that is turned in traced code would be turned while tracing only.


@torch.library.custom_op("liif_fast::convolution", mutates_args=())
def _convolution(feat: Tensor, kernels: Tensor, tf32: bool) -> Tensor:
    with _precision(tf32), torch.autocast(feat.device.type, enabled=False):
        return F.conv2d(feat, kernels, padding=kernels.shape[-1] // 2)


@_convolution.register_fake
def _(feat: Tensor, kernels: Tensor, tf32: bool) -> Tensor:
    return F.conv2d(feat, kernels, padding=kernels.shape[-1] // 2)


@torch.library.custom_op("liif_fast::convolution_backward", mutates_args=())
def _convolution_backward(
    grad_out: Tensor, feat: Tensor, kernels: Tensor, tf32: bool, with_feat: bool, with_kernels: bool
) -> tuple[Tensor, Tensor]:
    padding = [kernels.shape[-1] // 2] * 2
    with _precision(tf32), torch.autocast(feat.device.type, enabled=False):
        grad_feat, grad_kernels, _ = torch.ops.aten.convolution_backward(
            grad_out, feat, kernels, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [with_feat, with_kernels, False]
        )
    return _exists(grad_feat, feat), _exists(grad_kernels, kernels)


def _exists(grad: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor.new_empty(0) if grad is None else grad


@_convolution_backward.register_fake
def _(
    grad_out: Tensor, feat: Tensor, kernels: Tensor, tf32: bool, with_feat: bool, with_kernels: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(feat) if with_feat else feat.new_empty(0),
        torch.empty_like(kernels) if with_kernels else kernels.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    feat, kernels, ctx.tf32 = inputs
    ctx.save_for_backward(feat, kernels)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    feat, kernels = ctx.saved_tensors
    with_feat, with_kernels = ctx.needs_input_grad[:2]
    grad_feat, grad_kernels = _convolution_backward(grad_out, feat, kernels, ctx.tf32, with_feat, with_kernels)
    return grad_feat if with_feat else None, grad_kernels if with_kernels else None, None


_convolution.register_autograd(_backward, setup_context=_setup)


def convolve(feat: Tensor, kernels: Tensor, *, tf32: bool = False) -> Tensor:
    """feat [B,C,H,W] with kernels [K,C,k,k], k odd, zero padded -> [B,K,H,W], in channels-last memory.

    tf32: whether float32 may round to TF32 on a GPU even where products of matrices may not.
    """
    feat = feat.contiguous(memory_format=torch.channels_last)
    if feat.device.type == "cuda" and feat.dtype == torch.float32 and not torch.is_autocast_enabled("cuda"):
        return _convolution(feat, kernels, tf32)
    return F.conv2d(feat, kernels, padding=kernels.shape[-1] // 2)
