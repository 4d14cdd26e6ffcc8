"""The fused decode on the `cuda` backend: a kernel for the forward, one for the backward, and both for Hopper.

The forward saves 16-bit (or float32) activations, and one bit per activation for the ReLUs. The backward's kernel
computes every layer's gradient from them, and the weights' gradients are PyTorch's matrix products of both. Without
saved activations (`recompute`), the backward computes them again, a bounded number of rows at a time.

A row is one corner of one query. csrc/cuda/decode/launch.h describes the arrays, csrc/cuda/decode/tile.cuh the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...dtypes import allows_tf32
from ...inputs import DecodeInputs
from ..extension import OPS as _C
from . import hopper
from .packed import PACKED

_ROW_PADDING = 128  # kRowPadding of launch.h
_CHUNK_ROWS = 1536 * _ROW_PADDING  # of the backward: bounds its workspace, 100 MB a layer of 256 in 16 bits
_SAVED_ALIGNMENT = 256  # of the arrays in `saved`
_MAP_ALIGNMENT = 16  # kernels read the latent map in vectors of 16 bytes


def _padded_rows(rows: int) -> int:
    return -(-rows // _ROW_PADDING) * _ROW_PADDING


def _padded_width(inputs: DecodeInputs) -> int:
    """The width to which the kernels pad every layer but the last."""
    widest = max(inputs.widths[:-1])
    return 64 if widest <= 64 else 128 if widest <= 128 else 256


def _saved_bytes(inputs: DecodeInputs, rows: int, coord_grad: bool) -> int:
    """Bytes that a forward of `rows` rows saves: activations, blended hidden vectors, ReLU bits.

    saved_bytes of csrc/cuda/decode/decode.cu computes the same layout. It is repeated here because torch.compile traces
    this function with symbolic sizes.
    """
    padded, width, hidden = _padded_rows(rows), _padded_width(inputs), len(inputs.weights) - 1
    row = width * inputs.matmul_dtype.itemsize
    blended = padded // 4 if inputs.local_ensemble else padded
    masks = (hidden + 1) * padded * max(width // 8, 16)  # a thread's bits begin a new word
    return (hidden + (1 if coord_grad else 0)) * padded * row + blended * row + _SAVED_ALIGNMENT + masks


def saved_bytes(inputs: DecodeInputs, coord_grad: bool) -> int:
    return _saved_bytes(inputs, inputs.rows, coord_grad)


def _kernel_inputs(inputs: DecodeInputs) -> DecodeInputs:
    latent_map = inputs.latent_map
    latent_map = (latent_map if latent_map.dtype == inputs.matmul_dtype else latent_map.float()).contiguous()
    if latent_map.data_ptr() % _MAP_ALIGNMENT:  # a view into a larger tensor
        latent_map = latent_map.clone()
    return inputs.for_kernels(latent_map, torch.float32)


def _arguments(inputs: DecodeInputs) -> tuple[object, ...]:
    """The arguments that all bindings share: the inputs without query_term, an MmaPolicy's number as matmul_dtype."""
    float_policy = 2 if allows_tf32() else 3
    policies = hopper.POLICIES if _uses_hopper(inputs) else {torch.float16: 0, torch.bfloat16: 1}
    return *inputs[:-2], policies.get(inputs.matmul_dtype, float_policy)


def _uses_hopper(inputs: DecodeInputs) -> bool:
    """Whether the Hopper kernel decodes these inputs."""
    device = inputs.latent_map.device
    against = hopper.against_device(device.type, device.index)
    return not (against or hopper.against_imnet(inputs.widths, inputs.matmul_dtype, inputs.queries))


def decode(inputs: DecodeInputs, save: bool | None, coord_grad: bool) -> tuple[Tensor, Tensor]:
    saved = inputs.empty_saved(saved_bytes(inputs, coord_grad) if save else 0)
    rows = _padded_rows(inputs.rows) if saved.numel() else -1
    arguments = _arguments(_kernel_inputs(inputs))

    def pack() -> Tensor:
        return _C.cuda_decode_pack(*arguments, False, False)

    # Optimizers may change weights without counting it, so training packs them every time.
    packed = PACKED.get(inputs, arguments[-1], pack) if save is None else pack()
    return _C.cuda_decode(*arguments, packed, saved, coord_grad, 0, rows, True), saved


