// The parts of the fused decode that forward and backward share: a block's tile of rows and channels, the tile's
// geometry, the saved activations, the launch. layers.cuh has the steps that both take.
//
// A row is one corner of one query; a tile is kRows of them (with local ensemble a quarter as many queries) by kWidth
// channels, the widest layer's; narrower layers are padded with zeros. The tile stays on the chip from the latents to
// the blend: accumulators in registers, activations in shared memory. Weights stream through shared memory in chunks
// that all blocks read from L2.
//
// A matrix instruction takes its operands as fragments, spread over a warp's lanes. All arrays are stored in that
// order, 16 bytes a lane, so that no access conflicts and no shuffle is needed. The order of a layer's channels is free
// as long as the weights follow it. It is chosen so that a lane holds the same 16 bytes of consecutive channels of a
// group after one product (accumulators), before the next (operands), in the latent map and in saved activations. Rows
// are ordered so that one lane holds all four corners of a query: the ensemble is a sum in registers.
#pragma once

#include "cuda/common.cuh"
#include "cuda/decode/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/weight_stream.cuh"
#include "geometry.h"

namespace liif_fast {

template <MmaPolicy kPolicy_, int kWidth_, int kRows_>
struct Tile {
  static constexpr MmaPolicy kPolicy = kPolicy_;
  static constexpr bool kTensorCores = kPolicy != MmaPolicy::kFloat32;
  using Element = std::conditional_t<kPolicy == MmaPolicy::kFloat16, __half,
                                     std::conditional_t<kPolicy == MmaPolicy::kBFloat16, __nv_bfloat16, float>>;
  static constexpr int kWidth = kWidth_, kRows = kRows_;
  static constexpr int kVector = 16 / sizeof(Element);  // channels of a group that one lane holds
  static constexpr int kGroup = 4 * kVector;            // input channels of a chunk of weights
  static constexpr int kTiles = kVector / 2;            // n8 tiles of a group
  static constexpr int kGroups = kWidth / kGroup;
  static constexpr int kWarpCols = kRows == 32 ? 8 : (kGroups < 4 ? 2 : 4);
  static constexpr int kWarpRows = kWarps / kWarpCols;
  static constexpr int kRowTiles = kRows / kWarpRows / 16;  // m16 tiles of a warp
  static constexpr int kColGroups = kGroups / kWarpCols;    // groups of a warp
  static constexpr int kColTiles = kColGroups * kTiles;     // n8 tiles of a warp
  static constexpr int kTeams = kWarpRows;                  // warps that share rows are a team
  static constexpr int kTeamRows = kRows / kTeams, kTeamThreads = kWarpCols * kWarp;
  static constexpr int kActBytes = kRows * kWidth * static_cast<int>(sizeof(Element));
  static constexpr int kChunkBytes = kWidth * 64;  // weights from one group to every channel
  static constexpr int kStages = kRows == 128 ? 4 : 3;
  static constexpr int kMaskBits = kRowTiles * kColGroups * 2 * kVector;  // of a thread
  static constexpr int kMaskWords = (kMaskBits + 31) / 32;
  static_assert(kRowTiles % 2 == 0 && kColGroups > 0 && kRowTiles * 16 * kWarpRows == kRows, "a lane has all corners");
};

// The launch bounds' second number, from which the compiler bounds the registers.
template <class T>
constexpr int min_blocks_per_sm() {
  return blocks_per_sm(T::kWidth, sizeof(typename T::Element));
}

// Whether the architecture under compilation ever launches a tile. The kernels of other tiles stay empty.
template <class T>
__host__ __device__ constexpr bool is_launched() {
#ifdef __CUDA_ARCH__
  if (T::kWidth == 256 && has_small_tiles_only(__CUDA_ARCH__))
    return T::kRows == small_rows(sizeof(typename T::Element));
#endif
  return true;
}

// The rows and channels of the tile that a thread's accumulators hold.
template <class T>
struct FragmentCoords {
  int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  int row = lane >> 2, quad = lane & 3;  // of a fragment
  int team = warp / T::kWarpCols, member = static_cast<int>(threadIdx.x) % T::kTeamThreads;
  int first_row_tile = warp / T::kWarpCols * T::kRowTiles, first_group = warp % T::kWarpCols * T::kColGroups;

