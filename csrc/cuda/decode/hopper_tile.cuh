// The Hopper decode's tile and shared memory, which producers and consumers share. hopper.cuh describes the kernel.
#pragma once

#include "cuda/decode/layers.cuh"
#include "cuda/decode/neighbors.cuh"
#include "cuda/wgmma.cuh"

namespace liif_fast {

constexpr int kWarpgroup = 128;

// kOuts_: outputs at a time. kHidden_: hidden layers; 0: as many as the task says, and up to kMaxFusedOuts outputs.
template <class Element_, int kCorners_, int kOuts_, int kHidden_, int kWidth_ = 256>
struct HopperTile {
  using Element = Element_;
  static constexpr int kCorners = kCorners_, kOuts = kOuts_, kHidden = kHidden_, kWidth = kWidth_, kHalf = 128;
  // What a consumer holds is halved: by channels where a layer has 256, by rows where it has 128.
  static constexpr bool kHalvesRows = kWidth == kHalf;
  static constexpr bool kSaves = false;
  static constexpr int kRightRow = kHalvesRows ? 64 : 0;    // where the second half begins
  static constexpr int kLayerBlocks = kHalvesRows ? 1 : 4;  // of weights
  static constexpr int kConsumers = 2, kConsumerRows = 64 + kRightRow, kRows = kConsumers * kConsumerRows;
  static constexpr int kQueries = kConsumerRows / kCorners;                        // of a consumer
  static constexpr int kSums = kCorners == 4 ? 1 : 2;                              // queries of a lane's two rows
  static constexpr int kSteps = kHalf / 16;                                        // of inputs, in a half
  static constexpr int kPartBytes = kHalf * 64 * 2, kBlockBytes = 2 * kPartBytes;  // a part has 64 inputs
  static constexpr int kStages = 4;  // of the ring; a tile begins at the first, so that a block's stage is a constant
  static constexpr int kBiases = kHidden ? kHidden : kStages + 1;  // of each hidden layer, or of stages and the last
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup, kMakers = 3 * kWarp;
  // A launch gives 384 threads at most 168 registers each, of which warps give and take: 504 for three warpgroups. More
  // would let the second consumer wait for ever; with 216 for a consumer, ptxas serializes the products (C7512).
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 3 * 168, "the launch's registers");
};

// The same for training, and for any number of layers of 256 channels. A tile has 128 rows: those of tile.cuh, in whose
// layout it is saved. With 128 channels a consumer then has one half: 64 rows of all channels.
template <class T>
struct HopperSavingTile : T {
  static constexpr bool kSaves = true, kHalvesRows = false;
  static constexpr int kRightRow = 0, kConsumerRows = 64, kRows = T::kConsumers * kConsumerRows;
  static constexpr int kQueries = kConsumerRows / T::kCorners;
  static constexpr int kHalves = T::kWidth / T::kHalf;
  static_assert(T::kOuts == kMaxTrainedOuts && kRows == kRowPadding, "as hopper.py and launch.h promise");
};

// A block's shared memory. Two-fold: of either consumer.
template <class T>
struct alignas(1024) HopperWorkspace {
  unsigned char ring[T::kStages][T::kBlockBytes];
  uint4 first[T::kConsumers][2 * T::kSteps][kWarpgroup];  // the first layer's activations, as operands of each thread
  float biases[T::kBiases][T::kWidth];
  float base[T::kWidth], by_row[T::kWidth], by_col[T::kWidth], by_cell_row[T::kWidth], by_cell_col[T::kWidth];
  float last[T::kHidden ? T::kOuts : kMaxFusedOuts][T::kWidth], last_bias[kMaxFusedOuts];
  CornerRow rows[T::kConsumers][T::kConsumerRows];
  float2 rel_cell[T::kConsumers][T::kConsumerRows];
  float weight[2][T::kConsumers][T::kConsumerRows];  // of the blend; for even and odd tiles of this block
  uint64_t full[T::kStages], empty[T::kStages], made[T::kConsumers], taken[T::kConsumers];
};

using HalfSums = float[64];           // [n8 tile][row, row + 8][two channels]
using HalfOperands = uint32_t[8][4];  // [k16 step][word]

// Four channels of a packed vector, which a lane holds in two n8 tiles.
__device__ __forceinline__ float4 lane_channels(const float* half, int step, int quad) {
  return *reinterpret_cast<const float4*>(half + step / 2 * 32 + quad * 8 + step % 2 * 4);
}

// The upper one of a thread's two rows of its consumer.
__device__ __forceinline__ int lane_row(int thread) { return thread % kWarpgroup / kWarp * 16 + thread % kWarp / 4; }

// A block's tiles are blockIdx.x, blockIdx.x + gridDim.x and so on. Both blocks of a cluster have as many, since
// weights come to both; those after the last are not written. ptxas spills what all warps share, so each role counts by
// itself.
__device__ __forceinline__ bool cluster_has(const HopperTask& task, int tile) {
  return tile - static_cast<int>(cluster_rank()) < static_cast<int>(task.tiles);
}

// Whether the ring holds all weights: they are copied once.
template <class T>
__device__ __forceinline__ bool keeps_weights(const HopperTask& task) {
  return T::kLayerBlocks == 1 && task.hidden <= T::kStages;
}

// The tile from which a launch counts: training decodes parts of the queries.
template <class T>
__device__ __forceinline__ int first_tile(const HopperTask& task) {
  return T::kSaves ? static_cast<int>(task.first_tile) : 0;
}

// The query of a consumer's row.
template <class T>
__device__ __forceinline__ int row_query(int tile, int consumer, int row) {
  return (tile * T::kConsumers + consumer) * T::kQueries + (T::kCorners == 4 ? row / 16 * 4 + row % 4 : row);
}

// Gradients of outputs, by row of a consumer; times the blending weight, and as they are. In the place of
// the forward's `first`.
struct RowGradients {
  float4 weighted, plain;
};
template <class T>
__device__ __forceinline__ RowGradients* row_gradients(HopperWorkspace<T>& space, int consumer) {
  static_assert(sizeof(space.first[0]) >= T::kConsumerRows * sizeof(RowGradients), "fits");
  return reinterpret_cast<RowGradients*>(space.first[consumer]);
}

// Where a warp of a consumer turns 64 channels of up to 16 rows around, after these: a lane stores channels of its
// rows, and adds rows of its channels. With this pitch neither has bank conflicts.
constexpr int kTurnPitch = 68;
template <class T>
__device__ __forceinline__ float* turned_rows(HopperWorkspace<T>& space) {
  constexpr int kBytes = T::kConsumerRows * static_cast<int>(sizeof(RowGradients)), kFloats = 16 * kTurnPitch;
  static_assert(sizeof(space.first[0]) >= kBytes + kFloats * 4 * kWarpgroup / kWarp, "fits");
  const int warp = reread_thread() / kWarp - kWarpgroup / kWarp;
  unsigned char* const first = reinterpret_cast<unsigned char*>(space.first[warp / 4]);
  return reinterpret_cast<float*>(first + kBytes) + warp % 4 * kFloats;
}
__device__ __forceinline__ void store_turned(float* buffer, int row, int channel, const float (&v)[8]) {
  float4* const to = reinterpret_cast<float4*>(buffer + row * kTurnPitch + channel);
  to[0] = make_float4(v[0], v[1], v[2], v[3]);
  to[1] = make_float4(v[4], v[5], v[6], v[7]);
}

}  // namespace liif_fast
