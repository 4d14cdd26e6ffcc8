// The fused decode's activations in shared memory, the first layer that makes them, the products between layers, and
// sums of columns.
#pragma once

#include "cuda/decode/tile.cuh"

namespace liif_fast {

// Waits for the warps that share rows: only these read each other's activations.
template <class T>
__device__ __forceinline__ void sync_team(const FragmentCoords<T>& coords) {
  sync_threads<T::kTeamThreads>(1 + coords.team);
}

// kCount values of a packed vector, from a shared or the global memory.
template <bool kShared = false, int kCount>
__device__ __forceinline__ void load_floats(const float* from, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4* const place = reinterpret_cast<const float4*>(from + i);
    const float4 four = kShared ? *place : __ldg(place);
    values[i] = four.x;
    values[i + 1] = four.y;
    values[i + 2] = four.z;
    values[i + 3] = four.w;
  }
}

// Converts a lane's values of a group to the four words that store them, and back.
template <class T>
__device__ __forceinline__ uint4 to_words(const float (&v)[T::kVector]) {
  using Element = typename T::Element;
  if constexpr (T::kVector == 8) {
    return make_uint4(pack(v[0], v[1], Element{}), pack(v[2], v[3], Element{}), pack(v[4], v[5], Element{}),
                      pack(v[6], v[7], Element{}));
  } else if constexpr (T::kTensorCores) {
    return make_uint4(round_to_tf32(v[0]), round_to_tf32(v[1]), round_to_tf32(v[2]), round_to_tf32(v[3]));
  } else {
    return make_uint4(float_bits(v[0]), float_bits(v[1]), float_bits(v[2]), float_bits(v[3]));
  }
}

template <class T>
__device__ __forceinline__ void from_words(uint4 words, float (&v)[T::kVector]) {
  using Element = typename T::Element;
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (T::kVector == 8) {
      const float2 two = unpack(word[i], Element{});
      v[2 * i] = two.x;
      v[2 * i + 1] = two.y;
    } else {
      v[i] = bits_float(word[i]);
    }
  }
}

// Units of 16 bytes of the activations in shared memory. Tensor cores: a unit is a lane's part of a fragment, [m16
// tile][k step][lane]. CUDA cores: a unit is four channels of a row, [m16 tile][four channels][row].
template <class T>
__device__ __forceinline__ int act_unit(int row_tile, int group, int step, int lane) {
  return (row_tile * T::kGroups * 2 + group * 2 + step) * kWarp + lane;
}
template <class T>
__device__ __forceinline__ int act_row_unit(int row_tile, int group, int quad, int row) {
  return ((row_tile * T::kGroups + group) * 4 + quad) * 16 + row;
}

// words[half]: a lane's group of the m16 tile's upper and lower rows.
template <class T>
__device__ __forceinline__ void store_act(unsigned char* act, int row_tile, int group, int lane,
                                          const uint4 (&words)[2]) {
  uint4* const units = reinterpret_cast<uint4*>(act);
  const uint4 upper = words[0], lower = words[1];
  if constexpr (T::kTensorCores) {
    units[act_unit<T>(row_tile, group, 0, lane)] = make_uint4(upper.x, lower.x, upper.y, lower.y);
    units[act_unit<T>(row_tile, group, 1, lane)] = make_uint4(upper.z, lower.z, upper.w, lower.w);
  } else {
    units[act_row_unit<T>(row_tile, group, lane & 3, lane >> 2)] = upper;
    units[act_row_unit<T>(row_tile, group, lane & 3, 8 + (lane >> 2))] = lower;
  }
}

template <class T>
__device__ __forceinline__ void load_act(const unsigned char* act, int row_tile, int group, int lane,
                                         uint4 (&words)[2]) {
  const uint4* const units = reinterpret_cast<const uint4*>(act);
  if constexpr (T::kTensorCores) {
    const uint4 first = units[act_unit<T>(row_tile, group, 0, lane)];
    const uint4 second = units[act_unit<T>(row_tile, group, 1, lane)];
    words[0] = make_uint4(first.x, first.z, second.x, second.z);
    words[1] = make_uint4(first.y, first.w, second.y, second.w);
  } else {
    words[0] = units[act_row_unit<T>(row_tile, group, lane & 3, lane >> 2)];
    words[1] = units[act_row_unit<T>(row_tile, group, lane & 3, 8 + (lane >> 2))];
  }
}

// A lane's channels of a latent, as they are stored: float4s, or 16 bits a channel.
template <class T, class Latent>
struct LatentWords {
  static constexpr int kWords = T::kVector * static_cast<int>(sizeof(Latent)) / 16;
  uint4 words[kWords];

