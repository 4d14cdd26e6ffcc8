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
    if (!task.cell) space.rel_cell[consumer][row] = {task.rel_cell[0], task.rel_cell[1]};
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

// Where a lane's gradients of a layer go: its channels of its upper row, and its two channels of the warp's sums.
// Computed where it is used: there are no registers to keep it.
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
    sums =
        backward.sums + static_cast<int64_t>(part) * sum_count(task.hidden, task.outs) * T::kWidth + thread % kWarp * 2;
  }
};

// Adds a lane's two columns to its sums. No other warp adds to them, so that sums repeat bit for bit, and no lane waits
// for the memory.
__device__ __forceinline__ void add_columns(float* to, float2 sum) {
  atomicAdd(to, sum.x);
  atomicAdd(to + 1, sum.y);
}

// A layer's words of ReLU bits of a lane's two rows. Tiles after the last one have none.
using ReluBits = uint32_t[4];  // of 64 channels each
template <class T>
__device__ __forceinline__ void load_bits(const HopperTask& task, int layer, int tile, ReluBits& bits) {
  using Saved = SavedLayer<T>;
  const Saved first = first_saved_layer<T>(task, tile);
  const int64_t words = task.saved.tiles * task.saved_tile_rows * T::kWidth / 32;  // of a layer
  const auto* const masks = first.masks + layer * words * Saved::kParts;
  uint32_t parts[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) parts[i] = first.exists ? masks[i * Saved::kStride] : 0;
  if constexpr (Saved::kParts == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = parts[i];
  } else {
    bits[0] = parts[0] | parts[1] << 16;
    bits[1] = parts[2] | parts[3] << 16;
  }
}
using Low = std::integral_constant<int, 0>;
using High = std::integral_constant<int, 1>;

// The ReLU bits of a row's eight channels, number `part` of a word, as masks: of the packed channels 2 * i and 2 * i +
// 1, and of one channel. Selects would need more predicates than there are.
__device__ __forceinline__ uint32_t mask_pair(uint32_t bits, int part, int i) {
  return spread_signs(bits << (7 - 2 * i), bits << (6 - 2 * i), 0x1100 * (12 + part) + 0x11 * (8 + part));
}
__device__ __forceinline__ float mask_channel(uint32_t bits, int part, int i, float value) {
  const uint32_t shifted = bits << (7 - i);
  return bits_float(float_bits(value) & spread_signs(shifted, shifted, 0x1111 * (8 + part)));
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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = pack_in_order(v[half][2 * i], v[half][2 * i + 1], Element{}) &
                   mask_pair(bits[kHalf * 2 + group / 2], group % 2 * 2 + half, i);
        to[2 * group + i / 2][i % 2 * 2 + half] = words[i];
      }
      if (at.stores)
        store_once(reinterpret_cast<uint4*>(at.rows + half * 8 * T::kWidth + kHalf * T::kHalf + group * 32),
                   make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// The same, as they were stored, added to the sums of the layer's bias.
template <class T, int kHalf>
__device__ __forceinline__ void add_bias(const GradientPlace<T>& at, int layer, HopperWorkspace<T>& space,
                                         const HalfOperands& from) {
  const int lane = reread_thread() % kWarp;
  float* const buffer = turned_rows<T>(space);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t* const words = from[4 * pair + 2 * side + i / 2] + i % 2 * 2;
        const float2 first = unpack(words[0], typename T::Element{}), second = unpack(words[1], typename T::Element{});
        v[2 * i] = first.x + second.x;
        v[2 * i + 1] = first.y + second.y;
      }
      store_turned(buffer, lane / 4, side * 32 + lane % 4 * 8, v);
    }
    __syncwarp();
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int row = 0; row < 8; ++row) {
      const float2 one = *reinterpret_cast<const float2*>(buffer + row * kTurnPitch + 2 * lane);
      sum.x += one.x, sum.y += one.y;
    }
    add_columns(at.sums + layer * T::kWidth + kHalf * T::kHalf + pair * 64, sum);
    __syncwarp();
  }
}

// The first layer's masked gradients of a half: added to the latents, and times the geometry to its columns.
template <class T, int kHalf>
__device__ __forceinline__ void finish_first(const HopperTask& task, const BackwardArrays& backward,
                                             HopperWorkspace<T>& space, int tile, const ReluBits& bits,
                                             const HalfSums& sums) {
  const int thread = reread_thread(), consumer = thread / kWarpgroup - 1, lane = thread % kWarp;
  const GradientPlace<T> at(task, backward, 1, tile);
  if (!at.exists) return;
  float* const buffer = turned_rows<T>(space);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
    for (int group = 2 * pair; group < 2 * pair + 2; ++group) {
      const int channel = kHalf * T::kHalf + group * 32 + thread % 4 * 8;
      GroupRows v;
      get_group(sums, group, v);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane_row(thread) + half * 8;
        const bool exists = row_query<T>(tile + first_tile<T>(task), consumer, row) < task.total;
        float* to = nullptr;
        if (!backward.latent_map)
          to = backward.latent_rows +
               (static_cast<int64_t>(tile) * T::kRows + saved_row<T>(consumer, lane_row(thread)) + half * 8) *
                   T::kWidth +
               channel;
        else if (exists && channel < task.width)
          to = backward.latent_map + space.rows[consumer][row].offset + channel;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          v[half][i] = mask_channel(bits[kHalf * 2 + pair], group % 2 * 2 + half, i, v[half][i]);
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const float4 four = make_float4(v[half][i], v[half][i + 1], v[half][i + 2], v[half][i + 3]);
          if (!backward.latent_map)
            *reinterpret_cast<float4*>(to + i) = four;
          else if (to)
            reduce_add(to + i, four);
        }
        store_turned(buffer, lane / 4 + half * 8, group % 2 * 32 + lane % 4 * 8, v[half]);
      }
    }
    __syncwarp();
    float2 columns[5] = {};  // of the bias, rel_row, rel_col, and the cell's two
