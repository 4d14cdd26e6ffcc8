// The parts of the fused decode that forward and backward share: packed weights, scratch, geometry of a tile, first
// layer, hidden layers. A tile is kTileRows rows (query x corner, the corner fastest). One thread computes it, and no
// array of activations is larger than a tile.
#pragma once

#include "cpu/gemm.h"
#include "decode.h"
#include "geometry.h"

namespace liif_fast {
namespace {

constexpr int kTileRows = 96;  // 8 register tiles of 12 rows; activations and one layer's weights fit a 1 MB L2

// Allocates 64-byte aligned arrays from a buffer. With a null base it only counts the bytes.
struct Arena {
  char* base;
  size_t used = 0;
  template <class P>
  P* take(int64_t count) {
    P* array = base ? reinterpret_cast<P*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(P) + 63) & ~size_t(63);
    return array;
  }
};

// Bytes of the buffer that a Layout's constructor takes its arrays from.
template <class Layout, class Problem>
static size_t layout_bytes(const Problem& p) {
  Arena arena{nullptr};
  Layout(p, arena);
  return arena.used;
}

template <class T>
LIIF_INLINE int hidden_layers(const DecodeProblem<T>& p) {
  return p.layers > 0 ? p.layers - 1 : 0;
}

// Row stride of activations, in values: the widest layer's whole panels, and one vector more. So the stride is no
// multiple of 4 KB, and rows do not compete for a few cache sets.
template <class T>
static int64_t row_stride(const DecodeProblem<T>& p) {
  int64_t widest = p.width;
  for (int layer = 0; layer < hidden_layers(p); ++layer)
    widest = widest > p.widths[layer + 1] ? widest : p.widths[layer + 1];
  return round_up(widest, kCols<T>) + Vec<T>::kLanes;
}

// The weights in the layout that the kernels read, packed once per call. Padding is zero everywhere.
template <class Op>
struct Packed {
  using T = typename Op::Acc;
  using Elem = typename Op::Elem;
  int64_t stride;
  T* geometry[4];  // weight_geometry's columns, [stride] each
  T* first_bias;   // [stride]; a grid's constant cell is already added
  Elem* forward[kMaxLayers];
  Elem* backward[kMaxLayers];  // only for gradients
  T* bias[kMaxLayers];
  T* last;  // [out_width, stride]

  Packed(const DecodeProblem<T>& p, bool gradients, Arena& arena) {
    stride = row_stride(p);
    for (int i = 0; i < 4; ++i) geometry[i] = arena.take<T>(stride);
    first_bias = arena.take<T>(stride);
    for (int layer = 0; layer < hidden_layers(p); ++layer) {
      const int64_t in = p.widths[layer], out = p.widths[layer + 1];
      forward[layer] = arena.take<Elem>(round_up(out, kCols<T>) * round_up(in, Op::kPack) / Op::kPack);
      backward[layer] =
          gradients ? arena.take<Elem>(round_up(in, kCols<T>) * round_up(out, Op::kPack) / Op::kPack) : nullptr;
      bias[layer] = arena.take<T>(stride);
    }
    last = p.layers > 0 ? arena.take<T>(p.out_width() * stride) : nullptr;
  }