  // Row in the tile of m16 tile m's upper or lower half.
  __device__ __forceinline__ int tile_row(int m, int half) const { return (first_row_tile + m) * 16 + half * 8 + row; }
  // First of this lane's channels in its column group.
  __device__ __forceinline__ int channel(int group) const {
    return (first_group + group) * T::kGroup + quad * T::kVector;
  }
};

// A row's corner, and its query's slot among the tile's queries.
__device__ __forceinline__ int row_corner(int row, int corners) {
  return corners == 4 ? (row >> 4 & 1) * 2 + (row >> 3 & 1) : 0;
}
__device__ __forceinline__ int query_slot(int row, int corners) {
  return corners == 4 ? (row >> 5) * 8 + (row & 7) : row;
}

// The slot of a lane's query number s: its rows are kCorners * s and the following ones, counted by halves of m16
// tiles.
template <int kCorners, class T>
__device__ __forceinline__ int lane_slot(const FragmentCoords<T>& coords, int s) {
  return query_slot(coords.tile_row(s * kCorners / 2, s * kCorners % 2), kCorners);
}

// A row's latent, and its coordinates relative to the query.
struct alignas(16) CornerRow {
  int64_t offset;  // of the latent's first channel in the map, in elements
  float rel_row, rel_col;
};

// From what a row's operands of the weights' gradients are rebuilt, see rebuilds_first and rebuilds_last.
struct alignas(16) RowTerms {
  CornerRow seen;
  float4 grads;     // of the outputs, times the blend's weight
  float4 rel_cell;  // two numbers

