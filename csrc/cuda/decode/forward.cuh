// The fused decode, forward: latents, hidden layers, blend and last layer of one tile after the other.
#pragma once

#include "cuda/decode/layers.cuh"
#include "cuda/decode/saved.cuh"

namespace liif_fast {

// Keeps a layer's activations and mask; `values` hands out a lane's values before or after ReLU.
template <class T, class Values>
__device__ __forceinline__ void save_layer(const QueryTask& task, const Saved& saved, int layer, int64_t tile,
                                           const Place<T>& place, const Values& values) {
  Mask<T> mask;
  const bool keeps_rows = layer < task.hidden || saved.last_layer;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
    for (int group = 0; group < T::kColGroups; ++group)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[T::kVector];
        values(m, group, half, v);
        mask.set(m, group, half, v);
        if (keeps_rows) {
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) v[i] = relu(v[i]);
          *saved_row<T>(saved, layer, tile, place.row_of(m, half), place.channel_of(group)) = to_words<T>(v);
        }
      }
  mask.save(saved, layer, tile);
}

// The blend over corners and the last layer's products with it: sums over this warp's channels into
// partial[warp column][slot][out].
template <class T>
__device__ __forceinline__ void blend_and_finish(const QueryTask& task, const Saved& saved, int64_t tile,
                                                 const Geometry<T>& geometry, const Place<T>& place,
                                                 const Accumulators<T>& acc, float* partial) {
  const int corners = task.corners, slots = T::kRows / corners;
  const int warp_col = place.first_group / T::kColGroups;
#pragma unroll
  for (int pair = 0; pair < T::kRowTiles / 2; ++pair) {
#pragma unroll
    for (int sub = 0; sub < 4; ++sub) {  // without ensemble each row is a query of its own
      if (corners == 4 && sub > 0) break;
      const int first = place.row_of(2 * pair + sub / 2, sub % 2), slot = slot_of(first, corners);
      float blended[T::kColGroups][T::kVector];
#pragma unroll
      for (int group = 0; group < T::kColGroups; ++group) {
        float v[T::kVector];
        values_of<T>(acc, 2 * pair + sub / 2, group, sub % 2, v);
        const float weight = geometry.weight[first];
#pragma unroll
        for (int i = 0; i < T::kVector; ++i) blended[group][i] = weight * relu(v[i]);
        if (corners == 4) {
#pragma unroll
          for (int corner = 1; corner < 4; ++corner) {
            const float other = geometry.weight[place.row_of(2 * pair + corner / 2, corner % 2)];
            values_of<T>(acc, 2 * pair + corner / 2, group, corner % 2, v);
#pragma unroll
            for (int i = 0; i < T::kVector; ++i) blended[group][i] = fmaf(other, relu(v[i]), blended[group][i]);
          }
        }
        if (saved.masks)
          *saved_blended<T>(saved, tile, slots, slot, place.channel_of(group)) = to_words<T>(blended[group]);
      }
      for (int o = 0; o < task.outs; ++o) {
        float sum = 0.0f;
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group) {
          float last[T::kVector];
          load_floats(last_line<T>(task, o) + place.channel_of(group), last);
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) sum = fmaf(blended[group][i], last[i], sum);
        }
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (place.quad == 0) partial[(warp_col * slots + slot) * task.outs + o] = sum;
      }
    }
  }
}

// Sums of the warps' parts, bias, and out.
template <class T>
__device__ __forceinline__ void write_out(const QueryTask& task, int64_t tile, const float* partial) {
  const int slots = T::kRows / task.corners, count = slots * task.outs;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    // Neighbouring threads write neighbouring values: channels of a query, or queries of a channel.
    const int slot = task.out_channel == 1 ? i / task.outs : i % slots;
    const int o = task.out_channel == 1 ? i % task.outs : i / slots;
    const int64_t query = query_of<T>(task, tile, slot);
    if (query < 0) continue;
    float sum = __ldg(last_line<T>(task, task.outs) + o);
    for (int warp_col = 0; warp_col < T::kWarpCols; ++warp_col)
      sum += partial[(warp_col * slots + slot) * task.outs + o];
    const int64_t batch = query / task.queries, at = query - batch * task.queries;
    task.out[batch * task.out_batch + at * task.out_query + o * task.out_channel] = sum;
  }
}

template <class T>
__device__ __forceinline__ void forward_tiles(const QueryTask& task, const Saved& saved) {
  LIIF_DYNAMIC_SHARED(shared);
  unsigned char* const act = shared;
  unsigned char* const ring = act + T::kActBytes;
  Geometry<T>& geometry = *reinterpret_cast<Geometry<T>*>(ring + T::kStages * T::kChunkBytes);
  float* const partial = reinterpret_cast<float*>(act);  // once the last product has read its activations
  static_assert(T::kWarpCols * T::kRows * kMaxFusedOuts * 4 <= T::kActBytes, "partial fits into act");

  const Place<T> place;
  const int64_t mine = tiles_of_block(task.tiles);
  WeightStream<T> stream(task.weights, task.hidden * T::kGroups, mine, ring);
  for (int64_t i = 0; i < mine; ++i) {
    const int64_t tile = task.first_tile + blockIdx.x + i * gridDim.x;
    find_rows(task, tile, geometry);
    __syncthreads();
    first_layer(task, geometry, act);
    __syncthreads();
    const auto from_act = [&](int m, int group, int half, float (&v)[T::kVector]) {
      uint4 words[2];
      load_act<T>(act, place.first_row_tile + m, place.first_group + group, place.lane, words);
      from_words<T>(words[half], v);
    };
    if (saved.masks) save_layer<T>(task, saved, 0, tile, place, from_act);

    Accumulators<T> acc;
    if (task.hidden == 0) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float v[T::kVector];
            from_act(m, group, half, v);
            set_values<T>(acc, m, group, half, v);
          }
    }
    for (int layer = 1; layer <= task.hidden; ++layer) {
#pragma unroll
      for (int group = 0; group < T::kColGroups; ++group) {
        float bias[T::kVector];
        load_floats(bias_line<T>(task, layer) + place.channel_of(group), bias);
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
          set_values<T>(acc, m, group, 0, bias);
          set_values<T>(acc, m, group, 1, bias);
        }
      }
#pragma unroll 1
      for (int group = 0; group < T::kGroups; ++group) multiply<T>(act, stream.next(), group, place, acc);
      __syncthreads();  // act has been read
      if (saved.masks)
        save_layer<T>(task, saved, layer, tile, place, [&](int m, int group, int half, float (&v)[T::kVector]) {
          values_of<T>(acc, m, group, half, v);
        });
      if (layer == task.hidden) break;
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group) {
          uint4 words[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float v[T::kVector];
            values_of<T>(acc, m, group, half, v);
#pragma unroll
            for (int i = 0; i < T::kVector; ++i) v[i] = relu(v[i]);
            words[half] = to_words<T>(v);
          }
          store_act<T>(act, place.first_row_tile + m, place.first_group + group, place.lane, words);
        }
    }
    if (task.hidden == 0) __syncthreads();  // act has been read
    blend_and_finish<T>(task, saved, tile, geometry, place, acc, partial);
    __syncthreads();
    if (task.out) write_out<T>(task, tile, partial);
    __syncthreads();  // geometry and act are free for the next tile
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, blocks_an_sm<T>())
    query_forward_kernel(const __grid_constant__ QueryTask task, const __grid_constant__ Saved saved) {
  if constexpr (is_launched<T>()) forward_tiles<T>(task, saved);
}

}  // namespace liif_fast
