// What the fused decode's forward and backward share: a block's tile of rows and channels, where its values lie, and
// the steps that both take.
//
// A row is one corner of one query; a tile is kRows of them (with local ensemble a quarter as many queries) by kWidth
// channels, the widest layer's, narrower ones padded with zeros. It stays on the chip from the latents to the blend:
// accumulators in registers, activations in shared memory, weights streaming past in chunks that all blocks share in
// L2.
//
// A matrix instruction wants its operands as fragments, spread over a warp's lanes. Everything here is stored in that
// order, 16 bytes a lane, so that no access conflicts and nothing is ever shuffled: the order of a layer's channels is
// free as long as the weights follow it, and it is chosen such that what a lane holds of a group of channels after one
// product (accumulators), before the next (operands), in the latent map and in saved activations are the same 16 bytes
// of consecutive channels. Rows are ordered so that one lane holds all four corners of a query: the ensemble is a sum
// in registers.
#pragma once

#include "../geometry.h"
#include "common.cuh"
#include "ptx.cuh"
#include "query_variant.h"

namespace liif_fast {

// How products are made: operands of Element on tensor cores (float: rounded to TF32) or in true float on CUDA cores.
template <class Element_, bool kTensorCores_>
struct Products {
  using Element = Element_;
  static constexpr bool kTensorCores = kTensorCores_;
  static_assert(kTensorCores || std::is_same_v<Element, float>, "CUDA cores multiply floats");
};

using HalfProducts = Products<__half, true>;
using BFloat16Products = Products<__nv_bfloat16, true>;
using Tf32Products = Products<float, true>;
using FloatProducts = Products<float, false>;

template <class Products_, int kWidth_, int kRows_>
struct Tile {
  using Product = Products_;
  using Element = typename Product::Element;
  static constexpr int kWidth = kWidth_, kRows = kRows_;
  static constexpr int kVector = 16 / sizeof(Element);  // channels of a group that one lane holds
  static constexpr int kGroup = 4 * kVector;            // channels that a chunk of weights takes in
  static constexpr int kTiles = kVector / 2;            // n8 tiles of a group
  static constexpr int kGroups = kWidth / kGroup;
  static constexpr int kWarpCols = kRows == 32 ? 8 : (kGroups < 4 ? 2 : 4);
  static constexpr int kWarpRows = kWarps / kWarpCols;
  static constexpr int kRowTiles = kRows / kWarpRows / 16;  // m16 tiles of a warp
  static constexpr int kColGroups = kGroups / kWarpCols;    // groups of a warp
  static constexpr int kColTiles = kColGroups * kTiles;     // n8 tiles of a warp
  static constexpr int kActBytes = kRows * kWidth * static_cast<int>(sizeof(Element));
  static constexpr int kChunkBytes = kWidth * 64;  // weights from one group to every channel
  static constexpr int kStages = kRows == 128 ? 4 : 3;
  static constexpr int kMaskBits = kRowTiles * kColGroups * 2 * kVector;  // of a thread
  static constexpr int kMaskWords = (kMaskBits + 31) / 32;
  static constexpr bool kTensorCores = Product::kTensorCores;
  static_assert(kRowTiles % 2 == 0 && kColGroups > 0 && kRowTiles * 16 * kWarpRows == kRows, "a lane has all corners");
};

// Blocks that an SM is to hold at a time: the compiler's bound on registers.
template <class T>
constexpr int blocks_an_sm() {
  return T::kWidth == 64 ? 2 : 1;
}

// Whether the architecture under compilation ever launches a tile: what it does not, it need not hold.
template <class T>
__host__ __device__ constexpr bool is_launched() {
#ifdef __CUDA_ARCH__
  if (T::kWidth == 256 && __CUDA_ARCH__ != 800)
    return has_small_tiles_only(__CUDA_ARCH__) == (T::kRows == small_rows(sizeof(typename T::Element)));
#endif
  return true;
}

// Tiles of this block: every gridDim.x-th one.
__device__ __forceinline__ int64_t tiles_of_block(int64_t tiles) {
  return blockIdx.x < tiles ? (tiles - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
}

// Where a thread's accumulators lie in its block's tile.
template <class T>
struct Place {
  int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  int row = lane >> 2, quad = lane & 3;  // of a fragment
  int first_row_tile = warp / T::kWarpCols * T::kRowTiles, first_group = warp % T::kWarpCols * T::kColGroups;

  // Row in the tile of m16 tile m's upper or lower half.
  __device__ __forceinline__ int row_of(int m, int half) const { return (first_row_tile + m) * 16 + half * 8 + row; }
  // First of this lane's channels in its column group.
  __device__ __forceinline__ int channel_of(int group) const {
    return (first_group + group) * T::kGroup + quad * T::kVector;
  }
};

// A row's corner and its query's place among the tile's queries.
__device__ __forceinline__ int corner_of(int row, int corners) {
  return corners == 4 ? (row >> 4 & 1) * 2 + (row >> 3 & 1) : 0;
}
__device__ __forceinline__ int slot_of(int row, int corners) { return corners == 4 ? (row >> 5) * 8 + (row & 7) : row; }

// A row's latent and how it is seen from the query.
struct alignas(16) Row {
  int64_t offset;  // of the latent's first channel in the map, in elements
  float rel_row, rel_col;
};

// A tile's geometry in shared memory.
template <class T>
struct Geometry {
  Row rows[T::kRows];
  float rel_cell[T::kRows][2];  // unwritten where all cells are the same
  float weight[T::kRows];       // of the blend; 0 for rows behind the last query
};

// Bytes of shared memory: activations, ring of weights, geometry.
template <class T>
constexpr int shared_bytes() {
  return T::kActBytes + T::kStages * T::kChunkBytes + static_cast<int>(sizeof(Geometry<T>));
}

// The query of a tile's slot, -1 behind the last one.
template <class T>
__device__ __forceinline__ int64_t query_of(const QueryTask& task, int64_t tile, int slot) {
  const int64_t query = tile * (T::kRows / task.corners) + slot;
  return query < task.total ? query : -1;
}

template <class T>
__device__ __forceinline__ void find_rows(const QueryTask& task, int64_t tile, Geometry<T>& geometry) {
  for (int r = static_cast<int>(threadIdx.x); r < T::kRows; r += kThreads) {
    const int64_t found = query_of<T>(task, tile, slot_of(r, task.corners));
    const int64_t query = found < 0 ? task.total - 1 : found;
    const int64_t batch = query / task.queries, at = query - batch * task.queries;
    float coord_row, coord_col;
    if (task.coord) {
      coord_row = task.coord[2 * query];
      coord_col = task.coord[2 * query + 1];
    } else {
      const int64_t row = at / task.window_width;
      coord_row = pixel_center<float>(task.window_top + row, task.image_height);
      coord_col = pixel_center<float>(task.window_left + at - row * task.window_width, task.image_width);
    }
    Neighbour<float> row, col;
    float weight;
    if (task.corners == 4) {
      const int corner = corner_of(r, 4);
      const Neighbour<float> rows[2] = {find_neighbour(coord_row, -1, task.map_height),
                                        find_neighbour(coord_row, 1, task.map_height)};
      const Neighbour<float> cols[2] = {find_neighbour(coord_col, -1, task.map_width),
                                        find_neighbour(coord_col, 1, task.map_width)};
      const float rel_row[2] = {rows[0].rel, rows[1].rel}, rel_col[2] = {cols[0].rel, cols[1].rel};
      float weights[4];
      area_weights(rel_row, rel_col, weights);
      row = corner & 2 ? rows[1] : rows[0];
      col = corner & 1 ? cols[1] : cols[0];
      const float upper = corner & 1 ? weights[1] : weights[0], lower = corner & 1 ? weights[3] : weights[2];
      weight = corner & 2 ? lower : upper;
    } else {
      row = find_neighbour(coord_row, 0, task.map_height);
      col = find_neighbour(coord_col, 0, task.map_width);
      weight = mul_rounded(row.rel, col.rel) * 0.0f + 1.0f;  // 1, or NaN where the reference's area / area is
    }
    // The doors promise that a region holds what its window reaches; memory does not depend on that promise.
    const int64_t top = row.index - task.region_top, left = col.index - task.region_left;
    const int64_t inside_row = top < 0 ? 0 : (top < task.region_height ? top : task.region_height - 1);
    const int64_t inside_col = left < 0 ? 0 : (left < task.region_width ? left : task.region_width - 1);
    geometry.rows[r] = {
        ((batch * task.region_height + inside_row) * task.region_width + inside_col) * task.latent_width, row.rel,
        col.rel};
    geometry.weight[r] = found < 0 ? 0.0f : weight;
    if (task.cell) {
      geometry.rel_cell[r][0] = mul_rounded(task.cell[2 * query], static_cast<float>(task.map_height));
      geometry.rel_cell[r][1] = mul_rounded(task.cell[2 * query + 1], static_cast<float>(task.map_width));
    }
  }
}

// The packed vectors, by what they are.
template <class T>
__device__ __forceinline__ const float* bias_line(const QueryTask& task, int layer) {
  return task.lines + layer * T::kWidth;
}
template <class T>
__device__ __forceinline__ const float* geometry_line(const QueryTask& task, int term) {
  return task.lines + (task.hidden + 1 + term) * T::kWidth;
}
template <class T>
__device__ __forceinline__ const float* last_line(const QueryTask& task, int out) {
  return task.lines + (task.hidden + 5 + out) * T::kWidth;
}

// Part of a packed vector.
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

// A lane's values of a group as the four words in which they are stored, and back.
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

// Activations in shared memory. Tensor cores: a fragment's four words are a lane's, [m16 tile][k step][lane]. CUDA
// cores: four channels of a row are together, [m16 tile][four channels][row].
template <class T>
__device__ __forceinline__ int act_unit(int row_tile, int group, int step, int lane) {
  return (row_tile * T::kGroups * 2 + group * 2 + step) * kWarp + lane;
}
template <class T>
__device__ __forceinline__ int act_unit_of_row(int row_tile, int group, int quad, int row) {
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
    units[act_unit_of_row<T>(row_tile, group, lane & 3, lane >> 2)] = upper;
    units[act_unit_of_row<T>(row_tile, group, lane & 3, 8 + (lane >> 2))] = lower;
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
    words[0] = units[act_unit_of_row<T>(row_tile, group, lane & 3, lane >> 2)];
    words[1] = units[act_unit_of_row<T>(row_tile, group, lane & 3, 8 + (lane >> 2))];
  }
}

// The first layer: latents, geometry terms, ReLU; into act.
template <class T>
__device__ __forceinline__ void first_layer(const QueryTask& task, const Geometry<T>& geometry, unsigned char* act) {
  constexpr int kSpan = T::kGroups < kWarps ? T::kGroups : kWarps;  // groups under way at a time
  const Place<T> place;
  for (int group = place.warp % kSpan; group < T::kGroups; group += kSpan) {
    const int channel = group * T::kGroup + place.quad * T::kVector;
    const bool has_latent = channel < task.latent_width;
    float base[T::kVector], by_row[T::kVector], by_col[T::kVector], by_cell_row[T::kVector], by_cell_col[T::kVector];
    load_floats(bias_line<T>(task, 0) + channel, base);
    load_floats(geometry_line<T>(task, 0) + channel, by_row);
    load_floats(geometry_line<T>(task, 1) + channel, by_col);
    load_floats(geometry_line<T>(task, 2) + channel, by_cell_row);  // zeros without cells
    load_floats(geometry_line<T>(task, 3) + channel, by_cell_col);
    if (!task.cell) {
#pragma unroll
      for (int i = 0; i < T::kVector; ++i)
        base[i] = fmaf(task.rel_cell[1], by_cell_col[i], fmaf(task.rel_cell[0], by_cell_row[i], base[i]));
    }
#pragma unroll(T::kWidth == 64 ? 1 : 2)
    for (int m = place.warp / kSpan; m < T::kRows / 16; m += kWarps / kSpan) {
      float values[2][T::kVector];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t offset = geometry.rows[m * 16 + half * 8 + place.row].offset + channel;
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
        const int r = m * 16 + half * 8 + place.row;
        const Row row = geometry.rows[r];
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
      store_act<T>(act, m, group, place.lane, words);
    }
  }
}

// Packed weights on their way through a ring of chunks in shared memory; all threads of the block move together.
template <class T>
class WeightStream {
 public:
  // steps: chunks of one tile, which `tiles` tiles repeat.
  __device__ __forceinline__ WeightStream(const unsigned char* weights, int steps, int64_t tiles, unsigned char* ring)
      : weights_(weights), ring_(ring), steps_(steps), left_(steps * tiles) {
#pragma unroll
    for (int i = 0; i < T::kStages - 1; ++i) issue();
  }

