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
  if (row != row || col != col) {  // NaN has no latent: as in grid_sample, its features and its center are 0
    for (int side = 0; side < sides; ++side) {
      found.row[side] = found.col[side] = -2;  // the 3x3 around it are outside of the map too
      found.rel_row[side] = row * static_cast<T>(p.height);
      found.rel_col[side] = col * static_cast<T>(p.width);
    }
  }
  if (sides == 2) {
    area_weights(found.rel_row, found.rel_col, found.area_weight);
  } else {
    found.area_weight[0] = single_corner_weight(found.rel_row[0], found.rel_col[0]);
  }
  return found;
}

// A feature map in memory: the value of channel c at pixel i is data[i * pixel + c * channel].
template <class E>
struct Map {
  E* data;
  int64_t pixel, channel;
};

// A latent's channels: channel c is at data[c * step].
template <class E>
struct Latent {
  E* data;
  int64_t step;
};

// The latents that a corner reads: its own, or the 3x3 around it. `outside` stands for those outside of the map.
template <int kNeighbors, class E>
void find_latents(const Map<E>& map, int64_t row, int64_t col, int64_t height, int64_t width, E* outside,
                  Latent<E> (&found)[kNeighbors]) {
  for (int k = 0; k < kNeighbors; ++k) {
    const int64_t y = kNeighbors == 1 ? row : row + k / 3 - 1, x = kNeighbors == 1 ? col : col + k % 3 - 1;
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    found[k] = inside ? Latent<E>{map.data + (y * width + x) * map.pixel, map.channel} : Latent<E>{outside, 0};
  }
}

// to[c, r] = from[r, c], in blocks that stay in the cache.
template <class E>
void transpose(const E* from, int64_t from_stride, int64_t rows, int64_t cols, int64_t to_stride, E* to) {
  constexpr int64_t kBlock = 16;
  for (int64_t row = 0; row < rows; row += kBlock)
    for (int64_t col = 0; col < cols; col += kBlock)
      for (int64_t c = col; c < std::min(col + kBlock, cols); ++c)
        for (int64_t r = row; r < std::min(row + kBlock, rows); ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

// Whether a copy of the map with the channels of a pixel side by side pays: its latents are read often enough.
template <class T>
bool copies_map(const GatherProblem<T>& p) {
  return 2 * p.queries * p.corners >= p.height * p.width;
}

constexpr int64_t kGrain = 64;         // fewest queries of a shard
constexpr int64_t kChannelBlock = 16;  // channels of a shard of feat's gradient are a multiple

int64_t shards_for(int64_t count) { return std::max<int64_t>(1, std::min(thread_count(), count / kGrain)); }

template <int kNeighbors, class T, class E>
void gather_rows(const GatherProblem<T>& p, const E* feat, E* x, T* area_weight) {
  const int64_t count = p.batch * p.queries, features = p.features(), depth = p.depth(), pixels = p.height * p.width;
  Map<const E> map{feat, 1, pixels};
  const ThreadBuffers copy(1, copies_map(p) ? static_cast<size_t>(p.batch * pixels * p.channels) * sizeof(E) : 0);
  if (copies_map(p)) {
    E* const data = reinterpret_cast<E*>(copy[0]);
    const int64_t strips = p.batch * p.height;
    parallel_shards(strips, std::min(thread_count(), strips), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip)
        transpose(feat + strip / p.height * p.channels * pixels + strip % p.height * p.width, pixels, p.channels,
                  p.width, p.channels, data + strip * p.width * p.channels);
    });
    map = {data, p.channels, 1};
  }
  const E zero(0);
  parallel_shards(count, shards_for(count), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const Corners<T> found = find_corners(p, at);
      const Map<const E> entry{map.data + at / p.queries * p.channels * pixels, map.pixel, map.channel};
      for (int corner = 0; corner < p.corners; ++corner) {
        Latent<const E> latents[kNeighbors];
        find_latents(entry, found.row[corner >> 1], found.col[corner & 1], p.height, p.width, &zero, latents);
        E* out = x + (at * p.corners + corner) * depth;
        if (kNeighbors == 1 && latents[0].step == 1)
          std::copy_n(latents[0].data, p.channels, out);
        else
          for (int64_t channel = 0; channel < p.channels; ++channel)
            for (int k = 0; k < kNeighbors; ++k)
              out[channel * kNeighbors + k] = latents[k].data[channel * latents[k].step];
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

// A range of channels of a batch entry belongs to one thread, which walks the queries in order. That needs no atomics,
// and the result does not depend on the threads.
template <int kNeighbors, class T>
void scatter_rows(const GatherProblem<T>& p, const T* grad_x, T* grad_feat) {
  const int64_t depth = p.depth(), pixels = p.height * p.width;
  const int64_t wanted = std::max<int64_t>(1, p.channels * p.batch / thread_count());
  const int64_t part = std::min(p.channels, (wanted + kChannelBlock - 1) / kChannelBlock * kChannelBlock);
  const int64_t parts = (p.channels + part - 1) / part;
  torch::stable::parallel_for(0, p.batch * parts, 1, [&](int64_t begin, int64_t end) {
    const size_t bytes = static_cast<size_t>(pixels * part) * sizeof(T);
    const ThreadBuffers sums(1, copies_map(p) ? bytes : 0);
    T outside(0);
    for (int64_t shard = begin; shard < end; ++shard) {
      const int64_t batch = shard / parts, first = shard % parts * part, count = std::min(part, p.channels - first);
      T* const grad = grad_feat + (batch * p.channels + first) * pixels;
      Map<T> map{grad, 1, pixels};
      if (copies_map(p)) {
        map = {reinterpret_cast<T*>(sums[0]), part, 1};
        std::memset(map.data, 0, bytes);
      }
      for (int64_t at = batch * p.queries; at < (batch + 1) * p.queries; ++at) {
        const Corners<T> found = find_corners(p, at);
        for (int corner = 0; corner < p.corners; ++corner) {
          Latent<T> latents[kNeighbors];
          find_latents(map, found.row[corner >> 1], found.col[corner & 1], p.height, p.width, &outside, latents);
          const T* const row = grad_x + (at * p.corners + corner) * depth + first * kNeighbors;
          if (kNeighbors == 1 && latents[0].step == 1)
            for (int64_t channel = 0; channel < count; ++channel) latents[0].data[channel] += row[channel];
          else
            for (int64_t channel = 0; channel < count; ++channel)
              for (int k = 0; k < kNeighbors; ++k)
                latents[k].data[channel * latents[k].step] += row[channel * kNeighbors + k];
        }
      }
      if (copies_map(p)) transpose(map.data, part, pixels, count, pixels, grad);
    }
  });
}

}  // namespace

template <class T, class E>
void gather_forward(const GatherProblem<T>& p, const E* feat, E* x, T* area_weight) {
  p.feat_unfold ? gather_rows<9>(p, feat, x, area_weight) : gather_rows<1>(p, feat, x, area_weight);
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
  p.feat_unfold ? scatter_rows<9>(p, grad_x, grads.feat) : scatter_rows<1>(p, grad_x, grads.feat);
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
