// MetaSR's decode, backward to the latent map.
#pragma once

#include "cuda/metasr/task.cuh"

namespace liif_fast {
namespace {

// A lane's part of one latent's gradient, for kOuts outputs.
template <class T, int kCount>
struct LatentGrad {
  T value[kOuts][kCount], bias[kOuts];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int o = 0; o < kOuts; ++o) {
      bias[o] = 0;
#pragma unroll
      for (int u = 0; u < kCount; ++u) value[o][u] = 0;
    }
  }

  __device__ __forceinline__ void add(const MetasrTask<T>& task, const Filter<T, kCount>& filter,
                                      const QueryLocation<T>& location, const T* __restrict__ grad_out, int out) {
    T grad[kOuts];
#pragma unroll
    for (int o = 0; o < kOuts; ++o) {
      grad[o] = out + o < task.outs ? grad_out[location.query * task.outs + out + o] : T(0);
      bias[o] += grad[o];
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const T hidden = relu(filter(u, location.input));
#pragma unroll
      for (int o = 0; o < kOuts; ++o) value[o][u] = multiply_add(grad[o], hidden, value[o][u]);
    }
  }

  // Calls store(index in a latent's `count` rows of `row` numbers, value) for all values that exist; first: the lane's
  // first unit.
  template <class Store>
  __device__ __forceinline__ void for_each(int row, int count, int first, const Store& store) const {
#pragma unroll
    for (int o = 0; o < kOuts; ++o) {
      if (o >= count) break;
#pragma unroll
      for (int u = 0; u < kCount; ++u)
        if (first + u * kWarp < row - 1) store(o * row + first + u * kWarp, value[o][u]);
      if (first == 0) store(o * row + row - 1, bias[o]);  // by one lane, in the first chunk
    }
  }
};

// In the hardware's order. Consecutive queries of one latent are added up before they are added to memory.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    metasr_backward_map_kernel(MetasrTask<T> task, const T* __restrict__ grad_out, T* __restrict__ grad_map) {
  __shared__ QueryLocation<T> shared_locations[kWarps][kWarp];
  const MetasrProblem<T>& p = task.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  QueryLocation<T>* const locations = shared_locations[threadIdx.x / kWarp];
  const bool once = task.hidden <= kFewUnits<T> * kWarp;
  Filter<T, kFewUnits<T>> filter;
  filter.load(task, lane);
  for (int64_t run = grid_warp(); run < task.runs; run += grid_warps()) {
    const int64_t first = run * kWarp, left = task.queries - first;
    const int count = static_cast<int>(left < kWarp ? left : kWarp);
    share_with_warp(locations, lane, locate(p, first + (lane < count ? lane : count - 1)));
    for (int unit = lane; unit < task.hidden + lane; unit += kFewUnits<T> * kWarp) {
      if (!once) filter.load(task, unit);
      for (int out = 0; out < task.outs; out += kOuts) {
        LatentGrad<T, kFewUnits<T>> grad;
        grad.clear();
        for (int q = 0; q < count; ++q) {
          const QueryLocation<T> location = locations[q];
          grad.add(task, filter, location, grad_out, out);
          if (q + 1 < count && locations[q + 1].latent == location.latent) continue;
          T* const target = grad_map + (location.latent * task.outs + out) * task.row;
          grad.for_each(task.row, task.outs - out, unit, [&](int at, T value) { atomicAdd(target + at, value); });
          grad.clear();
        }
      }
    }
  }
}

// In the order of the queries. A warp owns a latent and adds up the latent's queries, order[starts[latent]] to
// order[starts[latent + 1]]. Every latent is written, and only once.
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<T>)
    metasr_backward_map_ordered_kernel(MetasrTask<T> task, const T* __restrict__ grad_out,
                                       const int64_t* __restrict__ order, const int64_t* __restrict__ starts,
                                       T* __restrict__ grad_map) {
  __shared__ QueryLocation<T> shared_locations[kWarps][kWarp];
  const MetasrProblem<T>& p = task.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  QueryLocation<T>* const locations = shared_locations[threadIdx.x / kWarp];
  const int64_t latents = p.batch * p.region_height * p.region_width;
  const bool once = task.hidden <= kUnits<T> * kWarp;
  Filter<T, kUnits<T>> filter;
  filter.load(task, lane);
  for (int64_t latent = grid_warp(); latent < latents; latent += grid_warps()) {
    const int64_t begin = starts[latent], end = starts[latent + 1];
    for (int unit = lane; unit < task.hidden + lane; unit += kUnits<T> * kWarp) {
      if (!once) filter.load(task, unit);
      for (int out = 0; out < task.outs; out += kOuts) {
        LatentGrad<T, kUnits<T>> grad;
        grad.clear();
        for (int64_t first = begin; first < end; first += kWarp) {
          const int count = static_cast<int>(end - first < kWarp ? end - first : kWarp);
          share_with_warp(locations, lane, locate(p, order[first + (lane < count ? lane : count - 1)]));
          for (int q = 0; q < count; ++q) grad.add(task, filter, locations[q], grad_out, out);
        }
        T* const target = grad_map + (latent * task.outs + out) * task.row;
        grad.for_each(task.row, task.outs - out, unit, [&](int at, T value) { target[at] = value; });
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) metasr_latents_kernel(MetasrTask<T> task, int64_t* __restrict__ latents) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t at = grid_warp() * kWarp + lane; at < task.queries; at += grid_warps() * kWarp)
    latents[at] = locate(task.p, at).latent;
}

}  // namespace
}  // namespace liif_fast
