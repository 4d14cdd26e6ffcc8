// The fused decode of inference on compute capability 9.0: 256 channels, 16 bits, products of warpgroups (wgmma).
//
// A block has three warpgroups. In the first, the producers, one thread streams weights through a ring in shared
// memory, and three warps make the first layer's activations of the next tile. The other two, the consumers, multiply:
// each has 64 rows, whose activations never leave its registers. Two blocks are a cluster where the device allows it:
// each fetches half of the weights for both.
//
// Inputs and outputs of a layer are halved. `left` and `right` are the sums of outputs 0-127 and 128-255, `low` and
// `high` the activations of inputs 0-127 and 128-255. A layer is four blocks of 128x128 weights, a group of products
// each:
//
//     left = low*W    right = low*W    left += high*W    right += high*W
//
// After the third, `left` is final and `low` is not read again: `left` becomes the next layer's `low` under the fourth,
// and `right` its `high` under the next layer's first. So one group is always under way. Between tiles the last layer
// takes the place of the packing.
//
// The order of channels is that of tile.cuh: a lane holds eight consecutive channels of a group of 32. A row's corner
// is 2 * (bit 2 of the row) + (bit 3), so that one lane and the one 16 lanes away hold a query's four corners.
#pragma once

#include <map>
#include <mutex>

#include "cuda/common.cuh"
#include "cuda/decode/layers.cuh"
#include "cuda/decode/neighbors.cuh"
#include "cuda/wgmma.cuh"

namespace liif_fast {

constexpr int kWarpgroup = 128;

// kHidden_: hidden layers; 0: as many as the task says.
template <class Element_, int kCorners_, int kOuts_, int kHidden_>
struct HopperTile {
  using Element = Element_;
  static constexpr int kCorners = kCorners_, kOuts = kOuts_, kHidden = kHidden_, kWidth = 256, kHalf = 128;
  static constexpr int kConsumers = 2, kConsumerRows = 64, kRows = kConsumers * kConsumerRows;
  static constexpr int kQueries = kConsumerRows / kCorners;                        // of a consumer
  static constexpr int kSums = kCorners == 4 ? 1 : 2;                              // queries of a lane's two rows
  static constexpr int kSteps = kHalf / 16;                                        // of inputs, in a half
  static constexpr int kPartBytes = kHalf * 64 * 2, kBlockBytes = 2 * kPartBytes;  // a part has 64 inputs
  static constexpr int kStages = 4;  // of the ring; a layer is once around it, so that a block's stage is a constant
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup, kMakers = 3 * kWarp;
  // A launch gives 384 threads at most 168 registers each, of which warps give and take: 504 for three warpgroups. More
  // would let the second consumer wait for ever; with 216 for a consumer, ptxas serializes the products (C7512).
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 3 * 168, "the launch's registers");
};

// A block's shared memory. Two-fold: of either consumer.
template <class T>
struct alignas(1024) HopperWorkspace {
  unsigned char ring[T::kStages][T::kBlockBytes];
  uint4 first[T::kConsumers][2 * T::kSteps][kWarpgroup];  // the first layer's activations, as operands of each thread
  float biases[kMaxWgmmaHidden][T::kWidth];
  float base[T::kWidth], by_row[T::kWidth], by_col[T::kWidth], by_cell_row[T::kWidth], by_cell_col[T::kWidth];
  float last[T::kOuts][T::kWidth], last_bias[4];
  CornerRow rows[T::kConsumers][T::kConsumerRows];
  float2 rel_cell[T::kConsumers][T::kConsumerRows];
  float weight[2][T::kConsumers][T::kConsumerRows];  // of the blend; for even and odd tiles of this block
  uint64_t full[T::kStages], empty[T::kStages], made[T::kConsumers], taken[T::kConsumers];
};

// A block's tiles are blockIdx.x, blockIdx.x + gridDim.x and so on. Both blocks of a cluster have as many, since
// weights come to both; those after the last are not written. ptxas spills what all warps share, so each role counts by
// itself.
__device__ __forceinline__ bool cluster_has(const HopperTask& task, int tile) {
  return tile - static_cast<int>(cluster_rank()) < static_cast<int>(task.tiles);
}

