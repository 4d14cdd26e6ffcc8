// What the fused decode's forward and backward share: a block's tile of rows and channels, and where its values lie.
// The steps that both take are in query_layers.cuh.
//
// A row is one corner of one query; a tile is kRows of them (with local ensemble a quarter as many queries) by kWidth
// channels, the widest layer's, narrower ones padded with zeros. It stays on the chip from the latents to the blend:
// accumulators in registers, activations in shared memory, weights streaming past in chunks that all blocks share in
// L2.
//
// A matrix instruction wants its operands as fragments, spread over a warp's lanes. Everything here is stored in that
// order, 16 bytes a lane, so that no access conflicts and nothing is ever shuffled: the order of a layer's channels is
// free as long as the weights follow it, and it is chosen such that what a lane holds of a group of channels after one
// product (accumulators), before the next (operands), in the latent map and in saved activations are the same 16 bytes
// of consecutive channels. Rows are ordered so that one lane holds all four corners of a query: the ensemble is a sum
// in registers.
#pragma once

#include "cuda/common.cuh"
#include "cuda/decode/variant.h"
#include "cuda/ptx.cuh"
#include "geometry.h"

namespace liif_fast {

// How products are made: operands of Element on tensor cores (float: rounded to TF32) or in true float on CUDA cores.
template <class Element_, bool kTensorCores_>
struct Products {
  using Element = Element_;
  static constexpr bool kTensorCores = kTensorCores_;
  static_assert(kTensorCores || std::is_same_v<Element, float>, "CUDA cores multiply floats");
};

using HalfProducts = Products<__half, true>;
using BFloat16Products = Products<__nv_bfloat16, true>;
using Tf32Products = Products<float, true>;
using FloatProducts = Products<float, false>;

template <class Products_, int kWidth_, int kRows_>
struct Tile {
  using Product = Products_;
  using Element = typename Product::Element;
  static constexpr int kWidth = kWidth_, kRows = kRows_;
  static constexpr int kVector = 16 / sizeof(Element);  // channels of a group that one lane holds
  static constexpr int kGroup = 4 * kVector;            // channels that a chunk of weights takes in
  static constexpr int kTiles = kVector / 2;            // n8 tiles of a group
  static constexpr int kGroups = kWidth / kGroup;
  static constexpr int kWarpCols = kRows == 32 ? 8 : (kGroups < 4 ? 2 : 4);
  static constexpr int kWarpRows = kWarps / kWarpCols;
  static constexpr int kRowTiles = kRows / kWarpRows / 16;  // m16 tiles of a warp
  static constexpr int kColGroups = kGroups / kWarpCols;    // groups of a warp
  static constexpr int kColTiles = kColGroups * kTiles;     // n8 tiles of a warp
  static constexpr int kActBytes = kRows * kWidth * static_cast<int>(sizeof(Element));
  static constexpr int kChunkBytes = kWidth * 64;  // weights from one group to every channel
  static constexpr int kStages = kRows == 128 ? 4 : 3;
  static constexpr int kMaskBits = kRowTiles * kColGroups * 2 * kVector;  // of a thread
  static constexpr int kMaskWords = (kMaskBits + 31) / 32;
  static constexpr bool kTensorCores = Product::kTensorCores;
  static_assert(kRowTiles % 2 == 0 && kColGroups > 0 && kRowTiles * 16 * kWarpRows == kRows, "a lane has all corners");
};

// Blocks that an SM is to hold at a time: the compiler's bound on registers.
template <class T>
constexpr int blocks_an_sm() {
  return T::kWidth == 64 ? 2 : 1;
}

// Whether the architecture under compilation ever launches a tile: what it does not, it need not hold.
template <class T>
__host__ __device__ constexpr bool is_launched() {
#ifdef __CUDA_ARCH__
  if (T::kWidth == 256 && __CUDA_ARCH__ != 800)
    return has_small_tiles_only(__CUDA_ARCH__) == (T::kRows == small_rows(sizeof(typename T::Element)));
#endif
  return true;
}

// Tiles of this block: every gridDim.x-th one.
__device__ __forceinline__ int64_t tiles_of_block(int64_t tiles) {
  return blockIdx.x < tiles ? (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
}

// Where a thread's accumulators lie in its block's tile.
template <class T>
struct Place {
  int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  int row = lane >> 2, quad = lane & 3;  // of a fragment
  int first_row_tile = warp / T::kWarpCols * T::kRowTiles, first_group = warp % T::kWarpCols * T::kColGroups;

  // Row in the tile of m16 tile m's upper or lower half.
  __device__ __forceinline__ int row_of(int m, int half) const { return (first_row_tile + m) * 16 + half * 8 + row; }
  // First of this lane's channels in its column group.
  __device__ __forceinline__ int channel_of(int group) const {
    return (first_group + group) * T::kGroup + quad * T::kVector;
  }
};

// A row's corner and its query's place among the tile's queries.
__device__ __forceinline__ int corner_of(int row, int corners) {
  return corners == 4 ? (row >> 4 & 1) * 2 + (row >> 3 & 1) : 0;
}
__device__ __forceinline__ int slot_of(int row, int corners) { return corners == 4 ? (row >> 5) * 8 + (row & 7) : row; }

// A row's latent and how it is seen from the query.
struct alignas(16) Row {
  int64_t offset;  // of the latent's first channel in the map, in elements
  float rel_row, rel_col;
};

// A tile's geometry in shared memory.
template <class T>
struct Geometry {
  Row rows[T::kRows];
  float rel_cell[T::kRows][2];  // unwritten where all cells are the same
  float weight[T::kRows];       // of the blend; 0 for rows behind the last query
};

// Bytes of shared memory: activations, ring of weights, geometry.
template <class T>
constexpr int shared_bytes() {
  return T::kActBytes + T::kStages * T::kChunkBytes + static_cast<int>(sizeof(Geometry<T>));
}

// The query of a tile's slot, -1 behind the last one.
template <class T>
__device__ __forceinline__ int64_t query_of(const QueryTask& task, int64_t tile, int slot) {
  const int64_t query = tile * (T::kRows / task.corners) + slot;
  return query < task.total ? query : -1;
}

template <class T>
__device__ __forceinline__ void find_rows(const QueryTask& task, int64_t tile, Geometry<T>& geometry) {
  for (int r = static_cast<int>(threadIdx.x); r < T::kRows; r += kThreads) {
    const int64_t found = query_of<T>(task, tile, slot_of(r, task.corners));
    const int64_t query = found < 0 ? task.total - 1 : found;
    const int64_t batch = query / task.queries, at = query - batch * task.queries;
    float coord_row, coord_col;
    if (task.coord) {
      coord_row = task.coord[2 * query];
      coord_col = task.coord[2 * query + 1];
    } else {
      const int64_t row = at / task.window_width;
      coord_row = pixel_center<float>(task.window_top + row, task.image_height);
      coord_col = pixel_center<float>(task.window_left + at - row * task.window_width, task.image_width);
    }
    Neighbour<float> row, col;
    float weight;
    if (task.corners == 4) {
      const int corner = corner_of(r, 4);
      const Neighbour<float> rows[2] = {find_neighbour(coord_row, -1, task.map_height),
                                        find_neighbour(coord_row, 1, task.map_height)};
      const Neighbour<float> cols[2] = {find_neighbour(coord_col, -1, task.map_width),
                                        find_neighbour(coord_col, 1, task.map_width)};
      const float rel_row[2] = {rows[0].rel, rows[1].rel}, rel_col[2] = {cols[0].rel, cols[1].rel};
      float weights[4];
      area_weights(rel_row, rel_col, weights);
      row = corner & 2 ? rows[1] : rows[0];
      col = corner & 1 ? cols[1] : cols[0];
      const float upper = corner & 1 ? weights[1] : weights[0], lower = corner & 1 ? weights[3] : weights[2];
      weight = corner & 2 ? lower : upper;
    } else {
      row = find_neighbour(coord_row, 0, task.map_height);
      col = find_neighbour(coord_col, 0, task.map_width);
      weight = mul_rounded(row.rel, col.rel) * 0.0f + 1.0f;  // 1, or NaN where the reference's area / area is
    }
    // The doors promise that a region holds what its window reaches; memory does not depend on that promise.
    const int64_t top = row.index - task.region_top, left = col.index - task.region_left;
    const int64_t inside_row = top < 0 ? 0 : (top < task.region_height ? top : task.region_height - 1);
    const int64_t inside_col = left < 0 ? 0 : (left < task.region_width ? left : task.region_width - 1);
    geometry.rows[r] = {
        ((batch * task.region_height + inside_row) * task.region_width + inside_col) * task.latent_width, row.rel,
        col.rel};
    geometry.weight[r] = found < 0 ? 0.0f : weight;
    if (task.cell) {
      geometry.rel_cell[r][0] = mul_rounded(task.cell[2 * query], static_cast<float>(task.map_height));
      geometry.rel_cell[r][1] = mul_rounded(task.cell[2 * query + 1], static_cast<float>(task.map_width));
    }
  }
}

// The packed vectors, by what they are.
template <class T>
__device__ __forceinline__ const float* bias_line(const QueryTask& task, int layer) {
  return task.lines + layer * T::kWidth;
}
template <class T>
__device__ __forceinline__ const float* geometry_line(const QueryTask& task, int term) {
  return task.lines + (task.hidden + 1 + term) * T::kWidth;
}
template <class T>
__device__ __forceinline__ const float* last_line(const QueryTask& task, int out) {
  return task.lines + (task.hidden + 5 + out) * T::kWidth;
}

}  // namespace liif_fast