  __device__ __forceinline__ void load(const DecodeTask& task, int64_t offset) {
    const uint4* const from = reinterpret_cast<const uint4*>(static_cast<const Latent*>(task.latent_map) + offset);
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_in_order(from + i);
  }
  __device__ __forceinline__ void get(float (&v)[T::kVector]) const {
    if constexpr (kWords * 4 == T::kVector) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        v[4 * i] = bits_float(words[i].x);
        v[4 * i + 1] = bits_float(words[i].y);
        v[4 * i + 2] = bits_float(words[i].z);
        v[4 * i + 3] = bits_float(words[i].w);
      }
    } else {
      from_words<T>(words[0], v);
    }
  }
};

// The first layer's vectors from a lane's channel on: bias with the grid's cell, geometry terms.
template <class T>
struct FirstVectors {
  float base[T::kVector], by_row[T::kVector], by_col[T::kVector], by_cell_row[T::kVector], by_cell_col[T::kVector];

  FirstVectors() = default;
  __device__ __forceinline__ FirstVectors(const DecodeTask& task, int channel) {
    load_floats(bias_vector<T>(task, 0) + channel, base);
    load_floats(geometry_vector<T>(task, 0) + channel, by_row);
    load_floats(geometry_vector<T>(task, 1) + channel, by_col);
    if (!task.has_cell) return;
    load_floats(geometry_vector<T>(task, 2) + channel, by_cell_row);
    load_floats(geometry_vector<T>(task, 3) + channel, by_cell_col);
    if (task.cell) return;
#pragma unroll
    for (int i = 0; i < T::kVector; ++i)
      base[i] = fmaf(task.rel_cell[1], by_cell_col[i], fmaf(task.rel_cell[0], by_cell_row[i], base[i]));
  }
  // v = relu(v + geometry terms of a row). rel_cell: its two numbers, read with cells of every query.
  __device__ __forceinline__ void finish(const DecodeTask& task, const CornerRow& seen, const float* rel_cell,
                                         float (&v)[T::kVector]) const {
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) v[i] += fmaf(seen.rel_col, by_col[i], fmaf(seen.rel_row, by_row[i], base[i]));
    if (task.cell) {
      const float cell_row = rel_cell[0], cell_col = rel_cell[1];
#pragma unroll
      for (int i = 0; i < T::kVector; ++i) v[i] += fmaf(cell_col, by_cell_col[i], cell_row * by_cell_row[i]);
    }
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) v[i] = relu(v[i]);
  }
};

// The term of a row's query from a lane's channel on; rows after the last query have the last one's.
template <class T>
__device__ __forceinline__ void load_term(const DecodeTask& task, int64_t tile, int row, int channel,
                                          float (&term)[T::kVector]) {
  const int64_t query = find_query<T>(task, tile, query_slot(row, task.corners));
  load_floats(task.query_term + (query < 0 ? task.total - 1 : query) * task.width + channel, term);
}

// The first layer (latents, geometry and query terms, ReLU) of this warp's rows and channels, stored in act.
template <class T, class Latent>
__device__ __forceinline__ void first_layer_of(const DecodeTask& task, int64_t tile, const Geometry<T>& geometry,
                                               const FragmentCoords<T>& coords, unsigned char* act) {
#pragma unroll 1
  for (int group = 0; group < T::kColGroups; ++group) {
    const int channel = coords.channel(group);
    const bool has_latent = channel < task.width;
    LatentWords<T, Latent> latents[T::kRowTiles][2];  // all loads are issued before the first use
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        latents[m][half].load(task, geometry.rows[coords.tile_row(m, half)].offset + (has_latent ? channel : 0));
    const int thread = read_thread(), first_row = thread / T::kTeamThreads * T::kTeamRows + thread % kWarp / 4;
    const FirstVectors<T> vectors(task, channel);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < T::kRowTiles; ++m) {
      uint4 words[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[T::kVector];
        latents[m][half].get(v);
#pragma unroll
        for (int i = 0; i < T::kVector; ++i) v[i] = has_latent ? v[i] : 0.0f;
        if (task.query_term && has_latent) {
          float term[T::kVector];
          load_term<T>(task, tile, first_row + m * 16 + half * 8, channel, term);
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) v[i] += term[i];
        }
        const int row = coords.tile_row(m, half);
        vectors.finish(task, geometry.rows[row], geometry.rel_cell[row], v);
        words[half] = to_words<T>(v);
      }
      store_act<T>(act, coords.first_row_tile + m, coords.first_group + group, coords.lane, words);
    }
  }
}
template <class T>
__device__ __forceinline__ void first_layer(const DecodeTask& task, int64_t tile, const Geometry<T>& geometry,
                                            const FragmentCoords<T>& coords, unsigned char* act) {
  if (T::kVector == 4 || task.latent_is_float)
    first_layer_of<T, float>(task, tile, geometry, coords, act);
  else
    first_layer_of<T, typename T::Element>(task, tile, geometry, coords, act);
}

