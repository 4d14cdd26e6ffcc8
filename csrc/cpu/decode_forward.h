// Forward tiles of the fused decode: gather, geometry terms, ReLU, hidden layers, blend, last layer, in one pass.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/tile.h"

namespace liif_fast {
namespace {

template <class Op>
struct ForwardScratch {
  using T = typename Op::Acc;
  Geometry<T> geometry;
  T *base, *blended, *last_rows;    // last_rows: the blend's input, always T
  typename Op::Value *rows, *next;  // hidden activations, taken in turns
  ForwardScratch(const DecodeProblem<T>& p, Arena& arena) : geometry(arena) {
    const int64_t stride = row_stride(p);
    base = arena.take<T>(stride);
    blended = arena.take<T>(stride);
    last_rows = arena.take<T>(kTileRows * stride);
    rows = arena.take<typename Op::Value>(kTileRows * stride);
    next = arena.take<typename Op::Value>(kTileRows * stride);
  }
};

template <class Op, class Latent>
static void forward_tile(const DecodeProblem<typename Op::Acc>& p, const Packed<Op>& packed, const TileSpan& span,
                         ForwardScratch<Op>& s, char* saved) {
  using T = typename Op::Acc;
  const int64_t* const first_row = s.geometry.first_row;
  const int64_t count = first_row[span.count];
  const int hidden = hidden_layers(p);
  Arena saved_arena{saved};
  const SavedTile<Op> keep(p, saved_arena);
  T* const last_rows = saved && hidden > 0 ? keep.last_rows : s.last_rows;
  if (p.layers == 0) {
    first_layer<false, Op, Latent>(p, packed, span, s.geometry, s.base, last_rows);
  } else if (hidden == 0) {
    first_layer<true, Op, Latent>(p, packed, span, s.geometry, s.base, last_rows);
  } else {
    first_layer<true, Op, Latent>(p, packed, span, s.geometry, s.base, s.rows);
    const auto* rows = s.rows;
    for (int layer = 0; layer + 1 < hidden; ++layer) {
      auto* const next = saved ? keep.rows[layer + 1] : rows == s.rows ? s.next : s.rows;
      hidden_layer(p, packed, layer, count, rows, next);
      rows = next;
    }
    hidden_layer(p, packed, hidden - 1, count, rows, last_rows);
  }
  // The weights sum to 1 and the last layer is linear, so it is applied once, after the blend.
  const int64_t width = p.widths[hidden], outs = p.out_width();
  for (int64_t q = 0; q < span.count; ++q) {
    const int64_t row = first_row[q];
    blend(last_rows + row * packed.stride, packed.stride, s.geometry.weight + row, first_row[q + 1] - row, width,
          s.blended);
    T* out = p.out + span.batch * p.out_batch + (span.first + q) * p.out_query;
    for (int64_t o = 0; o < outs; ++o)
      out[o * p.out_channel] =
          p.layers == 0 ? s.blended[o] : dot(s.blended, packed.last + o * packed.stride, width) + p.biases[p.layers][o];
  }
}

template <class Op>
static size_t packed_bytes(const DecodeProblem<typename Op::Acc>& p, bool gradients) {
  Arena arena{nullptr};
  Packed<Op>(p, gradients, arena);
  return arena.used;
}

template <class Op>
static void pack(const DecodeProblem<typename Op::Acc>& p, bool gradients, char* buffer) {
  Arena arena{buffer};
  Packed<Op>(p, gradients, arena).fill(p);
}

template <class Op, class Latent>
static void forward_tiles(const DecodeProblem<typename Op::Acc>& p, char* weights, int64_t begin, int64_t end,
                          char* buffer, const SavedActivations& saved) {
  Arena packed_arena{weights}, scratch_arena{buffer};
  const Packed<Op> packed(p, false, packed_arena);
  ForwardScratch<Op> scratch(p, scratch_arena);
  // Where corners are left out, tiles hold more queries: fewer than end - begin tiles then cover the same ones.
  for (int64_t tile = begin; tile < end;) {
    const TileSpan whole = tile_span(p, tile);
    const int64_t entry_end = (whole.batch + 1) * tiles_per_entry(p), stop = end < entry_end ? end : entry_end;
    const TileSpan last = tile_span(p, stop - 1);
    for (int64_t first = whole.first; first < last.first + last.count;) {
      const TileSpan span = locate(p, whole.batch, first, last.first + last.count, scratch.geometry);
      forward_tile<Op, Latent>(p, packed, span, scratch, saved.tile(tile++));
      first += span.count;
    }
    tile = stop;
  }
}

}  // namespace
}  // namespace liif_fast
