// The gather's and the ensemble's problems in plain sizes and pointers.
#pragma once

#include <cstdint>

namespace liif_fast {

// T is the dtype of geometry: float or double. All arrays are contiguous. A void pointer is to the dtype of features
// (gather) or predictions (ensemble): T on the CPU, any float dtype on a GPU.
template <class T>
struct GatherProblem {
  int64_t batch, channels, height, width, queries;
  int corners;            // 4 with local ensemble, otherwise 1
  bool feat_unfold;       // 9 * channels features a row instead of channels
  const T *coord, *cell;  // [batch, queries, 2]; cell may be null
  bool has_cell;

  int64_t features() const { return channels * (feat_unfold ? 9 : 1); }
  int64_t depth() const { return features() + (has_cell ? 4 : 2); }
};

template <class T>
struct GatherGrads {
  const void* x;           // [batch, queries, corners, depth]
  const T* area_weight;    // [batch, queries, corners]
  T *feat, *coord, *cell;  // feat: [batch, channels, height, width], zeroed; cell may be null
};

template <class T>
struct EnsembleProblem {
  int64_t rows, corners, outs;
  const void* pred;      // [rows, corners, outs]
  const T* area_weight;  // [rows, corners]
};

template <class T>
struct EnsembleGrads {
  const T* out;           // [rows, outs]
  T *pred, *area_weight;  // as in the problem, both in T
};

}  // namespace liif_fast