// ------------------------------------------------------------------------------------------------------------
// producers

// One thread: the weights of all layers, tile after tile.
template <class T>
__device__ __forceinline__ void stream_weights(const HopperTask& task, HopperWorkspace<T>& space) {
  const uint32_t rank = cluster_rank(), size = cluster_size();
  const uint32_t bytes = T::kBlockBytes >> (size - 1), ranks = (1u << size) - 1;
  const int hidden = T::kHidden ? T::kHidden : task.hidden;
  uint32_t parity = 1;
  for (int tile = static_cast<int>(blockIdx.x); cluster_has(task, tile); tile += static_cast<int>(gridDim.x)) {
    const unsigned char* from = task.weights + rank * bytes;
#pragma unroll 1
    for (int layer = 0; layer < hidden; ++layer) {
#pragma unroll
      for (int stage = 0; stage < T::kStages; ++stage) {
        wait_barrier(&space.empty[stage], parity);
        arrive_and_expect(&space.full[stage], T::kBlockBytes);
        copy_bulk(space.ring[stage] + rank * bytes, from, bytes, &space.full[stage], ranks);
        from += T::kBlockBytes;
      }
      parity ^= 1;
    }
  }
}

// The query of a consumer's row.
template <class T>
__device__ __forceinline__ int row_query(int tile, int consumer, int row) {
  return (tile * T::kConsumers + consumer) * T::kQueries + (T::kCorners == 4 ? row / 16 * 4 + row % 4 : row);
}

// A row's latent and blending weight, as locate_rows finds them.
template <class T>
__device__ __forceinline__ void locate_row(const HopperTask& task, HopperWorkspace<T>& space, int tile, uint32_t buffer,
                                           int consumer, int r) {
  const int total = static_cast<int>(task.total), wanted = row_query<T>(tile, consumer, r);
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
      uint4* const to = &space.first[consumer][2 * group][(m + tile) * kWarp + lane];
      to[0] = make_uint4(made[0][0], made[1][0], made[0][1], made[1][1]);
      to[kWarpgroup] = make_uint4(made[0][2], made[1][2], made[0][3], made[1][3]);
    }
  }
}

// Three warps: geometry and first layer of every tile for both consumers, then a tile without rows, so that consumers
// need not ask whether there is a next one.
template <class T>
__device__ __forceinline__ void make_tiles(const HopperTask& task, HopperWorkspace<T>& space) {
  int tile = static_cast<int>(blockIdx.x), consumer = 0;
  uint32_t buffer = 0;
#pragma unroll 1
  for (;;) {
    wait_barrier(&space.taken[consumer], buffer ^ 1);
    const bool exists = cluster_has(task, tile);
    if (exists) {
      const int row = reread_thread() - kWarp;
      if (row < T::kConsumerRows) locate_row<T>(task, space, tile, buffer, consumer, row);
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
      buffer ^= 1;
    }
    consumer ^= 1;
  }
}

// ------------------------------------------------------------------------------------------------------------
// consumers

using HalfSums = float[64];           // [n8 tile][row, row + 8][two channels]
using HalfOperands = uint32_t[8][4];  // [k16 step][word]

// Four channels of a packed vector, which a lane holds in two n8 tiles.
__device__ __forceinline__ float4 lane_channels(const float* half, int step, int quad) {
  return *reinterpret_cast<const float4*>(half + step / 2 * 32 + quad * 8 + step % 2 * 4);
}

// The next layer's operands: relu(sums + bias), which have the same place in a lane.
template <class T>
__device__ __forceinline__ void pack_half(const HalfSums& sums, const float* bias, int quad, HalfOperands& to) {
  using Element = typename T::Element;
#pragma unroll
  for (int k = 0; k < T::kSteps; ++k) {
    const float4 b = lane_channels(bias, k, quad);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      to[k][half] = pack_relu(sums[8 * k + 2 * half] + b.x, sums[8 * k + 2 * half + 1] + b.y, Element{});
      to[k][2 + half] = pack_relu(sums[8 * k + 4 + 2 * half] + b.z, sums[8 * k + 5 + 2 * half] + b.w, Element{});
    }
  }
}