  // In three stores. seen: in shared memory.
  __device__ __forceinline__ void set(const CornerRow& row, float4 weighted, float cell_row, float cell_col) {
    *reinterpret_cast<uint4*>(&seen) = *reinterpret_cast<const uint4*>(&row);
    grads = weighted;
    rel_cell = make_float4(cell_row, cell_col, 0.0f, 0.0f);
  }
};
static_assert(sizeof(RowTerms) == kRowTermsBytes, "as launch.h promises");

// A tile's geometry in shared memory. A team writes and reads only its own rows.
template <class T>
struct Geometry {
  CornerRow rows[T::kRows];
  float rel_cell[T::kRows][2];  // unwritten where all cells are the same
  float weight[T::kRows];       // of the blend; 0 for rows after the last query
};

// A block's shared memory. The backward has its gradients after it.
template <class T>
struct Workspace {
  alignas(16) unsigned char act[T::kActBytes];
  unsigned char ring[T::kStages * T::kChunkBytes];
  RingBarriers<T> barriers;
  Geometry<T> geometry;
};

// The query of a tile's slot; -1 after the last query.
template <class T>
__device__ __forceinline__ int64_t find_query(const DecodeTask& task, int64_t tile, int slot) {
  const int64_t query = tile * (T::kRows / task.corners) + slot;
  return query < task.total ? query : -1;
}

// use(slot, o, offset) for every output of a team's rows; offset is the value's place in out and grad_out, -1 after the
// last query. Neighboring threads get neighboring values: channels of a query, or queries of a channel. The team's last
// warps come first: locate_rows begins with the others.
template <class T, class F>
__device__ __forceinline__ void for_each_output(const DecodeTask& task, int64_t tile, const FragmentCoords<T>& coords,
                                                F use) {
  const int slots = T::kTeamRows / task.corners, count = slots * task.outs;
#pragma unroll 1
  for (int i = coords.member ^ (T::kTeamThreads - kWarp); i < count; i += T::kTeamThreads) {
    const int at_slot = task.out_channel == 1 ? i / task.outs : i % slots;
    const int o = task.out_channel == 1 ? i % task.outs : i / slots;
    const int slot = coords.team * slots + at_slot;
    const int64_t query = find_query<T>(task, tile, slot);
    const int64_t batch = query / task.queries, at = query - batch * task.queries;
    use(slot, o, query < 0 ? -1 : batch * task.out_batch + at * task.out_query + o * task.out_channel);
  }
}

template <class T>
__device__ __forceinline__ void locate_rows(const DecodeTask& task, int64_t tile, const FragmentCoords<T>& coords,
                                            Geometry<T>& geometry) {
  for (int i = coords.member; i < T::kTeamRows; i += T::kTeamThreads) {
    const int r = coords.team * T::kTeamRows + i;
    const int64_t found = find_query<T>(task, tile, query_slot(r, task.corners));
    const int64_t query = found < 0 ? task.total - 1 : found;
    const int64_t batch = query / task.queries, at = query - batch * task.queries;
    float coord_row, coord_col;
    if (task.coord) {
      coord_row = task.coord[2 * query];
      coord_col = task.coord[2 * query + 1];
    } else {
      const int64_t row = at / task.window_width;
      coord_row = pixel_center<float>(task.window_top + row, task.rows);
      coord_col = pixel_center<float>(task.window_left + at - row * task.window_width, task.cols);
    }
    Neighbor<float> row, col;
    float weight;
    if (task.corners == 4) {
      const int corner = row_corner(r, 4);
      const Neighbor<float> rows[2] = {find_neighbor(coord_row, -1, task.map_height),
                                       find_neighbor(coord_row, 1, task.map_height)};
      const Neighbor<float> cols[2] = {find_neighbor(coord_col, -1, task.map_width),
                                       find_neighbor(coord_col, 1, task.map_width)};
      const float rel_row[2] = {rows[0].rel, rows[1].rel}, rel_col[2] = {cols[0].rel, cols[1].rel};
      float weights[4];
      area_weights(rel_row, rel_col, weights);
      row = corner & 2 ? rows[1] : rows[0];
      col = corner & 1 ? cols[1] : cols[0];
      const float upper = corner & 1 ? weights[1] : weights[0], lower = corner & 1 ? weights[3] : weights[2];
      weight = corner & 2 ? lower : upper;
    } else {
      row = find_neighbor(coord_row, 0, task.map_height);
      col = find_neighbor(coord_col, 0, task.map_width);
      weight = single_corner_weight(row.rel, col.rel);
    }
    const int64_t map_row = clamp_to_region(row.index, task.region_top, task.region_height);
    const int64_t map_col = clamp_to_region(col.index, task.region_left, task.region_width);
    geometry.rows[r] = {((batch * task.region_height + map_row) * task.region_width + map_col) * task.width, row.rel,
                        col.rel};
    geometry.weight[r] = found < 0 ? 0.0f : weight;
    if (task.cell) {
      geometry.rel_cell[r][0] = mul_rounded(task.cell[2 * query], static_cast<float>(task.map_height));
      geometry.rel_cell[r][1] = mul_rounded(task.cell[2 * query + 1], static_cast<float>(task.map_width));
    }
  }
}

// The packed vectors: a layer's bias, a geometry term, the weights of an output (and after those the outputs' bias).
template <class T>
__device__ __forceinline__ const float* bias_vector(const DecodeTask& task, int layer) {
  return task.packed_vectors + layer * T::kWidth;
}
template <class T>
__device__ __forceinline__ const float* geometry_vector(const DecodeTask& task, int term) {
  return task.packed_vectors + (task.hidden + 1 + term) * T::kWidth;
}
template <class T>
__device__ __forceinline__ const float* last_vector(const DecodeTask& task, int out) {
  return task.packed_vectors + (task.hidden + 5 + out) * T::kWidth;
}

// One bit for every accumulator of a thread: whether its ReLU passes gradients, which it does for a NaN, as PyTorch's.
template <class T>
struct Mask {
  uint32_t words[T::kMaskWords] = {};

