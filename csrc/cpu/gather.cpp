// gather and ensemble on the CPU. gather makes imnet inputs and area weights from feat, coord and cell in one pass;
// both have a backward.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "cpu/entry_points.h"
#include "cpu/parallel.h"
#include "geometry.h"

namespace liif_fast {
namespace {

template <class T>
struct Corners {
  int64_t row[2], col[2];
  T rel_row[2], rel_col[2], area_weight[4];
  bool exists;  // NaN coordinates have no latent: as in grid_sample, its features and its center are 0
};

template <class T>
Corners<T> find_corners(const GatherProblem<T>& p, int64_t at) {
  Corners<T> found{};
  const int sides = p.corners == 4 ? 2 : 1;
  for (int side = 0; side < sides; ++side) {
    const int direction = sides == 1 ? 0 : 2 * side - 1;
    const Neighbor<T> row = find_neighbor(p.coord[2 * at], direction, p.height);
    const Neighbor<T> col = find_neighbor(p.coord[2 * at + 1], direction, p.width);
    found.row[side] = row.index;
    found.col[side] = col.index;
    found.rel_row[side] = row.rel;
    found.rel_col[side] = col.rel;
  }
  const T row = p.coord[2 * at], col = p.coord[2 * at + 1];
  found.exists = row == row && col == col;
  if (!found.exists) {
    std::fill_n(found.rel_row, 2, row * static_cast<T>(p.height));
    std::fill_n(found.rel_col, 2, col * static_cast<T>(p.width));
  }
  if (sides == 2) {
    area_weights(found.rel_row, found.rel_col, found.area_weight);
  } else {
    found.area_weight[0] = single_corner_weight(found.rel_row[0], found.rel_col[0]);
  }
  return found;
}

// Calls f(source row, first source column, first neighbor of the 3x3's row, count) for every row of the neighborhood,
// cut to the map.
template <class F>
void for_neighbor_rows(int64_t row, int64_t col, int64_t height, int64_t width, const F& f) {
  const int64_t first = col > 0 ? col - 1 : 0, last = col + 1 < width ? col + 1 : width - 1;
  for (int64_t ky = 0; ky < 3; ++ky) {
    const int64_t source = row + ky - 1;
    if (source >= 0 && source < height) f(source, first, ky * 3 + (first - (col - 1)), last - first + 1);
  }
}

constexpr int64_t kGrain = 64;         // fewest queries of a shard
constexpr int64_t kChannelBlock = 16;  // channels whose gradient one shard owns

int64_t shards_for(int64_t count) { return std::max<int64_t>(1, std::min(thread_count(), count / kGrain)); }

}  // namespace

template <class T, class E>
void gather_forward(const GatherProblem<T>& p, const E* feat, E* x, T* area_weight) {
  const int64_t count = p.batch * p.queries, features = p.features(), depth = p.depth();
  parallel_shards(count, shards_for(count), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const Corners<T> found = find_corners(p, at);
      const E* entry = feat + at / p.queries * p.channels * p.height * p.width;
      for (int corner = 0; corner < p.corners; ++corner) {
        const int64_t row = found.row[corner >> 1], col = found.col[corner & 1];
        E* out = x + (at * p.corners + corner) * depth;
        if (p.feat_unfold || !found.exists) std::fill(out, out + features, E(0));
        if (p.feat_unfold && found.exists) {
          for (int64_t channel = 0; channel < p.channels; ++channel) {
            const E* plane = entry + channel * p.height * p.width;
            for_neighbor_rows(row, col, p.height, p.width, [&](int64_t source, int64_t first, int64_t k, int64_t n) {
              std::copy_n(plane + source * p.width + first, n, out + channel * 9 + k);
            });
          }
        } else if (found.exists) {
          for (int64_t channel = 0; channel < p.channels; ++channel)
            out[channel] = entry[(channel * p.height + row) * p.width + col];
        }
        out[features] = static_cast<E>(found.rel_row[corner >> 1]);
        out[features + 1] = static_cast<E>(found.rel_col[corner & 1]);
        if (p.cell) {
          out[features + 2] = static_cast<E>(p.cell[2 * at] * static_cast<T>(p.height));
          out[features + 3] = static_cast<E>(p.cell[2 * at + 1] * static_cast<T>(p.width));
        }
        area_weight[at * p.corners + corner] = found.area_weight[corner];
      }
    }
  });
}

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
template void gather_forward(const GatherProblem<double>&, const double*, double*, double*);
template void gather_forward(const GatherProblem<float>&, const float*, float*, float*);
template void gather_forward(const GatherProblem<float>&, const BFloat16*, BFloat16*, float*);
template void gather_forward(const GatherProblem<float>&, const Half*, Half*, float*);

