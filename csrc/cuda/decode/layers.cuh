// The fused decode's activations in shared memory, the first layer that makes them, and the products between layers.
#pragma once

#include "cuda/decode/tile.cuh"

namespace liif_fast {

// kCount values of a packed vector.
template <int kCount>
__device__ __forceinline__ void load_floats(const float* from, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
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

// The first layer (latents, geometry terms, ReLU), stored in act.
template <class T>
__device__ __forceinline__ void first_layer(const DecodeTask& task, const Geometry<T>& geometry, unsigned char* act) {
  constexpr int kSpan = T::kGroups < kWarps ? T::kGroups : kWarps;  // groups computed at a time
  const FragmentCoords<T> coords;
  for (int group = coords.warp % kSpan; group < T::kGroups; group += kSpan) {
    const int channel = group * T::kGroup + coords.quad * T::kVector;
    const bool has_latent = channel < task.width;
    float base[T::kVector], by_row[T::kVector], by_col[T::kVector], by_cell_row[T::kVector], by_cell_col[T::kVector];
    load_floats(bias_vector<T>(task, 0) + channel, base);
    load_floats(geometry_vector<T>(task, 0) + channel, by_row);
    load_floats(geometry_vector<T>(task, 1) + channel, by_col);
    load_floats(geometry_vector<T>(task, 2) + channel, by_cell_row);  // zeros without cells
    load_floats(geometry_vector<T>(task, 3) + channel, by_cell_col);
    if (!task.cell) {
#pragma unroll
      for (int i = 0; i < T::kVector; ++i)
        base[i] = fmaf(task.rel_cell[1], by_cell_col[i], fmaf(task.rel_cell[0], by_cell_row[i], base[i]));
    }
#pragma unroll(T::kWidth == 64 ? 1 : 2)
    for (int m = coords.warp / kSpan; m < T::kRows / 16; m += kWarps / kSpan) {
      float values[2][T::kVector];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t offset = geometry.rows[m * 16 + half * 8 + coords.row].offset + channel;
        if (!has_latent) {
#pragma unroll
          for (int i = 0; i < T::kVector; ++i) values[half][i] = 0.0f;
        } else if (T::kVector == 4 || task.latent_is_float) {
          load_floats(static_cast<const float*>(task.latent_map) + offset, values[half]);
        } else {
          const auto* from = static_cast<const typename T::Element*>(task.latent_map) + offset;
          from_words<T>(__ldg(reinterpret_cast<const uint4*>(from)), values[half]);
        }
      }
      uint4 words[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = m * 16 + half * 8 + coords.row;
        const CornerRow row = geometry.rows[r];
#pragma unroll
        for (int i = 0; i < T::kVector; ++i)
          values[half][i] += fmaf(row.rel_col, by_col[i], fmaf(row.rel_row, by_row[i], base[i]));
        if (task.cell) {
          const float cell_row = geometry.rel_cell[r][0], cell_col = geometry.rel_cell[r][1];
#pragma unroll
          for (int i = 0; i < T::kVector; ++i)
            values[half][i] += fmaf(cell_col, by_cell_col[i], cell_row * by_cell_row[i]);
        }
#pragma unroll
        for (int i = 0; i < T::kVector; ++i) values[half][i] = relu(values[half][i]);
        words[half] = to_words<T>(values[half]);
      }
      store_act<T>(act, m, group, coords.lane, words);
    }
  }
}

// Streams packed weights through a ring of chunks in shared memory. All threads of the block call it together.
template <class T>
class WeightStream {
 public:
  // steps: chunks of one tile; each of the `tiles` tiles reads them all.
  __device__ __forceinline__ WeightStream(const unsigned char* weights, int steps, int64_t tiles, unsigned char* ring)
      : weights_(weights), ring_(ring), steps_(steps), left_(steps * tiles) {
#pragma unroll
    for (int i = 0; i < T::kStages - 1; ++i) issue();
  }

  // The next chunk. Invalidates the pointer that the previous call returned. Acts as a block barrier for shared memory.
  __device__ __forceinline__ const unsigned char* next() {
    wait_copies<T::kStages - 2>();
    __syncthreads();
    issue();
    const unsigned char* const chunk = ring_ + use_ * T::kChunkBytes;
    use_ = use_ + 1 == T::kStages ? 0 : use_ + 1;
    return chunk;
  }

 private:
  __device__ __forceinline__ void issue() {
    if (left_ > 0) {
      const unsigned char* const from = weights_ + static_cast<int64_t>(step_) * T::kChunkBytes;
      unsigned char* const to = ring_ + fill_ * T::kChunkBytes;
#pragma unroll
      for (int i = 0; i < T::kChunkBytes / (16 * kThreads); ++i) {
        const int at = (i * kThreads + static_cast<int>(threadIdx.x)) * 16;
        copy_async(to + at, from + at);
      }
      step_ = step_ + 1 == steps_ ? 0 : step_ + 1;
      fill_ = fill_ + 1 == T::kStages ? 0 : fill_ + 1;
      --left_;
    }
    commit_copies();  // empty groups too, because wait_copies counts them
  }

  const unsigned char* weights_;
  unsigned char* ring_;
  int steps_, step_ = 0, fill_ = 0, use_ = 0;
  int64_t left_;
};

template <class T>
using Accumulators = float[T::kRowTiles][T::kColTiles][4];

// acc += a group of act times its chunk of weights.
template <class T>
__device__ __forceinline__ void multiply(const unsigned char* act, const unsigned char* chunk, int group,
                                         const FragmentCoords<T>& coords, Accumulators<T>& acc) {
  const uint4* const rows = reinterpret_cast<const uint4*>(act);
  const uint4* const weights = reinterpret_cast<const uint4*>(chunk);
  if constexpr (T::kTensorCores) {
    uint2 first[T::kColTiles], second[T::kColTiles];
#pragma unroll
    for (int n = 0; n < T::kColTiles; ++n) {
      const uint4 both = weights[(coords.first_group * T::kTiles + n) * kWarp + coords.lane];
      first[n] = make_uint2(both.x, both.y);
      second[n] = make_uint2(both.z, both.w);
    }
    uint4 a[T::kRowTiles];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
        a[m] = rows[act_unit<T>(coords.first_row_tile + m, group, step, coords.lane)];
      if (step == 0)
        mma_step(acc, a, first, typename T::Element{});
      else
        mma_step(acc, a, second, typename T::Element{});
    }
  } else {
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

}  // namespace liif_fast
