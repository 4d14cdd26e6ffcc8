// The fused decode, forward: latents, hidden layers, blend and last layer, tile by tile.
#pragma once

#include "cuda/decode/layers.cuh"

namespace liif_fast {

// Saves a layer's activations and mask. `values` gives a lane's values, before or after ReLU.
template <class T, class Values>
__device__ __forceinline__ void save_layer(const DecodeTask& task, const SavedActivations& saved, int layer,
                                           int64_t tile, const FragmentCoords<T>& coords, const Values& values) {
  Mask<T> mask;
  const bool saves_rows = layer < task.hidden || saved.last_layer;
#pragma unroll
  for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
    for (int group = 0; group < T::kColGroups; ++group)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[T::kVector];
        values(m, group, half, v);
        mask.set(m, group, half, v);
        if (saves_rows) {
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) v[i] = relu(v[i]);
          *saved_row<T>(saved, layer, tile, coords.tile_row(m, half), coords.channel(group)) = to_words<T>(v);
        }
      }
  mask.save(saved, layer, tile);
}

// The blend over corners, and its products with the last layer's rows: sums over this warp's channels into
// partial[warp column][slot][out].
template <class T>
__device__ __forceinline__ void blend_and_finish(const DecodeTask& task, const SavedActivations& saved, int64_t tile,
                                                 const Geometry<T>& geometry, const FragmentCoords<T>& coords,
                                                 const Accumulators<T>& acc, float* partial) {
  const int corners = task.corners, slots = T::kRows / corners;
  const int warp_col = coords.first_group / T::kColGroups;
#pragma unroll
  for (int pair = 0; pair < T::kRowTiles / 2; ++pair) {
#pragma unroll
    for (int sub = 0; sub < 4; ++sub) {  // without ensemble each row is a query of its own
      if (corners == 4 && sub > 0) break;
      const int first = coords.tile_row(2 * pair + sub / 2, sub % 2), slot = query_slot(first, corners);
      float blended[T::kColGroups][T::kVector];
#pragma unroll
      for (int group = 0; group < T::kColGroups; ++group) {
        float v[T::kVector];
        get_values<T>(acc, 2 * pair + sub / 2, group, sub % 2, v);
        const float weight = geometry.weight[first];
#pragma unroll
        for (int i = 0; i < T::kVector; ++i) blended[group][i] = weight * relu(v[i]);
        if (corners == 4) {
#pragma unroll
          for (int corner = 1; corner < 4; ++corner) {
            const float other = geometry.weight[coords.tile_row(2 * pair + corner / 2, corner % 2)];
            get_values<T>(acc, 2 * pair + corner / 2, group, corner % 2, v);
#pragma unroll
            for (int i = 0; i < T::kVector; ++i) blended[group][i] = fmaf(other, relu(v[i]), blended[group][i]);
          }
        }
        if (saved.masks)
          *saved_blended<T>(saved, tile, slots, slot, coords.channel(group)) = to_words<T>(blended[group]);
      }
      for (int o = 0; o < task.outs; ++o) {
        float sum = 0.0f;
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group) {
          float last[T::kVector];
          load_floats(last_vector<T>(task, o) + coords.channel(group), last);
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) sum = fmaf(blended[group][i], last[i], sum);
        }
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (coords.quad == 0) partial[(warp_col * slots + slot) * task.outs + o] = sum;
      }
    }
  }
}

// Adds the warp columns' sums and the bias, and writes the result to out.
template <class T>
__device__ __forceinline__ void write_out(const DecodeTask& task, int64_t tile, const float* partial) {
  const int slots = T::kRows / task.corners;
  for_each_output<T>(task, tile, [&](int slot, int o, int64_t offset) {
    if (offset < 0) return;
    float sum = __ldg(last_vector<T>(task, task.outs) + o);
    for (int warp_col = 0; warp_col < T::kWarpCols; ++warp_col)
      sum += partial[(warp_col * slots + slot) * task.outs + o];
    task.out[offset] = sum;
  });
}

template <class T>
__device__ __forceinline__ void forward_tiles(const DecodeTask& task, const SavedActivations& saved) {
  LIIF_DYNAMIC_SHARED(shared);
  unsigned char* const act = shared;
  unsigned char* const ring = act + T::kActBytes;
  Geometry<T>& geometry = *reinterpret_cast<Geometry<T>*>(ring + T::kStages * T::kChunkBytes);
  float* const partial = reinterpret_cast<float*>(act);  // after the last product has read its activations
  static_assert(T::kWarpCols * T::kRows * kMaxFusedOuts * 4 <= T::kActBytes, "partial fits into act");

  const FragmentCoords<T> coords;
  const int64_t mine = block_tile_count(task.tiles);
  WeightStream<T> stream(task.weights, task.hidden * T::kGroups, mine, ring);
  for (int64_t i = 0; i < mine; ++i) {
    const int64_t tile = task.first_tile + blockIdx.x + i * gridDim.x;
    locate_rows(task, tile, geometry);
    __syncthreads();
    first_layer(task, geometry, act);
    __syncthreads();
    const auto from_act = [&](int m, int group, int half, float (&v)[T::kVector]) {
      uint4 words[2];
      load_act<T>(act, coords.first_row_tile + m, coords.first_group + group, coords.lane, words);
      from_words<T>(words[half], v);
    };
    if (saved.masks) save_layer<T>(task, saved, 0, tile, coords, from_act);

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
        load_floats(bias_vector<T>(task, layer) + coords.channel(group), bias);
#pragma unroll
        for (int m = 0; m < T::kRowTiles; ++m) {
          set_values<T>(acc, m, group, 0, bias);
          set_values<T>(acc, m, group, 1, bias);
        }
      }
#pragma unroll 1
      for (int group = 0; group < T::kGroups; ++group) multiply<T>(act, stream.next(), group, coords, acc);
      __syncthreads();  // act has been read
      if (saved.masks)
        save_layer<T>(task, saved, layer, tile, coords, [&](int m, int group, int half, float (&v)[T::kVector]) {
          get_values<T>(acc, m, group, half, v);
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
            get_values<T>(acc, m, group, half, v);
#pragma unroll
            for (int i = 0; i < T::kVector; ++i) v[i] = relu(v[i]);
            words[half] = to_words<T>(v);
          }
          store_act<T>(act, coords.first_row_tile + m, coords.first_group + group, coords.lane, words);
        }
    }
    if (task.hidden == 0) __syncthreads();  // act has been read
    blend_and_finish<T>(task, saved, tile, geometry, coords, acc, partial);
    __syncthreads();
    if (task.out) write_out<T>(task, tile, partial);
    __syncthreads();  // geometry and act are free for the next tile
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, min_blocks_per_sm<T>())
    decode_forward_kernel(const __grid_constant__ DecodeTask task, const __grid_constant__ SavedActivations saved) {
  if constexpr (is_launched<T>()) forward_tiles<T>(task, saved);
}

template <MmaPolicy kPolicy>
const char* launch_forward(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                           void* stream) {
  return with_tile<kPolicy>(variant, [&](auto tile) {
    using T = decltype(tile);
    return launch_with_shared(decode_forward_kernel<T>, block_count(variant, task), shared_bytes<T>(), stream, task,
                              saved);
  });
}

}  // namespace liif_fast
