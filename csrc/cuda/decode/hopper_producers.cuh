// The Hopper decode's producers: the weights, and the first layer's activations. hopper.cuh describes the kernel.
#pragma once

#include "cuda/decode/hopper_tile.cuh"

namespace liif_fast {

// One thread: the weights of all layers, tile after tile. Without a constant number of layers, a layer's bias comes
// with its last block.
template <class T>
__device__ __forceinline__ void stream_weights(const HopperTask& task, HopperWorkspace<T>& space) {
  const uint32_t rank = cluster_rank(), size = cluster_size(), ranks = (1u << size) - 1;
  constexpr uint32_t kBiasBytes = T::kWidth * 4;
  const uint32_t bytes = T::kBlockBytes >> (size - 1), bias_bytes = kBiasBytes >> (size - 1);
  const int blocks = (T::kHidden ? T::kHidden : task.hidden) * T::kLayerBlocks;
  uint32_t parities = ~0u;  // of the stages
  for (int tile = static_cast<int>(blockIdx.x); cluster_has(task, tile); tile += static_cast<int>(gridDim.x)) {
    const unsigned char* from = task.weights + rank * bytes;
    const unsigned char* bias = reinterpret_cast<const unsigned char*>(bias_vector<T>(task, 1)) + rank * bias_bytes;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      const int stage = block % T::kStages;
      const bool brings_bias = T::kHidden == 0 && (block + 1) % T::kLayerBlocks == 0;
      wait_barrier(&space.empty[stage], parities >> stage & 1);
      arrive_and_expect(&space.full[stage], T::kBlockBytes + (brings_bias ? kBiasBytes : 0));
      copy_bulk(space.ring[stage] + rank * bytes, from, bytes, &space.full[stage], ranks);
      from += T::kBlockBytes;
      if (brings_bias) {
        unsigned char* const to = reinterpret_cast<unsigned char*>(space.biases[stage]) + rank * bias_bytes;
        copy_bulk(to, bias, bias_bytes, &space.full[stage], ranks);
        bias += kBiasBytes;
      }
      parities ^= 1u << stage;
    }
    if (keeps_weights<T>(task)) return;
  }
}

// A row's latent and blending weight, as locate_rows finds them. Returns the latent's number.
template <class T>
__device__ __forceinline__ int64_t locate_row(const HopperTask& task, HopperWorkspace<T>& space, int tile,
                                              uint32_t buffer, int consumer, int r) {
  const int total = static_cast<int>(task.total), wanted = row_query<T>(tile + first_tile<T>(task), consumer, r);
  const int query = wanted < total ? wanted : total - 1;
  const Quotient place = task.coord ? Quotient{query, query} : task.columns.divide(query);
  const AxisNeighbors row = task.neighbor_rows[place.quotient], col = task.neighbor_cols[place.remainder];
  const bool lower = T::kCorners == 4 && (r >> 2 & 1), right = T::kCorners == 4 && (r >> 3 & 1);
  float weight;
  if constexpr (T::kCorners == 4) {
    weight = corner_weight(row.rel, col.rel, lower, right);
  } else {
    weight = single_corner_weight(row.rel[0], col.rel[0]);
  }
  const int64_t latent =
      (lower ? row.index[1] : row.index[0]) * task.region_width + (right ? col.index[1] : col.index[0]);
  space.rows[consumer][r] = {latent * task.width, lower ? row.rel[1] : row.rel[0], right ? col.rel[1] : col.rel[0]};
  space.weight[buffer][consumer][r] = weight;
  if (task.cell)
    space.rel_cell[consumer][r] = {mul_rounded(task.cell[2 * query], static_cast<float>(task.map_height)),
                                   mul_rounded(task.cell[2 * query + 1], static_cast<float>(task.map_width))};
  return latent;
}