def _product(grad_rows: Tensor, rows: Tensor) -> Tensor:
    """grad_rows^T rows, summed in float32 over the rows: [R, out], [R, in] -> [out, in]."""
    if grad_rows.dtype == torch.float32:
        return grad_rows.t() @ rows
    if grad_rows.is_cuda:
        return torch.mm(grad_rows.t(), rows, out_dtype=torch.float32)
    return grad_rows.t().float() @ rows.float()  # for kernels that the tests run on the CPU


def decode_backward(grad_out: Tensor, saved: Tensor, inputs: DecodeInputs, coord_grad: bool) -> list[Tensor]:
    inputs = _kernel_inputs(inputs)
    arguments = _arguments(inputs)
    latent_map, coord, cell, weight_geometry, weights = inputs[:5]
    matmul_dtype, widths, width, hidden = inputs.matmul_dtype, inputs.widths, _padded_width(inputs), len(weights) - 1
    padded = _padded_rows(inputs.rows)
    in_order = torch.are_deterministic_algorithms_enabled()

    def zeros(shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=latent_map.device)

    grad_latent_map = zeros(latent_map.shape)
    grad_points = [zeros(point.shape) for point in (coord, cell) if point is not None] if coord_grad else []
    grad_coord, grad_cell = [*grad_points, zeros((0,)), zeros((0,))][:2]
    grad_weights = [zeros(weight.shape) for weight in weights]
    column_sums = zeros((hidden + 5 + widths[-1], width))
    packed = _C.cuda_decode_pack(*arguments, True, coord_grad)
    forward_packed = None if saved.numel() else _C.cuda_decode_pack(*arguments, False, False)
    grad_out = grad_out.float().contiguous()
    for first in range(0, padded, _CHUNK_ROWS):
        count = min(_CHUNK_ROWS, padded - first)
        chunk_saved, saved_first, saved_rows = saved, 0, padded
        if not saved.numel():
            size = _saved_bytes(inputs, count, coord_grad)
            chunk_saved, saved_first, saved_rows = latent_map.new_empty(size, dtype=torch.uint8), first, count
            _C.cuda_decode(*arguments, forward_packed, chunk_saved, coord_grad, first, count, False)
        grad_rows, sums, latent_rows, latent_index = _C.cuda_decode_backward(
            grad_out,
            chunk_saved,
            saved_first,
            saved_rows,
            *arguments,
            packed,
            first,
            count,
            zeros((0,)) if in_order else grad_latent_map,
            grad_coord,
            grad_cell,
        )
        column_sums += sums.sum(0)
        saved_layers = chunk_saved[: hidden * saved_rows * width * matmul_dtype.itemsize].view(matmul_dtype)
        rows = saved_layers.view(hidden, saved_rows, width)[:, first - saved_first : first - saved_first + count]
        with torch.autocast(latent_map.device.type, enabled=False):
            for layer in range(hidden):
                product = _product(grad_rows[layer], rows[layer])
                grad_weights[layer] += product[: widths[layer + 1], : widths[layer]]
        if in_order:
            grad_latent_map.view(-1, widths[0]).index_add_(0, latent_index, latent_rows[:, : widths[0]])

    grad_weights[hidden] += column_sums[hidden + 5 :, : widths[hidden]]
    grad_biases = [column_sums[layer, : widths[layer]].clone() for layer in range(hidden + 1)]
    grad_biases.append(grad_out.sum((0, 1) if coord is not None else (0, 2, 3)))
    terms = column_sums[hidden + 1 : hidden + 1 + weight_geometry.shape[1], : widths[0]]
    grad_geometry = terms.t().clone(memory_format=torch.contiguous_format)
    return [grad_latent_map, grad_geometry, *grad_weights, *grad_biases, *grad_points]