  // The next chunk. What the call before this one returned is given up, and everything that the block wrote to shared
  // memory before is seen after it.
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
    commit_copies();  // an empty group too: wait_copies counts them
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
                                         const Place<T>& place, Accumulators<T>& acc) {
  const uint4* const rows = reinterpret_cast<const uint4*>(act);
  const uint4* const weights = reinterpret_cast<const uint4*>(chunk);
  if constexpr (T::kTensorCores) {
    uint2 first[T::kColTiles], second[T::kColTiles];
#pragma unroll
    for (int n = 0; n < T::kColTiles; ++n) {
      const uint4 both = weights[(place.first_group * T::kTiles + n) * kWarp + place.lane];
      first[n] = make_uint2(both.x, both.y);
      second[n] = make_uint2(both.z, both.w);
    }
    uint4 a[T::kRowTiles];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int m = 0; m < T::kRowTiles; ++m)
        a[m] = rows[act_unit<T>(place.first_row_tile + m, group, step, place.lane)];
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
          a[m][half] = rows[act_unit_of_row<T>(place.first_row_tile + m, group, four, half * 8 + place.row)];
#pragma unroll
      for (int n = 0; n < T::kColTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = ((four * T::kGroups + place.first_group) * T::kTiles + n) * 2 + e;
          const uint4 b = weights[at * 4 + place.quad];
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

// A lane's channels of a column group in accumulators' order.
template <class T>
__device__ __forceinline__ void values_of(const Accumulators<T>& acc, int m, int group, int half,
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

// One bit for every accumulator of a thread: whether its ReLU let it through.
template <class T>
struct Mask {
  uint32_t words[T::kMaskWords] = {};

  static __device__ __forceinline__ constexpr int index(int m, int group, int half, int i) {
    return ((m * T::kColGroups + group) * 2 + half) * T::kVector + i;
  }
  __device__ __forceinline__ void set(int m, int group, int half, const float (&v)[T::kVector]) {
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) {
      // In steps: GCC 12 with its undefined-behaviour sanitiser gets the one-line form of this wrong.
      const int at = index(m, group, half, i);
      const uint32_t bit = v[i] > 0.0f ? 1u : 0u;
      words[at / 32] |= bit << (at % 32);
    }
  }
  __device__ __forceinline__ void apply(int m, int group, int half, float (&v)[T::kVector]) const {
#pragma unroll
    for (int i = 0; i < T::kVector; ++i)
      if (!(words[index(m, group, half, i) / 32] >> index(m, group, half, i) % 32 & 1u)) v[i] = 0.0f;
  }
  static __device__ __forceinline__ int64_t address(const Saved& saved, int layer, int64_t tile, int word) {
    return ((layer * saved.tiles + tile - saved.first_tile) * T::kMaskWords + word) * kThreads + threadIdx.x;
  }
  __device__ __forceinline__ void save(const Saved& saved, int layer, int64_t tile) const {
#pragma unroll
    for (int word = 0; word < T::kMaskWords; ++word) saved.masks[address(saved, layer, tile, word)] = words[word];
  }
  __device__ __forceinline__ void load(const Saved& saved, int layer, int64_t tile) {
#pragma unroll
    for (int word = 0; word < T::kMaskWords; ++word) words[word] = saved.masks[address(saved, layer, tile, word)];
  }
};

// Tiles [first, first + count) that an array over tiles has a place for.
struct Span {
  int64_t first, count;
};

// A row of an array [layer][tile][row][channel], from a lane's channel on.
template <class T>
__device__ __forceinline__ uint4* row_at(void* rows, Span span, int layer, int64_t tile, int row, int channel) {
  const int64_t at = ((layer * span.count + tile - span.first) * T::kRows + row) * T::kWidth + channel;
  return reinterpret_cast<uint4*>(static_cast<typename T::Element*>(rows) + at);
}
template <class T>
__device__ __forceinline__ uint4* saved_row(const Saved& saved, int layer, int64_t tile, int row, int channel) {
  return row_at<T>(saved.rows, {saved.first_tile, saved.tiles}, layer, tile, row, channel);
}
// A blended hidden vector, one for every query of the tile.
template <class T>
__device__ __forceinline__ uint4* saved_blended(const Saved& saved, int64_t tile, int slots, int slot, int channel) {
  const int64_t at = ((tile - saved.first_tile) * slots + slot) * T::kWidth + channel;
  return reinterpret_cast<uint4*>(static_cast<typename T::Element*>(saved.blended) + at);
}

}  // namespace liif_fast