template <class T>
__device__ __forceinline__ void load_half(const uint4 (*first)[kWarpgroup], int thread, HalfOperands& to) {
#pragma unroll
  for (int k = 0; k < T::kSteps; ++k) {
    const uint4 words = first[k][thread];
    to[k][0] = words.x, to[k][1] = words.y, to[k][2] = words.z, to[k][3] = words.w;
  }
}

template <class T>
using LastSums = float[T::kOuts][T::kSums];

// The upper one of a thread's two rows of its consumer.
__device__ __forceinline__ int lane_row(int thread) { return thread % kWarpgroup / kWarp * 16 + thread % kWarp / 4; }

// The blending weights of a thread's rows: the upper one's, and the lower one's eight further on.
template <class T>
__device__ __forceinline__ const float* lane_weight(const HopperWorkspace<T>& space, uint32_t buffer) {
  const int thread = reread_thread();
  return &space.weight[buffer][thread / kWarpgroup - 1][lane_row(thread)];
}

// Adds this lane's part of the last layer: half of the last hidden layer's channels, each row times its weight.
template <class T>
__device__ __forceinline__ void add_last_layer(const HalfSums& hidden, const float* bias, const float* last, int quad,
                                               const float* weight, LastSums<T>& sums) {
  float parts[T::kOuts][2] = {};
#pragma unroll
  for (int k = 0; k < T::kSteps; ++k) {
    const float4 b = lane_channels(bias, k, quad);
    const float add[8] = {b.x, b.y, b.x, b.y, b.z, b.w, b.z, b.w};
    float h[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) h[i] = relu(hidden[8 * k + i] + add[i]);
#pragma unroll
    for (int o = 0; o < T::kOuts; ++o) {
      const float4 w = lane_channels(last + o * T::kWidth, k, quad);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& part = parts[o][half];
        part = fmaf(h[2 * half], w.x, part);
        part = fmaf(h[2 * half + 1], w.y, part);
        part = fmaf(h[4 + 2 * half], w.z, part);
        part = fmaf(h[5 + 2 * half], w.w, part);
      }
    }
  }
#pragma unroll
  for (int o = 0; o < T::kOuts; ++o)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[o][T::kSums == 2 ? half : 0];
      sum = fmaf(weight[half * 8], parts[o][half], sum);
    }
}

// Sums over the lanes that share a query, and writes them. There is no tile before a block's first.
template <class T>
__device__ __forceinline__ void write_queries(const HopperTask& task, const HopperWorkspace<T>& space, int tile,
                                              const LastSums<T>& sums) {
  const int thread = reread_thread(), lane = thread % kWarp;
#pragma unroll
  for (int s = 0; s < T::kSums; ++s) {
    float total[T::kOuts];
#pragma unroll
    for (int o = 0; o < T::kOuts; ++o) {
      total[o] = sums[o][s] + __shfl_xor_sync(kAllLanes, sums[o][s], 1);
      total[o] += __shfl_xor_sync(kAllLanes, total[o], 2);
      if (T::kCorners == 4) total[o] += __shfl_xor_sync(kAllLanes, total[o], 16);
    }
    const int query = row_query<T>(tile, thread / kWarpgroup - 1, lane_row(thread) + 8 * s);
    if (tile < 0 || lane % 4 != 0 || (T::kCorners == 4 && lane >= 16) || query >= task.total) continue;
    const Quotient at = task.entry_queries.divide(query);
    float* const out = task.out + at.quotient * task.out_batch + at.remainder * task.out_query;
#pragma unroll
    for (int o = 0; o < T::kOuts; ++o)
      if (o < task.outs) out[o * task.out_channel] = total[o] + space.last_bias[o];
  }
}

