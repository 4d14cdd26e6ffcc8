// The fused decode, forward: latents, hidden layers, blend and last layer, tile by tile.
#pragma once

#include "cuda/decode/layers.cuh"

namespace liif_fast {

// Saves a layer's activations and mask. `values` gives a lane's values, before or after ReLU.
template <class T, class Values>
__device__ __forceinline__ void save_layer(const DecodeTask& task, const SavedActivations& saved, int layer,
                                           int64_t tile, const FragmentCoords<T>& coords, const Values& values) {
  Mask<T> mask;
  const bool saves_rows = layer >= saved.first_layer && (layer < task.hidden || saved.last_layer);
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
          store_once(saved_row<T>(saved, layer, tile, coords.tile_row(m, half), coords.channel(group)), to_words<T>(v));
        }
      }
  mask.save(saved, layer, tile);
}

// The last layer's rows and its bias, which every tile reads, after the workspace in shared memory.
template <class T>
constexpr int forward_bytes(int outs) {
  return static_cast<int>(sizeof(Workspace<T>)) + (outs + 1) * T::kWidth * 4;
}

// The blend over corners, and its products with the last layer's rows: sums over this warp's channels into
// partial[warp column][slot of the team][out].
template <class T, bool kSaves, int kCorners>
__device__ __forceinline__ void blend_and_finish(const DecodeTask& task, const SavedActivations& saved, int64_t tile,
                                                 const Geometry<T>& geometry, const FragmentCoords<T>& coords,
                                                 const Accumulators<T>& acc, const float* last, float* partial) {
  constexpr int kSlots = T::kRowTiles / 2;  // of a lane at a time, which keeps them in registers
  const int warp_col = coords.first_group / T::kColGroups, slots = T::kTeamRows / kCorners;
#pragma unroll
  for (int first = 0; first < T::kRowTiles * 2 / kCorners; first += kSlots) {
    float blended[kSlots][T::kColGroups][T::kVector];
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        const int m = ((first + s) * kCorners + corner) / 2, half = ((first + s) * kCorners + corner) % 2;
        const float weight = geometry.weight[coords.tile_row(m, half)];
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group) {
          float v[T::kVector];
          get_values<T>(acc, m, group, half, v);
#pragma unroll
          for (int i = 0; i < T::kVector; ++i)
            blended[s][group][i] = corner == 0 ? weight * relu(v[i]) : fmaf(weight, relu(v[i]), blended[s][group][i]);
        }
      }
    if (kSaves || saved.blended) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s)
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group)
          store_once(saved_blended<T>(saved, tile, T::kRows / kCorners, lane_slot<kCorners>(coords, first + s),
                                      coords.channel(group)),
                     to_words<T>(blended[s][group]));
    }
    float next[T::kColGroups][T::kVector];  // loaded an output ahead; the outputs' bias follows the last one
    const auto load_next = [&](int o) {
#pragma unroll
      for (int group = 0; group < T::kColGroups; ++group)
        load_floats<true>(last + o * T::kWidth + coords.channel(group), next[group]);
    };
    load_next(0);
#pragma unroll 1
    for (int o = 0; o < task.outs; ++o) {
      float sums[kSlots] = {};
#pragma unroll
      for (int s = 0; s < kSlots; ++s)
#pragma unroll
        for (int group = 0; group < T::kColGroups; ++group)
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) sums[s] = fmaf(blended[s][group][i], next[group][i], sums[s]);
      load_next(o + 1);
#pragma unroll
      for (int lanes = 1; lanes <= 2; lanes *= 2)
#pragma unroll
        for (int s = 0; s < kSlots; ++s) sums[s] += __shfl_xor_sync(kAllLanes, sums[s], lanes);
      if (coords.quad == 0) {
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          const int slot = lane_slot<kCorners>(coords, first + s) - coords.team * slots;
          partial[(warp_col * slots + slot) * task.outs + o] = sums[s];
        }
      }
    }
  }
}

// Adds the warp columns' sums and the bias, and writes the result to out.
template <class T>
__device__ __forceinline__ void write_out(const DecodeTask& task, int64_t tile, const FragmentCoords<T>& coords,
                                          const float* last, const float* partial) {
  const int slots = T::kTeamRows / task.corners;
  for_each_output<T>(task, tile, coords, [&](int slot, int o, int64_t offset) {
    if (offset < 0) return;
    float sum = last[task.outs * T::kWidth + o];
    for (int warp_col = 0; warp_col < T::kWarpCols; ++warp_col)
      sum += partial[(warp_col * slots + slot - coords.team * slots) * task.outs + o];
    task.out[offset] = sum;
  });
}

// A lane's own activations in act: those that it has stored itself.
template <class T>
__device__ __forceinline__ void get_act(const unsigned char* act, const FragmentCoords<T>& coords, int m, int group,
                                        int half, float (&v)[T::kVector]) {
  uint4 words[2];
  load_act<T>(act, coords.first_row_tile + m, coords.first_group + group, coords.lane, words);
  from_words<T>(words[half], v);
}

// acc = a layer's bias.
template <class T>
__device__ __forceinline__ void begin_layer(const DecodeTask& task, int layer, const FragmentCoords<T>& coords,
                                            Accumulators<T>& acc) {
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
}

