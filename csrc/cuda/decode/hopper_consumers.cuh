// The Hopper decode's consumers: products, packing, blend, last layer. hopper.cuh describes the kernel.
#pragma once

#include "cuda/decode/hopper_saving.cuh"

namespace liif_fast {

template <int kStage>
using Stage = std::integral_constant<int, kStage>;

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
// row, first: of a consumer's rows and of the outputs, those at which the sums begin.
template <class T>
__device__ __forceinline__ void write_queries(const HopperTask& task, const HopperWorkspace<T>& space, int tile,
                                              const LastSums<T>& sums, int row = 0, int first = 0) {
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
    const int query = row_query<T>(tile + first_tile<T>(task), thread / kWarpgroup - 1, lane_row(thread) + row + 8 * s);
    if (tile < 0 || lane % 4 != 0 || (T::kCorners == 4 && lane >= 16) || query >= task.total) continue;
    const Quotient at = task.entry_queries.divide(query);
    float* const out = task.out + at.quotient * task.out_batch + at.remainder * task.out_query;
#pragma unroll
    for (int o = 0; o < T::kOuts; ++o)
      if (first + o < task.outs) out[(first + o) * task.out_channel] = total[o] + space.last_bias[first + o];
  }
}

// The last layer of a tile without products under way, kOuts outputs at a time: `add` adds a lane's part of those whose
// rows begin at a pointer. row: where the sums' rows begin.
template <class T, class Add>
__device__ __forceinline__ void decode_outputs(const HopperTask& task, const HopperWorkspace<T>& space, int tile,
                                               int row, const Add& add) {
#pragma unroll 1
  for (int first = 0; first < task.outs; first += T::kOuts) {
    LastSums<T> sums = {};
    add(space.last[first], sums);
    write_queries<T>(task, space, tile, sums, row, first);
  }
}

// A group: eight products with the block of weights that lies kAt bytes into shared memory.
template <class T, uint32_t kAt, bool kAdds>
__device__ __forceinline__ void multiply_group(const HalfOperands& a, HalfSums& d) {
  using Element = typename T::Element;
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
}

// A group with a block of the ring. Then the group before it is done, and its stage is given back to every block of the
// cluster, by a lane of each warp for each block.
template <class T, int kStage, bool kAdds>
__device__ __forceinline__ void multiply_block(HopperWorkspace<T>& space, uint32_t parity, uint32_t empty, bool gives,
                                               const HalfOperands& a, HalfSums& d) {
  wait_barrier(&space.full[kStage], parity);
  multiply_group<T, kStage * T::kBlockBytes, kAdds>(a, d);
  wait_products<1>();
  if (gives) arrive_remote<(kStage + T::kStages - 1) % T::kStages * 8>(empty);
}

// One consumer of 256 channels, where the number of layers is not known: drained after every layer, whose products the
// other consumer's cover. With groups under way around this loop ptxas serializes them (C7512).
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
    SavedLayer<T> saved = first_saved_layer<T>(task, tile);
    save_half<T, 0>(saved, low);
    save_half<T, 1>(saved, high);
    const float* const bias = space.biases[T::kStages - 1];  // came with the fourth block
#pragma unroll 1
    for (int layer = 1;; ++layer) {
      multiply_block<T, 0, false>(space, parity, empty, gives && has_before, low, left);
      multiply_block<T, 1, false>(space, parity, empty, gives, low, right);
      multiply_block<T, 2, true>(space, parity, empty, gives, high, left);
      multiply_block<T, 3, true>(space, parity, empty, gives, high, right);
      const bool is_last = layer == task.hidden, packs = !is_last || saved.exists;
      // Under the fourth group.
      if (packs) pack_half<T>(left, bias, quad, low);
      next_saved_layer<T>(task, layer, saved);
      save_half<T, 0>(saved, low);
      wait_products<0>();
      has_before = true;
      parity ^= 1;
      if (packs) pack_half<T>(right, bias + T::kHalf, quad, high);
      save_half<T, 1>(saved, high);
      if (is_last) break;
    }
    const float *const last_bias = space.biases[T::kStages], *const weight = lane_weight<T>(space, buffer);
    if (task.out)
      decode_outputs<T>(task, space, tile, 0, [&](const float* last, LastSums<T>& sums) {
        add_last_layer<T>(left, last_bias, last, quad, weight, sums);
        add_last_layer<T>(right, last_bias + T::kHalf, last + T::kHalf, quad, weight, sums);
      });
    save_blended<T, 0>(task, tile, left, last_bias, weight);
    save_blended<T, 1>(task, tile, right, last_bias + T::kHalf, weight);
    buffer ^= 1;
  }
}

// A layer of 128 channels and 64 rows in training. The other consumer's products cover what follows. In a descriptor
// the stage is a constant.
template <class T>
__device__ __forceinline__ void multiply_layer(int stage, const HalfOperands& a, HalfSums& d) {
  if (stage == 0) multiply_group<T, 0, false>(a, d), wait_products<0>();
  if (stage == 1) multiply_group<T, T::kBlockBytes, false>(a, d), wait_products<0>();
  if (stage == 2) multiply_group<T, 2 * T::kBlockBytes, false>(a, d), wait_products<0>();
  if (stage == 3) multiply_group<T, 3 * T::kBlockBytes, false>(a, d), wait_products<0>();
}

