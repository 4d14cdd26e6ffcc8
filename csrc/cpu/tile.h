// The parts of the fused decode that forward and backward share: packed weights, scratch, geometry of a tile, first
// layer, hidden layers. A tile is up to kTileRows rows (query x corner, the corner fastest). One thread computes it,
// and no array of activations is larger than a tile.
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

// A tile's geometry: one entry per row; rel_cell: two per query. There is room for a query that does not fit.
template <class T>
struct Geometry {
  int64_t* first_row;  // query q has the rows from first_row[q] to first_row[q + 1]
  int64_t* latent;     // index in the map in memory
  T *rel_row, *rel_col, *weight, *rel_cell;
  explicit Geometry(Arena& arena) {
    constexpr int64_t kMost = kTileRows + 4;
    first_row = arena.take<int64_t>(kMost);
    latent = arena.take<int64_t>(kMost);
    rel_row = arena.take<T>(kMost);
    rel_col = arena.take<T>(kMost);
    weight = arena.take<T>(kMost);
    rel_cell = arena.take<T>(2 * kMost);
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

// Which corners of a grid's pixel count, one bit each. Where the pixel's center is a latent's center, as on every odd
// scale, the latent on the other side has the weight 0 without rounding; in float32 it has a weight of up to 1e-4,
// which is noise. Integers decide, because coordinates are rounded. At the lower end of the map both sides are the same
// latent and all areas vanish: then every corner counts.
template <class T>
LIIF_INLINE int counting_corners(const DecodeProblem<T>& p, int64_t row_pixel, int64_t col_pixel, const int64_t row[2],
                                 const int64_t col[2]) {
  const auto sides = [](int64_t pixel, int64_t image, const int64_t index[2], int64_t map) {
    const int64_t twice = (2 * pixel + 1) * map;
    return (twice == (2 * index[0] + 1) * image ? 1 : 0) | (twice == (2 * index[1] + 1) * image ? 2 : 0);
  };
  constexpr int kOfRow[3] = {15, 3, 12}, kOfCol[3] = {15, 5, 10};
  const int on_row = sides(row_pixel, p.image_height, row, p.map_height);
  const int on_col = sides(col_pixel, p.image_width, col, p.map_width);
  return on_row == 3 || on_col == 3 ? 15 : kOfRow[on_row] & kOfCol[on_col];
}

// Query `at` of entry `batch` as the tile's query q, after the rows of those before it.
template <class T>
LIIF_INLINE void locate_query(const DecodeProblem<T>& p, int64_t batch, int64_t at, int64_t q, Geometry<T>& g) {
  const int64_t in_batch = batch * p.queries + at;
  const int64_t row_pixel = p.coord ? 0 : p.window_top + at / p.window_width;
  const int64_t col_pixel = p.coord ? 0 : p.window_left + at % p.window_width;
  const T center_row = p.coord ? p.coord[2 * in_batch] : pixel_center<T>(row_pixel, p.rows);
  const T center_col = p.coord ? p.coord[2 * in_batch + 1] : pixel_center<T>(col_pixel, p.cols);
  const int sides = p.corners == 4 ? 2 : 1;
  T rel_row[2], rel_col[2], weight[4];
  int64_t row[2], col[2];
  for (int side = 0; side < sides; ++side) {
    const int direction = sides == 1 ? 0 : 2 * side - 1;
    const Neighbor<T> r = find_neighbor(center_row, direction, p.map_height);
    const Neighbor<T> c = find_neighbor(center_col, direction, p.map_width);
    rel_row[side] = r.rel;
    rel_col[side] = c.rel;
    row[side] = r.index;
    col[side] = c.index;
  }
  if (sides == 2) {
    area_weights(rel_row, rel_col, weight);
  } else {
    weight[0] = single_corner_weight(rel_row[0], rel_col[0]);
  }
  const int every = (1 << p.corners) - 1;
  const int counting = p.skips_corners ? counting_corners(p, row_pixel, col_pixel, row, col) : every;
  int64_t to = g.first_row[q];
  T total = T(0);
  for (int corner = 0; corner < p.corners; ++corner) {
    if (!(counting >> corner & 1)) continue;
    total += weight[corner];
    g.weight[to] = weight[corner];
    g.rel_row[to] = rel_row[corner >> 1];
    g.rel_col[to] = rel_col[corner & 1];
    g.latent[to++] =
        (batch * p.region_height + clamp_to_region(row[corner >> 1], p.region_top, p.region_height)) * p.region_width +
        clamp_to_region(col[corner & 1], p.region_left, p.region_width);
  }
  g.first_row[q + 1] = to;
  if (counting != every)
    for (int64_t i = g.first_row[q]; i < to; ++i) g.weight[i] /= total;
  if (p.cell) {
    g.rel_cell[2 * q] = p.cell[2 * in_batch] * static_cast<T>(p.map_height);
    g.rel_cell[2 * q + 1] = p.cell[2 * in_batch + 1] * static_cast<T>(p.map_width);
  }
}

// Locates as many of the queries [first, last) of entry `batch` as fit into a tile, and returns them.
template <class T>
static TileSpan locate(const DecodeProblem<T>& p, int64_t batch, int64_t first, int64_t last, Geometry<T>& g) {
  int64_t count = 0;
  g.first_row[0] = 0;
  for (; first + count < last && g.first_row[count] < kTileRows; ++count) {
    locate_query(p, batch, first + count, count, g);
    if (g.first_row[count + 1] > kTileRows) break;
  }
  return {batch, first, count};
}

template <class T>
LIIF_INLINE void store_values(T* p, typename Vec<T>::Reg a) {
  Vec<T>::store(p, a);
}
#if defined(LIIF_SIMD_BF16)
LIIF_INLINE void store_values(Bf16* p, Vec<float>::Reg a) { store_bf16(p, a); }
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
    if (p.query_term) {
      const T* term = p.query_term + (span.batch * p.queries + span.first + q) * p.width;
      for (int64_t i = 0; i < whole; i += V::kLanes)
        V::store(base + i, V::add(V::load(query_base + i), V::load(term + i)));
      if (whole < p.width) {
        const auto rest = V::load_partial(term + whole, static_cast<int>(p.width - whole));
        V::store(base + whole, V::add(V::load(query_base + whole), rest));
      }
      query_base = base;
    }
    for (int64_t at = g.first_row[q]; at < g.first_row[q + 1]; ++at) {
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
LIIF_INLINE void blend(const T* rows, int64_t stride, const T* weight, int64_t corners, int64_t width, T* blended) {
  using V = Vec<T>;
  for (int64_t i = 0; i < width; i += V::kLanes) {
    auto x = V::mul(V::broadcast(weight[0]), V::load(rows + i));
    for (int64_t corner = 1; corner < corners; ++corner)
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