  void fill(const DecodeProblem<T>& p) {
    const int terms = p.has_cell ? 4 : 2;
    for (int64_t i = 0; i < stride; ++i) {
      const bool inside = i < p.width;
      for (int j = 0; j < 4; ++j) geometry[j][i] = inside && j < terms ? p.weight_geometry[i * terms + j] : T(0);
      first_bias[i] = inside ? p.biases[0][i] : T(0);
      if (p.has_cell && !p.cell) {
        first_bias[i] += geometry[2][i] * (p.grid_cell[0] * static_cast<T>(p.map_height));
        first_bias[i] += geometry[3][i] * (p.grid_cell[1] * static_cast<T>(p.map_width));
      }
    }
    for (int layer = 0; layer < hidden_layers(p); ++layer) {
      const int64_t in = p.widths[layer], out = p.widths[layer + 1];
      pack_panels(p.weights[layer], out, in, false, forward[layer]);
      if (backward[layer]) pack_panels(p.weights[layer], in, out, true, backward[layer]);
      for (int64_t i = 0; i < stride; ++i) bias[layer][i] = i < out ? p.biases[layer + 1][i] : T(0);
    }
    if (last) {
      const int64_t in = p.widths[p.layers - 1];
      for (int64_t o = 0; o < p.out_width(); ++o)
        for (int64_t i = 0; i < stride; ++i) last[o * stride + i] = i < in ? p.weights[p.layers - 1][o * in + i] : T(0);
    }
  }
};

// A tile's geometry: one entry per row; rel_cell: two per query.
template <class T>
struct Geometry {
  int64_t* latent;  // index in the map in memory
  T *rel_row, *rel_col, *weight, *rel_cell;
  explicit Geometry(Arena& arena) {
    latent = arena.take<int64_t>(kTileRows);
    rel_row = arena.take<T>(kTileRows);
    rel_col = arena.take<T>(kTileRows);
    weight = arena.take<T>(kTileRows);
    rel_cell = arena.take<T>(2 * kTileRows);
  }
};

// What the forward saves of a tile: activations after ReLU of all hidden layers, but not of the first layer, which
// costs less to compute again than to read.
template <class Op>
struct SavedTile {
  typename Op::Value* rows[kMaxLayers];  // [kTileRows, stride] each; rows[0] is not saved
  typename Op::Acc* last_rows;           // of the last hidden layer
  SavedTile(const DecodeProblem<typename Op::Acc>& p, Arena& arena) {
    const int64_t count = kTileRows * row_stride(p);
    for (int layer = 1; layer < hidden_layers(p); ++layer) rows[layer] = arena.take<typename Op::Value>(count);
    last_rows = hidden_layers(p) > 0 ? arena.take<typename Op::Acc>(count) : nullptr;
  }
};

// The queries of a tile.
struct TileSpan {
  int64_t batch, first, count;
};

template <class T>
LIIF_INLINE int64_t tiles_per_entry(const DecodeProblem<T>& p) {
  const int64_t queries = kTileRows / p.corners;
  return (p.queries + queries - 1) / queries;
}

template <class T>
LIIF_INLINE TileSpan tile_span(const DecodeProblem<T>& p, int64_t tile) {
  const int64_t queries = kTileRows / p.corners, tiles = tiles_per_entry(p), first = tile % tiles * queries;
  return {tile / tiles, first, first + queries < p.queries ? queries : p.queries - first};
}

// Center of the tile's query q.
template <class T>
LIIF_INLINE void query_center(const DecodeProblem<T>& p, const TileSpan& span, int64_t q, T center[2]) {
  if (p.coord) {
    const T* coord = p.coord + 2 * (span.batch * p.queries + span.first + q);
    center[0] = coord[0];
    center[1] = coord[1];
  } else {
    const int64_t at = span.first + q;
    center[0] = pixel_center<T>(p.window_top + at / p.window_width, p.image_height);
    center[1] = pixel_center<T>(p.window_left + at % p.window_width, p.image_width);
  }
}

template <class T>
static void locate(const DecodeProblem<T>& p, const TileSpan& span, Geometry<T>& g) {
  for (int64_t q = 0; q < span.count; ++q) {
    T center[2];
    query_center(p, span, q, center);
    const int sides = p.corners == 4 ? 2 : 1;
    T rel_row[2], rel_col[2];
    int64_t row[2], col[2];
    for (int side = 0; side < sides; ++side) {
      const int direction = sides == 1 ? 0 : 2 * side - 1;
      const Neighbor<T> r = find_neighbor(center[0], direction, p.map_height);
      const Neighbor<T> c = find_neighbor(center[1], direction, p.map_width);
      rel_row[side] = r.rel;
      rel_col[side] = c.rel;
      row[side] = clamp_to_region(r.index, p.region_top, p.region_height);
      col[side] = clamp_to_region(c.index, p.region_left, p.region_width);
    }
    T* weight = g.weight + q * p.corners;
    if (sides == 2) {
      area_weights(rel_row, rel_col, weight);
    } else {
      weight[0] = single_corner_weight(rel_row[0], rel_col[0]);
    }
    for (int corner = 0; corner < p.corners; ++corner) {
      const int64_t at = q * p.corners + corner;
      g.rel_row[at] = rel_row[corner >> 1];
      g.rel_col[at] = rel_col[corner & 1];
      g.latent[at] = (span.batch * p.region_height + row[corner >> 1]) * p.region_width + col[corner & 1];
    }
    if (p.cell) {
      const T* cell = p.cell + 2 * (span.batch * p.queries + span.first + q);
      g.rel_cell[2 * q] = cell[0] * static_cast<T>(p.map_height);
      g.rel_cell[2 * q + 1] = cell[1] * static_cast<T>(p.map_width);
    }
  }
}

template <class T>
LIIF_INLINE void store_values(T* p, typename Vec<T>::Reg a) {
  Vec<T>::store(p, a);
}
#if defined(LIIF_SIMD_AVX512_BF16)
LIIF_INLINE void store_values(Bf16* p, __m512 a) { store_bf16(p, a); }
#endif

// rows[query, corner] = latent + geometry terms + bias, with ReLU unless it is the only layer. Columns up to a whole
// panel are written (zeros after the width), because the next layer reads pairs and whole panels.
template <bool kRelu, class Op, class Latent, class Out>
static void first_layer(const DecodeProblem<typename Op::Acc>& p, const Packed<Op>& packed, const TileSpan& span,
                        const Geometry<typename Op::Acc>& g, typename Op::Acc* base, Out* rows) {
  using T = typename Op::Acc;
  using V = Vec<T>;
  const Latent* map = static_cast<const Latent*>(p.latent_map);
  const int64_t whole = p.width / V::kLanes * V::kLanes, padded = round_up(p.width, kCols<T>);
  for (int64_t q = 0; q < span.count; ++q) {
    const T* query_base = packed.first_bias;
    if (p.cell) {
      const auto cell_row = V::broadcast(g.rel_cell[2 * q]), cell_col = V::broadcast(g.rel_cell[2 * q + 1]);
      for (int64_t i = 0; i < padded; i += V::kLanes) {
        auto x = V::fma(cell_row, V::load(packed.geometry[2] + i), V::load(packed.first_bias + i));
        V::store(base + i, V::fma(cell_col, V::load(packed.geometry[3] + i), x));
      }
      query_base = base;
    }
    for (int corner = 0; corner < p.corners; ++corner) {
      const int64_t at = q * p.corners + corner;
      const Latent* latent = map + g.latent[at] * p.width;
      Out* out = rows + at * packed.stride;
      const auto rel_row = V::broadcast(g.rel_row[at]), rel_col = V::broadcast(g.rel_col[at]);
      const auto finish = [&](int64_t i, typename V::Reg x) {
        x = V::add(x, V::load(query_base + i));
        x = V::fma(rel_row, V::load(packed.geometry[0] + i), x);
        x = V::fma(rel_col, V::load(packed.geometry[1] + i), x);
        store_values(out + i, kRelu ? V::relu(x) : x);
      };
      int64_t i = 0;
      for (; i < whole; i += V::kLanes) finish(i, V::load(latent + i));
      if (i < p.width) {
        finish(i, V::load_partial(latent + i, static_cast<int>(p.width - i)));
        i += V::kLanes;
      }
      for (; i < padded; i += V::kLanes) store_values(out + i, V::zero());
    }
  }
}

// next = relu(rows * weights[layer]^T + bias)
template <class Op, class Out>
static void hidden_layer(const DecodeProblem<typename Op::Acc>& p, const Packed<Op>& packed, int layer, int64_t count,
                         const typename Op::Value* rows, Out* next) {
  using T = typename Op::Acc;
  const int64_t steps = round_up(p.widths[layer], Op::kPack) / Op::kPack;
  Gemm<Op, Out> g{};
  g.a = reinterpret_cast<const typename Op::Elem*>(rows);
  g.a_stride = packed.stride / Op::kPack;
  g.b = packed.forward[layer];
  g.b_stride = kCols<T>;
  g.b_panel = steps * kCols<T>;
  g.c = next;
  g.c_stride = packed.stride;
  g.bias = packed.bias[layer];
  g.m = count;
  g.panels = round_up(p.widths[layer + 1], kCols<T>) / kCols<T>;
  g.k = steps;
  multiply<Op, false, Start::kBias, Finish::kRelu>(g);
}

// blended = sum over the corners of weight * row; `width` values, rounded up to whole vectors.
template <class T>
LIIF_INLINE void blend(const T* rows, int64_t stride, const T* weight, int corners, int64_t width, T* blended) {
  using V = Vec<T>;
  for (int64_t i = 0; i < width; i += V::kLanes) {
    auto x = V::mul(V::broadcast(weight[0]), V::load(rows + i));
    for (int corner = 1; corner < corners; ++corner)
      x = V::fma(V::broadcast(weight[corner]), V::load(rows + corner * stride + i), x);
    V::store(blended + i, x);
  }
}

template <class T>
LIIF_INLINE T dot(const T* a, const T* b, int64_t width) {  // whole vectors; the padding of one factor is zero
  using V = Vec<T>;
  auto x = V::zero();
  for (int64_t i = 0; i < width; i += V::kLanes) x = V::fma(V::load(a + i), V::load(b + i), x);
  return V::sum(x);
}

template <class T>
LIIF_INLINE void add_scaled(T* sum, T factor, const T* a, int64_t width) {
  using V = Vec<T>;
  const auto x = V::broadcast(factor);
  for (int64_t i = 0; i < width; i += V::kLanes) V::store(sum + i, V::fma(x, V::load(a + i), V::load(sum + i)));
}

}  // namespace
}  // namespace liif_fast
