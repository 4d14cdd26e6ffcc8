"""The `cpu` backend: hands tensors to the C++ kernels in the layout and dtype these take.

The kernels compute in float64 or float32. The hidden layers of `query` and `render` multiply bfloat16, forward and
backward, where that is the operands' dtype and the processor multiplies it natively; a bfloat16 latent map then stays
as it is. Every other 16-bit tensor is widened to float32 here. One function for every op of `library.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registration import compute_dtype

_C = torch.ops.liif_fast_C


def _widen(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _layers(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [_widen(tensor, dtype) for tensor in tensors]


def gather(
    feat: Tensor, coord: Tensor, cell: Tensor | None, feat_unfold: bool, local_ensemble: bool
) -> tuple[Tensor, Tensor]:
    cell = None if cell is None else cell.contiguous()
    x, area_weight = _C.gather(feat.contiguous(), coord.contiguous(), cell, feat_unfold, local_ensemble)
    return x, area_weight


def gather_backward(
    grad_x: Tensor,
    grad_area_weight: Tensor,
    feat: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    feat_unfold: bool,
    local_ensemble: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(feat)
    height, width = feat.shape[2:]
    grad_feat, grad_coord, grad_cell = _C.gather_backward(
        _widen(grad_x, dtype),
        _widen(grad_area_weight, dtype),
        coord.contiguous(),
        feat.shape[1],
        height,
        width,
        cell is not None,
        feat_unfold,
        local_ensemble,
    )
    return grad_feat, grad_coord, grad_cell


def ensemble(pred: Tensor, area_weight: Tensor) -> Tensor:
    return _C.ensemble(_widen(pred, area_weight.dtype), area_weight.contiguous())


def ensemble_backward(grad_out: Tensor, pred: Tensor, area_weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = area_weight.dtype
    grad_pred, grad_area_weight = _C.ensemble_backward(
        _widen(grad_out, dtype), _widen(pred, dtype), area_weight.contiguous()
    )
    return grad_pred, grad_area_weight


def _multiplies_bf16(latent_map: Tensor, operands: torch.dtype) -> bool:
    """Whether products have bfloat16 operands: forward and backward have to agree, or they would open other ReLUs."""
    if torch.bfloat16 not in (latent_map.dtype, operands) or latent_map.dtype == torch.float64:
        return False
    return _C.cpu_has_bf16()


def _forward(
    latent_map: Tensor,
    coord: Tensor | None,
    cell: Tensor | None,
    weight_geometry: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grid: list[int],
    grid_cell: list[float],
    local_ensemble: bool,
    operands: torch.dtype,
) -> Tensor:
    dtype, bf16 = compute_dtype(latent_map), _multiplies_bf16(latent_map, operands)
    return _C.query(
        latent_map.contiguous() if bf16 and latent_map.dtype == torch.bfloat16 else _widen(latent_map, dtype),
        None if coord is None else coord.contiguous(),
        None if cell is None else cell.contiguous(),
        _widen(weight_geometry, dtype),
        _layers(weights, dtype),
        _layers(biases, dtype),
        grid,
        grid_cell,
        local_ensemble,
        bf16,
    )


def _backward(
    grad_out: Tensor,
    latent_map: Tensor,
    coord: Tensor | None,
    cell: Tensor | None,
    weight_geometry: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grid: list[int],
    grid_cell: list[float],
    local_ensemble: bool,
    operands: torch.dtype,
) -> list[Tensor]:
    dtype = compute_dtype(latent_map)
    return _C.query_backward(
        _widen(grad_out, dtype),
        _widen(latent_map, dtype),
        None if coord is None else coord.contiguous(),
        None if cell is None else cell.contiguous(),
        _widen(weight_geometry, dtype),
        _layers(weights, dtype),
        _layers(biases, dtype),
        grid,
        grid_cell,
        local_ensemble,
        _multiplies_bf16(latent_map, operands),
    )


def saved_bytes(queries: int, rows: int, widths: Sequence[int], operands: torch.dtype, coord_grad: bool) -> int:
    """The backward computes activations again, tile by tile: on a CPU memory is slower than that."""
    return 0


def query(
    latent_map: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weight_geometry: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    local_ensemble: bool,
    operands: torch.dtype,
    coord_grad: bool,
    saved: Tensor,
) -> Tensor:
    return _forward(latent_map, coord, cell, weight_geometry, weights, biases, [], [], local_ensemble, operands)


def query_backward(
    grad_out: Tensor,
    saved: Tensor,
    latent_map: Tensor,
    coord: Tensor,
    cell: Tensor | None,
    weight_geometry: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    local_ensemble: bool,
    operands: torch.dtype,
    coord_grad: bool,
) -> list[Tensor]:
    grads = _backward(
        grad_out, latent_map, coord, cell, weight_geometry, weights, biases, [], [], local_ensemble, operands
    )
    return grads if coord_grad else grads[: 3 + 2 * len(weights)]


def render(
    latent_map: Tensor,
    weight_geometry: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grid: list[int],
    cell: list[float],
    local_ensemble: bool,
    operands: torch.dtype,
    saved: Tensor,
) -> Tensor:
    return _forward(latent_map, None, None, weight_geometry, weights, biases, grid, cell, local_ensemble, operands)


def render_backward(
    grad_out: Tensor,
    saved: Tensor,
    latent_map: Tensor,
    weight_geometry: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    grid: list[int],
    cell: list[float],
    local_ensemble: bool,
    operands: torch.dtype,
) -> list[Tensor]:
    return _backward(
        grad_out, latent_map, None, None, weight_geometry, weights, biases, grid, cell, local_ensemble, operands
    )


def metasr_query(
    latent_map: Tensor, coord: Tensor, cell: Tensor, weight: Tensor, bias: Tensor, region: list[int]
) -> Tensor:
    dtype = compute_dtype(latent_map)
    return _C.metasr_query(
        _widen(latent_map, dtype),
        coord.contiguous(),
        cell.contiguous(),
        _widen(weight, dtype),
        _widen(bias, dtype),
        region,
    )


def metasr_query_backward(
    grad_out: Tensor, latent_map: Tensor, coord: Tensor, cell: Tensor, weight: Tensor, bias: Tensor, region: list[int]
) -> list[Tensor]:
    dtype = compute_dtype(latent_map)
    return _C.metasr_query_backward(
        _widen(grad_out, dtype),
        _widen(latent_map, dtype),
        coord.contiguous(),
        cell.contiguous(),
        _widen(weight, dtype),
        _widen(bias, dtype),
        region,
    )
