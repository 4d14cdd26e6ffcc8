"""The `cuda` backend's query and render: one kernel for the whole decode, one for its backward.

The forward keeps 16-bit (or float32) activations and one bit an activation for the ReLUs; the backward's kernel makes
every layer's gradient from them, and the weights' gradients are library products of the two. Without what the forward
keeps (`recompute`), the backward makes it again, a bounded number of rows at a time.

A row is one corner of one query. csrc/cuda/query_launch.h describes the arrays, csrc/cuda/query_tile.cuh the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...decode_inputs import DecodeInputs
from ...dtypes import allows_tf32

_C = torch.ops.liif_fast_C

_ROW_PADDING = 128  # kRowPadding
_CHUNK_ROWS = 1536 * _ROW_PADDING  # rows of a backward's step: bounds its workspace, 100 MB a layer of 256 in 16 bits
_ALIGNMENT = 256  # of the arrays in what a forward keeps
_ALIGNED = 16


def _padded_rows(rows: int) -> int:
    return -(-rows // _ROW_PADDING) * _ROW_PADDING


def _padded_width(widths: Sequence[int]) -> int:
    """The width to which kernels pad every layer but the last."""
    widest = max(widths[:-1])
    return 64 if widest <= 64 else 128 if widest <= 128 else 256


def _saved_bytes(queries: int, rows: int, widths: Sequence[int], operands: torch.dtype, coord_grad: bool) -> int:
    """Bytes that a forward of `rows` rows keeps: activations, blended hidden vectors, ReLU bits."""
    padded, width, hidden = _padded_rows(rows), _padded_width(widths), len(widths) - 2
    row = width * operands.itemsize
    blended = padded if rows == queries else padded // 4
    masks = (hidden + 1) * padded * max(width // 8, 16)  # a thread's bits begin a word of their own
    return (hidden + (1 if coord_grad else 0)) * padded * row + blended * row + _ALIGNMENT + masks


def saved_bytes(inputs: DecodeInputs, coord_grad: bool) -> int:
    return _saved_bytes(inputs.queries, inputs.rows, inputs.widths, inputs.matmul_dtype, coord_grad)


class _Problem(NamedTuple):
    """What forward and backward hand to the bindings alike, in the dtypes these take."""

    latent_map: Tensor
    coord: Tensor | None
    cell: Tensor | None
    weight_geometry: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    grid: list[int]
    grid_cell: list[float]
    local_ensemble: bool
    operands: int


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _problem(inputs: DecodeInputs) -> _Problem:
    latent_map, matmul_dtype = inputs.latent_map, inputs.matmul_dtype
    latent_map = (latent_map if latent_map.dtype == matmul_dtype else latent_map.float()).contiguous()
    if latent_map.data_ptr() % _ALIGNED:  # a view into something larger: kernels read 16 bytes at a time
        latent_map = latent_map.clone()
    float_products = 2 if allows_tf32() else 3
    return _Problem(
        latent_map,
        None if inputs.coord is None else inputs.coord.contiguous(),
        None if inputs.cell is None else inputs.cell.contiguous(),
        _floats(inputs.weight_geometry),
        [_floats(weight) for weight in inputs.weights],
        [_floats(bias) for bias in inputs.biases],
        inputs.grid,
        inputs.grid_cell,
        inputs.local_ensemble,
        {torch.float16: 0, torch.bfloat16: 1}.get(matmul_dtype, float_products),
    )


def _count_rows(problem: _Problem) -> int:
    batch = problem.latent_map.shape[0]
    queries = problem.grid[4] * problem.grid[5] if problem.coord is None else problem.coord.shape[1]
    return batch * queries * (4 if problem.local_ensemble else 1)


def _forward(problem: _Problem, coord_grad: bool, saved: Tensor) -> Tensor:
    rows = _padded_rows(_count_rows(problem)) if saved.numel() else -1
    return _C.cuda_decode(*problem, saved, coord_grad, 0, rows, True)


def _product(grad_rows: Tensor, rows: Tensor) -> Tensor:
    """grad_rows^T rows, summed in float32 over the rows: [R, out], [R, in] -> [out, in]."""
    if grad_rows.dtype == torch.float32:
        return grad_rows.t() @ rows
    if grad_rows.is_cuda:
        return torch.mm(grad_rows.t(), rows, out_dtype=torch.float32)
    return grad_rows.t().float() @ rows.float()  # kernels on the CPU, in the tests


def _backward(
    grad_out: Tensor, saved: Tensor, problem: _Problem, operands: torch.dtype, coord_grad: bool
) -> list[Tensor]:
    latent_map, coord, cell, weight_geometry, weights = problem[:5]
    hidden = len(weights) - 1
    widths = [latent_map.shape[-1], *(weight.shape[0] for weight in weights)]
    width = _padded_width(widths)
    padded = _padded_rows(_count_rows(problem))
    in_order = torch.are_deterministic_algorithms_enabled()

    def zeros(shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=latent_map.device)

    grad_latent_map = zeros(latent_map.shape)
    grad_points = [zeros(point.shape) for point in (coord, cell) if point is not None] if coord_grad else []
    grad_coord, grad_cell = [*grad_points, zeros((0,)), zeros((0,))][:2]
    grad_weights = [zeros(weight.shape) for weight in weights]
    lines = zeros((hidden + 5 + widths[-1], width))
    grad_out = _floats(grad_out)
    for first in range(0, padded, _CHUNK_ROWS):
        count = min(_CHUNK_ROWS, padded - first)
        kept, kept_first, kept_rows = saved, 0, padded
        if not saved.numel():
            queries = count // 4 if problem.local_ensemble else count
            size = _saved_bytes(queries, count, widths, operands, coord_grad)
            kept, kept_first, kept_rows = latent_map.new_empty(size, dtype=torch.uint8), first, count
            _C.cuda_decode(*problem, kept, coord_grad, first, count, False)
        grad_rows, sums, latent_rows, latent_places = _C.cuda_decode_backward(
            grad_out,
            kept,
            kept_first,
            kept_rows,
            *problem,
            first,
            count,
            zeros((0,)) if in_order else grad_latent_map,
            grad_coord,
            grad_cell,
        )
        lines += sums.sum(0)
        kept_layers = kept[: hidden * kept_rows * width * operands.itemsize].view(operands)
        rows = kept_layers.view(hidden, kept_rows, width)[:, first - kept_first : first - kept_first + count]
        with torch.autocast(latent_map.device.type, enabled=False):
            for layer in range(hidden):
                product = _product(grad_rows[layer], rows[layer])
                grad_weights[layer] += product[: widths[layer + 1], : widths[layer]]
        if in_order:
            grad_latent_map.view(-1, widths[0]).index_add_(0, latent_places, latent_rows[:, : widths[0]])

    grad_weights[hidden] += lines[hidden + 5 :, : widths[hidden]]
    grad_biases = [lines[layer, : widths[layer]].clone() for layer in range(hidden + 1)]
    grad_biases.append(grad_out.sum((0, 1) if problem.coord is not None else (0, 2, 3)))
    terms = weight_geometry.shape[1]
    grad_geometry = lines[hidden + 1 : hidden + 1 + terms, : widths[0]].t().clone(memory_format=torch.contiguous_format)
    return [grad_latent_map, grad_geometry, *grad_weights, *grad_biases, *grad_points]


def decode(inputs: DecodeInputs, saved: Tensor, coord_grad: bool) -> Tensor:
    return _forward(_problem(inputs), coord_grad, saved)


def decode_backward(grad_out: Tensor, saved: Tensor, inputs: DecodeInputs, coord_grad: bool) -> list[Tensor]:
    return _backward(grad_out, saved, _problem(inputs), inputs.matmul_dtype, coord_grad)
