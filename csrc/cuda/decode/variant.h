// The variants of the fused decode as plain numbers: which tile runs where, and where packed weights lie. Constant
// expressions, so that kernels, launchers and tests all read the same ones.
#pragma once

#include "cuda/decode/launch.h"
#include "geometry.h"

namespace liif_fast {

// Rows of a 256-wide tile where a block may have 160 KB of shared memory, and where it may have 99 KB. Weights stream
// from L2 once a tile: more rows are fewer bytes.
LIIF_HOST_DEVICE constexpr int large_rows(int operand_bytes) { return operand_bytes == 2 ? 128 : 64; }
LIIF_HOST_DEVICE constexpr int small_rows(int operand_bytes) { return operand_bytes == 2 ? 64 : 32; }
constexpr int kLargeSharedBytes = 160 << 10;

// GPUs of the second kind, by compute capability * 10: their machine code holds the small tiles alone, that of the
// others the large ones alone. What comes later runs sm_80's PTX, which holds both.
LIIF_HOST_DEVICE constexpr bool has_small_tiles_only(int arch) { return (arch > 800 && arch < 900) || arch >= 1200; }

LIIF_HOST_DEVICE constexpr int padded_width(int width) { return width <= 64 ? 64 : (width <= 128 ? 128 : 256); }

// Warp rows of a tile: each has a part of its own in a block's partial sums.
LIIF_HOST_DEVICE constexpr int row_sums_of(int rows, int width, int operand_bytes) {
  return rows == 32 ? 1 : (width * operand_bytes < 256 ? 4 : 2);
}

// Packed vectors of a problem (QueryTask::lines), and partial sums of its columns (QueryBackward::sums).
LIIF_HOST_DEVICE int packed_lines(int hidden, int outs) { return hidden + 1 + 4 + outs + 1; }
LIIF_HOST_DEVICE int sum_lines(int hidden, int outs) { return hidden + 1 + 4 + outs; }

// 16-byte units of a chunk, and input groups of a layer, each of which is a chunk.
LIIF_HOST_DEVICE int chunk_units(int width) { return width * 64 / 16; }
LIIF_HOST_DEVICE int groups_of(Operands operands, int width) {
  return width / (operands == Operands::kFloat16 || operands == Operands::kBFloat16 ? 32 : 16);
}

// Which weight a packed 16-byte unit begins with: unit `unit` of the chunk from input group `group`.
struct PackedUnit {
  int out, in;
};
LIIF_HOST_DEVICE PackedUnit packed_unit(Operands operands, int width, int group, int unit) {
  const int vector = operands == Operands::kFloat16 || operands == Operands::kBFloat16 ? 8 : 4;
  const int tiles = vector / 2, channels = 4 * vector, groups = width / channels;
  if (operands == Operands::kFloat32) {  // [four inputs][out group][tile][e][quad]
    const int quad = unit % 4, e = unit / 4 % 2, tile = unit / 8 % tiles, out_group = unit / 8 / tiles % groups;
    const int four = unit / 8 / tiles / groups;
    return {out_group * channels + quad * vector + tile * 2 + e, group * channels + four * 4};
  }
  // [out group][tile][lane]: the lane's column of the n8 tile, its quad's inputs of both k steps
  const int lane = unit % 32, tile = unit / 32 % tiles, out_group = unit / 32 / tiles, column = lane >> 2;
  return {out_group * channels + (column >> 1) * vector + tile * 2 + (column & 1),
          group * channels + (lane & 3) * vector};
}

}  // namespace liif_fast
