"""Where the fused decode keeps a tile's activations or gradients in memory, and the masks of its ReLUs."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


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