// The first layer of a consumer's rows, by the makers' three warps, as the operands that its threads load. At a time, a
// warp makes 32 channels of one or two m16 tiles: four loads of each lane are under way.
template <class T, class Latent>
__device__ __forceinline__ void make_first_layer(const HopperTask& task, HopperWorkspace<T>& space, int consumer) {
  using Element = typename T::Element;
  constexpr int kWide = static_cast<int>(sizeof(Latent)) / 2, kTiles = 2 / kWide;
  constexpr int kGroups = T::kWidth / 32, kItems = kGroups * (T::kConsumerRows / 16) / kTiles;
  const int warp = static_cast<int>(threadIdx.x) / kWarp - 1, lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int item = warp; item < kItems; item += T::kMakers / kWarp) {
    const int group = item % kGroups, m = item / kGroups * kTiles, channel = group * 32 + lane % 4 * 8;
    const bool has_latent = channel < task.width;
    const int first_row = m * 16 + lane / 4;
    const Latent* const latents = static_cast<const Latent*>(task.latent_map) + (has_latent ? channel : 0);
    uint4 words[2 * kTiles][kWide];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        words[i][j] =
            load_in_order(reinterpret_cast<const uint4*>(latents + space.rows[consumer][first_row + i * 8].offset) + j);
    __syncwarp();  // the compiler must not move a load after the first use of another
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t made[2][4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const auto at = [&](const float* vector) {
          return *reinterpret_cast<const float2*>(vector + channel + 2 * pair);
        };
        const float2 base = at(space.base), by_row = at(space.by_row), by_col = at(space.by_col);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = 2 * tile + half;
          const auto word = [&](int w) {
            const uint4& four = words[i][w / 4];
            return w % 4 == 0 ? four.x : w % 4 == 1 ? four.y : w % 4 == 2 ? four.z : four.w;
          };
          float2 v;
          if constexpr (kWide == 2)
            v = {bits_float(word(2 * pair)), bits_float(word(2 * pair + 1))};
          else
            v = unpack(word(pair), Element{});
          if (!has_latent) v = {0.0f, 0.0f};
          const CornerRow& row = space.rows[consumer][first_row + i * 8];
          v.x += fmaf(row.rel_col, by_col.x, fmaf(row.rel_row, by_row.x, base.x));
          v.y += fmaf(row.rel_col, by_col.y, fmaf(row.rel_row, by_row.y, base.y));
          if (task.cell) {
            const float2 cell = space.rel_cell[consumer][first_row + i * 8];
            const float2 by_cell_row = at(space.by_cell_row), by_cell_col = at(space.by_cell_col);
            v.x += fmaf(cell.y, by_cell_col.x, cell.x * by_cell_row.x);
            v.y += fmaf(cell.y, by_cell_col.y, cell.x * by_cell_row.y);
          }
          made[half][pair] = pack_relu(v.x, v.y, Element{});
        }
      }
      const int half = T::kHalvesRows ? m / 4 : 0;
      uint4* const to = &space.first[consumer][half * T::kSteps + 2 * group][(m - 4 * half + tile) * kWarp + lane];
      to[0] = make_uint4(made[0][0], made[1][0], made[0][1], made[1][1]);
      to[kWarpgroup] = make_uint4(made[0][2], made[1][2], made[0][3], made[1][3]);
    }
  }
}

// Three warps: geometry and first layer of every tile for both consumers, then a tile without rows, so that consumers
// need not ask whether there is a next one.
template <class T>
__device__ __forceinline__ void make_tiles(const HopperTask& task, HopperWorkspace<T>& space) {
  int tile = static_cast<int>(blockIdx.x);
  uint32_t turn = 0;
#pragma unroll 1
  for (;; ++turn) {
    const int consumer = static_cast<int>(turn & 1);
    const uint32_t buffer = turn >> 1 & 1;
    wait_barrier(&space.taken[consumer], buffer ^ 1);
    const bool exists = cluster_has(task, tile);
    if (exists) {
      int row = reread_thread() - kWarp;
      if (row < T::kConsumerRows) locate_row<T>(task, space, tile, buffer, consumer, row);
      if constexpr (T::kConsumerRows > T::kMakers) {
        row = reread_thread() - kWarp + T::kMakers;
        if (row < T::kConsumerRows) locate_row<T>(task, space, tile, buffer, consumer, row);
      }
      sync_threads<T::kMakers>(1);
      if (task.latent_is_float)
        make_first_layer<T, float>(task, space, consumer);
      else
        make_first_layer<T, typename T::Element>(task, space, consumer);
    }
    arrive(&space.made[consumer]);
    if (consumer == 1) {
      if (!exists) return;
      tile += reread_grid();
    }
  }
}

}  // namespace liif_fast
