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

// A problem's sizes, without its pointers. latent_map: batch, height, width, channels in memory. region: top, left, map
// height, map width. hidden: 0 for a problem that only finds latents.
template <class T>
MetasrProblem<T> make_metasr_problem(const int64_t (&latent_map)[4], int64_t queries, const int64_t* region,
                                     int64_t hidden) {
  MetasrProblem<T> p{};
  p.batch = latent_map[0];
  p.queries = queries;
  p.map_height = region[2];
  p.map_width = region[3];
  p.region_top = region[0];
  p.region_left = region[1];
  p.region_height = latent_map[1];
  p.region_width = latent_map[2];
  p.hidden = hidden;
  p.outs = latent_map[3] / (hidden + 1);
  return p;
}

}  // namespace liif_fast
