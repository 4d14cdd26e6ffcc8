// MetaSR's decode, backward to coord, cell and filter.
#pragma once

#include "cuda/metasr/task.cuh"

namespace liif_fast {
namespace {

// From the gradient of one of the filter's inputs (the lane's `input`) to gradients of coord and cell. All lanes take
// part.
template <class T>
__device__ __forceinline__ void store_geometry(const MetasrProblem<T>& p, const MetasrGrads<T>& grads, int64_t query,
                                               int input, bool mine, bool add, T grad) {
  const T half_height = static_cast<T>(static_cast<double>(p.map_height) / 2.0);
  const T half_width = static_cast<T>(static_cast<double>(p.map_width) / 2.0);
  const T grad_row = __shfl_xor_sync(kAllLanes, grad, 2 * kBatch);  // for the lanes of input 2
  if (!mine) return;
  const auto store = [add](T& value, T more) { value = add ? value + more : more; };
  if (input == 0) {
    store(grads.coord[2 * query], grad * half_height);
  } else if (input == 1) {
    store(grads.coord[2 * query + 1], grad * half_width);
    store(grads.cell[2 * query + 1], -grad * T(0.5) * half_width);
  } else {
    store(grads.cell[2 * query], (grad - grad_row * T(0.5)) * half_height);
  }
}

// A block takes one shard of the queries at a time and writes the shard's sums to partial[shard][term][unit].
template <class T, class E>
__global__ void __launch_bounds__(kThreads, 2)
    metasr_backward_filter_kernel(MetasrTask<T> task, const E* __restrict__ latent_map, MetasrGrads<T> grads,
                                  int64_t shards, T* __restrict__ partial) {
  constexpr int kChunk = kFewUnits<T> * kWarp;
  __shared__ QueryLocation<T> shared_locations[kWarps][kWarp];
  __shared__ T shared_sums[kWarps][kChunk];
  const MetasrProblem<T>& p = task.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int my_query = lane % kBatch, my_input = lane / kBatch;
  QueryLocation<T>* const locations = shared_locations[warp];
  for (int64_t shard = blockIdx.x; shard < shards; shard += gridDim.x) {
    const int64_t end_run = task.runs * (shard + 1) / shards;
    for (int chunk = 0; chunk < task.hidden; chunk += kChunk) {
      const int unit = chunk + lane, units = task.hidden - unit;
      Filter<T, kFewUnits<T>> filter;
      filter.load(task, unit);
      T sum[kTerms][kFewUnits<T>] = {}, latent[kOuts][kFewUnits<T>];
      int64_t latent_index = -1;  // of `latent`; -1: none
      for (int64_t run = task.runs * shard / shards + warp; run < end_run; run += kWarps) {
        const int64_t first = run * kWarp, left = task.queries - first;
        const int count = static_cast<int>(left < kWarp ? left : kWarp);
        share_with_warp(locations, lane, locate(p, first + (lane < count ? lane : count - 1)));
        for (int begin = 0; begin < count; begin += kBatch) {
          T grad_input[kInputs][kBatch] = {};
#pragma unroll
          for (int q = 0; q < kBatch; ++q) {
            if (begin + q >= count) continue;
            const QueryLocation<T> location = locations[begin + q];
            T grad_hidden[kFewUnits<T>] = {};
            for (int out = 0; out < task.outs; out += kOuts) {
              if (location.latent != latent_index || task.outs > kOuts)
                load_latent(latent_map + (location.latent * task.outs + out) * task.row + unit, task.row,
                            task.outs - out, units, latent);
              latent_index = location.latent;
#pragma unroll
              for (int o = 0; o < kOuts; ++o) {
                const T grad = out + o < task.outs ? grads.grad_out[location.query * task.outs + out + o] : T(0);
#pragma unroll
                for (int u = 0; u < kFewUnits<T>; ++u)
                  grad_hidden[u] = multiply_add(grad, latent[o][u], grad_hidden[u]);
              }
            }
#pragma unroll
            for (int u = 0; u < kFewUnits<T>; ++u) {
              const bool passes = u * kWarp < units && !(filter(u, location.input) <= T(0));  // NaN passes
              const T grad = passes ? grad_hidden[u] : T(0);
#pragma unroll
              for (int k = 0; k < kInputs; ++k) {
                sum[k][u] = multiply_add(grad, location.input[k], sum[k][u]);
                grad_input[k][q] = multiply_add(grad, filter.weight[k][u], grad_input[k][q]);
              }
              sum[kInputs][u] += grad;
            }
          }
          const bool mine = lane < kInputs * kBatch && begin + my_query < count;
          store_geometry(p, grads, first + begin + my_query, my_input, mine, chunk > 0,
                         sum_over_lanes(grad_input, lane));
        }
      }
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        __syncthreads();  // wait until all threads have read the previous term
#pragma unroll
        for (int u = 0; u < kFewUnits<T>; ++u) shared_sums[warp][u * kWarp + lane] = sum[k][u];
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < kChunk && chunk + i < task.hidden; i += kThreads) {
          T total = 0;
          for (int w = 0; w < kWarps; ++w) total += shared_sums[w][i];
          partial[(shard * kTerms + k) * task.hidden + chunk + i] = total;
        }
      }
    }
  }
}

// Adds the shards: a warp takes every eighth of them for 32 columns (term, unit), the block adds its warps' sums.
template <class T>
__global__ void __launch_bounds__(kThreads)
    metasr_backward_weight_kernel(const T* __restrict__ partial, int64_t shards, int64_t hidden,
                                  T* __restrict__ grad_weight, T* __restrict__ grad_bias) {
  __shared__ T shared_sums[kWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t columns = kTerms * hidden;
  for (int64_t first = int64_t{blockIdx.x} * kWarp; first < columns; first += int64_t{gridDim.x} * kWarp) {
    const int64_t column = first + lane;
    T sum = 0;
    if (column < columns) {
#pragma unroll 8
      for (int64_t shard = warp; shard < shards; shard += kWarps) sum += partial[shard * columns + column];
    }
    __syncthreads();
    shared_sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= columns) continue;
    for (int w = 1; w < kWarps; ++w) sum += shared_sums[w][lane];
    const int64_t term = column / hidden, unit = column - term * hidden;
    if (term < kInputs)
      grad_weight[kInputs * unit + term] = sum;
    else
      grad_bias[unit] = sum;
  }
}

}  // namespace
}  // namespace liif_fast
