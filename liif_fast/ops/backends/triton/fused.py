"""The fused decode in Triton: gather, every layer and the ensemble in one kernel, and the way back through the layers.

A tile of rows stays on the chip from the first layer to the last. Activations are NB blocks of BLOCK columns; every
step makes one block of the next layer, so that a step's weights, [BLOCK, NB * BLOCK], are all of them that is in shared
memory, and Triton's pipeline fetches the next ones meanwhile. The launch says how many stages ahead: a loop that says
so itself would put biases and masks into the pipeline too, which need the room of a block.

With 16-bit operands a tile's activations, old and new, fit the registers. One loop walks all steps, and what travels
from one to the next does so as integers: a product whose left operand is the loop's own argument would go through
shared memory, a bitcast keeps it in registers. In float32 they are too many, so there shared memory is what is wanted
for the old ones: a loop over layers puts them there once, and a loop within it makes the new ones.

The last layer and its gradient are products of 16 columns: twice the same eight outputs (or less), once with the
operand rounded and once with what rounding left over, so that both are as good as in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import as_operand, find_queries, find_rows, first_layer, joined, out_offset, relu

OUTS = tl.constexpr(8)  # at most; a last layer's product has twice as many columns


@triton.constexpr_function
def mask_bytes(width, wide):
    """Bytes that say which of a row's `width` activations are positive: bits of 16-bit ones, in eights for 64 columns;
    bytes of wider ones, for which bits would save little."""
    return width if wide else (width + 63) // 64 * 8


@triton.jit
def pack_kernel(
    layers, layer_biases, weights, biases, last, last_bias,
    WIDTHS: tl.constexpr, TRANSPOSED: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A tile of a hidden layer's weights, [P, P] with zeros behind its widths, or of the last layer's.

    layers: weights [out, in], a tuple; WIDTHS: of every layer, the first one's output to the last one's.
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
                tl.store(weights + layer * (P * P) + column[None, :] * P + output[:, None], value)
            else:
                tl.store(weights + layer * (P * P) + output[:, None] * P + column[None, :], value)
            bias = tl.load(layer_biases[layer + 1] + output, mask=exists, other=0.0).to(tl.float32)
            tl.store(biases + layer * P + output, bias, mask=((output >= 0) & (tile % tiles == 0)) != 0)
    if part == HIDDEN:
        number = tl.arange(0, OUTS)
        exists = number < WIDTHS[HIDDEN + 1]
        inside = (column < WIDTHS[HIDDEN])[:, None] & exists[None, :]
        place = layers[HIDDEN] + number[None, :] * WIDTHS[HIDDEN] + column[:, None]
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        rounded = as_operand(value, OP, PRECISION)
        place = last + column[:, None] * (2 * OUTS) + number[None, :]
        tl.store(place, rounded)
        tl.store(place + OUTS, as_operand(value - rounded.to(tl.float32), OP, PRECISION))
        bias = tl.load(layer_biases[HIDDEN + 1] + number, mask=exists, other=0.0)
        tl.store(last_bias + number, bias.to(tl.float32))


@triton.jit
def multiply(blocks, weights, offsets, total, step, NB: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr):
    """total + blocks @ weights, block by block; `step` is the distance between blocks of the weights."""
    for k in tl.static_range(NB):
        weight = tl.load(weights + (offsets + k * step))
        total = tl.dot(blocks[k].to(OP, bitcast=True), weight, total, input_precision=PRECISION)
    return total


@triton.jit
def no_blocks(NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Room for the blocks of a layer in float32."""
    blocks = ()
    for _ in tl.static_range(NB):
        blocks = blocks + (tl.zeros([ROWS, BLOCK], tl.float32),)
    return blocks


@triton.jit
def put(blocks, block, slot, NB: tl.constexpr):
    """The blocks with number `slot` replaced."""
    replaced = ()
    for k in tl.static_range(NB):
        replaced = replaced + (tl.where(slot == k, block, blocks[k]),)
    return replaced


