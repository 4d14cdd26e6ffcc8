"""The fused decode in Triton: gather, every layer and the ensemble in one kernel, and the backward through the layers.

A tile of rows stays on the chip from the first layer to the last. Activations are NB blocks of BLOCK columns. Each step
computes one block of the next layer, so that shared memory holds only that step's weights, [BLOCK, NB * BLOCK], while
Triton's pipeline loads the next ones. The launch sets the number of pipeline stages: if the loop set it, the pipeline
would include biases and masks, which need the room of a block.

In 16 bits, a tile's old and new activations fit in registers. One loop runs over all steps and carries activations as
integers: a product whose left operand is a loop argument would go through shared memory, a bitcast keeps it in
registers. In float32 old and new activations do not both fit in registers. The outer loop (layers) keeps the old ones
in shared memory; the inner loop computes the new ones.

The last layer and its gradient are products of 16 columns: the same eight outputs (or fewer) twice, once with the
weights rounded and once with the rounding errors, so that both are as accurate as in float32. With more than eight
outputs the kernels end at the blend and begin at its gradient. The last layer is then a product of PyTorch, which has a
row for each query and not for each corner.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .rows import as_operand, find_queries, find_rows, first_layer, joined, out_offset, relu

MAX_OUTS = tl.constexpr(8)  # of a last layer in the kernel; its product has twice as many columns


class PackedImnet(NamedTuple):
    """The layers as kernels read them; P is the tile width of the widest hidden layer, L the hidden products."""

    first: Tensor  # [terms + 1, P], float32
    weights: Tensor  # [L, P, P] (out, in), for float32's backward (in, out); matmul_dtype
    biases: Tensor  # [L, P], float32
    last: Tensor  # [P, 16]: the last layer's columns rounded, then their rounding errors; matmul_dtype
    last_bias: Tensor  # [8], float32


class SavedActivations(NamedTuple):
    """The tensors that the forward saves for the backward; S is the padded width of the widest hidden layer.

    Only gradients of coordinates need preds or, with more than eight outputs, the last layer's inputs in acts.
    """

    acts: Tensor  # [L, rows, S], the hidden layers' inputs, in matmul_dtype; [L + 1, ..] with the last layer's
    masks: Tensor  # which activations are positive: [L + 1, rows, mask_bytes]
    blended: Tensor  # [queries, S], float32
    preds: Tensor  # [rows, 8], float32


class RowGrads(NamedTuple):
    """The tensors that the backward kernel writes."""

    layers: Tensor  # [L + 1, rows, S]: gradients of every layer's output before its ReLU, in matmul_dtype
    bias_sums: Tensor  # [tiles, L, P]: each tile's sums for the hidden layers' biases
    area_weight: Tensor  # [rows]; empty without gradients of coordinates


class TileMemory(NamedTuple):
    """Where a tile's rows are in the memory of saved activations or of gradients, STORED columns a row."""

    layers: Any  # pointer to the tile's first row in the first layer's activations or gradients
    masks: Any  # pointer to the tile's first row in the first layer's masks
    total: Any  # rows of the whole launch, the distance between layers
    valid: Any  # [ROWS]
    row: Any  # [ROWS], distance from the tile's first row
    block: Any  # [ROWS, BLOCK]: offsets of a block's values


@triton.constexpr_function
def mask_bytes(width, wide):
    """Bytes of the ReLU mask of a row of `width` activations: eight bytes for 64 columns of 16 bits; a byte for each
    column of 32 bits, where bits would save little."""
    return width if wide else (width + 63) // 64 * 8


@triton.constexpr_function
def carrier(op):
    """The dtype in which activations go from layer to layer."""
    return tl.float32 if op == tl.float32 else tl.int16


