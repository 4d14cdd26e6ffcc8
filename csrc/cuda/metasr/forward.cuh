// MetaSR's folded decode, forward: a warp decodes runs of 32 queries.
#pragma once

#include "cuda/metasr/task.cuh"

namespace liif_fast {
namespace {

// Values that a lane reuses from query to query: its part of a latent, and of `hidden` before the column's term is
// added.
template <class T>
struct LaneCache {
  T weight_col[kUnits<T>], base[kUnits<T>], latent[kOuts][kUnits<T>];
  T row, cell;           // inputs of `base`; NaN: none
  int64_t latent_index;  // of `latent`; -1: none

  __device__ __forceinline__ void reset(const MetasrTask<T>& task, int first) {
#pragma unroll
    for (int u = 0; u < kUnits<T>; ++u) {
      const int unit = first + u * kWarp;
      weight_col[u] = unit < task.hidden ? task.p.weight[kInputs * unit + 1] : T(0);
    }
    row = cell = static_cast<T>(NAN);
    latent_index = -1;
  }

  template <bool kWhole>
  __device__ __forceinline__ void set_base(const MetasrTask<T>& task, int first, const QueryLocation<T>& location) {
    if (location.input[0] == row && location.input[2] == cell) return;  // never true with NaN
    row = location.input[0];
    cell = location.input[2];
    const T* const weight = task.p.weight + kInputs * first;
    const T* const bias = task.p.bias + first;
    const int units = task.hidden - first;
#pragma unroll
    for (int u = 0; u < kUnits<T>; ++u)
      base[u] = kWhole || u * kWarp < units
                    ? multiply_add(weight[kInputs * kWarp * u], row,
                                   multiply_add(weight[kInputs * kWarp * u + 2], cell, bias[u * kWarp]))
                    : T(0);
  }
};

// kWhole: the hidden units fill all lanes, as MetaSR's 256 do, so that no lane needs a bounds check.
template <class T, class E, bool kWhole>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<T>)
    metasr_forward_kernel(MetasrTask<T> task, const E* __restrict__ latent_map) {
  __shared__ QueryLocation<T> shared_locations[kWarps][kWarp];
  const MetasrProblem<T>& p = task.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int my_query = lane % kBatch, my_out = lane / kBatch;  // sum_over_lanes gives their sum to this lane
  QueryLocation<T>* const locations = shared_locations[threadIdx.x / kWarp];
  const bool once =
      task.hidden <= kUnits<T> * kWarp && task.outs <= kOuts;  // then the cache stays valid between batches
  LaneCache<T> cache;
  cache.reset(task, lane);
  for (int64_t run = grid_warp(); run < task.runs; run += grid_warps()) {
    const int64_t first = run * kWarp, left = task.queries - first;
    const int count = static_cast<int>(left < kWarp ? left : kWarp);
    share_with_warp(locations, lane, locate(p, first + (lane < count ? lane : count - 1)));
    for (int out = 0; out < task.outs; out += kOuts) {
      for (int begin = 0; begin < count; begin += kBatch) {
        const int64_t my_row = locations[begin + my_query].latent * task.outs + out + my_out;
        const bool mine = my_out < kOuts && out + my_out < task.outs && begin + my_query < count;
        const T bias = mine ? widen(latent_map[my_row * task.row + task.hidden]) : T(0);
        T sum[kOuts][kBatch] = {};
        for (int unit = lane; unit < task.hidden + lane; unit += kUnits<T> * kWarp) {
          if (!once) cache.reset(task, unit);
          const int units = task.hidden - unit;
#pragma unroll
          for (int q = 0; q < kBatch; ++q) {
            const QueryLocation<T> location = locations[begin + q];
            cache.template set_base<kWhole>(task, unit, location);
            if (location.latent != cache.latent_index) {
              cache.latent_index = location.latent;
              load_latent(latent_map + (location.latent * task.outs + out) * task.row + unit, task.row, task.outs - out,
                          kWhole ? kUnits<T> * kWarp : units, cache.latent);
            }
#pragma unroll
            for (int u = 0; u < kUnits<T>; ++u) {
              T hidden = relu(multiply_add(cache.weight_col[u], location.input[1], cache.base[u]));
              if (!kWhole) hidden = u * kWarp < units ? hidden : T(0);
#pragma unroll
              for (int o = 0; o < kOuts; ++o) sum[o][q] = multiply_add(hidden, cache.latent[o][u], sum[o][q]);
            }
          }
        }
        const T total = sum_over_lanes(sum, lane);
        if (mine) p.out[(first + begin + my_query) * task.outs + out + my_out] = total + bias;
      }
    }
  }
}

}  // namespace
}  // namespace liif_fast
