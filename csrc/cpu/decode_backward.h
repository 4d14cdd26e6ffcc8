// Backward tiles of the fused decode. Activations that the forward did not save are computed again, tile by tile.
// Weight gradients are added to the thread's own sums. Gradients of latents are stored row by row, and a second pass
// adds them up latent by latent in a fixed order, so the result does not depend on how threads interleave.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/tile.h"

namespace liif_fast {
namespace {

// A thread's gradient sums; [rows, stride] each, padding ignored.
template <class T>
struct Sums {
  T *geometry[4], *weights[kMaxLayers], *biases[kMaxLayers + 1];
  Sums(const DecodeProblem<T>& p, Arena& arena) {
    const int64_t stride = row_stride(p), outs = round_up(p.out_width(), kCols<T>);
    for (int i = 0; i < 4; ++i) geometry[i] = arena.take<T>(stride);
    for (int layer = 0; layer < p.layers; ++layer) weights[layer] = arena.take<T>(p.widths[layer + 1] * stride);
    for (int layer = 0; layer <= p.layers; ++layer) biases[layer] = arena.take<T>(stride > outs ? stride : outs);
  }
};

template <class Op>
struct BackwardScratch {
  using T = typename Op::Acc;
  using Value = typename Op::Value;
  using Elem = typename Op::Elem;
  Geometry<T> geometry;
  T *base, *blended, *grad_blended;
  Value* rows[kMaxLayers];        // activations after ReLU that a hidden layer multiplies
  T* last_rows;                   // activations that the blend reads
  Value *grad_rows, *grad_below;  // gradients of a hidden layer's result, taken in turns
  T* grad_first;                  // gradients of the first layer's result
  Elem *row_steps, *grad_steps;   // buffers of pack_rows
  T *grad_weight, *grad_rel;      // [kTileRows], [kTileRows, 4]
  BackwardScratch(const DecodeProblem<T>& p, Arena& arena) : geometry(arena) {
    const int64_t stride = row_stride(p);
    base = arena.take<T>(stride);
    blended = arena.take<T>(stride);
    grad_blended = arena.take<T>(stride);
    for (int layer = 0; layer < hidden_layers(p); ++layer) rows[layer] = arena.take<Value>(kTileRows * stride);
    last_rows = arena.take<T>(kTileRows * stride);
    grad_rows = arena.take<Value>(kTileRows * stride);
    grad_below = arena.take<Value>(kTileRows * stride);
    grad_first = arena.take<T>(kTileRows * stride);
    const int64_t steps = Op::kPack == 1 ? 0 : kTileRows / Op::kPack * stride;
    row_steps = arena.take<Elem>(steps);
    grad_steps = arena.take<Elem>(steps);
    grad_weight = arena.take<T>(kTileRows);
    grad_rel = arena.take<T>(4 * kTileRows);
  }
};

// Through the last layer and the blend: fills grad_rows (masked by ReLU) and grad_weight.
template <class Op, class Out, class T = typename Op::Acc>
static void blend_backward(const DecodeProblem<T>& p, const DecodeGrads<T>& grads, const Packed<Op>& packed,
                           const TileSpan& span, BackwardScratch<Op>& s, Sums<T>& sums, Out* grad_rows) {
  using V = Vec<T>;
  const int hidden = hidden_layers(p);
  const int64_t stride = packed.stride, width = p.widths[hidden], outs = p.out_width(),
                padded = round_up(width, kCols<T>);
  for (int64_t q = 0; q < span.count; ++q) {
    const T* grad_out = grads.grad_out + span.batch * p.out_batch + (span.first + q) * p.out_query;
    const T* rows = s.last_rows + q * p.corners * stride;
    const T* weight = s.geometry.weight + q * p.corners;
    for (int64_t i = 0; i < padded; i += V::kLanes) V::store(s.grad_blended + i, V::zero());
    if (p.layers == 0) {
      for (int64_t o = 0; o < outs; ++o) s.grad_blended[o] = grad_out[o * p.out_channel];
    } else {
      blend(rows, stride, weight, p.corners, width, s.blended);
      for (int64_t o = 0; o < outs; ++o) {
        const T grad = grad_out[o * p.out_channel];
        add_scaled(s.grad_blended, grad, packed.last + o * stride, width);
        add_scaled(sums.weights[p.layers - 1] + o * stride, grad, s.blended, width);
        sums.biases[p.layers][o] += grad;
      }
    }
    for (int corner = 0; corner < p.corners; ++corner) {
      const int64_t at = q * p.corners + corner;
      const T* row = rows + corner * stride;
      if (grads.coord) s.grad_weight[at] = dot(s.grad_blended, row, padded);
      const auto factor = V::broadcast(weight[corner]);
      for (int64_t i = 0; i < padded; i += V::kLanes) {
        const auto grad = V::mul(factor, V::load(s.grad_blended + i));
        store_values(grad_rows + at * stride + i,
                     p.layers == 0 ? grad : V::keep_where_positive(grad, V::load(row + i)));
      }
    }
  }
}

// Through hidden layer `layer`: weight and bias gradients from grad_rows, then gradients of the rows below.
template <class Op, class Out, class T = typename Op::Acc>
static void hidden_backward(const DecodeProblem<T>& p, const Packed<Op>& packed, int layer, int64_t count,
                            BackwardScratch<Op>& s, Sums<T>& sums, Out* grad_below) {
  using V = Vec<T>;
  const int64_t stride = packed.stride, in = p.widths[layer], out = p.widths[layer + 1];
  for (int64_t row = 0; row < count; ++row)
    for (int64_t i = 0; i < out; i += V::kLanes)
      V::store(sums.biases[layer + 1] + i,
               V::add(V::load(sums.biases[layer + 1] + i), V::load(s.grad_rows + row * stride + i)));

  Gemm<Op, T> weight{};  // [out, in] += grad_rows^T [out, rows] * rows [rows, in]
  weight.a = pack_rows<Op>(s.grad_rows, stride, count, out, s.grad_steps);
  weight.a_stride = stride;
  weight.b = pack_rows<Op>(s.rows[layer], stride, count, in, s.row_steps);
  weight.b_stride = stride;
  weight.b_panel = kCols<T>;
  weight.c = sums.weights[layer];
  weight.c_stride = stride;
  weight.m = out;
  weight.panels = round_up(in, kCols<T>) / kCols<T>;
  weight.k = round_up(count, Op::kPack) / Op::kPack;
  multiply<Op, true, Start::kAccumulate, Finish::kPlain>(weight);

  const int64_t steps = round_up(out, Op::kPack) / Op::kPack;
  Gemm<Op, Out> below{};  // [rows, in] = grad_rows [rows, out] * weight [out, in], masked by ReLU
  below.a = reinterpret_cast<const typename Op::Elem*>(s.grad_rows);
  below.a_stride = stride / Op::kPack;
  below.b = packed.backward[layer];
  below.b_stride = kCols<T>;
  below.b_panel = steps * kCols<T>;
  below.c = grad_below;
  below.c_stride = stride;
  below.mask = s.rows[layer];
  below.m = count;
  below.panels = weight.panels;
  below.k = steps;
  multiply<Op, false, Start::kZero, Finish::kMask>(below);
}

// Through the first layer: latent rows for the scatter, weight_geometry, its bias, grad_rel (row, col, cell row, cell
// col), and the gradient of query_term in `term` unless that is null.
template <class Op, class T = typename Op::Acc>
static void first_layer_backward(const DecodeProblem<T>& p, const Packed<Op>& packed, const TileSpan& span,
                                 bool coord_grad, BackwardScratch<Op>& s, Sums<T>& sums, T* latent_rows, T* term) {
  using V = Vec<T>;
  const int64_t count = span.count * p.corners, width = round_up(p.width, V::kLanes);
  for (int64_t at = 0; at < count; ++at) {
    const T* grad = s.grad_first + at * packed.stride;
    const int64_t q = at / p.corners;
    T rel[4] = {s.geometry.rel_row[at], s.geometry.rel_col[at], 0, 0};
    if (p.has_cell) {
      rel[2] = p.cell ? s.geometry.rel_cell[2 * q] : p.grid_cell[0] * static_cast<T>(p.map_height);
      rel[3] = p.cell ? s.geometry.rel_cell[2 * q + 1] : p.grid_cell[1] * static_cast<T>(p.map_width);
    }
    const int terms = p.has_cell ? 4 : 2;
    for (int j = 0; j < 4; ++j) s.grad_rel[4 * at + j] = T(0);
    for (int j = 0; j < terms; ++j) {
      if (coord_grad) s.grad_rel[4 * at + j] = dot(grad, packed.geometry[j], width);
      add_scaled(sums.geometry[j], rel[j], grad, width);
    }
    add_scaled(sums.biases[0], T(1), grad, width);
    for (int64_t i = 0; i < p.width; ++i) latent_rows[at * p.width + i] = grad[i];
    if (term) {
      T* sum = term + (span.batch * p.queries + span.first + q) * p.width;
      for (int64_t i = 0; i < p.width; ++i) sum[i] += grad[i];
    }
  }
}

template <class Op, class T = typename Op::Acc>
static void geometry_backward(const DecodeProblem<T>& p, const DecodeGrads<T>& grads, const TileSpan& span,
                              const BackwardScratch<Op>& s) {
  const T height = static_cast<T>(p.map_height), width = static_cast<T>(p.map_width);
  for (int64_t q = 0; q < span.count; ++q) {
    const int64_t first = q * p.corners, at = 2 * (span.batch * p.queries + span.first + q);
    T grad_row[2] = {0, 0}, grad_col[2] = {0, 0}, grad_cell[2] = {0, 0};
    for (int corner = 0; corner < p.corners; ++corner) {
      const T* grad = s.grad_rel + 4 * (first + corner);
      grad_row[corner >> 1] += grad[0];
      grad_col[corner & 1] += grad[1];
      grad_cell[0] += grad[2];
      grad_cell[1] += grad[3];
    }
    if (p.corners == 4) {
      const T rel_row[2] = {s.geometry.rel_row[first], s.geometry.rel_row[first + 2]};
      const T rel_col[2] = {s.geometry.rel_col[first], s.geometry.rel_col[first + 1]};
      area_weights_backward(rel_row, rel_col, s.grad_weight + first, grad_row, grad_col);
    }
    grads.coord[at] = (grad_row[0] + grad_row[1]) * height;
    grads.coord[at + 1] = (grad_col[0] + grad_col[1]) * width;
    if (grads.cell) {
      grads.cell[at] = grad_cell[0] * height;
      grads.cell[at + 1] = grad_cell[1] * width;
    }
  }
}

// Activations of a tile: those that the forward saved, and the others computed as in the forward. With other roundings
// the ReLU masks would differ.
template <class Op, class Latent, class T = typename Op::Acc>
static void find_activations(const DecodeProblem<T>& p, const Packed<Op>& packed, const TileSpan& span, char* saved,
                             BackwardScratch<Op>& s) {
  const int64_t count = span.count * p.corners;
  const int hidden = hidden_layers(p);
  if (p.layers == 0)
    first_layer<false, Op, Latent>(p, packed, span, s.geometry, s.base, s.last_rows);
  else if (hidden == 0)
    first_layer<true, Op, Latent>(p, packed, span, s.geometry, s.base, s.last_rows);
  else
    first_layer<true, Op, Latent>(p, packed, span, s.geometry, s.base, s.rows[0]);
  if (saved && hidden > 0) {
    Arena arena{saved};
    const SavedTile<Op> kept(p, arena);
    for (int layer = 1; layer < hidden; ++layer) s.rows[layer] = kept.rows[layer];
    s.last_rows = kept.last_rows;
    return;
  }
  for (int layer = 0; layer + 1 < hidden; ++layer)
    hidden_layer(p, packed, layer, count, s.rows[layer], s.rows[layer + 1]);
  if (hidden > 0) hidden_layer(p, packed, hidden - 1, count, s.rows[hidden - 1], s.last_rows);
}

// Through all layers of a tile, down to grad_first.
template <class Op, class T = typename Op::Acc>
static void layers_backward(const DecodeProblem<T>& p, const DecodeGrads<T>& grads, const Packed<Op>& packed,
                            const TileSpan& span, BackwardScratch<Op>& s, Sums<T>& sums) {
  const int64_t count = span.count * p.corners;
  const int hidden = hidden_layers(p);
  if (hidden == 0) {
    blend_backward(p, grads, packed, span, s, sums, s.grad_first);
    return;
  }
  blend_backward(p, grads, packed, span, s, sums, s.grad_rows);
  for (int layer = hidden - 1; layer > 0; --layer) {
    hidden_backward(p, packed, layer, count, s, sums, s.grad_below);
    auto* swap = s.grad_rows;
    s.grad_rows = s.grad_below;
    s.grad_below = swap;
  }
  hidden_backward(p, packed, 0, count, s, sums, s.grad_first);
}

template <class Op, class Latent, class T = typename Op::Acc>
static void backward_tiles(const DecodeProblem<T>& p, const DecodeGrads<T>& grads, const BackwardTiles<T>& tiles,
                           const SavedActivations& saved) {
  Arena packed_arena{tiles.packed}, scratch_arena{tiles.scratch}, sum_arena{tiles.sums};
  const Packed<Op> packed(p, true, packed_arena);
  const BackwardScratch<Op> scratch(p, scratch_arena);
  Sums<T> sums(p, sum_arena);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const TileSpan span = tile_span(p, tile);
    const int64_t count = span.count * p.corners, first_row = (tile - tiles.chunk_begin) * kTileRows;
    BackwardScratch<Op> s = scratch;  // its pointers move to saved activations, and are exchanged
    locate(p, span.batch, span.first, span.first + span.count, s.geometry);
    find_activations<Op, Latent>(p, packed, span, saved.tile(tile), s);
    layers_backward(p, grads, packed, span, s, sums);
    first_layer_backward(p, packed, span, grads.coord != nullptr, s, sums, tiles.latent_rows + first_row * p.width,
                         grads.query_term);
    if (grads.coord) geometry_backward(p, grads, span, s);
    for (int64_t row = 0; row < kTileRows; ++row)
      tiles.row_latent[first_row + row] = row < count ? s.geometry.latent[row] : -1;
  }
}

// Adds the chunk's rows to the latents that `owner` of `owners` owns, in the order of the rows.
template <class T>
static void scatter_rows(const T* latent_rows, const int64_t* row_latent, int64_t count, int64_t width, int64_t owner,
                         int64_t owners, T* grad_latent_map) {
  for (int64_t row = 0; row < count; ++row) {
    const int64_t latent = row_latent[row];
    if (latent < 0 || latent % owners != owner) continue;
    T* sum = grad_latent_map + latent * width;
    const T* grad = latent_rows + row * width;
    for (int64_t i = 0; i < width; ++i) sum[i] += grad[i];
  }
}

// Adds a thread's sums to the gradients of the weights.
template <class T>
static void add_sums(const DecodeProblem<T>& p, char* sum_buffer, const DecodeGrads<T>& grads) {
  Arena arena{sum_buffer};
  const Sums<T> sums(p, arena);
  const int64_t stride = row_stride(p);
  const int terms = p.has_cell ? 4 : 2;
  for (int64_t i = 0; i < p.width; ++i)
    for (int j = 0; j < terms; ++j) grads.weight_geometry[i * terms + j] += sums.geometry[j][i];
  for (int layer = 0; layer < p.layers; ++layer)
    for (int64_t row = 0; row < p.widths[layer + 1]; ++row)
      for (int64_t i = 0; i < p.widths[layer]; ++i)
        grads.weights[layer][row * p.widths[layer] + i] += sums.weights[layer][row * stride + i];
  for (int layer = 0; layer <= p.layers; ++layer)
    for (int64_t i = 0; i < p.widths[layer]; ++i) grads.biases[layer][i] += sums.biases[layer][i];
}

}  // namespace
}  // namespace liif_fast
