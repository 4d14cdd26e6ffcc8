// The problem of MetaSR's folded decode in plain sizes and pointers: hidden = relu(weight * (rel_row, rel_col,
// rel_cell) + bias) for every query, then out_o = sum_j hidden_j * latent[o, j] + latent[o, hidden].
#pragma once

#include <cstdint>

namespace liif_fast {

template <class T>
struct MetasrProblem {
  int64_t batch, queries, map_height, map_width;
  int64_t region_top, region_left, region_height, region_width;  // the part of the map in memory, as in decode.h
  int64_t hidden, outs;
  const void* latent_map;  // [batch, region_height, region_width, outs * (hidden + 1)]: T, on a GPU any float dtype
  const T *coord, *cell;   // [batch, queries, 2]
  const T *weight, *bias;  // [hidden, 3], [hidden]
  T* out;                  // [batch, queries, outs]
};

template <class T>
struct MetasrGrads {
  const T* grad_out;
  T *latent_map, *coord, *cell, *weight, *bias;
};

}  // namespace liif_fast
