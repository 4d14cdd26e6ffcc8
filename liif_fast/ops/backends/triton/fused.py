"""The fused decode's launches: which imnets it takes, packing, tiles, and a decode in chunks. The kernels are in
fused_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...inputs import DecodeInputs
from .fused_kernels import (
    MAX_OUTS,
    PackedImnet,
    RowGrads,
    SavedActivations,
    blend_backward_kernel,
    fused_decode_backward_kernel,
    fused_decode_forward_kernel,
    mask_bytes,
)
from .launch import (
    DTYPES,
    OPTIONS,
    DecodeChunk,
    Kernel,
    Shapes,
    TileConfigKey,
    current_device,
    holds_wide,
    padded_width,
    tile_config,
    tile_width,
)
from .layerwise import DecodeGrads, backward_first_layer, last_layer, product_of_rows
from .rows import as_operand

MAX_WIDTH, MAX_INFERENCE_WIDTH = 256, 512  # of a hidden layer: registers do not hold wider ones; see launch.holds_wide
FUSED_CHUNK_BYTES = 1 << 29  # of activations and gradients that a backward computes again, of blends of many outputs


@triton.jit
def pack_kernel(
    layers, layer_biases, imnet,
    WIDTHS: tl.constexpr, TRANSPOSED: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Packs a tile of a hidden layer's weights, [P, P] with zeros past its widths, or of the last layer's weights.

    layers: tuple of weights [out, in]; WIDTHS: outputs of every layer from the first to the last.
    """
    HIDDEN: tl.constexpr = len(WIDTHS) - 2
    tiles: tl.constexpr = P // TILE
    part = tl.program_id(0) // (tiles * tiles)
    tile = tl.program_id(0) % (tiles * tiles)
    output = tile // tiles * TILE + tl.arange(0, TILE)
    column = tile % tiles * TILE + tl.arange(0, TILE)
    for layer in tl.static_range(HIDDEN):
        if part == layer:
            exists = output < WIDTHS[layer + 1]
            inside = exists[:, None] & (column < WIDTHS[layer])[None, :]
            place = layers[layer] + output[:, None] * WIDTHS[layer] + column[None, :]
            value = as_operand(tl.load(place, mask=inside, other=0.0).to(tl.float32), OP, PRECISION)
            if TRANSPOSED:
                tl.store(imnet.weights + layer * (P * P) + column[None, :] * P + output[:, None], value)
            else:
                tl.store(imnet.weights + layer * (P * P) + output[:, None] * P + column[None, :], value)
            bias = tl.load(layer_biases[layer + 1] + output, mask=exists, other=0.0).to(tl.float32)
            tl.store(imnet.biases + layer * P + output, bias, mask=((output >= 0) & (tile % tiles == 0)) != 0)
    if part == HIDDEN:
        number = tl.arange(0, MAX_OUTS)
        exists = number < WIDTHS[HIDDEN + 1]
        inside = (column < WIDTHS[HIDDEN])[:, None] & exists[None, :]
        place = layers[HIDDEN] + number[None, :] * WIDTHS[HIDDEN] + column[:, None]
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        rounded = as_operand(value, OP, PRECISION)
        place = imnet.last + column[:, None] * (2 * MAX_OUTS) + number[None, :]
        tl.store(place, rounded)
        tl.store(place + MAX_OUTS, as_operand(value - rounded.to(tl.float32), OP, PRECISION))
        bias = tl.load(layer_biases[HIDDEN + 1] + number, mask=exists, other=0.0)
        tl.store(imnet.last_bias + number, bias.to(tl.float32))


def can_fuse(widths: Sequence[int], matmul_dtype: torch.dtype, infers: bool = False) -> bool:
    """Whether these kernels take an imnet (K, *hidden, O); infers: without a backward, on the current device."""
    if matmul_dtype not in (torch.float32, torch.bfloat16, torch.float16) or len(widths) == 1:
        return False
    wide = infers and matmul_dtype.itemsize == 2 and holds_wide(current_device())
    return max(widths[:-1]) <= (MAX_INFERENCE_WIDTH if wide else MAX_WIDTH)


def kernel_outs(inputs: DecodeInputs) -> int:
    """Outputs of the last layer in the kernels; 0 where it is a product of PyTorch."""
    outs = inputs.widths[-1]
    return outs if outs <= MAX_OUTS.value else 0


