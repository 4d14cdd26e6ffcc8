// What the Hopper decode saves for a backward, in the places where the kernels of tile.cuh save it: their backward
// reads it. Every layer's operands go from registers to memory in 16-byte pieces, eight channels of a row each. A lane
// holds two rows, which are eight apart in the saved arrays as well, and all bits of a word of ReLU bits: those of 64
// channels of both rows.
#pragma once

#include "cuda/decode/hopper_tile.cuh"

namespace liif_fast {

// A lane's places in the saved arrays, of a layer: its channels of its upper row, and that row's first word of ReLU
// bits. Tiles after the last one have none, and the backward does not read every layer's activations.
template <class T>
struct SavedLayer {
  typename T::Element* rows;
  uint32_t* masks;
  bool exists, has_rows;
};

// A consumer's row among the tile's rows in the order of tile.cuh. A lane's second row is eight further on there too.
template <class T>
__device__ __forceinline__ int saved_row(int consumer, int row) {
  if (T::kCorners == 1) return consumer * T::kConsumerRows + row;
  const int warp = row / 16, corner = (row >> 2 & 1) * 2 + (row >> 3 & 1);
  return consumer * T::kConsumerRows + warp / 2 * 32 + corner * 8 + warp % 2 * 4 + row % 4;
}

// The first layer's places. As Mask::address has it, a tile of 64 or 128 rows has two teams, each with half of the
// rows; m16 tile after m16 tile, a team's four warps have a word of each lane.
template <class T>
__device__ __forceinline__ SavedLayer<T> first_saved_layer(const HopperTask& task, int tile) {
  const int thread = reread_thread(), row = saved_row<T>(thread / kWarpgroup - 1, lane_row(thread));
  const int team_rows = task.saved_tile_rows / 2;
  const int team = row / team_rows, m = (row - team * team_rows) / 16, teams = T::kRows / team_rows;
  const int words = team_rows / 16;  // of a thread
  const int64_t at = task.saved_tile + tile, first = at * teams / 2 + team / 2;
  return {static_cast<typename T::Element*>(task.saved.rows) + (at * T::kRows + row) * T::kWidth + thread % 4 * 8,
          task.saved.masks + (first * words + m) * kThreads + team % 2 * 128 + row % 8 * 4 + thread % 4,
          tile < static_cast<int>(task.tiles), task.saved.first_layer == 0};
}

// The next layer's, which has number `layer`.
template <class T>
__device__ __forceinline__ void next_saved_layer(const HopperTask& task, int layer, SavedLayer<T>& at) {
  const int64_t rows = task.saved.tiles * task.saved_tile_rows;
  at.masks += rows * T::kWidth / 32;
  at.rows += layer > task.saved.first_layer ? rows * T::kWidth : 0;
  at.has_rows = layer < task.hidden || task.saved.last_layer;
}

// kHalf: 0 for the lower 128 channels, 1 for the upper ones.
template <class T, int kHalf>
__device__ __forceinline__ void save_half(const SavedLayer<T>& at, const HalfOperands& a) {
  if (!at.exists) return;
#pragma unroll
  for (int pair = 0; pair < T::kHalf / 64; ++pair) {
    uint32_t bits[2] = {};  // of 32 channels: even ones in the lower halves, odd ones in the upper halves
#pragma unroll
    for (int group = 0; group < 2; ++group)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = 4 * pair + 2 * group;
        const uint4 words = make_uint4(a[k][half], a[k][2 + half], a[k + 1][half], a[k + 1][2 + half]);
        if (at.has_rows) {
          auto* const row = at.rows + half * 8 * T::kWidth + kHalf * T::kHalf + pair * 64 + group * 32;
          store_once(reinterpret_cast<uint4*>(row), words);
        }
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
          bits[group] |= above_zero(word[i], typename T::Element{}) & 0x00020001u << (8 * half + 2 * i);
      }
    const uint32_t lower = bits[0] | bits[0] >> 16, upper = bits[1] | bits[1] >> 16;
    at.masks[(kHalf * 2 + pair) * kWarp] = (lower & 0xffffu) | upper << 16;
  }
}

// The blended hidden vectors of a lane's query, or without local ensemble of its two queries. Two lanes hold the
// corners of a query: each stores 64 of the half's channels.
template <class T, int kHalf>
__device__ __forceinline__ void save_blended(const HopperTask& task, int tile, const HalfSums& hidden,
                                             const float* bias, const float* weight) {
  using Element = typename T::Element;
  if (tile >= static_cast<int>(task.tiles)) return;
  const int thread = reread_thread(), quad = thread % 4;
  const bool upper = thread & 16;
  const auto values = [&](int group, int half, float (&v)[8]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int k = 2 * group + step;
      const float4 b = lane_channels(bias, k, quad);
      const float add[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[4 * step + i] = weight[half * 8] * relu(hidden[8 * k + 2 * half + i / 2 * 4 + i % 2] + add[i]);
    }
  };
  const auto store = [&](int slot, int group, const float (&v)[8]) {
    auto* const to = static_cast<Element*>(task.saved.blended) +
                     (static_cast<int64_t>(tile) * (T::kRows / T::kCorners) + slot) * T::kWidth + kHalf * T::kHalf +
                     group * 32 + quad * 8;
    store_once(reinterpret_cast<uint4*>(to), make_uint4(pack(v[0], v[1], Element{}), pack(v[2], v[3], Element{}),
                                                        pack(v[4], v[5], Element{}), pack(v[6], v[7], Element{})));
  };
  const int slot = row_query<T>(0, thread / kWarpgroup - 1, lane_row(thread));
  if constexpr (T::kCorners == 1) {
#pragma unroll
    for (int group = 0; group < 4; ++group)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[8];
        values(group, half, v);
        store(slot + half * 8, group, v);
      }
  } else {
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      float both[2][8];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float lower[8];
        values(group + 2 * side, 0, both[side]);
        values(group + 2 * side, 1, lower);
#pragma unroll
        for (int i = 0; i < 8; ++i) both[side][i] += lower[i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
        both[0][i] =
            (upper ? both[1][i] : both[0][i]) + __shfl_xor_sync(kAllLanes, upper ? both[0][i] : both[1][i], 16);
      store(slot, group + (upper ? 2 : 0), both[0]);
    }
  }
}

}  // namespace liif_fast
