"""The `cpu` backend: passes tensors to the C++ kernels of csrc/cpu in the layout and dtype that these take.

The kernels compute in float64 or float32. The hidden layers of `decode` multiply in bfloat16, forward and backward,
where that is `matmul_dtype` and the processor has bfloat16 products; a bfloat16 latent map then stays in bfloat16.
Every other 16-bit tensor is widened to float32 here. There is one function for every op of registration.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import geometry_dtype
from ..inputs import DecodeInputs, GatherInputs, MetasrInputs
from .extension import OPS as _C


def _widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def gather(inputs: GatherInputs) -> tuple[Tensor, Tensor]:
    return _C.gather(*inputs.for_kernels()._replace(feat=inputs.feat.contiguous()))


def gather_backward(grad_x: Tensor, grad_area_weight: Tensor, inputs: GatherInputs) -> tuple[Tensor, Tensor, Tensor]:
    dtype = geometry_dtype(inputs.feat)
    return _C.gather_backward(
        _widen(grad_x, dtype),
        _widen(grad_area_weight, dtype),
        inputs.coord.contiguous(),
        *inputs.feat.shape[1:],
        inputs.cell is not None,
        inputs.feat_unfold,
        inputs.local_ensemble,
    )


def ensemble(pred: Tensor, area_weight: Tensor) -> Tensor:
    return _C.ensemble(_widen(pred, area_weight.dtype), area_weight.contiguous())


def ensemble_backward(grad_out: Tensor, pred: Tensor, area_weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = area_weight.dtype
    grad_pred, grad_area_weight = _C.ensemble_backward(
        _widen(grad_out, dtype), _widen(pred, dtype), area_weight.contiguous()
    )
    return grad_pred, grad_area_weight


def _multiplies_bf16(inputs: DecodeInputs) -> bool:
    """Whether products have bfloat16 operands. Forward and backward must agree; otherwise their ReLU masks differ."""
    if torch.bfloat16 not in (inputs.latent_map.dtype, inputs.matmul_dtype) or inputs.latent_map.dtype == torch.float64:
        return False
    return _C.cpu_has_bf16()


def _tile_bytes(inputs: DecodeInputs) -> tuple[int, int]:
    """Bytes that the forward saves of a tile, 0 for an imnet without hidden layers to save, and of a whole slab."""
    float64 = inputs.latent_map.dtype == torch.float64
    tile_bytes, tile_rows, header, limit = _C.cpu_saved_layout(inputs.widths, float64, _multiplies_bf16(inputs))
    if tile_bytes == 0:
        return 0, 0
    batch, queries = inputs.latent_map.shape[0], tile_rows // (4 if inputs.local_ensemble else 1)
    tiles = batch * ((inputs.entry_queries + queries - 1) // queries)
    return tile_bytes, header + min(tiles * tile_bytes, limit)


def saved_bytes(inputs: DecodeInputs, coord_grad: bool) -> int:
    """The size of what the forward saves for the backward, up to a limit; sizes may be symbolic."""
    return _tile_bytes(inputs)[1]


def decode(inputs: DecodeInputs, save: bool | None, coord_grad: bool) -> tuple[Tensor, Tensor]:
    tile_bytes, slab_bytes = _tile_bytes(inputs) if save else (0, 0)
    saved = _C.cpu_take_slab(slab_bytes, tile_bytes) if slab_bytes else inputs.empty_saved(0)
    dtype, bf16 = geometry_dtype(inputs.latent_map), _multiplies_bf16(inputs)
    keeps_dtype = bf16 and inputs.latent_map.dtype == torch.bfloat16
    latent_map = inputs.latent_map if keeps_dtype else inputs.latent_map.to(dtype)
    skips_corners = save is None  # the backward reads every corner
    return _C.decode(*inputs.for_kernels(latent_map, dtype)[:-1], bf16, saved, skips_corners), saved


def decode_backward(grad_out: Tensor, saved: Tensor, inputs: DecodeInputs, coord_grad: bool) -> list[Tensor]:
    dtype, bf16 = geometry_dtype(inputs.latent_map), _multiplies_bf16(inputs)
    arguments = inputs.for_kernels(inputs.latent_map.to(dtype), dtype)[:-1]  # without matmul_dtype
    return _C.decode_backward(_widen(grad_out, dtype), *arguments, bf16, saved, coord_grad)


def has_kernel_grads(feat: Tensor, kernels: Tensor) -> bool:
    """Whether `kernel_grads` takes these tensors. Other sizes are plain products, as fast in PyTorch."""
    return feat.dtype in (torch.float32, torch.float64) and kernels.shape[2:] == (3, 3)


def kernel_grads(grad_out: Tensor, feat: Tensor) -> Tensor:
    """The gradient of kernels [K, C, 3, 3], from that of the result [B, K, H, W]."""
    return _C.cpu_kernel_grads(feat.permute(0, 2, 3, 1).contiguous(), grad_out.permute(0, 2, 3, 1).contiguous())


def metasr_query(inputs: MetasrInputs) -> Tensor:
    return _C.metasr_query(*inputs.for_kernels(inputs.latent_map.to(geometry_dtype(inputs.latent_map))))


def metasr_query_backward(grad_out: Tensor, inputs: MetasrInputs) -> list[Tensor]:
    dtype = geometry_dtype(inputs.latent_map)
    return _C.metasr_query_backward(_widen(grad_out, dtype), *inputs.for_kernels(inputs.latent_map.to(dtype)))