def saved_shapes(inputs: DecodeInputs, queries: int, rows: int, coord_grad: bool) -> Shapes:
    """Shapes and dtypes of SavedActivations."""
    matmul_dtype, layers = inputs.matmul_dtype, len(inputs.weights) - 1
    width, outs = padded_width(max(inputs.widths[:-1])), kernel_outs(inputs)
    return [
        ((layers + int(coord_grad and not outs), rows, width), matmul_dtype),
        ((layers + 1, rows, mask_bytes(width, matmul_dtype == torch.float32)), torch.uint8),
        ((queries, width), torch.float32),
        ((rows if coord_grad and outs else 0, MAX_OUTS.value), torch.float32),
    ]


def pack(chunk: DecodeChunk, *, backward: bool = False) -> PackedImnet:
    """Packs the imnet for the kernels. Tensor cores read TF32 along a product's sum only, so the backward in float32
    takes transposed weights."""
    weights, biases, widths = chunk.inputs.weights, chunk.inputs.biases, tuple(chunk.inputs.widths)
    matmul_dtype, first = chunk.inputs.matmul_dtype, chunk.first
    hidden, width = len(weights) - 1, tile_width(max(widths[:-1]))
    tile = min(width, 64)
    if first.shape[1] < width:
        first = F.pad(first, (0, width - first.shape[1]))
    imnet = PackedImnet(
        first=first,
        weights=first.new_empty(hidden, width, width, dtype=matmul_dtype),
        biases=first.new_empty(hidden, width),
        last=first.new_empty(width, 2 * MAX_OUTS.value, dtype=matmul_dtype),
        last_bias=first.new_empty(MAX_OUTS.value),
    )
    last_tiles = width // tile if kernel_outs(chunk.inputs) else 0
    pack_kernel[(hidden * (width // tile) ** 2 + last_tiles,)](
        tuple(weight.contiguous() for weight in weights), tuple(bias.contiguous() for bias in biases), imnet,
        WIDTHS=widths, TRANSPOSED=backward and matmul_dtype == torch.float32, OP=DTYPES[matmul_dtype],
        PRECISION=chunk.precision, P=width, TILE=tile, **OPTIONS,
    )  # fmt: skip
    return imnet


def _configure(chunk: DecodeChunk, kernel: Kernel, width: int) -> tuple[int, dict[str, Any]]:
    """Rows of a tile, and the constants and options that both kernels share."""
    matmul_dtype, outs = chunk.inputs.matmul_dtype, kernel_outs(chunk.inputs)
    config = tile_config(TileConfigKey(kernel, width, matmul_dtype, chunk.precision), current_device())
    if kernel == "backward" and not outs:  # loads its first gradients, which takes registers
        config = config._replace(stages=min(config.stages, 2))
    stored = width if kernel == "forward" else padded_width(max(chunk.inputs.widths[:-1]))
    return config.rows, dict(
        OUTS=outs, OP=DTYPES[matmul_dtype], PRECISION=chunk.precision, STORED=stored, NB=width // config.block,
        BLOCK=config.block, num_stages=config.stages, num_warps=config.warps, **chunk.flags(config.rows),
    )  # fmt: skip


def _forward_chunk(
    chunk: DecodeChunk, imnet: PackedImnet, out: Tensor, saved: SavedActivations | None, blended: Tensor | None = None
) -> None:
    """Decodes to `out`, the whole decode's for points, the chunk's own for a grid; fills `saved`.

    blended: [queries, P], which a decode to many outputs fills instead of `out` where it fills no `saved`.
    """
    layers, width = imnet.biases.shape
    rows, options = _configure(chunk, "forward" if saved is None else "save", width)
    tiles, grid = chunk.tiles(rows)
    coord_grad = saved is not None and (saved.preds.numel() > 0 or len(saved.acts) > layers)
    if saved is None:
        unused = imnet.first
        to = SavedActivations(unused, unused, unused if blended is None else blended, unused)
    else:
        to = saved
    fused_decode_forward_kernel[(tiles,)](
        chunk.latent_map, imnet, out, to, grid, layers, query_term=chunk.query_term,
        WIDTH=chunk.latent_map.shape[-1], TERMS=chunk.terms, SAVE=saved is not None, COORD=coord_grad, **options,
    )  # fmt: skip


def _backward_chunk(
    chunk: DecodeChunk, imnet: PackedImnet, grad_out: Tensor, saved: SavedActivations, grads: DecodeGrads
) -> None:
    """Adds a chunk's gradients; grad_out is [queries, O]."""
    layers, width = imnet.biases.shape
    rows, options = _configure(chunk, "backward", width)
    tiles, grid = chunk.tiles(rows)
    coord_grad = grads.coord is not None
    row_grads = RowGrads(
        grad_out.new_empty(layers + 1, chunk.rows, saved.blended.shape[1], dtype=chunk.inputs.matmul_dtype),
        grad_out.new_empty(tiles, layers, width),
        grad_out.new_empty(chunk.rows if coord_grad else 0),
    )
    options["COORD"] = coord_grad
    if not options["OUTS"]:
        last = chunk.inputs.weights[-1].to(grad_out.dtype)
        grad_blended = torch.mm(grad_out, F.pad(last, (0, saved.blended.shape[1] - last.shape[1])))
        block = min(width, 64)
        tiling = {**options, "NB": width // block, "BLOCK": block, "num_warps": 8}
        del tiling["OUTS"]
        blend_backward_kernel[(tiles,)](grad_blended, saved, row_grads, grid, layers, **tiling)
        options["COORD"] = False
    fused_decode_backward_kernel[(tiles,)](grad_out, imnet, saved, row_grads, grid, layers, **options)
    sums = row_grads.bias_sums.sum(0)
    for layer in range(layers):
        weight, bias = grads.weights[layer], grads.biases[layer + 1]
        product = product_of_rows(row_grads.layers[layer + 1], saved.acts[layer])
        weight += product[: weight.shape[0], : weight.shape[1]]
        bias += sums[layer, : bias.shape[0]]
    grads.weights[-1].add_(torch.mm(grad_out.t(), saved.blended)[:, : grads.weights[-1].shape[1]])
    grads.biases[-1].add_(grad_out.sum(0))
    backward_first_layer(chunk, row_grads.layers[0], row_grads.area_weight, grads)


def forward(whole: DecodeChunk, out: Tensor, saved: Sequence[Tensor] | None) -> None:
    """Decodes to `out`; fills `saved`, tensors of `saved_shapes`."""
    imnet, keeps = pack(whole), None if saved is None else SavedActivations(*saved)
    if kernel_outs(whole.inputs):
        _forward_chunk(whole, imnet, out, keeps)
        return
    width = imnet.first.shape[1]
    for chunk in [whole] if keeps else whole.chunks(FUSED_CHUNK_BYTES // (4 * width) * whole.corners):
        blended = keeps.blended if keeps else imnet.first.new_empty(chunk.queries, width)
        _forward_chunk(chunk, imnet, out, keeps, blended)
        chunk.put_queries(out, last_layer(chunk, blended[:, : whole.inputs.widths[-2]]))


def backward(whole: DecodeChunk, grad_out: Tensor, saved: Sequence[Tensor] | None, grads: DecodeGrads) -> None:
    """Adds all gradients; without `saved` it computes the activations again, chunk by chunk."""
    inputs, imnet = whole.inputs, pack(whole, backward=True)
    if saved is not None:
        _backward_chunk(whole, imnet, whole.of_queries(grad_out).contiguous(), SavedActivations(*saved), grads)
        return
    forward_imnet = pack(whole)
    row_bytes = padded_width(max(inputs.widths[:-1])) * inputs.matmul_dtype.itemsize * (2 * len(inputs.weights) + 1)
    out = grad_out.new_empty(grad_out.shape if kernel_outs(inputs) else 0)  # not read
    for chunk in whole.chunks(FUSED_CHUNK_BYTES // row_bytes):
        shapes = saved_shapes(inputs, chunk.queries, chunk.rows, grads.coord is not None)
        again = SavedActivations(*(grad_out.new_empty(shape, dtype=dtype) for shape, dtype in shapes))
        _forward_chunk(chunk, forward_imnet, out, again)
        _backward_chunk(chunk, imnet, chunk.of_queries(grad_out).contiguous(), again, grads)
