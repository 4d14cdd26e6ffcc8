// The fused decode's backward on compute capability 9.0, without gradients of coordinates: what backward.cuh computes,
// from what the forward saved, with the roles of hopper.cuh. The weights are transposed, and come in the opposite
// order. Producers only locate rows and load gradients of outputs. A consumer makes the gradients of its last hidden
// layer, and then layer by layer those before it. In its registers they are masked, stored for the weights' gradients,
// added to sums of columns, and packed for the next products. The first layer's go to the latents.
//
// A consumer is drained after every layer; the other one's products cover that.
#pragma once

#include "cuda/decode/hopper_consumers.cuh"
#include "cuda/decode/hopper_producers.cuh"

namespace liif_fast {

// A lane's channels of 32, of its two rows.
using GroupRows = float[2][8];

// Gradients of outputs, by row of a consumer; times the blending weight, and as they are. In the forward's `first`.
struct RowGradients {
  float4 weighted, plain;
};
template <class T>
__device__ __forceinline__ RowGradients* row_gradients(HopperWorkspace<T>& space, int consumer) {
  static_assert(sizeof(space.first[0]) >= T::kConsumerRows * sizeof(RowGradients), "fits");
  return reinterpret_cast<RowGradients*>(space.first[consumer]);
}

// Gradients of the last layer's rows, of four channels.
using LastRows = float[kMaxTrainedOuts][4];

// Adds a consumer's queries: blended hidden vectors times gradients of outputs.
template <class T>
__device__ __forceinline__ void add_last_rows(const HopperTask& task, const RowGradients* grads, int tile, int consumer,
                                              int channel, LastRows& sums) {
  using Element = typename T::Element;
  const int before = row_query<T>(tile + first_tile<T>(task), consumer, 0);
  const int rest = tile < task.tiles ? static_cast<int>(task.total) - before : 0;
  const int count = rest < T::kQueries ? rest : T::kQueries;
  const auto* from = static_cast<const Element*>(task.saved.blended) + channel +
                     static_cast<int64_t>(row_query<T>(task.saved_tile + tile, consumer, 0)) * T::kWidth;
#pragma unroll 4
  for (int q = 0; q < count; ++q, from += T::kWidth) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    const float4 grad = grads[T::kCorners == 4 ? q / 4 * 16 + q % 4 : q].plain;
    const float2 first = unpack(words.x, Element{}), second = unpack(words.y, Element{});
    const float hidden[4] = {first.x, first.y, second.x, second.y}, by_out[4] = {grad.x, grad.y, grad.z, grad.w};
#pragma unroll
    for (int o = 0; o < kMaxTrainedOuts; ++o)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[o][i] = fmaf(by_out[o], hidden[i], sums[o][i]);
  }
}

// A row's latent and gradients of outputs, 0 for a row without a query.
template <class T>
__device__ __forceinline__ void load_gradients(const HopperTask& task, const BackwardArrays& backward,
                                               HopperWorkspace<T>& space, int tile, int consumer, int row) {
  const int64_t latent = locate_row<T>(task, space, tile, 0, consumer, row);
  const int query = row_query<T>(tile + first_tile<T>(task), consumer, row);
  float grads[kMaxTrainedOuts] = {};
  float weight = 0.0f;
  if (query < task.total && tile < task.tiles) {
    const Quotient at = task.entry_queries.divide(query);
    const float* const from = backward.grad_out + at.quotient * task.out_batch + at.remainder * task.out_query;
#pragma unroll
    for (int o = 0; o < kMaxTrainedOuts; ++o)
      if (o < task.outs) grads[o] = from[o * task.out_channel];
    weight = space.weight[0][consumer][row];
  } else {
    space.rows[consumer][row].rel_row = space.rows[consumer][row].rel_col = 0.0f;
    space.rel_cell[consumer][row] = {0.0f, 0.0f};
  }
  const float4 weighted = make_float4(weight * grads[0], weight * grads[1], weight * grads[2], weight * grads[3]);
  row_gradients(space, consumer)[row] = {weighted, make_float4(grads[0], grads[1], grads[2], grads[3])};
  if (tile >= task.tiles) return;
  const int64_t at = static_cast<int64_t>(tile) * T::kRows + saved_row<T>(consumer, row);
  if (!backward.latent_map) backward.latent_index[at] = latent;
  const float2 cell = space.rel_cell[consumer][row];
  static_cast<RowTerms*>(backward.row_terms)[at].set(space.rows[consumer][row], weighted, cell.x, cell.y);
}

