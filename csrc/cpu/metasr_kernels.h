// MetaSR's folded decode, query by query; csrc/metasr.h has the formula.
#pragma once

#include "cpu/tile.h"
#include "metasr.h"

namespace liif_fast {
namespace {

template <class T>
struct MetasrScratch {
  T *weight[3], *bias, *hidden, *grad_hidden;  // [padded] each, zeros after `hidden`
  T *sum_weight[3], *sum_bias;
  int64_t padded;
  MetasrScratch(const MetasrProblem<T>& p, Arena& arena) {
    padded = round_up(p.hidden, Vec<T>::kLanes);
    for (auto*& column : weight) column = arena.take<T>(padded);
    bias = arena.take<T>(padded);
    hidden = arena.take<T>(padded);
    grad_hidden = arena.take<T>(padded);
    for (auto*& column : sum_weight) column = arena.take<T>(padded);
    sum_bias = arena.take<T>(padded);
  }
  void fill(const MetasrProblem<T>& p) {
    for (int64_t i = 0; i < padded; ++i) {
      const bool inside = i < p.hidden;
      for (int j = 0; j < 3; ++j) {
        weight[j][i] = inside ? p.weight[3 * i + j] : T(0);
        sum_weight[j][i] = T(0);
      }
      bias[i] = inside ? p.bias[i] : T(0);
      sum_bias[i] = T(0);
    }
  }
};

// The latent of query `at` (counted through the batch), and the three inputs of the query's filter.
template <class T>
LIIF_INLINE int64_t metasr_locate(const MetasrProblem<T>& p, int64_t at, T input[3]) {
  const Neighbor<T> row = find_metasr_neighbor(p.coord[2 * at], p.cell[2 * at], p.map_height);
  const Neighbor<T> col = find_metasr_neighbor(p.coord[2 * at + 1], p.cell[2 * at + 1], p.map_width);
  input[0] = row.rel;
  input[1] = col.rel;
  input[2] = p.cell[2 * at] * static_cast<T>(static_cast<double>(p.map_height) / 2.0);
  const int64_t map_row = clamp_to_region(row.index, p.region_top, p.region_height);
  return (at / p.queries * p.region_height + map_row) * p.region_width +
         clamp_to_region(col.index, p.region_left, p.region_width);
}

template <class T>
LIIF_INLINE void metasr_hidden(const T input[3], MetasrScratch<T>& s) {
  using V = Vec<T>;
  for (int64_t i = 0; i < s.padded; i += V::kLanes) {
    auto x = V::load(s.bias + i);
    for (int j = 0; j < 3; ++j) x = V::fma(V::broadcast(input[j]), V::load(s.weight[j] + i), x);
    V::store(s.hidden + i, V::relu(x));
  }
}

// Calls f(index, vector of the values from that index) for all `count` values of `row`; zeros fill the last vector.
template <class T, class F>
LIIF_INLINE void for_vectors(const T* row, int64_t count, F f) {
  using V = Vec<T>;
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) f(i, V::load(row + i));
  if (i < count) f(i, V::load_partial(row + i, static_cast<int>(count - i)));
}

template <class T>
static void metasr_forward(const MetasrProblem<T>& p, int64_t begin, int64_t end, char* buffer) {
  using V = Vec<T>;
  Arena arena{buffer};
  MetasrScratch<T> s(p, arena);
  s.fill(p);
  for (int64_t at = begin; at < end; ++at) {
    T input[3];
    const T* latent = static_cast<const T*>(p.latent_map) + metasr_locate(p, at, input) * p.outs * (p.hidden + 1);
    metasr_hidden(input, s);
    for (int64_t o = 0; o < p.outs; ++o, latent += p.hidden + 1) {
      auto sum = V::zero();
      for_vectors(latent, p.hidden, [&](int64_t i, typename V::Reg x) { sum = V::fma(x, V::load(s.hidden + i), sum); });
      p.out[at * p.outs + o] = V::sum(sum) + latent[p.hidden];
    }
  }
}

// Gradients of everything but the latent map. Those of weight and bias are left in the scratch's sums.
template <class T>
static void metasr_backward(const MetasrProblem<T>& p, const MetasrGrads<T>& grads, int64_t begin, int64_t end,
                            char* buffer) {
  using V = Vec<T>;
  Arena arena{buffer};
  MetasrScratch<T> s(p, arena);
  s.fill(p);
  const T half_height = static_cast<T>(static_cast<double>(p.map_height) / 2.0);
  const T half_width = static_cast<T>(static_cast<double>(p.map_width) / 2.0);
  for (int64_t at = begin; at < end; ++at) {
    T input[3], grad_input[3];
    const T* latent = static_cast<const T*>(p.latent_map) + metasr_locate(p, at, input) * p.outs * (p.hidden + 1);
    metasr_hidden(input, s);
    for (int64_t i = 0; i < s.padded; i += V::kLanes) V::store(s.grad_hidden + i, V::zero());
    for (int64_t o = 0; o < p.outs; ++o, latent += p.hidden + 1) {
      const auto grad = V::broadcast(grads.grad_out[at * p.outs + o]);
      for_vectors(latent, p.hidden, [&](int64_t i, typename V::Reg x) {
        V::store(s.grad_hidden + i, V::fma(grad, x, V::load(s.grad_hidden + i)));
      });
    }
    for (int64_t i = 0; i < s.padded; i += V::kLanes)
      V::store(s.grad_hidden + i, V::keep_where_positive(V::load(s.grad_hidden + i), V::load(s.hidden + i)));
    for (int j = 0; j < 3; ++j) {
      grad_input[j] = dot(s.grad_hidden, s.weight[j], s.padded);
      add_scaled(s.sum_weight[j], input[j], s.grad_hidden, s.padded);
    }
    add_scaled(s.sum_bias, T(1), s.grad_hidden, s.padded);
    grads.coord[2 * at] = grad_input[0] * half_height;
    grads.coord[2 * at + 1] = grad_input[1] * half_width;
    grads.cell[2 * at] = (grad_input[2] - grad_input[0] * T(0.5)) * half_height;
    grads.cell[2 * at + 1] = -grad_input[1] * T(0.5) * half_width;
  }
}

template <class T>
static void metasr_add_sums(const MetasrProblem<T>& p, char* buffer, const MetasrGrads<T>& grads) {
  Arena arena{buffer};
  const MetasrScratch<T> s(p, arena);
  for (int64_t i = 0; i < p.hidden; ++i) {
    for (int j = 0; j < 3; ++j) grads.weight[3 * i + j] += s.sum_weight[j][i];
    grads.bias[i] += s.sum_bias[i];
  }
}

// The latent map's gradient. Every owner walks all queries and adds to its own latents, so the order of the sums does
// not depend on the threads.
template <class T>
static void metasr_scatter(const MetasrProblem<T>& p, const MetasrGrads<T>& grads, int64_t owner, int64_t owners,
                           char* buffer) {
  Arena arena{buffer};
  MetasrScratch<T> s(p, arena);
  s.fill(p);
  for (int64_t at = 0; at < p.batch * p.queries; ++at) {
    T input[3];
    const int64_t latent = metasr_locate(p, at, input);
    if (latent % owners != owner) continue;
    metasr_hidden(input, s);
    T* grad = grads.latent_map + latent * p.outs * (p.hidden + 1);
    for (int64_t o = 0; o < p.outs; ++o, grad += p.hidden + 1) {
      const T grad_out = grads.grad_out[at * p.outs + o];
      for (int64_t i = 0; i < p.hidden; ++i) grad[i] += grad_out * s.hidden[i];
      grad[p.hidden] += grad_out;
    }
  }
}

}  // namespace
}  // namespace liif_fast
