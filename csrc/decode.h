// The fused decode's problem in plain sizes and pointers: what the bindings fill and every kernel reads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace liif_fast {

constexpr int kMaxLayers = 64;  // after the first; a longer imnet is refused by the bindings

// T is the dtype of geometry, weights and result: float or double. All arrays are contiguous.
template <class T>
struct QueryProblem {
  int64_t batch, queries;  // queries of one batch entry; window_height * window_width for a grid
  int corners;             // 4 with local ensemble, otherwise 1

  // The latent map [batch, region_height, region_width, width] holds rows and columns from (region_top, region_left) of
  // a map of map_height x map_width.
  const void* latent_map;  // T, or bfloat16 where the kernel says so
  int64_t map_height, map_width, region_top, region_left, region_height, region_width, width;

  const T* coord;  // [batch, queries, 2]; null: the grid below
  const T* cell;   // [batch, queries, 2]; null: grid_cell, if there is a cell at all
  int64_t image_height, image_width, window_top, window_left, window_height, window_width;
  T grid_cell[2];
  bool has_cell;

  const T* weight_geometry;  // [width, 2 or 4]: the first layer's part for rel_coord (and rel_cell)
  int layers;                // layers after the first
  const T* weights[kMaxLayers];
  const T* biases[kMaxLayers + 1];  // biases[0] is the first layer's
  int64_t widths[kMaxLayers + 1];   // widths[0] = width, widths[i + 1] = rows of weights[i]

  T* out;  // element (b, q, o) at b*out_batch + q*out_query + o*out_channel
  int64_t out_batch, out_query, out_channel;

  int64_t out_width() const { return widths[layers]; }
};

// Where gradients go. grad_out has out's strides.
template <class T>
struct QueryGrads {
  const T* grad_out;
  T* latent_map;
  T* weight_geometry;
  T* weights[kMaxLayers];
  T* biases[kMaxLayers + 1];
  T* coord;  // null for a grid
  T* cell;   // null without per-query cells
};

template <class T>
struct MetasrProblem {
  int64_t batch, queries, map_height, map_width;
  int64_t region_top, region_left, region_height, region_width;  // the part of the map in memory, as above
  int64_t hidden, outs;  // latent_map: [batch, region_height, region_width, outs * (hidden + 1)]
  const T *latent_map, *coord, *cell, *weight, *bias;  // weight: [hidden, 3]
  T* out;                                              // [batch, queries, outs]
};

template <class T>
struct MetasrGrads {
  const T* grad_out;
  T *latent_map, *coord, *cell, *weight, *bias;
};

}  // namespace liif_fast
