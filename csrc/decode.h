// The fused decode's problem in plain sizes and pointers: the bindings fill it, every kernel reads it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "geometry.h"

namespace liif_fast {

constexpr int kMaxLayers = 64;  // after the first; the bindings refuse a longer imnet

// The queries of a decode: where they lie, which latents they read, and where their results go. T is the dtype of
// geometry, weights and results: float or double. All arrays are contiguous.
template <class T>
struct DecodeQueries {
  int64_t batch, queries;  // queries of one batch entry; window_height * window_width for a grid
  int corners;             // 4 with local ensemble, otherwise 1

  const T* coord;  // [batch, queries, 2]; null: the grid below
  const T* cell;   // [batch, queries, 2]; null: grid_cell, if there is a cell at all

  // The latent map [batch, region_height, region_width, width] holds rows and columns from (region_top, region_left) of
  // a map of map_height x map_width.
  int64_t width, map_height, map_width, region_top, region_left, region_height, region_width;
  const void* latent_map;  // T, or the 16-bit dtype that the kernel's interface names

  int64_t image_height, image_width, window_top, window_left, window_height, window_width;
  T grid_cell[2];
  PixelAxis rows, cols;  // of a grid's whole image
  const T* query_term;   // [batch, queries, width], added before the first activation; null: nothing
  bool has_cell;

  bool skips_corners;  // the CPU's forward on a grid may leave out corners whose weight is 0 without rounding

  T* out;  // element (b, q, o) at b*out_batch + q*out_query + o*out_channel
  int64_t out_batch, out_query, out_channel;
};

template <class T>
struct DecodeProblem : DecodeQueries<T> {
  const T* weight_geometry;  // [width, 2 or 4]: the first layer's columns for rel_coord (and rel_cell)
  int layers;                // layers after the first
  const T* weights[kMaxLayers];
  const T* biases[kMaxLayers + 1];  // biases[0] is the first layer's
  int64_t widths[kMaxLayers + 1];   // widths[0] = width, widths[i + 1] = rows of weights[i]

  int64_t out_width() const { return widths[layers]; }
};

// Where the gradients go. grad_out has out's strides.
template <class T>
struct DecodeGrads {
  const T* grad_out;
  T* latent_map;
  T* weight_geometry;
  T* weights[kMaxLayers];
  T* biases[kMaxLayers + 1];
  T* coord;  // null for a grid, and where the gradients of coordinates and cells are not wanted
  T* cell;   // null without per-query cells
  T* query_term;
};

// A decode's sizes, without its pointers and layers. latent_map: batch, height, width, channels in memory. grid: image
// height, width; window top, left, height, width; region top, left; map height, width; null: `queries` coordinates.
// grid_cell: a pixel's row, col size, and with has_axes the origin and step of the rows and those of the columns.
template <class T>
DecodeProblem<T> make_decode_problem(const int64_t (&latent_map)[4], int64_t queries, const int64_t* grid,
                                     const double* grid_cell, bool local_ensemble, bool has_axes = false) {
  DecodeProblem<T> p{};
  p.batch = latent_map[0];
  p.region_height = latent_map[1];
  p.region_width = latent_map[2];
  p.width = p.widths[0] = latent_map[3];
  p.corners = local_ensemble ? 4 : 1;
  p.queries = queries;
  p.map_height = p.region_height;
  p.map_width = p.region_width;
  if (!grid) return p;
  p.image_height = grid[0];
  p.image_width = grid[1];
  p.rows = has_axes ? PixelAxis{grid_cell[2], grid_cell[3]} : image_axis(p.image_height);
  p.cols = has_axes ? PixelAxis{grid_cell[4], grid_cell[5]} : image_axis(p.image_width);
  p.window_top = grid[2];
  p.window_left = grid[3];
  p.window_height = grid[4];
  p.window_width = grid[5];
  p.region_top = grid[6];
  p.region_left = grid[7];
  p.map_height = grid[8];
  p.map_width = grid[9];
  p.queries = p.window_height * p.window_width;
  p.grid_cell[0] = static_cast<T>(grid_cell[0]);
  p.grid_cell[1] = static_cast<T>(grid_cell[1]);
  return p;
}

// Sets the layout of `out`, once the layers' widths are known: [batch, queries, outputs] at coordinates, [batch,
// outputs, height, width] for a grid.
template <class T>
void set_out_layout(DecodeProblem<T>& p) {
  p.out_batch = p.queries * p.out_width();
  p.out_query = p.coord ? p.out_width() : 1;
  p.out_channel = p.coord ? 1 : p.queries;
}

}  // namespace liif_fast