  static __device__ __forceinline__ constexpr int index(int m, int group, int half, int i) {
    return ((m * T::kColGroups + group) * 2 + half) * T::kVector + i;
  }
  __device__ __forceinline__ void set(int m, int group, int half, const float (&v)[T::kVector]) {
#pragma unroll
    for (int i = 0; i < T::kVector; ++i) {
      // In steps: GCC 12 with its undefined-behavior sanitizer miscompiles the one-line form.
      const int at = index(m, group, half, i);
      const uint32_t bit = v[i] <= 0.0f ? 0u : 1u;
      words[at / 32] |= bit << (at % 32);
    }
  }
  __device__ __forceinline__ void apply(int m, int group, int half, float (&v)[T::kVector]) const {
#pragma unroll
    for (int i = 0; i < T::kVector; ++i)
      if (!(words[index(m, group, half, i) / 32] >> index(m, group, half, i) % 32 & 1u)) v[i] = 0.0f;
  }
  static __device__ __forceinline__ int64_t address(const SavedActivations& saved, int layer, int64_t tile, int word) {
    return ((layer * saved.tiles + tile - saved.first_tile) * T::kMaskWords + word) * kThreads + threadIdx.x;
  }
  __device__ __forceinline__ void save(const SavedActivations& saved, int layer, int64_t tile) const {
#pragma unroll
    for (int word = 0; word < T::kMaskWords; ++word) saved.masks[address(saved, layer, tile, word)] = words[word];
  }
  __device__ __forceinline__ void load(const SavedActivations& saved, int layer, int64_t tile) {
#pragma unroll
    for (int word = 0; word < T::kMaskWords; ++word) words[word] = saved.masks[address(saved, layer, tile, word)];
  }
};

// A byte of Mask's words, with the bits of eight channels of a row: that of the first of 32 rows, number `rows` of a
// layer's in steps of 32, and how much further that of one of them is. For 16 bits; tiles may have 64 rows or 128.
template <class T>
__device__ __forceinline__ int64_t mask_rows(int rows, int tile_rows) {
  const bool two = tile_rows / T::kTeams == 64;  // of a team
  const int part = two ? rows & 1 : 0, at = two ? rows >> 1 : rows;
  const int64_t word = int64_t{at / T::kTeams} * (two ? 2 : 1) + part;
  return (word * T::kColGroups * kThreads + at % T::kTeams * T::kTeamThreads) * 4;
}
template <class T>
__device__ __forceinline__ int mask_byte(int row, int channel) {
  const int group = channel / T::kGroup, byte = (row / 16 * T::kColGroups + group % T::kColGroups) * 2 + row / 8 % 2;
  const int thread = (group / T::kColGroups * 8 + row % 8) * 4 + channel % T::kGroup / T::kVector;
  return (byte / 4 * kThreads + thread) * 4 + byte % 4;
}

// Tiles [first, first + count) of an array over tiles.
struct TileRange {
  int64_t first, count;
};

// A row of an array [layer][tile][row][channel], from a lane's channel on.
template <class T>
__device__ __forceinline__ uint4* row_at(void* rows, TileRange range, int layer, int64_t tile, int row, int channel) {
  const int64_t at = ((layer * range.count + tile - range.first) * T::kRows + row) * T::kWidth + channel;
  return reinterpret_cast<uint4*>(static_cast<typename T::Element*>(rows) + at);
}
template <class T>
__device__ __forceinline__ uint4* saved_row(const SavedActivations& saved, int layer, int64_t tile, int row,
                                            int channel) {
  return row_at<T>(saved.rows, {saved.first_tile, saved.tiles}, layer - saved.first_layer, tile, row, channel);
}
// A blended hidden vector, one for every query of the tile.
template <class T>
__device__ __forceinline__ uint4* saved_blended(const SavedActivations& saved, int64_t tile, int slots, int slot,
                                                int channel) {
  const int64_t at = ((tile - saved.first_tile) * slots + slot) * T::kWidth + channel;
  return reinterpret_cast<uint4*>(static_cast<typename T::Element*>(saved.blended) + at);
}

// Blocks of a launch.
inline unsigned block_count(const DecodeVariant& variant, const DecodeTask& task) {
  return static_cast<unsigned>(variant.blocks < task.tiles ? variant.blocks : task.tiles);
}

// f(Tile{}) with the tile of a variant.
template <MmaPolicy kPolicy, class F>
const char* with_tile(const DecodeVariant& variant, const F& f) {
  constexpr int kBytes = operand_bytes(kPolicy);
  if (variant.width == 64) return f(Tile<kPolicy, 64, kBytes == 2 ? 128 : 64>{});
  if (variant.width == 128) return f(Tile<kPolicy, 128, kBytes == 2 ? 128 : 64>{});
  if (variant.rows == large_rows(kBytes)) return f(Tile<kPolicy, 256, large_rows(kBytes)>{});
  return f(Tile<kPolicy, 256, small_rows(kBytes)>{});
}

// Outside the namespace: the launches of one policy, a name of MmaPolicy.
#define LIIF_INSTANTIATE_DECODE(policy)                                                                           \
  namespace liif_fast {                                                                                           \
  template const char* launch_forward<MmaPolicy::policy>(const DecodeTask&, const DecodeVariant&,                 \
                                                         const SavedActivations&, void*);                         \
  template const char* launch_backward<MmaPolicy::policy>(const DecodeTask&, const DecodeVariant&,                \
                                                          const SavedActivations&, const BackwardArrays&, void*); \
  }

}  // namespace liif_fast