#pragma unroll 4
    for (int row = 0; row < 16; ++row) {
      const float2 one = *reinterpret_cast<const float2*>(buffer + row * kTurnPitch + 2 * lane);
      const CornerRow& seen = space.rows[consumer][thread % kWarpgroup / kWarp * 16 + row];
      const float2 cell = space.rel_cell[consumer][thread % kWarpgroup / kWarp * 16 + row];
      const float factors[5] = {1.0f, seen.rel_row, seen.rel_col, cell.x, cell.y};
#pragma unroll
      for (int term = 0; term < 5; ++term) {
        columns[term].x = fmaf(factors[term], one.x, columns[term].x);
        columns[term].y = fmaf(factors[term], one.y, columns[term].y);
      }
    }
    float* const to = at.sums + kHalf * T::kHalf + pair * 64;
    add_columns(to, columns[0]);
#pragma unroll
    for (int term = 1; term < 5; ++term)
      if (term < 3 || task.has_cell) add_columns(to + (task.hidden + term) * T::kWidth, columns[term]);
    __syncwarp();
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

// One consumer. With 128 channels there is no `right` and no `high`.
template <class T>
__device__ __forceinline__ void propagate(const HopperTask& task, const BackwardArrays& backward,
                                          HopperWorkspace<T>& space) {
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const uint32_t rank = threadIdx.x % kWarp;
  const bool gives = !keeps_weights<T>(task) && rank < cluster_size();
  const uint32_t empty = remote_address(space.empty, gives ? rank : 0);
  uint32_t parity = 0;  // of the stages, which with 128 channels have a bit each; bit 4 of `made`: in one register
  [[maybe_unused]] bool waits = true;
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); cluster_has(task, tile); tile += static_cast<int>(gridDim.x)) {
    HalfSums left, right;
    HalfOperands low, high;
    ReluBits bits;
    load_bits<T>(task, task.hidden, tile, bits);
    wait_barrier(&space.made[consumer], parity >> 4);
    const auto from_blend = [&](auto half) {
      return [&](int group, GroupRows& v) { through_blend<T, decltype(half)::value>(space, group, v); };
    };
    const auto from_sums = [](const HalfSums& sums) {
      return [&](int group, GroupRows& v) { get_group(sums, group, v); };
    };
    const auto place = [&](int layer) { return GradientPlace<T>(task, backward, layer, tile); };
    pack_gradients<T, 0>(place(task.hidden), bits, low, from_blend(Low{}));
    add_bias<T, 0>(place(task.hidden), task.hidden, space, low);
    if constexpr (T::kHalves == 2) {
      pack_gradients<T, 1>(place(task.hidden), bits, high, from_blend(High{}));
      add_bias<T, 1>(place(task.hidden), task.hidden, space, high);
    }
#pragma unroll 1
    for (int layer = task.hidden - 1;; --layer) {
      load_bits<T>(task, layer, tile, bits);  // early: under products there are no registers for the addresses
      if constexpr (T::kHalves == 2) {
        multiply_block<T, 0, false>(space, parity & 1, empty, false, low, left);
        multiply_block<T, 1, false>(space, parity & 1, empty, gives, low, right);
        multiply_block<T, 2, true>(space, parity & 1, empty, gives, high, left);
        multiply_block<T, 3, true>(space, parity & 1, empty, gives, high, right);
        parity ^= 1;
      } else {
        const int stage = (task.hidden - 1 - layer) % T::kStages;
        if (waits) wait_barrier(&space.full[stage], parity >> stage & 1);
        multiply_layer<T>(stage, low, left);
        if (gives) arrive_remote<0>(empty + stage * 8);
        parity ^= 1u << stage;
      }
      // Under the fourth group.
      if (layer > 0) pack_gradients<T, 0>(place(layer), bits, low, from_sums(left));
      wait_products<0>();
      if (T::kHalves == 2 && gives) arrive_remote<(T::kStages - 1) * 8>(empty);
      if (layer == 0) break;
      add_bias<T, 0>(place(layer), layer, space, low);
      if constexpr (T::kHalves == 2) {
        pack_gradients<T, 1>(place(layer), bits, high, from_sums(right));
        add_bias<T, 1>(place(layer), layer, space, high);
      }
    }
    finish_first<T, 0>(task, backward, space, tile, bits, left);
    if constexpr (T::kHalves == 2) finish_first<T, 1>(task, backward, space, tile, bits, right);
    waits = !keeps_weights<T>(task);
    arrive(&space.taken[consumer]);
    parity ^= 16;
  }
}

}  // namespace liif_fast
