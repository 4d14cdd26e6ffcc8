"""The fused decode on the `cuda` backend: one kernel for the forward, one for the backward, one for Hopper's inference.

The forward saves 16-bit (or float32) activations, and one bit per activation for the ReLUs. The backward's kernel
computes every layer's gradient from them. The weights' gradients are products of both: of a third kernel in 16 bits,
which rebuilds the activations of the first layer and the gradients of the last one, and of PyTorch in float32. Without
saved activations (`recompute`), the backward computes them again, a bounded number of rows at a time.

A row is one corner of one query. csrc/cuda/decode/launch.h describes the arrays, csrc/cuda/decode/tile.cuh the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...dtypes import allows_tf32
from ...inputs import DecodeInputs
from ..extension import OPS as _C
from . import hopper
from .packed import PACKED

_ROW_PADDING = 128  # kRowPadding of launch.h
_FUSED_OUTS = hopper.MOST_OUTS  # kMaxFusedOuts: more are a product of PyTorch
_CHUNK_ROWS = 1536 * _ROW_PADDING  # of the backward: bounds its workspace, 100 MB a layer of 256 in 16 bits
_SAVED_ALIGNMENT = 256  # of the arrays in `saved`
_ALIGNMENT = 16  # kernels read the latent map and query terms in vectors of 16 bytes


def _padded_rows(rows: int) -> int:
    return -(-rows // _ROW_PADDING) * _ROW_PADDING


def _padded_width(inputs: DecodeInputs) -> int:
    """The width to which the kernels pad every layer but the last."""
    widest = max(inputs.widths[:-1])
    return 64 if widest <= 64 else 128 if widest <= 128 else 256


def _saved_layers(inputs: DecodeInputs, coord_grad: bool) -> int:
    """How many layers' activations a forward saves; see rebuilds_first of launch.h."""
    is_float = inputs.latent_map.dtype != inputs.matmul_dtype
    hidden = len(inputs.weights) - 1
    rebuilds_first = hidden > 1 and is_float and inputs.matmul_dtype.itemsize == 2 and inputs.query_term is None
    return hidden - rebuilds_first + coord_grad


