"""The dtype rules of the ops: geometry, the latent map, autocast and TF32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def geometry_dtype(values: Tensor) -> torch.dtype:
    """The dtype of geometry, of sums and of what the registered ops return: float64 for float64, otherwise float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def autocast_dtype(feat: Tensor) -> torch.dtype | None:
    """The dtype that autocast uses on feat's device; None outside autocast and for float64."""
    kind = feat.device.type
    if feat.dtype == torch.float64 or not _autocasts(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on a device, which may have none, such as `meta`."""
    return torch.autocast(device.type, enabled=False) if _autocasts(device.type) else nullcontext()


def latent_dtype(device: torch.device, matmul_dtype: torch.dtype, needs_grad: bool) -> torch.dtype:
    """The dtype of the latent map when matrix products multiply in `matmul_dtype`.

    Rounding the latent map to 16 bits flips the sign of some pre-activations. That makes gradients several times less
    accurate than those of PyTorch's own 16-bit layers, so training keeps the map in float32. On a CPU, float16 is
    slower than float32, so only bfloat16 keeps 16 bits there.
    """
    if matmul_dtype.itemsize == 2 and (needs_grad or (device.type == "cpu" and matmul_dtype == torch.float16)):
        return torch.float32
    return matmul_dtype


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether PyTorch finds products of a 16-bit dtype in this processor, which is then of x86."""
    names = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    find = getattr(torch.cpu, "get_capabilities", None)  # an older torch cannot tell
    return find is not None and any(find().get(name) for name in names)


def allows_tf32() -> bool:
    """Whether float32 products on an accelerator may round their operands to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 and its successors set this


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records an op on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
