// Shared by MetaSR's kernels: the task, a query's latent, sums over a warp's lanes, a lane's part of the filter.
#pragma once

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"
#include "geometry.h"

namespace liif_fast {
namespace {

constexpr int kInputs = 3;               // of the filter: rel_row, rel_col, rel_cell
constexpr int kTerms = kInputs + 1;      // of a hidden unit: a weight for each input, and its bias
constexpr int kOuts = 3;                 // outputs that are decoded together: a color
constexpr int kBatch = 4;                // queries whose sums over the lanes are taken together
constexpr int64_t kMaxShards = 1 << 10;  // of the queries; four waves of blocks on the largest devices
static_assert(kOuts <= 4 && kBatch == 4 && kInputs <= 4, "sum_over_lanes has two lane bits for each");

template <class T>
constexpr int kUnits = 32 / static_cast<int>(sizeof(T));  // hidden units that a lane holds at a time
template <class T>
constexpr int kFewUnits = kUnits<T> / 2;  // in kernels that need more registers for each
template <class T>
constexpr int kMinBlocksPerSm = sizeof(T) == 4 ? 2 : 1;

using liif_fast::relu;  // float's, which the next function would hide
__device__ __forceinline__ double relu(double value) { return value < 0.0 ? 0.0 : value; }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// A problem, and the numbers that every thread of its kernels would otherwise compute.
template <class T>
struct MetasrTask {
  MetasrProblem<T> p;
  int64_t queries, runs;  // of the whole batch; a run is 32 queries
  int hidden, outs, row;  // row: how many numbers a latent holds for one output
};

template <class T>
MetasrTask<T> make_task(const MetasrProblem<T>& p) {
  const int64_t queries = p.batch * p.queries;
  const int hidden = static_cast<int>(p.hidden);
  return {p, queries, (queries + kWarp - 1) / kWarp, hidden, static_cast<int>(p.outs), hidden + 1};
}

// A query's latent, and the inputs of the query's filter.
template <class T>
struct alignas(16) QueryLocation {
  T input[kInputs];
  int64_t latent, query;  // counted through the batch
};

template <class T>
__device__ __forceinline__ QueryLocation<T> locate(const MetasrProblem<T>& p, int64_t query) {
  const T cell_row = p.cell[2 * query], cell_col = p.cell[2 * query + 1];
  const Neighbor<T> row = find_metasr_neighbor(p.coord[2 * query], cell_row, p.map_height);
  const Neighbor<T> col = find_metasr_neighbor(p.coord[2 * query + 1], cell_col, p.map_width);
  QueryLocation<T> found;
  found.input[0] = row.rel;
  found.input[1] = col.rel;
  found.input[2] = mul_rounded(cell_row, static_cast<T>(static_cast<double>(p.map_height) / 2.0));
  found.latent = (query / p.queries * p.region_height + clamp_to_region(row.index, p.region_top, p.region_height)) *
                     p.region_width +
                 clamp_to_region(col.index, p.region_left, p.region_width);
  found.query = query;
  return found;
}

// Shares every lane's location with its warp.
template <class T>
__device__ __forceinline__ void share_with_warp(QueryLocation<T>* locations, int lane, const QueryLocation<T>& mine) {
  __syncwarp();  // wait until all lanes have read the previous locations
  locations[lane] = mine;
  __syncwarp();
}

// One step of two sums over the lanes: lanes with the bit `distance` continue with b, the others with a.
template <class T>
__device__ __forceinline__ T butterfly_step(T a, T b, int lane, int distance) {
  const T keep = lane & distance ? b : a, give = lane & distance ? a : b;
  return keep + __shfl_xor_sync(kAllLanes, give, distance);
}

// value[i][q] summed over the lanes, on lanes q + 4 * i and q + 4 * i + 16. Lanes of i = 3 get an undefined value.
template <class T>
__device__ __forceinline__ T sum_over_lanes(const T (&value)[3][kBatch], int lane) {
  T sum[3];
#pragma unroll
  for (int i = 0; i < 3; ++i)
    sum[i] = butterfly_step(butterfly_step(value[i][0], value[i][1], lane, 1),
                            butterfly_step(value[i][2], value[i][3], lane, 1), lane, 2);
  const T last = sum[2] + __shfl_xor_sync(kAllLanes, sum[2], 4);
  const T total = butterfly_step(butterfly_step(sum[0], sum[1], lane, 4), last, lane, 8);
  return total + __shfl_xor_sync(kAllLanes, total, 16);
}

// Loads a lane's part of a latent's rows for `count` outputs. left: hidden units from this lane's first one on. Values
// that do not exist are zero.
template <class T, class E, int kCount>
__device__ __forceinline__ void load_latent(const E* __restrict__ source, int row, int count, int left,
                                            T (&latent)[kOuts][kCount]) {
#pragma unroll
  for (int o = 0; o < kOuts; ++o)
#pragma unroll
    for (int u = 0; u < kCount; ++u)
      latent[o][u] = o < count && u * kWarp < left ? widen(source[o * row + u * kWarp]) : T(0);
}

// A lane's units of the filter; zero where units do not exist.
template <class T, int kCount>
struct Filter {
  T weight[kInputs][kCount], bias[kCount];

  __device__ __forceinline__ void load(const MetasrTask<T>& task, int first) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int unit = first + u * kWarp;
      const bool inside = unit < task.hidden;
#pragma unroll
      for (int k = 0; k < kInputs; ++k) weight[k][u] = inside ? task.p.weight[kInputs * unit + k] : T(0);
      bias[u] = inside ? task.p.bias[unit] : T(0);
    }
  }

  // Before the ReLU. The order of the terms is the forward's: both must agree on the sign.
  __device__ __forceinline__ T operator()(int u, const T (&input)[kInputs]) const {
    const T base = multiply_add(weight[0][u], input[0], multiply_add(weight[2][u], input[2], bias[u]));
    return multiply_add(weight[1][u], input[1], base);
  }
};

}  // namespace
}  // namespace liif_fast