def _saved_bytes(inputs: DecodeInputs, rows: int, coord_grad: bool) -> int:
    """Bytes that a forward of `rows` rows saves: activations, blended hidden vectors, ReLU bits.

    saved_bytes of csrc/cuda/decode/decode.cu computes the same layout. It is repeated here because torch.compile traces
    this function with symbolic sizes.
    """
    padded, width = _padded_rows(rows), _padded_width(inputs)
    row = width * inputs.matmul_dtype.itemsize
    blended = padded // 4 if inputs.local_ensemble else padded
    masks = len(inputs.weights) * padded * max(width // 8, 16)  # a thread's bits begin a new word
    return _saved_layers(inputs, coord_grad) * padded * row + blended * row + _SAVED_ALIGNMENT + masks


def saved_bytes(inputs: DecodeInputs, coord_grad: bool) -> int:
    return _saved_bytes(inputs, inputs.rows, coord_grad)


def aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor  # a view into a larger tensor


def _kernel_inputs(inputs: DecodeInputs) -> DecodeInputs:
    latent_map = inputs.latent_map
    latent_map = (latent_map if latent_map.dtype == inputs.matmul_dtype else latent_map.float()).contiguous()
    inputs = inputs.for_kernels(aligned(latent_map), torch.float32)
    return inputs if inputs.query_term is None else inputs._replace(query_term=aligned(inputs.query_term))


def _arguments(inputs: DecodeInputs, policy: int | None = None) -> tuple[object, ...]:
    """The arguments that all bindings share: the inputs, with an MmaPolicy's number as matmul_dtype.

    policy: that number, None for the kernels that run on every GPU.
    """
    float_policy = 2 if allows_tf32() else 3
    every = {torch.float16: 0, torch.bfloat16: 1}.get(inputs.matmul_dtype, float_policy)
    return *inputs[:-1], every if policy is None else policy


def _hopper_policy(inputs: DecodeInputs, trains: bool) -> int | None:
    """The policy of the Hopper kernel where it decodes these inputs."""
    device = inputs.latent_map.device
    against = hopper.against_device(device.type, device.index)
    facts = inputs.widths, inputs.matmul_dtype, trains, inputs.queries, inputs.query_term is not None
    against = against or hopper.against_imnet(*facts)
    return None if against else hopper.POLICIES[inputs.matmul_dtype]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a @ b, summed in float32."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return a @ b
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()  # for kernels that the tests run on the CPU


def _has_own_product(inputs: DecodeInputs) -> bool:
    """Whether the last layer is a product of blended hidden vectors here, and not a part of the kernels."""
    return inputs.widths[-1] > _FUSED_OUTS


def _last_weight(inputs: DecodeInputs) -> Tensor:
    """The last layer's rows in the operands' dtype, [O, padded width]."""
    weight = inputs.weights[-1].to(inputs.matmul_dtype)
    return pad(weight, (0, _padded_width(inputs) - weight.shape[1]))


def _saved_blended(inputs: DecodeInputs, saved: Tensor, rows: int, coord_grad: bool) -> Tensor:
    """The blended hidden vectors that a forward of `rows` rows saved, [rows / corners, padded width]."""
    row = _padded_width(inputs) * inputs.matmul_dtype.itemsize
    begin = _saved_layers(inputs, coord_grad) * rows * row
    end = begin + rows // inputs.corners * row
    return saved[begin:end].view(inputs.matmul_dtype).view(-1, _padded_width(inputs))


def _of_queries(out: Tensor, inputs: DecodeInputs, begin: int, end: int) -> list[Tensor]:
    """Views [queries, O] of an output: those of queries begin to end of the batch, one view for each entry."""
    by_query = out.flatten(2).transpose(1, 2) if inputs.coord is None else out
    size = inputs.entry_queries
    entries = range(begin // size, -(-min(end, inputs.queries) // size))
    return [by_query[entry, max(begin - entry * size, 0) : end - entry * size] for entry in entries]


def _multiply_last(inputs: DecodeInputs, blend: Callable[[int, int], Tensor]) -> Tensor:
    """The output by the last layer's own product, a bounded number of queries at a time.

    blend: (first row, rows) -> their blended hidden vectors.
    """
    out = inputs.latent_map.new_empty(inputs.out_shape, dtype=torch.float32)
    weight, padded = _last_weight(inputs).t(), _padded_rows(inputs.rows)
    for first in range(0, padded, _CHUNK_ROWS):
        count = min(_CHUNK_ROWS, padded - first)
        product = _product(blend(first, count), weight) + inputs.biases[-1]
        for part in _of_queries(out, inputs, first // inputs.corners, (first + count) // inputs.corners):
            part.copy_(product[: len(part)])
            product = product[len(part) :]
    return out


def _multiply_last_backward(
    inputs: DecodeInputs, grad_out: Tensor, begin: int, blended: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the last layer's rows [O, K], and of blended hidden vectors, those of queries from `begin` on."""
    grad = torch.cat(_of_queries(grad_out, inputs, begin, begin + len(blended))).to(inputs.matmul_dtype)
    grad_weight = _product(grad.t(), blended[: len(grad)])[:, : inputs.weights[-1].shape[1]]
    return grad_weight, pad(_product(grad, _last_weight(inputs)), (0, 0, 0, len(blended) - len(grad)))


def decode(inputs: DecodeInputs, save: bool | None, coord_grad: bool) -> tuple[Tensor, Tensor]:
    saved = inputs.empty_saved(saved_bytes(inputs, coord_grad) if save else 0)
    rows = _padded_rows(inputs.rows) if saved.numel() else -1
    arguments = _arguments(_kernel_inputs(inputs), _hopper_policy(inputs, save is not None))

    def pack() -> Tensor:
        return _C.cuda_decode_pack(*arguments, False, False)

    # Optimizers may change weights without counting it, so training packs them every time.
    packed = PACKED.get(inputs, arguments[-1], pack) if save is None else pack()
    if not _has_own_product(inputs):
        return _C.cuda_decode(*arguments, packed, saved, coord_grad, 0, rows, True), saved
    if saved.numel():
        _C.cuda_decode(*arguments, packed, saved, coord_grad, 0, rows, False)
        blended = _saved_blended(inputs, saved, rows, coord_grad)

    def blend(first: int, count: int) -> Tensor:
        if saved.numel():
            return blended[first // inputs.corners : (first + count) // inputs.corners]
        return _C.cuda_decode(*arguments, packed, saved, coord_grad, first, count, True)

    return _multiply_last(inputs, blend), saved


def decode_backward(grad_out: Tensor, saved: Tensor, inputs: DecodeInputs, coord_grad: bool) -> list[Tensor]:
    inputs = _kernel_inputs(inputs)
    arguments = _arguments(inputs, _hopper_policy(inputs, trains=True))
    latent_map, coord, cell, weight_geometry, weights = inputs[:5]
    matmul_dtype, widths, width, hidden = inputs.matmul_dtype, inputs.widths, _padded_width(inputs), len(weights) - 1
    padded = _padded_rows(inputs.rows)
    in_order = torch.are_deterministic_algorithms_enabled()

    def zeros(shape: Sequence[int]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=latent_map.device)

    grad_latent_map = zeros(latent_map.shape)
    grad_points = [zeros(point.shape) for point in (coord, cell) if point is not None] if coord_grad else []
    grad_coord, grad_cell = [*grad_points, zeros((0,)), zeros((0,))][:2]
    grad_terms = [] if inputs.query_term is None else [zeros(inputs.query_term.shape)]
    grad_last_weight, grad_hidden = zeros(weights[-1].shape), zeros((hidden, width, width))
    multiplies_last = _has_own_product(inputs)
    column_sums = zeros((hidden + 5 + (0 if multiplies_last else widths[-1]), width))
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
        chunk_grad = grad_out
        if multiplies_last:
            blended = _saved_blended(inputs, chunk_saved, saved_rows, coord_grad)
            blended = blended[(first - saved_first) // inputs.corners :][: count // inputs.corners]
            grad_last, chunk_grad = _multiply_last_backward(inputs, grad_out, first // inputs.corners, blended)
            grad_last_weight += grad_last
        grad_rows, sums, latent_rows, latent_index = _C.cuda_decode_backward(
            chunk_grad,
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
            *(grad_terms or [zeros((0,))]),
            grad_hidden,
        )
        column_sums += sums.sum(0)
        if in_order:
            grad_latent_map.view(-1, widths[0]).index_add_(0, latent_index, latent_rows[:, : widths[0]])
        if matmul_dtype.itemsize == 2:  # the kernel has added the hidden layers' products to grad_hidden
            continue
        saved_layers = chunk_saved[: hidden * saved_rows * width * matmul_dtype.itemsize].view(matmul_dtype)
        rows = saved_layers.view(hidden, saved_rows, width)[:, first - saved_first : first - saved_first + count]
        for layer in range(hidden):
            grad_hidden[layer] += _product(grad_rows[layer].t(), rows[layer])

    if not multiplies_last:
        grad_last_weight += column_sums[hidden + 5 :, : widths[hidden]]
    grad_weights = [
        grad_hidden[layer, : widths[layer + 1], : widths[layer]].clone(memory_format=torch.contiguous_format)
        for layer in range(hidden)
    ]
    grad_weights.append(grad_last_weight)
    grad_biases = [column_sums[layer, : widths[layer]].clone() for layer in range(hidden + 1)]
    grad_biases.append(grad_out.sum((0, 1) if coord is not None else (0, 2, 3)))
    terms = column_sums[hidden + 1 : hidden + 1 + weight_geometry.shape[1], : widths[0]]
    grad_geometry = terms.t().clone(memory_format=torch.contiguous_format)
    return [grad_latent_map, grad_geometry, *grad_weights, *grad_biases, *grad_points, *grad_terms]