// Three warps: the rows of every tile, for both consumers, and the gradients of the last layer's rows.
template <class T>
__device__ __forceinline__ void make_gradients(const HopperTask& task, const BackwardArrays& backward,
                                               HopperWorkspace<T>& space) {
  const int member = static_cast<int>(threadIdx.x) - kWarp, channel = member * 4;
  const bool sums_channels = channel < T::kWidth;
  LastRows sums = {};
  int consumer = 0;
  uint32_t parity = 1;
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); cluster_has(task, tile);) {
    wait_barrier(&space.taken[consumer], parity);
    if (member < T::kConsumerRows) load_gradients<T>(task, backward, space, tile, consumer, member);
    arrive(&space.made[consumer]);
    sync_threads<T::kMakers>(1);
    if (sums_channels) add_last_rows<T>(task, row_gradients(space, consumer), tile, consumer, channel, sums);
    if (consumer == 1) {
      tile += static_cast<int>(gridDim.x);
      parity ^= 1;
    }
    consumer ^= 1;
  }
  if (!sums_channels) return;
  float* const to =
      backward.sums + (blockIdx.x * kHopperRowSums * sum_count(task.hidden, task.outs) + task.hidden + 5) * T::kWidth;
#pragma unroll
  for (int o = 0; o < kMaxTrainedOuts; ++o)
    if (o < task.outs)
      *reinterpret_cast<float4*>(to + o * T::kWidth + channel) =
          make_float4(sums[o][0], sums[o][1], sums[o][2], sums[o][3]);
}

// Where a lane's gradients of a layer go: its channels of its upper row, and of its warp's sums. Computed where it is
// used: there are no registers to keep it.
template <class T>
struct GradientPlace {
  typename T::Element* rows;
  float* sums;
  bool exists, stores;  // not a tile after the last one; nor a layer that is rebuilt

  __device__ __forceinline__ GradientPlace(const HopperTask& task, const BackwardArrays& backward, int layer, int tile)
      : exists(tile < static_cast<int>(task.tiles)), stores(exists && layer <= backward.stored) {
    const int thread = reread_thread(), first = thread % 4 * 8;
    const int64_t row =
        ((layer - 1) * task.tiles + tile) * T::kRows + saved_row<T>(thread / kWarpgroup - 1, lane_row(thread));
    rows = static_cast<typename T::Element*>(backward.rows) + row * T::kWidth + first;
    const int part = static_cast<int>(blockIdx.x) * kHopperRowSums + thread / kWarp - kWarpgroup / kWarp;
    sums = backward.sums + static_cast<int64_t>(part) * sum_count(task.hidden, task.outs) * T::kWidth + first;
  }
};

// Sums over a warp's rows, and adds them to column sums number `index`. As add_column_sums: one channel is left to each
// lane. No other warp adds to it, so that sums repeat bit for bit, and no lane waits for the memory.
template <class T>
__device__ __forceinline__ void add_columns(const GradientPlace<T>& at, int index, int channel, float (&v)[8]) {
#pragma unroll
  for (int count = 4, lanes = 16; count >= 1; count /= 2, lanes /= 2) {
    const bool upper = threadIdx.x & lanes;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, upper ? v[i] : v[i + count], lanes);
      v[i] = (upper ? v[i + count] : v[i]) + other;
    }
    channel += upper ? count : 0;
  }
  atomicAdd(&at.sums[index * T::kWidth + channel], v[0]);
}

// A layer's words of ReLU bits of a lane's two rows. Tiles after the last one have none.
using ReluBits = uint32_t[4];
template <class T>
__device__ __forceinline__ void load_bits(const HopperTask& task, int layer, int tile, ReluBits& bits) {
  const SavedLayer<T> first = first_saved_layer<T>(task, tile);
  const uint32_t* const masks = first.masks + layer * task.saved.tiles * task.saved_tile_rows * T::kWidth / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = first.exists ? masks[i * kWarp] : 0;
}
using Low = std::integral_constant<int, 0>;
using High = std::integral_constant<int, 1>;