template <class T>
using Accumulators = float[T::kRowTiles][T::kColTiles][4];

// acc += a group of act times its chunk of weights, the stream's current one.
template <class T>
__device__ __forceinline__ void multiply(const unsigned char* act, WeightStream<T>& stream, int group,
                                         const FragmentCoords<T>& coords, Accumulators<T>& acc) {
  const uint4* const rows = reinterpret_cast<const uint4*>(act);
  const uint4* const weights = reinterpret_cast<const uint4*>(stream.wait());
  if constexpr (T::kTensorCores) {
    uint2 first[T::kColTiles], second[T::kColTiles];
#pragma unroll
    for (int n = 0; n < T::kColTiles; ++n) {
      const uint4 both = weights[(coords.first_group * T::kTiles + n) * kWarp + coords.lane];
      first[n] = make_uint2(both.x, both.y);
      second[n] = make_uint2(both.z, both.w);
    }
    uint4 a[T::kRowTiles];
    const auto load_rows = [&](int step) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
        a[m] = rows[act_unit<T>(coords.first_row_tile + m, group, step, coords.lane)];
    };
    load_rows(0);
    mma_step(acc, a, first, typename T::Element{});
    stream.refill();  // under the products
    stream.release();
    load_rows(1);
    mma_step(acc, a, second, typename T::Element{});
  } else {
    stream.refill();
#pragma unroll 1
    for (int four = 0; four < 4; ++four) {
      uint4 a[T::kRowTiles][2];
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          a[m][half] = rows[act_row_unit<T>(coords.first_row_tile + m, group, four, half * 8 + coords.row)];
#pragma unroll
      for (int n = 0; n < T::kColTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = ((four * T::kGroups + coords.first_group) * T::kTiles + n) * 2 + e;
          const uint4 b = weights[at * 4 + coords.quad];
#pragma unroll
          for (int m = 0; m < T::kRowTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& sum = acc[m][n][half * 2 + e];
              sum = fmaf(bits_float(a[m][half].x), bits_float(b.x), sum);
              sum = fmaf(bits_float(a[m][half].y), bits_float(b.y), sum);
              sum = fmaf(bits_float(a[m][half].z), bits_float(b.z), sum);
              sum = fmaf(bits_float(a[m][half].w), bits_float(b.w), sum);
            }
        }
      }
    }
    stream.release();
  }
}

// Reads and writes a lane's channels of a column group in the accumulators.
template <class T>
__device__ __forceinline__ void get_values(const Accumulators<T>& acc, int m, int group, int half,
                                           float (&v)[T::kVector]) {
#pragma unroll
  for (int i = 0; i < T::kVector; ++i) v[i] = acc[m][group * T::kTiles + i / 2][half * 2 + i % 2];
}
template <class T>
__device__ __forceinline__ void set_values(Accumulators<T>& acc, int m, int group, int half,
                                           const float (&v)[T::kVector]) {
#pragma unroll
  for (int i = 0; i < T::kVector; ++i) acc[m][group * T::kTiles + i / 2][half * 2 + i % 2] = v[i];
}

// Adds a lane's column values to the block's partial sums number `index`. A butterfly over the eight rows of a fragment
// leaves one channel to each lane (or the same one to two lanes), which the thread adds to memory that no other writes.
template <class T>
__device__ __forceinline__ void add_column_sums(const DecodeTask& task, const BackwardArrays& backward, int index,
                                                const FragmentCoords<T>& coords,
                                                float (&column)[T::kColGroups][T::kVector]) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * T::kWarpRows + coords.team;
  float* const sums = backward.sums + (block * sum_count(task.hidden, task.outs) + index) * T::kWidth;
#pragma unroll
  for (int group = 0; group < T::kColGroups; ++group) {
    float (&v)[T::kVector] = column[group];
    int channel = 0;
#pragma unroll
    for (int count = T::kVector / 2, lanes = 16; lanes >= 4; count /= 2, lanes /= 2) {
      const bool upper = coords.lane & lanes;
      if (count == 0) {  // four channels for eight rows: the last step only adds
        v[0] += __shfl_xor_sync(kAllLanes, v[0], lanes);
      } else {
#pragma unroll
        for (int i = 0; i < count; ++i) {
          const float other = __shfl_xor_sync(kAllLanes, upper ? v[i] : v[i + count], lanes);
          v[i] = (upper ? v[i + count] : v[i]) + other;
        }
        channel += upper ? count : 0;
      }
    }
    if (T::kVector == 8 || !(coords.lane & 4)) sums[coords.channel(group) + channel] += v[0];
  }
}

// Sums a value over the four lanes that share a row.
__device__ __forceinline__ float sum_over_quad(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

}  // namespace liif_fast