// A group: eight products with a block of weights. Then the group before it is done, and its stage is given back to
// every block of the cluster, by a lane of each warp for each block.
template <class T, int kStage, bool kAdds>
__device__ __forceinline__ void multiply_block(HopperWorkspace<T>& space, uint32_t parity, uint32_t empty, bool gives,
                                               const HalfOperands& a, HalfSums& d) {
  using Element = typename T::Element;
  constexpr uint32_t kAt = kStage * T::kBlockBytes;
  wait_barrier(&space.full[kStage], parity);
  fence_operands();
  multiply_add<kAt, kAdds>(d, a[0], Element{});
  multiply_add<kAt + 32, true>(d, a[1], Element{});
  multiply_add<kAt + 64, true>(d, a[2], Element{});
  multiply_add<kAt + 96, true>(d, a[3], Element{});
  multiply_add<kAt + T::kPartBytes, true>(d, a[4], Element{});
  multiply_add<kAt + T::kPartBytes + 32, true>(d, a[5], Element{});
  multiply_add<kAt + T::kPartBytes + 64, true>(d, a[6], Element{});
  multiply_add<kAt + T::kPartBytes + 96, true>(d, a[7], Element{});
  commit_products();
  wait_products<1>();
  if (gives) arrive_remote<(kStage + T::kStages - 1) % T::kStages * 8>(empty);
}

// One consumer, where the number of layers is not known: drained after every layer, whose products the other consumer's
// cover. With groups under way around this loop ptxas serializes them (C7512).
template <class T>
__device__ __forceinline__ void consume_layers(const HopperTask& task, HopperWorkspace<T>& space) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, quad = thread % 4;
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const uint4(*const first)[kWarpgroup] = space.first[consumer];
  const uint32_t rank = static_cast<uint32_t>(thread % kWarp);
  const bool gives = rank < cluster_size();
  const uint32_t empty = remote_address(space.empty, gives ? rank : 0);
  uint32_t parity = 0, buffer = 0;
  bool has_before = false;
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); cluster_has(task, tile); tile += static_cast<int>(gridDim.x)) {
    HalfSums left, right;
    HalfOperands low, high;
    wait_barrier(&space.made[consumer], buffer);
    load_half<T>(first, thread, low);
    load_half<T>(first + T::kSteps, thread, high);
    arrive(&space.taken[consumer]);
    const float* bias = space.biases[0];
#pragma unroll 1
    for (int layer = 1;; ++layer) {
      multiply_block<T, 0, false>(space, parity, empty, gives && has_before, low, left);
      multiply_block<T, 1, false>(space, parity, empty, gives, low, right);
      multiply_block<T, 2, true>(space, parity, empty, gives, high, left);
      multiply_block<T, 3, true>(space, parity, empty, gives, high, right);
      const bool is_last = layer == task.hidden;
      // Under the fourth group.
      if (!is_last) pack_half<T>(left, bias, quad, low);
      wait_products<0>();
      has_before = true;
      parity ^= 1;
      if (is_last) break;
      pack_half<T>(right, bias + T::kHalf, quad, high);
      bias += T::kWidth;
    }
    LastSums<T> sums = {};
    const float* const weight = lane_weight<T>(space, buffer);
    add_last_layer<T>(left, bias, space.last[0], quad, weight, sums);
    add_last_layer<T>(right, bias + T::kHalf, space.last[0] + T::kHalf, quad, weight, sums);
    write_queries<T>(task, space, tile, sums);
    buffer ^= 1;
  }
}

// One consumer with a constant number of layers.
template <class T>
__device__ __forceinline__ void consume(const HopperTask& task, HopperWorkspace<T>& space) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, quad = thread % 4;
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const uint4(*const first)[kWarpgroup] = space.first[consumer];
  const uint32_t rank = static_cast<uint32_t>(thread % kWarp);
  const bool gives = rank < cluster_size();
  const uint32_t empty = remote_address(space.empty, gives ? rank : 0);
  const float* const last_bias = space.biases[T::kHidden - 1];
  HalfSums left, right;
  HalfOperands low, high;
  LastSums<T> sums = {};
  wait_barrier(&space.made[consumer], 0);
  load_half<T>(first, thread, low);