// All bits of a word like its bit `at`. Selects would need more predicates than there are.
__device__ __forceinline__ uint32_t spread_bit(uint32_t word, int at) {
  return static_cast<uint32_t>(static_cast<int32_t>(word << (31 - at)) >> 31);
}
// Of group `group` of a half.
__device__ __forceinline__ void mask_group(uint32_t word, int group, GroupRows& v) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v[half][i] = bits_float(float_bits(v[half][i]) & spread_bit(word, group % 2 * 16 + half * 8 + i));
}
__device__ __forceinline__ void get_group(const HalfSums& sums, int group, GroupRows& v) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 8; ++i) v[half][i] = sums[16 * group + i / 4 * 8 + i / 2 % 2 * 4 + 2 * half + i % 2];
}

// A layer's masked gradients of a half, of which `values(group, v)` gives a group's before the mask. They are stored,
// and become the next product's operands.
template <class T, int kHalf, class Values>
__device__ __forceinline__ void pack_gradients(const GradientPlace<T>& at, const ReluBits& bits, HalfOperands& to,
                                               const Values& values) {
  using Element = typename T::Element;
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    GroupRows v;
    values(group, v);
    mask_group(bits[kHalf * 2 + group / 2], group, v);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = pack_in_order(v[half][2 * i], v[half][2 * i + 1], Element{});
        to[2 * group + i / 2][i % 2 * 2 + half] = words[i];
      }
      if (at.stores)
        store_once(reinterpret_cast<uint4*>(at.rows + half * 8 * T::kWidth + kHalf * T::kHalf + group * 32),
                   make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// The same, added to the sums of the layer's bias.
template <class T, int kHalf, class Values>
__device__ __forceinline__ void add_bias(const GradientPlace<T>& at, int layer, const ReluBits& bits,
                                         const Values& values) {
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    GroupRows v;
    values(group, v);
    mask_group(bits[kHalf * 2 + group / 2], group, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[0][i] += v[1][i];
    add_columns<T>(at, layer, kHalf * T::kHalf + group * 32, v[0]);
    __syncwarp();  // the compiler must not begin the next group's, for which there are no registers
  }
}

// The first layer's masked gradients of a half: added to the latents, and times the geometry to its columns.
template <class T, int kHalf>
__device__ __forceinline__ void finish_first(const HopperTask& task, const BackwardArrays& backward,
                                             const HopperWorkspace<T>& space, int tile, const ReluBits& bits,
                                             const HalfSums& sums) {
  const int thread = reread_thread(), consumer = thread / kWarpgroup - 1;
  const GradientPlace<T> at(task, backward, 1, tile);
  if (!at.exists) return;
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    const int channel = kHalf * T::kHalf + group * 32 + thread % 4 * 8;
    GroupRows v;
    get_group(sums, group, v);
    mask_group(bits[kHalf * 2 + group / 2], group, v);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane_row(thread) + half * 8;
      const bool exists = row_query<T>(tile + first_tile<T>(task), consumer, row) < task.total;
      float* to = nullptr;
      if (!backward.latent_map)
        to = backward.latent_rows +
             (static_cast<int64_t>(tile) * T::kRows + saved_row<T>(consumer, lane_row(thread)) + half * 8) * T::kWidth +
             channel;
      else if (exists && channel < task.width)
        to = backward.latent_map + space.rows[consumer][row].offset + channel;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const float4 four = make_float4(v[half][i], v[half][i + 1], v[half][i + 2], v[half][i + 3]);
        if (!backward.latent_map)
          *reinterpret_cast<float4*>(to + i) = four;
        else if (to)
          reduce_add(to + i, four);
      }
    }
