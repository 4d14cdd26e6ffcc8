// What the fused decode's forward keeps for its backward: a bit for every ReLU, and rows of activations.
#pragma once

#include "cuda/decode/tile.cuh"

namespace liif_fast {

// One bit for every accumulator of a thread: whether its ReLU let it through.
template <class T>
struct Mask {
  uint32_t words[T::kMaskWords] = {};

  static __device__ __forceinline__ constexpr int index(int m, int group, int half, int i) {
    return ((m * T::kColGroups + group) * 2 + half) * T::kVector + i;
  }
  __device__ __forceinline__ void set(int m, int group, int half, const float (&v)[T::kVector]) {
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) {
      // In steps: GCC 12 with its undefined-behaviour sanitiser gets the one-line form of this wrong.
      const int at = index(m, group, half, i);
      const uint32_t bit = v[i] > 0.0f ? 1u : 0u;
      words[at / 32] |= bit << (at % 32);
    }
  }
  __device__ __forceinline__ void apply(int m, int group, int half, float (&v)[T::kVector]) const {
#pragma unroll
    for (int i = 0; i < T::kVector; ++i)
      if (!(words[index(m, group, half, i) / 32] >> index(m, group, half, i) % 32 & 1u)) v[i] = 0.0f;
  }
  static __device__ __forceinline__ int64_t address(const Saved& saved, int layer, int64_t tile, int word) {
    return ((layer * saved.tiles + tile - saved.first_tile) * T::kMaskWords + word) * kThreads + threadIdx.x;
  }
  __device__ __forceinline__ void save(const Saved& saved, int layer, int64_t tile) const {
#pragma unroll
    for (int word = 0; word < T::kMaskWords; ++word) saved.masks[address(saved, layer, tile, word)] = words[word];
  }
  __device__ __forceinline__ void load(const Saved& saved, int layer, int64_t tile) {
#pragma unroll
    for (int word = 0; word < T::kMaskWords; ++word) words[word] = saved.masks[address(saved, layer, tile, word)];
  }
};

// Tiles [first, first + count) that an array over tiles has a place for.
struct Span {
  int64_t first, count;
};

// A row of an array [layer][tile][row][channel], from a lane's channel on.
template <class T>
__device__ __forceinline__ uint4* row_at(void* rows, Span span, int layer, int64_t tile, int row, int channel) {
  const int64_t at = ((layer * span.count + tile - span.first) * T::kRows + row) * T::kWidth + channel;
  return reinterpret_cast<uint4*>(static_cast<typename T::Element*>(rows) + at);
}
template <class T>
__device__ __forceinline__ uint4* saved_row(const Saved& saved, int layer, int64_t tile, int row, int channel) {
  return row_at<T>(saved.rows, {saved.first_tile, saved.tiles}, layer, tile, row, channel);
}
// A blended hidden vector, one for every query of the tile.
template <class T>
__device__ __forceinline__ uint4* saved_blended(const Saved& saved, int64_t tile, int slots, int slot, int channel) {
  const int64_t at = ((tile - saved.first_tile) * slots + slot) * T::kWidth + channel;
  return reinterpret_cast<uint4*>(static_cast<typename T::Element*>(saved.blended) + at);
}

}  // namespace liif_fast