@triton.jit
def advance(blocks, made, block, slot, NB: tl.constexpr):
    """After block number `slot` of a layer was made: (the activations of the next step, the blocks made so far)."""
    if NB == 1:
        return (block,), made
    else:
        done = slot == NB - 1
        following = ()
        for k in tl.static_range(NB - 1):
            following = following + (tl.where(done, made[k], blocks[k]),)
        following = following + (tl.where(done, block, blocks[NB - 1]),)
        if NB == 2:
            return following, (block,)
        else:
            kept = ()
            for k in tl.static_range(NB - 1):
                kept = kept + (tl.where(slot == k, block, made[k]),)
            return following, kept


@triton.jit
def kept_columns(valid, slot, KEPT: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr):
    """Which of a block's values memory has a place for: rows that exist, columns before KEPT."""
    if KEPT == NB * BLOCK:
        return valid[:, None]
    else:
        return valid[:, None] & (slot * BLOCK + tl.arange(0, BLOCK) < KEPT)[None, :]


@triton.jit
def store_mask(
    masks, before, row, slot, valid, carried,
    KEPT: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keeps which columns of a block are positive, behind `before` rows of other layers, in mask_bytes a row.

    Where those are bits, bit j of byte i is column 8j + i of 64. carried: activations after ReLU, as they travel; as
    integers those are positive where the activations are, or NaN.
    """
    WIDE: tl.constexpr = carried.dtype != tl.int16
    stride: tl.constexpr = mask_bytes(KEPT, WIDE)
    size: tl.constexpr = mask_bytes(BLOCK, WIDE)
    place = masks + (before * stride + slot * size) + (row * stride)[:, None] + tl.arange(0, size)[None, :]
    if WIDE:
        positive = carried.to(tl.int32, bitcast=True) > 0
        tl.store(place, positive.to(tl.uint8), mask=kept_columns(valid, slot, KEPT, NB, BLOCK))
    else:
        tl.static_assert(NB == 1 or BLOCK % 64 == 0, "blocks share no group of 64 columns")
        BITS: tl.constexpr = BLOCK // size
        bit = tl.arange(0, BITS)
        positive = tl.reshape(carried > 0, [ROWS, size // 8, BITS, 8])
        bits = tl.sum(tl.where(positive, (1 << bit)[None, None, :, None], 0), axis=2)
        tl.store(place, tl.reshape(bits, [ROWS, size]).to(tl.uint8), mask=valid[:, None])


@triton.jit
def load_mask(
    masks, before, row, slot, valid,
    OP: tl.constexpr, KEPT: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What store_mask kept, [ROWS, BLOCK]; columns behind KEPT are not positive."""
    WIDE: tl.constexpr = OP == tl.float32
    stride: tl.constexpr = mask_bytes(KEPT, WIDE)
    size: tl.constexpr = mask_bytes(BLOCK, WIDE)
    place = masks + (before * stride + slot * size) + (row * stride)[:, None] + tl.arange(0, size)[None, :]
    if WIDE:
        return tl.load(place, mask=kept_columns(valid, slot, KEPT, NB, BLOCK), other=0) != 0
    else:
        tl.static_assert(NB == 1 or BLOCK % 64 == 0, "blocks share no group of 64 columns")
        bit = tl.arange(0, BLOCK // size)
        bits = tl.reshape(tl.load(place, mask=valid[:, None], other=0), [ROWS, size // 8, 1, 8]).to(tl.int32)
        return tl.reshape((bits & (1 << bit)[None, None, :, None]) != 0, [ROWS, BLOCK])


@triton.jit
def forward_block(
    blocks, weights, biases, offsets, acts, masks, block_of_row, row, valid, number, layers, step, slot,
    SAVE: tl.constexpr, OP: tl.constexpr, CARRY: tl.constexpr, PRECISION: tl.constexpr,
    KEPT: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Block `slot` of the next layer, as it travels; kept for SAVE."""
    P: tl.constexpr = NB * BLOCK
    inner = tl.arange(0, BLOCK)
    total = tl.broadcast_to(tl.load(biases + step * BLOCK + inner)[None, :], [ROWS, BLOCK])
    total = multiply(blocks, weights + step * (BLOCK * P), offsets, total, BLOCK, NB, OP, PRECISION)
    value = as_operand(relu(total), OP, PRECISION)
    carried = value.to(CARRY, bitcast=True)
    if SAVE:
        before = (step // NB + 1) * number  # rows of the layers before
        store_mask(masks, before, row, slot, valid, carried, KEPT, NB, BLOCK, ROWS)
        place = acts + (before * KEPT + slot * BLOCK) + block_of_row
        inside = kept_columns(valid, slot, KEPT, NB, BLOCK)
        tl.store(place, value, mask=(inside & (step < (layers - 1) * NB)) != 0)
    return carried


@triton.jit(do_not_specialize=["layers"])
def chain_forward_kernel(
    latent_map, coord, cell, first, weights, biases, last, last_bias, out, acts, masks, blended, preds,
    places, rows, cols, image_rows, image_cols, layers,
    WIDTH: tl.constexpr, NUMBER: tl.constexpr, TERMS: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr,
    SAVE: tl.constexpr, COORD: tl.constexpr, OP: tl.constexpr, CARRY: tl.constexpr, PRECISION: tl.constexpr,
    KEPT: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Decodes a tile of queries to NUMBER outputs.

    first [TERMS + 1, P] and biases [layers, P] in float32, weights [layers, P, P] (out, in) and last [P, 16] in OP,
    last_bias [8]; P = NB * BLOCK. SAVE keeps what the backward needs: inputs of the hidden layers acts
    [layers, rows, KEPT], masks [layers + 1, rows, ...], blended [queries, KEPT] and, for COORD, preds [rows, 8].
    """
    T: tl.constexpr = tl.float32
    P: tl.constexpr = NB * BLOCK
    CORNERS: tl.constexpr = 4 if ENSEMBLE else 1
    QUERIES: tl.constexpr = ROWS // CORNERS
    tile = tl.program_id(0).to(tl.int64)
    valid, flat, latent, weight, rel, first_row, row = find_rows(
        tile, coord, cell, places, rows, cols, image_rows, image_cols, TERMS, GRID, ENSEMBLE, T, ROWS
    )
    number = joined(places.total) * CORNERS
    latent = tl.where(valid, latent, 0)
    inner = tl.arange(0, BLOCK)
    block_of_row = row[:, None] * KEPT + inner[None, :]
    if SAVE:
        acts += first_row * KEPT
        masks += first_row * mask_bytes(KEPT, OP == tl.float32)
    blocks = ()
    for k in tl.static_range(NB):
        value = relu(first_layer(latent_map, latent, rel, first, k * BLOCK + inner, WIDTH, P, TERMS, T))
        value = as_operand(value, OP, PRECISION)
        carried = value.to(CARRY, bitcast=True)
        if SAVE:
            store_mask(masks, 0, row, k, valid, carried, KEPT, NB, BLOCK, ROWS)
            inside = kept_columns(valid, k, KEPT, NB, BLOCK)
            tl.store(acts + k * BLOCK + block_of_row, value, mask=(inside & (layers > 0)) != 0)
        blocks = blocks + (carried,)
    offsets = inner[None, :] * P + inner[:, None]
    if OP == tl.float32:
        for layer in range(layers):
            made = no_blocks(NB, BLOCK, ROWS)
            for slot in range(NB):
                step = layer * NB + slot
                carried = forward_block(
                    blocks, weights, biases, offsets, acts, masks, block_of_row, row, valid, number, layers, step, slot,
                    SAVE, OP, CARRY, PRECISION, KEPT, NB, BLOCK, ROWS,
                )  # fmt: skip
                made = put(made, carried, slot, NB)
            blocks = made
    else:
        made = blocks[1:]
        for step in range(layers * NB):
            slot = step % NB
            carried = forward_block(
                blocks, weights, biases, offsets, acts, masks, block_of_row, row, valid, number, layers, step, slot,
                SAVE, OP, CARRY, PRECISION, KEPT, NB, BLOCK, ROWS,
            )  # fmt: skip
            blocks, made = advance(blocks, made, carried, slot, NB)

    pair = tl.arange(0, 2 * OUTS)
    output = tl.arange(0, OUTS)
    exists, entry, _, _, first_query, query = find_queries(tile, tl.arange(0, QUERIES), places, GRID, QUERIES)
    query = first_query + query
    pred = tl.zeros([ROWS, 2 * OUTS], T)
    for k in tl.static_range(NB):
        value = blocks[k].to(OP, bitcast=True)
        column = k * BLOCK + inner
        weight_pair = tl.load(last + column[:, None] * (2 * OUTS) + pair[None, :])
        pred = tl.dot(value, weight_pair, pred, input_precision=PRECISION)
        if SAVE:
            blend = tl.sum(tl.reshape(value.to(T) * weight[:, None], [QUERIES, CORNERS, BLOCK]), axis=1)
            inside = kept_columns(exists, k, KEPT, NB, BLOCK)
            tl.store(blended + query[:, None] * KEPT + column[None, :], blend, mask=inside)
    if COORD:
        both = tl.sum(tl.reshape(pred, [ROWS, 2, OUTS]), axis=1)
        tl.store(preds + first_row * OUTS + row[:, None] * OUTS + output[None, :], both, mask=valid[:, None])
    value = tl.sum(tl.reshape(pred * weight[:, None], [QUERIES, CORNERS, 2 * OUTS]), axis=1)
    value = tl.sum(tl.reshape(value, [QUERIES, 2, OUTS]), axis=1) + tl.load(last_bias + output)[None, :]
    place = out_offset(query[:, None], entry, output[None, :], NUMBER, places, GRID)
    tl.store(out + place, value, mask=exists[:, None] & (output < NUMBER)[None, :])


@triton.jit
def backward_block(
    blocks, weights, offsets, masks, sums, grads, block_of_row, row, valid, number, layer, slot,
    OP: tl.constexpr, CARRY: tl.constexpr, PRECISION: tl.constexpr,
    KEPT: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Block `slot` of the gradient of a layer's input before its ReLU, as it travels."""
    P: tl.constexpr = NB * BLOCK
    column = slot * BLOCK + tl.arange(0, BLOCK)
    before = layer * number
    keep = load_mask(masks, before, row, slot, valid, OP, KEPT, NB, BLOCK, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if OP == tl.float32:  # weights (in, out): offsets of the forward's kind
        place = weights + (layer * (P * P) + slot * (BLOCK * P))
        total = multiply(blocks, place, offsets, total, BLOCK, NB, OP, PRECISION)
    else:
        place = weights + (layer * (P * P) + slot * BLOCK)
        total = multiply(blocks, place, offsets, total, BLOCK * P, NB, OP, PRECISION)
    total = tl.where(keep, total, 0.0)
    tl.store(sums + (layer - 1) * P + column, tl.sum(total, axis=0), mask=((column >= 0) & (layer > 0)) != 0)
    value = as_operand(total, OP, PRECISION)
    inside = kept_columns(valid, slot, KEPT, NB, BLOCK)
    tl.store(grads + (before * KEPT + slot * BLOCK) + block_of_row, value, mask=inside)
    return value.to(CARRY, bitcast=True)


@triton.jit(do_not_specialize=["layers"])
def chain_backward_kernel(
    grad_out, coord, weights, last, masks, preds, grads, partial, grad_area_weight,
    places, rows, cols, image_rows, image_cols, layers,
    NUMBER: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr, COORD: tl.constexpr, OP: tl.constexpr,
    CARRY: tl.constexpr, PRECISION: tl.constexpr, KEPT: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """From the gradient of the output, [queries, NUMBER], to those of every layer before its ReLU, grads
    [layers + 1, rows, KEPT] in OP.

    weights [layers, P, P] (out, in; of float32 in, out) and last [P, 16] in OP. Sums a tile's rows for the hidden
    layers' biases, partial [tiles, layers, P], and, for COORD, the outputs for the area weights' gradients [rows].
    """
    T: tl.constexpr = tl.float32
    P: tl.constexpr = NB * BLOCK
    CORNERS: tl.constexpr = 4 if ENSEMBLE else 1
    tile = tl.program_id(0).to(tl.int64)
    valid, flat, latent, weight, rel, first_row, row = find_rows(
        tile, coord, coord, places, rows, cols, image_rows, image_cols, 2, GRID, ENSEMBLE, T, ROWS
    )
    number = joined(places.total) * CORNERS
    inner = tl.arange(0, BLOCK)
    pair = tl.arange(0, 2 * OUTS)
    inside = valid[:, None] & (pair % OUTS < NUMBER)[None, :]
    grad = tl.load(grad_out + flat[:, None] * NUMBER + (pair % OUTS)[None, :], mask=inside, other=0.0)
    if COORD:
        pred = tl.load(preds + first_row * OUTS + row[:, None] * OUTS + (pair % OUTS)[None, :], mask=inside, other=0.0)
        tl.store(
            grad_area_weight + first_row + row,
            tl.sum(tl.where((pair < OUTS)[None, :], grad * pred, 0.0), axis=1),
            mask=valid,
        )
    grad = grad * weight[:, None]
    rounded = as_operand(grad, OP, PRECISION)
    rest = as_operand(grad - rounded.to(T), OP, PRECISION)
    grad = tl.where((pair < OUTS)[None, :], rounded.to(T), rest.to(T)).to(OP)
    sums = partial + tile * layers * P
    block_of_row = row[:, None] * KEPT + inner[None, :]
    grads += first_row * KEPT
    masks += first_row * mask_bytes(KEPT, OP == tl.float32)
    blocks = ()
    for k in tl.static_range(NB):
        column = k * BLOCK + inner
        value = tl.dot(grad, tl.load(last + column[None, :] * (2 * OUTS) + pair[:, None]), input_precision=PRECISION)
        before = layers * number  # rows of the layers before
        value = tl.where(load_mask(masks, before, row, k, valid, OP, KEPT, NB, BLOCK, ROWS), value, 0.0)
        tl.store(sums + (layers - 1) * P + column, tl.sum(value, axis=0), mask=((column >= 0) & (layers > 0)) != 0)
        value = as_operand(value, OP, PRECISION)
        inside = kept_columns(valid, k, KEPT, NB, BLOCK)
        tl.store(grads + (before * KEPT + k * BLOCK) + block_of_row, value, mask=inside)
        blocks = blocks + (value.to(CARRY, bitcast=True),)
    if OP == tl.float32:
        offsets = inner[None, :] * P + inner[:, None]
        for back in range(layers):
            layer = layers - 1 - back
            made = no_blocks(NB, BLOCK, ROWS)
            for slot in range(NB):
                carried = backward_block(
                    blocks, weights, offsets, masks, sums, grads, block_of_row, row, valid, number, layer, slot,
                    OP, CARRY, PRECISION, KEPT, NB, BLOCK, ROWS,
                )  # fmt: skip
                made = put(made, carried, slot, NB)
            blocks = made
    else:
        made = blocks[1:]
        offsets = inner[:, None] * P + inner[None, :]
        for step in range(layers * NB):
            slot = step % NB
            layer = layers - 1 - step // NB
            carried = backward_block(
                blocks, weights, offsets, masks, sums, grads, block_of_row, row, valid, number, layer, slot,
                OP, CARRY, PRECISION, KEPT, NB, BLOCK, ROWS,
            )  # fmt: skip
            blocks, made = advance(blocks, made, carried, slot, NB)