// act = relu(acc).
template <class T>
__device__ __forceinline__ void finish_layer(const FragmentCoords<T>& coords, const Accumulators<T>& acc,
                                             unsigned char* act) {
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

// acc = the last hidden layer before its ReLU. Every path writes acc: otherwise the compiler would keep the registers
// of the last tile's through the first layer, and spill.
template <class T, bool kSaves>
__device__ __forceinline__ void hidden_layers(const DecodeTask& task, const SavedActivations& saved, int64_t tile,
                                              const FragmentCoords<T>& coords, unsigned char* act,
                                              WeightStream<T>& stream, Accumulators<T>& acc) {
  if (task.hidden == 0) {
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int group = 0; group < T::kColGroups; ++group)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float v[T::kVector];
          get_act<T>(act, coords, m, group, half, v);
          set_values<T>(acc, m, group, half, v);
        }
    sync_team<T>(coords);  // act has been read
    return;
  }
  for (int layer = 1;; ++layer) {
    begin_layer<T>(task, layer, coords, acc);
    sync_team<T>(coords);  // act has been written
#pragma unroll 1
    for (int group = 0; group < T::kGroups; ++group) multiply<T>(act, stream, group, coords, acc);
    sync_team<T>(coords);  // act has been read
    if (kSaves)
      save_layer<T>(task, saved, layer, tile, coords,
                    [&](int m, int group, int half, float (&v)[T::kVector]) { get_values<T>(acc, m, group, half, v); });
    if (layer == task.hidden) return;
    finish_layer<T>(coords, acc, act);
  }
}

// Called at the end of every phase of a tile; tests/gpu/cycles.cu has one that reads the clock.
struct NoMarks {
  __device__ __forceinline__ void operator()() {}
};

template <class T, bool kSaves, class Marks = NoMarks>
__device__ __forceinline__ void forward_tiles(const DecodeTask& task, const SavedActivations& saved, Marks marks = {}) {
  LIIF_DYNAMIC_SHARED(shared);
  Workspace<T>& space = *reinterpret_cast<Workspace<T>*>(shared);
  const FragmentCoords<T> coords;
  // In the team's own activations, after its last product has read them.
  float* const partial = reinterpret_cast<float*>(space.act + coords.team * (T::kActBytes / T::kTeams));
  static_assert(T::kWarpCols * T::kRows * kMaxFusedOuts * 4 <= T::kActBytes, "partial fits into act");

  float* const last = reinterpret_cast<float*>(&space + 1);
  for (int i = static_cast<int>(threadIdx.x); i < (task.outs + 1) * T::kWidth; i += kThreads)
    last[i] = __ldg(last_vector<T>(task, 0) + i);  // read after the stream's first barrier

  WeightStream<T> stream(task.weights, task.hidden * T::kGroups, space.ring, space.barriers);
  int64_t tile = task.first_tile + blockIdx.x;
  locate_rows(task, tile, coords, space.geometry);
  sync_team<T>(coords);
  marks();
  for (; tile < task.first_tile + task.tiles; tile += gridDim.x) {
    first_layer(task, tile, space.geometry, coords, space.act);
    if (kSaves)
      save_layer<T>(task, saved, 0, tile, coords, [&](int m, int group, int half, float (&v)[T::kVector]) {
        get_act<T>(space.act, coords, m, group, half, v);
      });
    marks();
    Accumulators<T> acc;
    hidden_layers<T, kSaves>(task, saved, tile, coords, space.act, stream, acc);
    marks();
    if (task.corners == 4)
      blend_and_finish<T, kSaves, 4>(task, saved, tile, space.geometry, coords, acc, last, partial);
    else
      blend_and_finish<T, kSaves, 1>(task, saved, tile, space.geometry, coords, acc, last, partial);
    sync_team<T>(coords);  // partial has been written, geometry has been read
    marks();
    if (task.out) write_out<T>(task, tile, coords, last, partial);
    marks();
    locate_rows(task, tile + gridDim.x, coords, space.geometry);  // of the last query after the last tile
    sync_team<T>(coords);                                         // geometry has been written, partial has been read
    marks();
  }
  stream.finish();
}

template <class T, bool kSaves>
__global__ void __launch_bounds__(kThreads, min_blocks_per_sm<T>())
    decode_forward_kernel(const __grid_constant__ DecodeTask task, const __grid_constant__ SavedActivations saved) {
  if constexpr (is_launched<T>()) forward_tiles<T, kSaves>(task, saved);
}

template <MmaPolicy kPolicy>
const char* launch_forward(const DecodeTask& task, const DecodeVariant& variant, const SavedActivations& saved,
                           void* stream) {
  return with_tile<kPolicy>(variant, [&](auto tile) {
    using T = decltype(tile);
    constexpr bool kLarge = T::kWidth == 256 && T::kRows == large_rows(sizeof(typename T::Element));
    static_assert(forward_bytes<T>(kMaxFusedOuts) <= (kLarge ? kLargeSharedBytes : 99 << 10), "as launch.h promises");
    static_assert(min_blocks_per_sm<T>() * forward_bytes<T>(kMaxFusedOuts) <= kLargeSharedBytes, "blocks fit");
    const auto run = [&](auto saves) {
      constexpr auto kKernel = decode_forward_kernel<T, saves()>;
      if (const char* error = allow_shared<kKernel>(forward_bytes<T>(kMaxFusedOuts))) return error;
      const LaunchSize size{block_count(variant, task), forward_bytes<T>(task.outs)};
      return launch(kKernel, size, stream, task, saved);
    };
    return saved.masks ? run(std::true_type{}) : run(std::false_type{});
  });
}

}  // namespace liif_fast