#pragma unroll
  for (int i = 0; i < 64; ++i) right[i] = 0.0f;
  uint32_t buffer = 0;
  int tile = static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (; cluster_has(task, tile); tile += static_cast<int>(gridDim.x)) {
    const int before = tile - static_cast<int>(gridDim.x);
#pragma unroll
    for (int layer = 0; layer < T::kHidden; ++layer) {
      const float* const bias = space.biases[layer];
      const uint32_t parity = T::kHidden % 2 ? buffer ^ (layer & 1) : layer & 1;
      multiply_block<T, 0, false>(space, parity, empty, gives && (layer > 0 || before >= 0), low, left);
      // `right` of the layer before, or of the tile before, is final.
      if (layer > 0) {
        pack_half<T>(right, bias - T::kHalf, quad, high);
      } else {
        add_last_layer<T>(right, last_bias + T::kHalf, space.last[0] + T::kHalf, quad,
                          lane_weight<T>(space, buffer ^ 1), sums);
        write_queries<T>(task, space, before, sums);
        load_half<T>(first + T::kSteps, thread, high);
        arrive(&space.taken[consumer]);
      }
      multiply_block<T, 1, false>(space, parity, empty, gives, low, right);
      multiply_block<T, 2, true>(space, parity, empty, gives, high, left);
      multiply_block<T, 3, true>(space, parity, empty, gives, high, right);
      // `left` is final, and `low` is read no more.
      if (layer + 1 < T::kHidden) pack_half<T>(left, bias, quad, low);
    }
#pragma unroll
    for (int o = 0; o < T::kOuts; ++o)
#pragma unroll
      for (int s = 0; s < T::kSums; ++s) sums[o][s] = 0.0f;
    add_last_layer<T>(left, last_bias, space.last[0], quad, lane_weight<T>(space, buffer), sums);
    buffer ^= 1;
    wait_barrier(&space.made[consumer], buffer);
    load_half<T>(first, thread, low);
    wait_products<0>();  // ptxas allows no products under way over the loop's end
  }
  add_last_layer<T>(right, last_bias + T::kHalf, space.last[0] + T::kHalf, quad, lane_weight<T>(space, buffer ^ 1),
                    sums);
  write_queries<T>(task, space, tile - reread_grid(), sums);
}

// ------------------------------------------------------------------------------------------------------------
// kernel

template <class T>
__device__ __forceinline__ void load_vectors(const HopperTask& task, HopperWorkspace<T>& space) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < task.hidden * T::kWidth; i += T::kThreads)
    space.biases[i / T::kWidth][i % T::kWidth] = bias_vector<T>(task, 1)[i];
  for (int i = thread; i < T::kOuts * T::kWidth; i += T::kThreads)
    space.last[i / T::kWidth][i % T::kWidth] = i < task.outs * T::kWidth ? last_vector<T>(task, 0)[i] : 0.0f;
  if (thread < task.outs) space.last_bias[thread] = last_vector<T>(task, task.outs)[thread];
  for (int i = thread; i < T::kWidth; i += T::kThreads) {
    const float cell_row = geometry_vector<T>(task, 2)[i], cell_col = geometry_vector<T>(task, 3)[i];
    const float base = bias_vector<T>(task, 0)[i];
    const bool adds_cell = task.has_cell && !task.cell;  // the grid's
    space.base[i] = adds_cell ? fmaf(task.rel_cell[1], cell_col, fmaf(task.rel_cell[0], cell_row, base)) : base;
    space.by_row[i] = geometry_vector<T>(task, 0)[i];
    space.by_col[i] = geometry_vector<T>(task, 1)[i];
    space.by_cell_row[i] = cell_row;
    space.by_cell_col[i] = cell_col;
  }
}