@triton.jit
def multiply(blocks, weights, offsets, total, step, NB: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr):
    """total + blocks @ weights, block by block; `step` is the distance between blocks of the weights."""
    for k in tl.static_range(NB):
        weight = tl.load(weights + (offsets + k * step))
        total = tl.dot(blocks[k].to(OP, bitcast=True), weight, total, input_precision=PRECISION)
    return total


@triton.jit
def zero_blocks(NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The blocks of a layer in float32, to be replaced one by one."""
    blocks = ()
    for _ in tl.static_range(NB):
        blocks = blocks + (tl.zeros([ROWS, BLOCK], tl.float32),)
    return blocks


@triton.jit
def replace_block(blocks, block, slot, NB: tl.constexpr):
    """The blocks with block number `slot` replaced."""
    replaced = ()
    for k in tl.static_range(NB):
        replaced = replaced + (tl.where(slot == k, block, blocks[k]),)
    return replaced


@triton.jit
def advance(blocks, computed, block, slot, NB: tl.constexpr):
    """After block number `slot` of a layer: (the input blocks of the next step, the blocks computed so far)."""
    if NB == 1:
        return (block,), computed
    else:
        done = slot == NB - 1
        following = ()
        for k in tl.static_range(NB - 1):
            following = following + (tl.where(done, computed[k], blocks[k]),)
        following = following + (tl.where(done, block, blocks[NB - 1]),)
        if NB == 2:
            return following, (block,)
        else:
            return following, replace_block(computed, block, slot, NB - 1)


@triton.jit
def stored_columns(valid, slot, STORED: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr):
    """Which of a block's values have a place in memory: rows that exist, columns before STORED."""
    if STORED == NB * BLOCK:
        return valid[:, None]
    else:
        return valid[:, None] & (tl.arange(0, BLOCK) + slot * BLOCK < STORED)[None, :]


@triton.jit
def mask_place(memory, layer, slot, WIDE: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to the ReLU mask of a tile's block."""
    stride: tl.constexpr = mask_bytes(STORED, WIDE)
    size: tl.constexpr = mask_bytes(BLOCK, WIDE)
    place = memory.masks + (layer * memory.total * stride + slot * size)
    return place + (memory.row * stride)[:, None] + tl.arange(0, size)[None, :]


@triton.jit
def store_mask(memory, layer, slot, carried, STORED: tl.constexpr, NB: tl.constexpr):
    """Stores which columns of a block are positive.

    As bits, bit j of byte i is column 8j + i of 64. carried: activations after ReLU as they go from layer to layer. As
    integers they are positive where the activations are positive or NaN.
    """
    WIDE: tl.constexpr = carried.dtype != tl.int16
    ROWS: tl.constexpr = carried.shape[0]
    BLOCK: tl.constexpr = carried.shape[1]
    size: tl.constexpr = mask_bytes(BLOCK, WIDE)
    place = mask_place(memory, layer, slot, WIDE, STORED, BLOCK)
    if WIDE:
        positive = carried.to(tl.int32, bitcast=True) > 0
        tl.store(place, positive.to(tl.uint8), mask=stored_columns(memory.valid, slot, STORED, NB, BLOCK))
    else:
        tl.static_assert(NB == 1 or BLOCK % 64 == 0, "blocks share no group of 64 columns")
        BITS: tl.constexpr = BLOCK // size
        bit = tl.arange(0, BITS)
        positive = tl.reshape(carried > 0, [ROWS, size // 8, BITS, 8])
        bits = tl.sum(tl.where(positive, (1 << bit)[None, None, :, None], 0), axis=2)
        tl.store(place, tl.reshape(bits, [ROWS, size]).to(tl.uint8), mask=memory.valid[:, None])


@triton.jit
def load_mask(memory, layer, slot, WIDE: tl.constexpr, STORED: tl.constexpr, NB: tl.constexpr):
    """The mask that store_mask stored, [ROWS, BLOCK]; columns from STORED on are not positive."""
    ROWS: tl.constexpr = memory.block.shape[0]
    BLOCK: tl.constexpr = memory.block.shape[1]
    size: tl.constexpr = mask_bytes(BLOCK, WIDE)
    place = mask_place(memory, layer, slot, WIDE, STORED, BLOCK)
    if WIDE:
        return tl.load(place, mask=stored_columns(memory.valid, slot, STORED, NB, BLOCK), other=0) != 0
    else:
        tl.static_assert(NB == 1 or BLOCK % 64 == 0, "blocks share no group of 64 columns")
        bit = tl.arange(0, BLOCK // size)
        bits = tl.reshape(tl.load(place, mask=memory.valid[:, None], other=0), [ROWS, size // 8, 1, 8]).to(tl.int32)
        return tl.reshape((bits & (1 << bit)[None, None, :, None]) != 0, [ROWS, BLOCK])


@triton.jit
def forward_block(
    blocks, imnet, memory, offsets, kept, step, slot,
    SAVE: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, STORED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Computes block `slot` of the next layer, in the dtype in which it is carried; SAVE stores it in `kept` layers."""
    ROWS: tl.constexpr = memory.block.shape[0]
    BLOCK: tl.constexpr = memory.block.shape[1]
    P: tl.constexpr = NB * BLOCK
    inner = tl.arange(0, BLOCK)
    total = tl.broadcast_to(tl.load(imnet.biases + step * BLOCK + inner)[None, :], [ROWS, BLOCK])
    total = multiply(blocks, imnet.weights + step * (BLOCK * P), offsets, total, BLOCK, NB, OP, PRECISION)
    value = as_operand(relu(total), OP, PRECISION)
    carried = value.to(carrier(OP), bitcast=True)
    if SAVE:
        layer = step // NB + 1
        store_mask(memory, layer, slot, carried, STORED, NB)
        place = memory.layers + (layer * memory.total * STORED + slot * BLOCK) + memory.block
        inside = stored_columns(memory.valid, slot, STORED, NB, BLOCK)
        tl.store(place, value, mask=(inside & (step < (kept - 1) * NB)) != 0)
    return carried


@triton.jit(do_not_specialize=["layers"])
def fused_decode_forward_kernel(
    latent_map, imnet, out, saved, grid, layers, query_term,
    WIDTH: tl.constexpr, OUTS: tl.constexpr, TERMS: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr,
    SAVE: tl.constexpr, COORD: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, STORED: tl.constexpr,
    NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Decodes a tile of queries to OUTS outputs, or, if OUTS is 0, to saved.blended.

    imnet: PackedImnet with P = NB * BLOCK; its weights and last are in OP. SAVE fills saved, SavedActivations; what
    the gradients of coordinates need only with COORD. `layers` is the number of hidden products.
    """
    T: tl.constexpr = tl.float32
    P: tl.constexpr = NB * BLOCK
    CORNERS: tl.constexpr = 4 if ENSEMBLE else 1
    QUERIES: tl.constexpr = ROWS // CORNERS
    tile = tl.program_id(0).to(tl.int64)
    found = find_rows(tile, grid, TERMS, GRID, ENSEMBLE, T, ROWS)
    valid = found.valid
    row = found.distance
    inner = tl.arange(0, BLOCK)
    memory = TileMemory(
        saved.acts + found.first_row * STORED,
        saved.masks + found.first_row * mask_bytes(STORED, OP == tl.float32),
        joined(grid.total) * CORNERS,
        valid,
        row,
        row[:, None] * STORED + inner[None, :],
    )
    kept = layers
    if COORD and OUTS == 0:
        kept = layers + 1
    blocks = ()
    for k in tl.static_range(NB):
        value = first_layer(latent_map, query_term, found, imnet.first, k * BLOCK + inner, WIDTH, P, TERMS, T)
        value = as_operand(relu(value), OP, PRECISION)
        carried = value.to(carrier(OP), bitcast=True)
        if SAVE:
            store_mask(memory, 0, k, carried, STORED, NB)
            inside = stored_columns(valid, k, STORED, NB, BLOCK)
            tl.store(memory.layers + k * BLOCK + memory.block, value, mask=(inside & (kept > 0)) != 0)
        blocks = blocks + (carried,)
    offsets = inner[None, :] * P + inner[:, None]
    if OP == tl.float32:
        for layer in range(layers):
            computed = zero_blocks(NB, BLOCK, ROWS)
            for slot in range(NB):
                step = layer * NB + slot
                carried = forward_block(
                    blocks, imnet, memory, offsets, kept, step, slot, SAVE, OP, PRECISION, STORED, NB
                )
                computed = replace_block(computed, carried, slot, NB)
            blocks = computed
    else:
        computed = blocks[1:]
        for step in range(layers * NB):
            slot = step % NB
            carried = forward_block(blocks, imnet, memory, offsets, kept, step, slot, SAVE, OP, PRECISION, STORED, NB)
            blocks, computed = advance(blocks, computed, carried, slot, NB)

    pair = tl.arange(0, 2 * MAX_OUTS)
    exists, entry, _, _, first_query, query = find_queries(tile, tl.arange(0, QUERIES), grid, GRID, QUERIES)
    query = first_query + query
    pred = tl.zeros([ROWS, 2 * MAX_OUTS], T)
    for k in tl.static_range(NB):
        value = blocks[k].to(OP, bitcast=True)
        column = k * BLOCK + inner
        if OUTS > 0:
            weight_pair = tl.load(imnet.last + column[:, None] * (2 * MAX_OUTS) + pair[None, :])
            pred = tl.dot(value, weight_pair, pred, input_precision=PRECISION)
        if SAVE or OUTS == 0:
            blend = tl.sum(tl.reshape(value.to(T) * found.area_weight[:, None], [QUERIES, CORNERS, BLOCK]), axis=1)
            inside = stored_columns(exists, k, STORED, NB, BLOCK)
            tl.store(saved.blended + query[:, None] * STORED + column[None, :], blend, mask=inside)
    if OUTS > 0:
        output = tl.arange(0, MAX_OUTS)
        if COORD:
            both = tl.sum(tl.reshape(pred, [ROWS, 2, MAX_OUTS]), axis=1)
            place = saved.preds + found.first_row * MAX_OUTS + row[:, None] * MAX_OUTS + output[None, :]
            tl.store(place, both, mask=valid[:, None])
        value = tl.sum(tl.reshape(pred * found.area_weight[:, None], [QUERIES, CORNERS, 2 * MAX_OUTS]), axis=1)
        value = tl.sum(tl.reshape(value, [QUERIES, 2, MAX_OUTS]), axis=1) + tl.load(imnet.last_bias + output)[None, :]
        place = out_offset(query[:, None], entry, output[None, :], OUTS, grid, GRID)
        tl.store(out + place, value, mask=exists[:, None] & (output < OUTS)[None, :])


@triton.jit
def load_grad_pair(grad_out, saved, grads, found, OUTS: tl.constexpr, COORD: tl.constexpr):
    """The gradients of the rows' outputs, twice, [ROWS, 16]; COORD stores those of the area weights."""
    row = found.distance
    output = tl.arange(0, 2 * MAX_OUTS) % MAX_OUTS
    inside = found.valid[:, None] & (output < OUTS)[None, :]
    grad = tl.load(grad_out + found.flat[:, None] * OUTS + output[None, :], mask=inside, other=0.0)
    if COORD:
        place = saved.preds + found.first_row * MAX_OUTS + row[:, None] * MAX_OUTS + output[None, :]
        total = tl.sum(grad * tl.load(place, mask=inside, other=0.0), axis=1) * 0.5
        tl.store(grads.area_weight + found.first_row + row, total, mask=found.valid)
    return grad * found.area_weight[:, None]


@triton.jit
def store_last_grads(
    value, memory, sums, layers, slot,
    OP: tl.constexpr, PRECISION: tl.constexpr, STORED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Stores block `slot` of the gradient of the last hidden layer, and its sum; before the ReLU, as an operand."""
    BLOCK: tl.constexpr = memory.block.shape[1]
    column = slot * BLOCK + tl.arange(0, BLOCK)
    value = tl.where(load_mask(memory, layers, slot, OP == tl.float32, STORED, NB), value, 0.0)
    place = sums + (layers - 1) * (NB * BLOCK) + column
    tl.store(place, tl.sum(value, axis=0), mask=((column >= 0) & (layers > 0)) != 0)
    value = as_operand(value, OP, PRECISION)
    place = memory.layers + (layers * memory.total * STORED + slot * BLOCK) + memory.block
    tl.store(place, value, mask=stored_columns(memory.valid, slot, STORED, NB, BLOCK))
    return value


@triton.jit(do_not_specialize=["layers"])
def blend_backward_kernel(
    grad_blended, saved, grads, grid, layers,
    GRID: tl.constexpr, ENSEMBLE: tl.constexpr, COORD: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr,
    STORED: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the gradient of a tile's blends, [queries, STORED], to those of the last hidden layer in `grads`, RowGrads.

    COORD stores those of the area weights too, for which it reads the layer's outputs in saved.acts. A kernel of its
    own, because the decode's backward has no registers for the addresses.
    """
    T: tl.constexpr = tl.float32
    CORNERS: tl.constexpr = 4 if ENSEMBLE else 1
    tile = tl.program_id(0).to(tl.int64)
    found = find_rows(tile, grid, 2, GRID, ENSEMBLE, T, ROWS)
    inner = tl.arange(0, BLOCK)
    sums = grads.bias_sums + tile * layers * (NB * BLOCK)
    memory = TileMemory(
        grads.layers + found.first_row * STORED,
        saved.masks + found.first_row * mask_bytes(STORED, OP == tl.float32),
        joined(grid.total) * CORNERS,
        found.valid,
        found.distance,
        found.distance[:, None] * STORED + inner[None, :],
    )
    grad_area_weight = tl.zeros([ROWS], T)
    for slot in range(NB):
        inside = stored_columns(found.valid, slot, STORED, NB, BLOCK)
        place = grad_blended + (found.first_query * STORED + slot * BLOCK)
        value = tl.load(place + (found.query[:, None] * STORED + inner[None, :]), mask=inside, other=0.0)
        if COORD:
            place = saved.acts + ((layers * memory.total + found.first_row) * STORED + slot * BLOCK) + memory.block
            grad_area_weight += tl.sum(value * tl.load(place, mask=inside, other=0.0).to(T), axis=1)
        store_last_grads(value * found.area_weight[:, None], memory, sums, layers, slot, OP, PRECISION, STORED, NB)
    if COORD:
        tl.store(grads.area_weight + (found.first_row + found.distance), grad_area_weight, mask=found.valid)


@triton.jit
def backward_block(
    blocks, imnet, memory, sums, offsets, layer, slot,
    OP: tl.constexpr, PRECISION: tl.constexpr, STORED: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """Computes block `slot` of the gradient of a layer's input before its ReLU, in the dtype in which it is carried."""
    ROWS: tl.constexpr = memory.block.shape[0]
    BLOCK: tl.constexpr = memory.block.shape[1]
    P: tl.constexpr = NB * BLOCK
    column = tl.arange(0, BLOCK) + slot * BLOCK
    positive = load_mask(memory, layer, slot, OP == tl.float32, STORED, NB)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if OP == tl.float32:  # weights (in, out): offsets as in the forward
        place = imnet.weights + (layer * (P * P) + slot * (BLOCK * P))
        total = multiply(blocks, place, offsets, total, BLOCK, NB, OP, PRECISION)
    else:
        place = imnet.weights + (layer * (P * P) + slot * BLOCK)
        total = multiply(blocks, place, offsets, total, BLOCK * P, NB, OP, PRECISION)
    total = tl.where(positive, total, 0.0)
    tl.store(sums + (layer - 1) * P + column, tl.sum(total, axis=0), mask=((column >= 0) & (layer > 0)) != 0)
    value = as_operand(total, OP, PRECISION)
    inside = stored_columns(memory.valid, slot, STORED, NB, BLOCK)
    place = memory.layers + (layer * memory.total * STORED + slot * BLOCK) + memory.block
    tl.store(place, value, mask=inside)
    return value.to(carrier(OP), bitcast=True)


@triton.jit(do_not_specialize=["layers"])
def fused_decode_backward_kernel(
    grad_out, imnet, saved, grads, grid, layers,
    OUTS: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr, COORD: tl.constexpr, OP: tl.constexpr,
    PRECISION: tl.constexpr, STORED: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the gradient of a tile's outputs, [queries, OUTS], to `grads`, RowGrads; its area_weight only with COORD.

    If OUTS is 0, it begins at the gradient of the last hidden layer in `grads`. imnet: PackedImnet, for float32 with
    weights (in, out). saved: SavedActivations, of which masks and, with COORD, preds are read.
    """
    T: tl.constexpr = tl.float32
    P: tl.constexpr = NB * BLOCK
    CORNERS: tl.constexpr = 4 if ENSEMBLE else 1
    tile = tl.program_id(0).to(tl.int64)
    found = find_rows(tile, grid, 2, GRID, ENSEMBLE, T, ROWS)
    valid = found.valid
    row = found.distance
    inner = tl.arange(0, BLOCK)
    if OUTS > 0:
        pair = tl.arange(0, 2 * MAX_OUTS)
        grad = load_grad_pair(grad_out, saved, grads, found, OUTS, COORD)
        rounded = as_operand(grad, OP, PRECISION)
        rest = as_operand(grad - rounded.to(T), OP, PRECISION)
    sums = grads.bias_sums + tile * layers * P
    memory = TileMemory(
        grads.layers + found.first_row * STORED,
        saved.masks + found.first_row * mask_bytes(STORED, OP == tl.float32),
        joined(grid.total) * CORNERS,
        valid,
        row,
        row[:, None] * STORED + inner[None, :],
    )
    blocks = ()
    for k in tl.static_range(NB):
        if OUTS > 0:
            weight_pair = tl.load(imnet.last + (k * BLOCK + inner)[None, :] * (2 * MAX_OUTS) + pair[:, None])
            value = tl.dot(rest, weight_pair, input_precision=PRECISION)
            value = tl.dot(rounded, weight_pair, value, input_precision=PRECISION)
            value = store_last_grads(value, memory, sums, layers, k, OP, PRECISION, STORED, NB)
        else:
            place = memory.layers + (layers * memory.total * STORED + k * BLOCK) + memory.block
            value = tl.load(place, mask=stored_columns(valid, k, STORED, NB, BLOCK), other=0.0)
        blocks = blocks + (value.to(carrier(OP), bitcast=True),)
    if OP == tl.float32:
        offsets = inner[None, :] * P + inner[:, None]
        for back in range(layers):
            layer = layers - 1 - back
            computed = zero_blocks(NB, BLOCK, ROWS)
            for slot in range(NB):
                carried = backward_block(blocks, imnet, memory, sums, offsets, layer, slot, OP, PRECISION, STORED, NB)
                computed = replace_block(computed, carried, slot, NB)
            blocks = computed
    else:
        computed = blocks[1:]
        offsets = inner[:, None] * P + inner[None, :]
        for step in range(layers * NB):
            slot = step % NB
            layer = layers - 1 - step // NB
            carried = backward_block(blocks, imnet, memory, sums, offsets, layer, slot, OP, PRECISION, STORED, NB)
            blocks, computed = advance(blocks, computed, carried, slot, NB)
