"""The fused decode in Triton: gather, every layer and the ensemble in one kernel, and the way back through the layers.

A tile of rows (32 queries x 4 corners) stays in registers from the first layer to the last. Activations are NB blocks
of BLOCK columns; every step of the loop makes one block of the next layer, so that a step's weights,
[BLOCK, NB * BLOCK], are all that is in shared memory, and Triton's pipeline fetches the next ones meanwhile. The launch
says how many stages ahead: a loop that says so itself would put biases and masks into the pipeline too, which need the
room of a block. What travels from step to step does so as integers: a product whose left operand is the loop's own
argument would go through shared memory, a bitcast keeps it in registers.

The last layer and its gradient are products of 16 columns: twice the same eight outputs (or less), once with the
operand rounded and once with what rounding left over, so that both are as good as in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import find_queries, find_rows, first_layer, joined, out_offset, relu

OUTS = tl.constexpr(8)  # at most; a last layer's product has twice as many columns


@triton.jit
def multiply(blocks, weights, offsets, total, step, NB: tl.constexpr, OP: tl.constexpr):
    """total + blocks @ weights, block by block; `step` is the distance between blocks of the weights."""
    for k in tl.static_range(NB):
        weight = tl.load(weights + (offsets + k * step))
        total = tl.dot(blocks[k].to(OP, bitcast=True), weight, total)
    return total


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
def store_mask(place, row, valid, carried, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Keeps which columns of a block are positive: bit j of word i is column 8j + i. [rows, NB, 8] words.

    carried: activations after ReLU, as the integers that travel: those are positive where the activations are, or NaN.
    """
    bit = tl.arange(0, BLOCK // 8)
    positive = tl.reshape(carried > 0, [ROWS, BLOCK // 8, 8])
    bits = tl.where(positive, (1 << bit)[None, :, None], 0)
    word = (row * (NB * 8))[:, None] + tl.arange(0, 8)[None, :]
    tl.store(place + word, tl.sum(bits, axis=1).to(tl.int16), mask=valid[:, None])


@triton.jit
def load_mask(place, row, valid, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """What store_mask kept, [ROWS, BLOCK]."""
    word = (row * (NB * 8))[:, None] + tl.arange(0, 8)[None, :]
    words = tl.load(place + word, mask=valid[:, None], other=0).to(tl.int32)
    bit = tl.arange(0, BLOCK // 8)
    return tl.reshape((words[:, None, :] & (1 << bit)[None, :, None]) != 0, [ROWS, BLOCK])


@triton.jit(do_not_specialize=["layers"])
def chain_forward_kernel(
    latent_map, coord, cell, first, weights, biases, last, last_bias, out, acts, masks, blended, preds,
    places, rows, cols, image_rows, image_cols, layers,
    WIDTH: tl.constexpr, NUMBER: tl.constexpr, TERMS: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr,
    SAVE: tl.constexpr, COORD: tl.constexpr, OP: tl.constexpr, CARRY: tl.constexpr,
    NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Decodes a tile of queries to NUMBER outputs.

    first [TERMS + 1, P] and biases [layers, P] in float32, weights [layers, P, P] (out, in) and last [P, 16] in OP,
    last_bias [8]; P = NB * BLOCK. SAVE keeps what the backward needs: inputs of the hidden layers acts
    [layers, rows, P], masks [layers + 1, rows, NB, 8], blended [queries, P] and, for COORD, preds [rows, 8].
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
    block_of_row = row[:, None] * P + inner[None, :]
    if SAVE:
        acts += first_row * P
        masks += first_row * (NB * 8)
    blocks = ()
    for k in tl.static_range(NB):
        value = relu(first_layer(latent_map, latent, rel, first, k * BLOCK + inner, WIDTH, P, TERMS, T)).to(OP)
        carried = value.to(CARRY, bitcast=True)
        if SAVE:
            store_mask(masks + k * 8, row, valid, carried, NB, BLOCK, ROWS)
            tl.store(acts + k * BLOCK + block_of_row, value, mask=(valid[:, None] & (layers > 0)) != 0)
        blocks = blocks + (carried,)
    made = blocks[1:]
    offsets = inner[None, :] * P + inner[:, None]
    for step in range(layers * NB):
        slot = step % NB
        total = tl.broadcast_to(tl.load(biases + step * BLOCK + inner)[None, :], [ROWS, BLOCK])
        total = multiply(blocks, weights + step * (BLOCK * P), offsets, total, BLOCK, NB, OP)
        value = relu(total).to(OP)
        carried = value.to(CARRY, bitcast=True)
        if SAVE:
            before = (step // NB + 1) * number  # rows of the layers before
            store_mask(masks + (before * NB + slot) * 8, row, valid, carried, NB, BLOCK, ROWS)
            place = acts + (before * P + slot * BLOCK) + block_of_row
            tl.store(place, value, mask=(valid[:, None] & (step < (layers - 1) * NB)) != 0)
        blocks, made = advance(blocks, made, carried, slot, NB)

    pair = tl.arange(0, 2 * OUTS)
    output = tl.arange(0, OUTS)
    exists, entry, _, _, first_query, query = find_queries(tile, tl.arange(0, QUERIES), places, GRID, QUERIES)
    query = first_query + query
    pred = tl.zeros([ROWS, 2 * OUTS], T)
    for k in tl.static_range(NB):
        value = blocks[k].to(OP, bitcast=True)
        column = k * BLOCK + inner
        pred = tl.dot(value, tl.load(last + column[:, None] * (2 * OUTS) + pair[None, :]), pred)
        if SAVE:
            blend = tl.sum(tl.reshape(value.to(T) * weight[:, None], [QUERIES, CORNERS, BLOCK]), axis=1)
            tl.store(blended + query[:, None] * P + column[None, :], blend, mask=exists[:, None])
    if COORD:
        both = tl.sum(tl.reshape(pred, [ROWS, 2, OUTS]), axis=1)
        tl.store(preds + first_row * OUTS + row[:, None] * OUTS + output[None, :], both, mask=valid[:, None])
    value = tl.sum(tl.reshape(pred * weight[:, None], [QUERIES, CORNERS, 2 * OUTS]), axis=1)
    value = tl.sum(tl.reshape(value, [QUERIES, 2, OUTS]), axis=1) + tl.load(last_bias + output)[None, :]
    place = out_offset(query[:, None], entry, output[None, :], NUMBER, places, GRID)
    tl.store(out + place, value, mask=exists[:, None] & (output < NUMBER)[None, :])


@triton.jit(do_not_specialize=["layers"])
def chain_backward_kernel(
    grad_out, coord, weights, last, masks, preds, grads, partial, grad_area_weight,
    places, rows, cols, image_rows, image_cols, layers,
    NUMBER: tl.constexpr, GRID: tl.constexpr, ENSEMBLE: tl.constexpr, COORD: tl.constexpr, OP: tl.constexpr,
    CARRY: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the gradient of the output, [queries, NUMBER], to those of every layer before its ReLU, grads
    [layers + 1, rows, P] in OP.

    weights [layers, P, P] (out, in) and last [16, P] in OP. Sums a tile's rows for the hidden layers' biases, partial
    [tiles, layers, P], and, for COORD, the outputs for the area weights' gradients [rows].
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
    rounded = grad.to(OP)
    rest = (grad - rounded.to(T)).to(OP)
    grad = tl.where((pair < OUTS)[None, :], rounded.to(T), rest.to(T)).to(OP)
    sums = partial + tile * layers * P
    block_of_row = row[:, None] * P + inner[None, :]
    grads += first_row * P
    masks += first_row * (NB * 8)
    blocks = ()
    for k in tl.static_range(NB):
        column = k * BLOCK + inner
        value = tl.dot(grad, tl.load(last + pair[:, None] * P + column[None, :]))
        before = layers * number  # rows of the layers before
        value = tl.where(load_mask(masks + (before * NB + k) * 8, row, valid, NB, BLOCK, ROWS), value, 0.0)
        tl.store(sums + (layers - 1) * P + column, tl.sum(value, axis=0), mask=((column >= 0) & (layers > 0)) != 0)
        value = value.to(OP)
        tl.store(grads + (before * P + k * BLOCK) + block_of_row, value, mask=valid[:, None])
        blocks = blocks + (value.to(CARRY, bitcast=True),)
    made = blocks[1:]
    offsets = inner[:, None] * P + inner[None, :]
    for step in range(layers * NB):
        slot = step % NB
        layer = layers - 1 - step // NB
        column = slot * BLOCK + inner
        before = layer * number
        keep = load_mask(masks + (before * NB + slot) * 8, row, valid, NB, BLOCK, ROWS)
        total = tl.zeros([ROWS, BLOCK], T)
        total = multiply(blocks, weights + (layer * (P * P) + slot * BLOCK), offsets, total, BLOCK * P, NB, OP)
        total = tl.where(keep, total, 0.0)
        tl.store(sums + (layer - 1) * P + column, tl.sum(total, axis=0), mask=((column >= 0) & (layer > 0)) != 0)
        value = total.to(OP)
        tl.store(grads + (before * P + slot * BLOCK) + block_of_row, value, mask=valid[:, None])
        blocks, made = advance(blocks, made, value.to(CARRY, bitcast=True), slot, NB)