#pragma unroll 1
    for (int term = -1; term < (task.has_cell ? 4 : 2); ++term) {  // the bias, rel_row, rel_col, and the cell's two
      float factor[2] = {1.0f, 1.0f}, column[8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row(thread) + half * 8;
        const CornerRow& seen = space.rows[consumer][row];
        if (term == 0) factor[half] = seen.rel_row;
        if (term == 1) factor[half] = seen.rel_col;
        if (term == 2) factor[half] = task.cell ? space.rel_cell[consumer][row].x : task.rel_cell[0];
        if (term == 3) factor[half] = task.cell ? space.rel_cell[consumer][row].y : task.rel_cell[1];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) column[i] = fmaf(factor[1], v[1][i], factor[0] * v[0][i]);
      add_columns<T>(at, term < 0 ? 0 : task.hidden + 1 + term, kHalf * T::kHalf + group * 32, column);
    }
  }
}

// The gradients of the last hidden layer, before its mask: the outputs' through the last layer and the blend.
template <class T, int kHalf>
__device__ __forceinline__ void through_blend(HopperWorkspace<T>& space, int group, GroupRows& v) {
  const int thread = reread_thread(), quad = thread % 4, row = lane_row(thread);
  const RowGradients* const grads = row_gradients(space, thread / kWarpgroup - 1);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 8; ++i) v[half][i] = 0.0f;
#pragma unroll
  for (int o = 0; o < kMaxTrainedOuts; ++o) {
    const float first = (&grads[row].weighted.x)[o], second = (&grads[row + 8].weighted.x)[o];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const float4 w = lane_channels(space.last[o] + kHalf * T::kHalf, 2 * group + step, quad);
      const float four[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[0][4 * step + i] = fmaf(first, four[i], v[0][4 * step + i]);
        v[1][4 * step + i] = fmaf(second, four[i], v[1][4 * step + i]);
      }
    }
  }
}

// One consumer.
template <class T>
__device__ __forceinline__ void propagate(const HopperTask& task, const BackwardArrays& backward,
                                          HopperWorkspace<T>& space) {
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const uint32_t rank = threadIdx.x % kWarp;
  const bool gives = rank < cluster_size();
  const uint32_t empty = remote_address(space.empty, gives ? rank : 0);
  uint32_t parity = 0, buffer = 0;
  bool has_before = false;
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); cluster_has(task, tile); tile += static_cast<int>(gridDim.x)) {
    HalfSums left, right;
    HalfOperands low, high;
    ReluBits bits;
    load_bits<T>(task, task.hidden, tile, bits);
    wait_barrier(&space.made[consumer], buffer);
    const auto from_blend = [&](auto half) {
      return [&](int group, GroupRows& v) { through_blend<T, decltype(half)::value>(space, group, v); };
    };
    const auto from_sums = [](const HalfSums& sums) {
      return [&](int group, GroupRows& v) { get_group(sums, group, v); };
    };
    const auto place = [&](int layer) { return GradientPlace<T>(task, backward, layer, tile); };
    pack_gradients<T, 0>(place(task.hidden), bits, low, from_blend(Low{}));
    add_bias<T, 0>(place(task.hidden), task.hidden, bits, from_blend(Low{}));
    pack_gradients<T, 1>(place(task.hidden), bits, high, from_blend(High{}));
    add_bias<T, 1>(place(task.hidden), task.hidden, bits, from_blend(High{}));
#pragma unroll 1
    for (int layer = task.hidden - 1;; --layer) {
      load_bits<T>(task, layer, tile, bits);  // early: under products there are no registers for the addresses
      multiply_block<T, 0, false>(space, parity, empty, gives && has_before, low, left);
      multiply_block<T, 1, false>(space, parity, empty, gives, low, right);
      multiply_block<T, 2, true>(space, parity, empty, gives, high, left);
      multiply_block<T, 3, true>(space, parity, empty, gives, high, right);
      // Under the fourth group.
      if (layer > 0) pack_gradients<T, 0>(place(layer), bits, low, from_sums(left));
      wait_products<0>();
      has_before = true;
      parity ^= 1;
      if (layer == 0) break;
      add_bias<T, 0>(place(layer), layer, bits, from_sums(left));
      pack_gradients<T, 1>(place(layer), bits, high, from_sums(right));
      add_bias<T, 1>(place(layer), layer, bits, from_sums(right));
    }
    finish_first<T, 0>(task, backward, space, tile, bits, left);
    finish_first<T, 1>(task, backward, space, tile, bits, right);
    arrive(&space.taken[consumer]);
    buffer ^= 1;
  }
}

}  // namespace liif_fast