// One consumer of 128 channels in training.
template <class T>
__device__ __forceinline__ void consume_and_save(const HopperTask& task, HopperWorkspace<T>& space) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, quad = thread % 4;
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const uint32_t rank = static_cast<uint32_t>(thread % kWarp);
  const bool gives = !keeps_weights<T>(task) && rank < cluster_size();
  const uint32_t empty = remote_address(space.empty, gives ? rank : 0);
  uint32_t parities = 0, buffer = 0;  // of the stages; of `made`
  bool waits = true;
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); cluster_has(task, tile); tile += static_cast<int>(gridDim.x)) {
    HalfSums sums;
    HalfOperands a;
    wait_barrier(&space.made[consumer], buffer);
    load_half<T>(space.first[consumer], thread, a);
    arrive(&space.taken[consumer]);
    SavedLayer<T> saved = first_saved_layer<T>(task, tile);
    save_half<T, 0>(saved, a);
#pragma unroll 1
    for (int layer = 1; layer <= task.hidden; ++layer) {
      const int stage = (layer - 1) % T::kStages;
      if (waits) wait_barrier(&space.full[stage], parities >> stage & 1);
      multiply_layer<T>(stage, a, sums);
      pack_half<T>(sums, space.biases[stage], quad, a);
      __syncwarp();  // all lanes have read the layer's bias
      if (gives) arrive_remote<0>(empty + stage * 8);
      parities ^= 1u << stage;
      next_saved_layer<T>(task, layer, saved);
      save_half<T, 0>(saved, a);
    }
    waits = !keeps_weights<T>(task);
    const float *const bias = space.biases[T::kStages], *const weight = lane_weight<T>(space, buffer);
    if (task.out)
      decode_outputs<T>(task, space, tile, 0, [&](const float* last, LastSums<T>& to) {
        add_last_layer<T>(sums, bias, last, quad, weight, to);
      });
    save_blended<T, 0>(task, tile, sums, bias, weight);
    buffer ^= 1;
  }
}

// A layer of 128 channels in inference: the same weights for both halves of the rows.
template <class T, int kStage>
__device__ __forceinline__ void multiply_rows(HopperWorkspace<T>& space, bool is_last, int quad, HalfOperands& low,
                                              HalfOperands& high, HalfSums& left, HalfSums& right) {
  const float* const bias = space.biases[kStage];
  multiply_group<T, kStage * T::kBlockBytes, false>(low, left);
  multiply_group<T, kStage * T::kBlockBytes, false>(high, right);
  wait_products<1>();
  if (!is_last) pack_half<T>(left, bias, quad, low);  // under the second group
  wait_products<0>();
  if (!is_last) pack_half<T>(right, bias, quad, high);
}

// One consumer of 128 channels in inference. The other consumer's products cover the packing of `right`.
template <class T>
__device__ __forceinline__ void consume_rows(const HopperTask& task, HopperWorkspace<T>& space) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, quad = thread % 4;
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const uint32_t rank = static_cast<uint32_t>(thread % kWarp);
  const bool gives = !keeps_weights<T>(task) && rank < cluster_size();
  const uint32_t empty = remote_address(space.empty, gives ? rank : 0);
  uint32_t parities = 0, buffer = 0;  // of the stages; of `made`
  int tile = static_cast<int>(blockIdx.x);
  bool waits = true;
#pragma unroll 1
  for (; cluster_has(task, tile); tile += static_cast<int>(gridDim.x)) {
    HalfSums left, right;
    HalfOperands low, high;
    wait_barrier(&space.made[consumer], buffer);
    load_half<T>(space.first[consumer], thread, low);
    load_half<T>(space.first[consumer] + T::kSteps, thread, high);
    arrive(&space.taken[consumer]);
    int layer = 0;
    const auto run = [&](auto stage) {  // returns whether another layer follows
      constexpr int kStage = decltype(stage)::value;
      const bool is_last = ++layer == task.hidden;
      if (waits) wait_barrier(&space.full[kStage], parities >> kStage & 1);
      multiply_rows<T, kStage>(space, is_last, quad, low, high, left, right);
      __syncwarp();  // all lanes have read the bias
      if (gives) arrive_remote<kStage * 8>(empty);
      parities ^= 1u << kStage;
      return !is_last;
    };
    while (run(Stage<0>{}) && run(Stage<1>{}) && run(Stage<2>{}) && run(Stage<3>{})) {
    }
    waits = !keeps_weights<T>(task);
    const auto decode_half = [&](const HalfSums& sums, int row) {
      decode_outputs<T>(task, space, tile, row, [&](const float* last, LastSums<T>& to) {
        add_last_layer<T>(sums, space.biases[T::kStages], last, quad, lane_weight<T>(space, buffer) + row, to);
      });
    };
    decode_half(left, 0);
    decode_half(right, T::kRightRow);
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

}  // namespace liif_fast