template <class T>
__device__ __forceinline__ void decode_tiles(const HopperTask& task) {
  LIIF_DYNAMIC_SHARED(shared);
  HopperWorkspace<T>& space = *reinterpret_cast<HopperWorkspace<T>*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  load_vectors<T>(task, space);
  if (thread == 0) {
    for (int i = 0; i < T::kStages; ++i) {
      init_barrier(&space.full[i], 1);
      init_barrier(&space.empty[i], cluster_size() * T::kConsumers * kWarpgroup / kWarp);
    }
    for (int i = 0; i < T::kConsumers; ++i) {
      init_barrier(&space.made[i], T::kMakers);
      init_barrier(&space.taken[i], kWarpgroup);
    }
    fence_barrier_init();
  }
  sync_cluster();
  if (thread < kWarpgroup) {
    give_registers<T::kProducerRegisters>();
    if (thread >= kWarp)
      make_tiles<T>(task, space);
    else if (thread == 0)
      stream_weights<T>(task, space);
  } else {
    take_registers<T::kConsumerRegisters>();
    if constexpr (T::kHidden)
      consume<T>(task, space);
    else
      consume_layers<T>(task, space);
  }
  __syncwarp();
  sync_cluster();  // no block ends while another may copy to its memory or arrive at its barriers
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) decode_hopper_kernel(const __grid_constant__ HopperTask task) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  decode_tiles<T>(task);
#endif
}

// ------------------------------------------------------------------------------------------------------------
// launch

// Blocks that the device runs at a time, in clusters of two where these are nearly as many as single blocks. The driver
// is asked once for each kernel and device.
template <auto kKernel>
const char* find_hopper_launch(int threads, int bytes, LaunchSize& size) {
  static std::mutex mutex;
  static std::map<int, LaunchSize> known;
  const auto failed = [](cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); };
  int device = 0, reserved = 0, clusters[2] = {};
  if (const char* error = failed(cudaGetDevice(&device))) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) {
    size = found->second;
    return nullptr;
  }
  if (const char* error = failed(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device)))
    return error;
  if (reserved != static_cast<int>(kSharedBase)) return "this device's shared memory begins at an unknown address";
  if (const char* error = allow_shared<kKernel>(bytes)) return error;
  for (const unsigned cluster : {1u, 2u}) {
    cudaLaunchAttribute attribute = {};
    const cudaLaunchConfig_t config = launch_config({cluster, bytes, threads, cluster}, attribute, nullptr);
    if (const char* error = failed(cudaOccupancyMaxActiveClusters(&clusters[cluster - 1], kKernel, &config)))
      return error;
  }
  const bool pairs = 2 * clusters[1] * 10 >= clusters[0] * 9;
  size = {static_cast<unsigned>(pairs ? 2 * clusters[1] : clusters[0]), bytes, threads, pairs ? 2u : 1u};
  if (size.blocks == 0) return "no block of the Hopper kernel fits on this device";
  known[device] = size;
  return nullptr;
}

template <class T>
const char* launch_tile(const HopperTask& task, void* stream) {
  constexpr auto kKernel = decode_hopper_kernel<T>;
  LaunchSize size = {};
  if (const char* error = find_hopper_launch<kKernel>(T::kThreads, sizeof(HopperWorkspace<T>), size)) return error;
  const int64_t wanted = (task.tiles + size.cluster - 1) / size.cluster * size.cluster;
  if (wanted < size.blocks) size.blocks = static_cast<unsigned>(wanted);
  return launch(kKernel, size, stream, task);
}

// The paper's decoder has a kernel of its own: with three layers and three outputs, both constants.
template <MmaPolicy kPolicy>
const char* launch_hopper(const HopperTask& task, void* stream) {
  using Element = std::conditional_t<is_float16(kPolicy), __half, __nv_bfloat16>;
  if (task.corners != 4) return launch_tile<HopperTile<Element, 1, 4, 0>>(task, stream);
  if (task.hidden == 3 && task.outs <= 3) return launch_tile<HopperTile<Element, 4, 3, 3>>(task, stream);
  return launch_tile<HopperTile<Element, 4, 4, 0>>(task, stream);
}

}  // namespace liif_fast