template <class T>
void gather_backward(const GatherProblem<T>& p, const GatherGrads<T>& grads) {
  const int64_t count = p.batch * p.queries, features = p.features(), depth = p.depth();
  const T* const grad_x = static_cast<const T*>(grads.x);
  const T height = static_cast<T>(p.height), width = static_cast<T>(p.width);
  parallel_shards(count, shards_for(count), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const Corners<T> found = find_corners(p, at);
      T grad_row[2] = {0, 0}, grad_col[2] = {0, 0}, grad_cell[2] = {0, 0};
      for (int corner = 0; corner < p.corners; ++corner) {
        const T* grad = grad_x + (at * p.corners + corner) * depth + features;
        grad_row[corner >> 1] += grad[0];
        grad_col[corner & 1] += grad[1];
        if (p.has_cell) {
          grad_cell[0] += grad[2];
          grad_cell[1] += grad[3];
        }
      }
      if (p.corners == 4)
        area_weights_backward(found.rel_row, found.rel_col, grads.area_weight + at * 4, grad_row, grad_col);
      grads.coord[2 * at] = (grad_row[0] + grad_row[1]) * height;
      grads.coord[2 * at + 1] = (grad_col[0] + grad_col[1]) * width;
      if (p.has_cell) {
        grads.cell[2 * at] = grad_cell[0] * height;
        grads.cell[2 * at + 1] = grad_cell[1] * width;
      }
    }
  });

  // A block of channels belongs to one thread, which walks the queries in order. That needs no atomics, and the result
  // does not depend on the threads.
  const int64_t blocks = (p.channels + kChannelBlock - 1) / kChannelBlock, shards = p.batch * blocks;
  torch::stable::parallel_for(0, shards, 1, [&](int64_t begin, int64_t end) {
    for (int64_t shard = begin; shard < end; ++shard) {
      const int64_t batch = shard / blocks, first = shard % blocks * kChannelBlock;
      const int64_t last = std::min(first + kChannelBlock, p.channels);
      T* entry = grads.feat + batch * p.channels * p.height * p.width;
      for (int64_t q = 0; q < p.queries; ++q) {
        const int64_t at = batch * p.queries + q;
        const Corners<T> found = find_corners(p, at);
        if (!found.exists) continue;
        for (int corner = 0; corner < p.corners; ++corner) {
          const int64_t row = found.row[corner >> 1], col = found.col[corner & 1];
          const T* grad = grad_x + (at * p.corners + corner) * depth;
          for (int64_t channel = first; channel < last; ++channel) {
            T* plane = entry + channel * p.height * p.width;
            if (p.feat_unfold)
              for_neighbor_rows(row, col, p.height, p.width, [&](int64_t source, int64_t column, int64_t k, int64_t n) {
                for (int64_t i = 0; i < n; ++i) plane[source * p.width + column + i] += grad[channel * 9 + k + i];
              });
            else
              plane[row * p.width + col] += grad[channel];
          }
        }
      }
    }
  });
}
template void gather_backward(const GatherProblem<double>&, const GatherGrads<double>&);
template void gather_backward(const GatherProblem<float>&, const GatherGrads<float>&);

template <class T>
void ensemble_forward(const EnsembleProblem<T>& p, T* out) {
  const int64_t corners = p.corners, outs = p.outs;
  parallel_shards(p.rows, shards_for(p.rows), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* const values = static_cast<const T*>(p.pred) + row * corners * outs;
      const T* const weight = p.area_weight + row * corners;
      T* const blended = out + row * outs;
      if (corners == 4) {  // the sum stays in a register
        const T w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3];
        for (int64_t o = 0; o < outs; ++o)
          blended[o] = values[o] * w0 + values[outs + o] * w1 + values[2 * outs + o] * w2 + values[3 * outs + o] * w3;
        continue;
      }
      std::fill(blended, blended + outs, T(0));
      for (int64_t corner = 0; corner < corners; ++corner)
        for (int64_t o = 0; o < outs; ++o) blended[o] += values[corner * outs + o] * weight[corner];
    }
  });
}
template void ensemble_forward(const EnsembleProblem<double>&, double*);
template void ensemble_forward(const EnsembleProblem<float>&, float*);

namespace {

// kOuts: the number of outputs, 0 for any number. A constant 3, for colors, halves the time.
template <int kOuts, class T>
void ensemble_backward_rows(const EnsembleProblem<T>& p, const EnsembleGrads<T>& grads, int64_t begin, int64_t end) {
  const int64_t corners = p.corners, outs = kOuts ? kOuts : p.outs;
  const T *const pred = static_cast<const T*>(p.pred), *const area_weight = p.area_weight;
  T *const grad_pred = grads.pred, *const grad_area_weight = grads.area_weight;
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = grads.out + row * outs;
    for (int64_t corner = row * corners; corner < (row + 1) * corners; ++corner) {
      T sum = T(0);
      for (int64_t o = 0; o < outs; ++o) {
        sum += grad[o] * pred[corner * outs + o];
        grad_pred[corner * outs + o] = grad[o] * area_weight[corner];
      }
      grad_area_weight[corner] = sum;
    }
  }
}

}  // namespace

template <class T>
void ensemble_backward(const EnsembleProblem<T>& p, const EnsembleGrads<T>& grads) {
  const auto rows_backward = p.outs == 3 ? ensemble_backward_rows<3, T> : ensemble_backward_rows<0, T>;
  parallel_shards(p.rows, shards_for(p.rows),
                  [&](int64_t, int64_t begin, int64_t end) { rows_backward(p, grads, begin, end); });
}
template void ensemble_backward(const EnsembleProblem<double>&, const EnsembleGrads<double>&);
template void ensemble_backward(const EnsembleProblem<float>&, const EnsembleGrads<float>&);

}  // namespace liif_fast
