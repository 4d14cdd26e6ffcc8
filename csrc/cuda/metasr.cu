// MetaSR's folded decode on the GPU: hidden = relu(weight * (rel_row, rel_col, rel_cell) + bias) for every query, then
// out_o = sum_j hidden_j * latent[o, j] + latent[o, hidden], and the way back. Not yet run on a GPU.
//
// A lane owns a few hidden units, the same ones for all queries, so that every access to a latent is one whole segment.
// A warp walks 32 consecutive queries: first each lane finds the latent of one of them, then all lanes decode one query
// after the other. What neighbouring queries share stays in registers: the latent's values (neighbours of an upscaled
// image lie on the same latent), and the part of `hidden` that row and cell decide (all queries of an image row have it
// in common). What is left of a query is five instructions a hidden unit; its sums over the lanes are taken for four
// queries and three outputs at a time, by one tree of shuffles instead of twelve.
//
// Backward: the weights' gradients are summed in registers, then over a block, and end as one partial sum a piece of
// the queries; a last kernel adds the pieces. The pieces and every order of summation depend on the problem alone. The
// latent map's gradient is summed in registers while queries stay on one latent, then added with atomics; or, where the
// caller has sorted the queries by latent, written once a latent with its queries added in their order.
#include "../geometry.h"
#include "common.cuh"
#include "ptx.cuh"

namespace liif_fast {
namespace {

constexpr int kInputs = 3;               // of the filter: rel_row, rel_col, rel_cell
constexpr int kTerms = kInputs + 1;      // of a hidden unit: a weight for each input, and its bias
constexpr int kOuts = 3;                 // outputs that are decoded together: a colour
constexpr int kBatch = 4;                // queries whose sums over the lanes are taken together
constexpr int64_t kMaxPieces = 1 << 10;  // of the queries; four waves of blocks on the largest devices
static_assert(kOuts <= 4 && kBatch == 4 && kInputs <= 4, "sum_over_lanes has two lane bits for each");

template <class T>
constexpr int kUnits = 32 / static_cast<int>(sizeof(T));  // hidden units that a lane holds at a time
template <class T>
constexpr int kFewUnits = kUnits<T> / 2;  // where it keeps more of each
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 2 : 1;  // that share a multiprocessor's registers

using liif_fast::relu;  // float's; the function below would hide it
__device__ __forceinline__ double relu(double value) { return value < 0.0 ? 0.0 : value; }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// A problem with what its kernels would otherwise each work out.
template <class T>
struct Task {
  MetasrProblem<T> p;
  int64_t queries, runs;  // of all maps; a run is 32 queries
  int hidden, outs, row;  // row: numbers of one output of a latent
};

template <class T>
Task<T> make_task(const MetasrProblem<T>& p) {
  const int64_t queries = p.batch * p.queries;
  const int hidden = static_cast<int>(p.hidden);
  return {p, queries, (queries + kWarp - 1) / kWarp, hidden, static_cast<int>(p.outs), hidden + 1};
}

// Where a query looks, and the inputs of its filter.
template <class T>
struct alignas(16) Place {
  T input[kInputs];
  int64_t latent;  // counted through all maps
  int64_t query;   // likewise
};

// The doors promise that a region holds every latent under a query; memory does not depend on that promise.
__device__ __forceinline__ int64_t inside_region(int64_t index, int64_t first, int64_t count) {
  const int64_t local = index - first;
  return local < 0 ? 0 : (local < count ? local : count - 1);
}

template <class T>
__device__ __forceinline__ Place<T> locate(const MetasrProblem<T>& p, int64_t query) {
  const T cell_row = p.cell[2 * query], cell_col = p.cell[2 * query + 1];
  const Neighbour<T> row = find_metasr_neighbour(p.coord[2 * query], cell_row, p.map_height);
  const Neighbour<T> col = find_metasr_neighbour(p.coord[2 * query + 1], cell_col, p.map_width);
  Place<T> place;
  place.input[0] = row.rel;
  place.input[1] = col.rel;
  place.input[2] = mul_rounded(cell_row, static_cast<T>(static_cast<double>(p.map_height) / 2.0));
  place.latent =
      (query / p.queries * p.region_height + inside_region(row.index, p.region_top, p.region_height)) * p.region_width +
      inside_region(col.index, p.region_left, p.region_width);
  place.query = query;
  return place;
}

// Shows a lane's place to its warp.
template <class T>
__device__ __forceinline__ void show(Place<T>* places, int lane, const Place<T>& place) {
  __syncwarp();  // whoever still reads the places before these
  places[lane] = place;
  __syncwarp();
}

// Half of two sums: lanes with the bit `distance` go on with b, the others with a.
template <class T>
__device__ __forceinline__ T halve(T a, T b, int lane, int distance) {
  const T keep = lane & distance ? b : a, give = lane & distance ? a : b;
  return keep + __shfl_xor_sync(kAllLanes, give, distance);
}

// value[i][q] summed over the lanes, for lane q + 4 * i and every 16th from there. Lanes of i = 3 get something else.
template <class T>
__device__ __forceinline__ T sum_over_lanes(const T (&value)[3][kBatch], int lane) {
  T sum[3];
#pragma unroll
  for (int i = 0; i < 3; ++i)
    sum[i] = halve(halve(value[i][0], value[i][1], lane, 1), halve(value[i][2], value[i][3], lane, 1), lane, 2);
  const T last = sum[2] + __shfl_xor_sync(kAllLanes, sum[2], 4);
  const T total = halve(halve(sum[0], sum[1], lane, 4), last, lane, 8);
  return total + __shfl_xor_sync(kAllLanes, total, 16);
}

// A lane's part of `count` outputs' rows of a latent; `left` of the hidden units are still to come, this lane's first
// among them. What does not exist is zero.
template <class T, class E, int kCount>
__device__ __forceinline__ void load_latent(const E* __restrict__ source, int row, int count, int left,
                                            T (&latent)[kOuts][kCount]) {
#pragma unroll
  for (int o = 0; o < kOuts; ++o)
#pragma unroll
    for (int u = 0; u < kCount; ++u)
      latent[o][u] = o < count && u * kWarp < left ? widen(source[o * row + u * kWarp]) : T(0);
}

// A lane's units of the filter. Units that do not exist are zero.
template <class T, int kCount>
struct Filter {
  T weight[kInputs][kCount], bias[kCount];

  __device__ __forceinline__ void load(const Task<T>& task, int first) {
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

// ------------------------------------------------------------------------------------------------------------ forward

// What a lane keeps from query to query: its part of a latent, and of `hidden` before the column's share is added.
template <class T>
struct Kept {
  T weight_col[kUnits<T>], base[kUnits<T>], latent[kOuts][kUnits<T>];
  T row, cell;    // that base is for; NaN: none
  int64_t which;  // latent; -1: none

  __device__ __forceinline__ void begin(const Task<T>& task, int first) {
#pragma unroll
    for (int u = 0; u < kUnits<T>; ++u) {
      const int unit = first + u * kWarp;
      weight_col[u] = unit < task.hidden ? task.p.weight[kInputs * unit + 1] : T(0);
    }
    row = cell = static_cast<T>(NAN);
    which = -1;
  }

  template <bool kWhole>
  __device__ __forceinline__ void set_base(const Task<T>& task, int first, const Place<T>& place) {
    if (place.input[0] == row && place.input[2] == cell) return;  // never with NaN
    row = place.input[0];
    cell = place.input[2];
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

// kWhole: the hidden units fill the lanes, as MetaSR's 256 do, and nothing has to be left out.
template <class T, class E, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    metasr_forward_kernel(Task<T> task, const E* __restrict__ latent_map) {
  __shared__ Place<T> shared_places[kWarps][kWarp];
  const MetasrProblem<T>& p = task.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int my_query = lane % kBatch, my_out = lane / kBatch;  // whose sum sum_over_lanes gives to this lane
  Place<T>* const places = shared_places[threadIdx.x / kWarp];
  const bool once = task.hidden <= kUnits<T> * kWarp && task.outs <= kOuts;  // then what is kept outlives a batch
  Kept<T> kept;
  kept.begin(task, lane);
  for (int64_t run = grid_warp(); run < task.runs; run += grid_warps()) {
    const int64_t first = run * kWarp, left = task.queries - first;
    const int count = static_cast<int>(left < kWarp ? left : kWarp);
    show(places, lane, locate(p, first + (lane < count ? lane : count - 1)));
    for (int out = 0; out < task.outs; out += kOuts) {
      for (int begin = 0; begin < count; begin += kBatch) {
        const int64_t my_row = places[begin + my_query].latent * task.outs + out + my_out;
        const bool mine = my_out < kOuts && out + my_out < task.outs && begin + my_query < count;
        const T bias = mine ? widen(latent_map[my_row * task.row + task.hidden]) : T(0);
        T sum[kOuts][kBatch] = {};
        for (int unit = lane; unit < task.hidden + lane; unit += kUnits<T> * kWarp) {
          if (!once) kept.begin(task, unit);
          const int units = task.hidden - unit;
#pragma unroll
          for (int q = 0; q < kBatch; ++q) {
            const Place<T> place = places[begin + q];
            kept.template set_base<kWhole>(task, unit, place);
            if (place.latent != kept.which) {
              kept.which = place.latent;
              load_latent(latent_map + (place.latent * task.outs + out) * task.row + unit, task.row, task.outs - out,
                          kWhole ? kUnits<T> * kWarp : units, kept.latent);
            }
#pragma unroll
            for (int u = 0; u < kUnits<T>; ++u) {
              T hidden = relu(multiply_add(kept.weight_col[u], place.input[1], kept.base[u]));
              if (!kWhole) hidden = u * kWarp < units ? hidden : T(0);
#pragma unroll
              for (int o = 0; o < kOuts; ++o) sum[o][q] = multiply_add(hidden, kept.latent[o][u], sum[o][q]);
            }
          }
        }
        const T total = sum_over_lanes(sum, lane);
        if (mine) p.out[(first + begin + my_query) * task.outs + out + my_out] = total + bias;
      }
    }
  }
}

// ------------------------------------------------------------------------------- gradients of coord, cell and filter

// From the gradient of one of the filter's inputs (the lane's `input`) to those of coord and cell. All lanes take part.
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

// A block takes a piece of the queries at a time and leaves its sums in partial[piece][term][unit].
template <class T, class E>
__global__ void __launch_bounds__(kThreads, 2)
    metasr_backward_filter_kernel(Task<T> task, const E* __restrict__ latent_map, MetasrGrads<T> grads, int64_t pieces,
                                  T* __restrict__ partial) {
  constexpr int kChunk = kFewUnits<T> * kWarp;
  __shared__ Place<T> shared_places[kWarps][kWarp];
  __shared__ T shared_sums[kWarps][kChunk];
  const MetasrProblem<T>& p = task.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int my_query = lane % kBatch, my_input = lane / kBatch;
  Place<T>* const places = shared_places[warp];
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const int64_t end_run = task.runs * (piece + 1) / pieces;
    for (int chunk = 0; chunk < task.hidden; chunk += kChunk) {
      const int unit = chunk + lane, units = task.hidden - unit;
      Filter<T, kFewUnits<T>> filter;
      filter.load(task, unit);
      T sum[kTerms][kFewUnits<T>] = {}, latent[kOuts][kFewUnits<T>];
      int64_t which = -1;  // latent's
      for (int64_t run = task.runs * piece / pieces + warp; run < end_run; run += kWarps) {
        const int64_t first = run * kWarp, left = task.queries - first;
        const int count = static_cast<int>(left < kWarp ? left : kWarp);
        show(places, lane, locate(p, first + (lane < count ? lane : count - 1)));
        for (int begin = 0; begin < count; begin += kBatch) {
          T grad_input[kInputs][kBatch] = {};
#pragma unroll
          for (int q = 0; q < kBatch; ++q) {
            if (begin + q >= count) continue;
            const Place<T> place = places[begin + q];
            T grad_hidden[kFewUnits<T>] = {};
            for (int out = 0; out < task.outs; out += kOuts) {
              if (place.latent != which || task.outs > kOuts)
                load_latent(latent_map + (place.latent * task.outs + out) * task.row + unit, task.row, task.outs - out,
                            units, latent);
              which = place.latent;
#pragma unroll
              for (int o = 0; o < kOuts; ++o) {
                const T grad = out + o < task.outs ? grads.grad_out[place.query * task.outs + out + o] : T(0);
#pragma unroll
                for (int u = 0; u < kFewUnits<T>; ++u)
                  grad_hidden[u] = multiply_add(grad, latent[o][u], grad_hidden[u]);
              }
            }
#pragma unroll
            for (int u = 0; u < kFewUnits<T>; ++u) {
              const bool passes = u * kWarp < units && !(filter(u, place.input) <= T(0));  // NaN passes
              const T grad = passes ? grad_hidden[u] : T(0);
#pragma unroll
              for (int k = 0; k < kInputs; ++k) {
                sum[k][u] = multiply_add(grad, place.input[k], sum[k][u]);
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
        __syncthreads();  // whoever still reads the term before this
#pragma unroll
        for (int u = 0; u < kFewUnits<T>; ++u) shared_sums[warp][u * kWarp + lane] = sum[k][u];
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < kChunk && chunk + i < task.hidden; i += kThreads) {
          T total = 0;
          for (int w = 0; w < kWarps; ++w) total += shared_sums[w][i];
          partial[(piece * kTerms + k) * task.hidden + chunk + i] = total;
        }
      }
    }
  }
}

// Adds the pieces: a warp takes every eighth of them for 32 columns (term, unit), the block adds its warps' sums.
template <class T>
__global__ void __launch_bounds__(kThreads)
    metasr_backward_weight_kernel(const T* __restrict__ partial, int64_t pieces, int64_t hidden,
                                  T* __restrict__ grad_weight, T* __restrict__ grad_bias) {
  __shared__ T shared_sums[kWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t columns = kTerms * hidden;
  for (int64_t first = int64_t{blockIdx.x} * kWarp; first < columns; first += int64_t{gridDim.x} * kWarp) {
    const int64_t column = first + lane;
    T sum = 0;
    if (column < columns) {
#pragma unroll 8
      for (int64_t piece = warp; piece < pieces; piece += kWarps) sum += partial[piece * columns + column];
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

// --------------------------------------------------------------------------------------- gradient of the latent map

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

  __device__ __forceinline__ void add(const Task<T>& task, const Filter<T, kCount>& filter, const Place<T>& place,
                                      const T* __restrict__ grad_out, int out) {
    T grad[kOuts];
#pragma unroll
    for (int o = 0; o < kOuts; ++o) {
      grad[o] = out + o < task.outs ? grad_out[place.query * task.outs + out + o] : T(0);
      bias[o] += grad[o];
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const T hidden = relu(filter(u, place.input));
#pragma unroll
      for (int o = 0; o < kOuts; ++o) value[o][u] = multiply_add(grad[o], hidden, value[o][u]);
    }
  }

  // store(index in a latent's `count` rows of `row` numbers, value) for all that exist; first: the lane's first unit.
  template <class Store>
  __device__ __forceinline__ void give(int row, int count, int first, const Store& store) const {
#pragma unroll
    for (int o = 0; o < kOuts; ++o) {
      if (o >= count) break;
#pragma unroll
      for (int u = 0; u < kCount; ++u)
        if (first + u * kWarp < row - 1) store(o * row + first + u * kWarp, value[o][u]);
      if (first == 0) store(o * row + row - 1, bias[o]);  // one lane, of the first chunk
    }
  }
};

// In the hardware's order: one addition to memory for each time that the walk leaves a latent.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    metasr_backward_map_kernel(Task<T> task, const T* __restrict__ grad_out, T* __restrict__ grad_map) {
  __shared__ Place<T> shared_places[kWarps][kWarp];
  const MetasrProblem<T>& p = task.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Place<T>* const places = shared_places[threadIdx.x / kWarp];
  const bool once = task.hidden <= kFewUnits<T> * kWarp;
  Filter<T, kFewUnits<T>> filter;
  filter.load(task, lane);
  for (int64_t run = grid_warp(); run < task.runs; run += grid_warps()) {
    const int64_t first = run * kWarp, left = task.queries - first;
    const int count = static_cast<int>(left < kWarp ? left : kWarp);
    show(places, lane, locate(p, first + (lane < count ? lane : count - 1)));
    for (int unit = lane; unit < task.hidden + lane; unit += kFewUnits<T> * kWarp) {
      if (!once) filter.load(task, unit);
      for (int out = 0; out < task.outs; out += kOuts) {
        LatentGrad<T, kFewUnits<T>> grad;
        grad.clear();
        for (int q = 0; q < count; ++q) {
          const Place<T> place = places[q];
          grad.add(task, filter, place, grad_out, out);
          if (q + 1 < count && places[q + 1].latent == place.latent) continue;
          T* const target = grad_map + (place.latent * task.outs + out) * task.row;
          grad.give(task.row, task.outs - out, unit, [&](int at, T value) { atomicAdd(target + at, value); });
          grad.clear();
        }
      }
    }
  }
}

// In the order of the queries: a warp owns a latent and adds up its queries, order[starts[latent]] to
// order[starts[latent + 1]]. Every latent is written, and only once.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    metasr_backward_map_ordered_kernel(Task<T> task, const T* __restrict__ grad_out, const int64_t* __restrict__ order,
                                       const int64_t* __restrict__ starts, T* __restrict__ grad_map) {
  __shared__ Place<T> shared_places[kWarps][kWarp];
  const MetasrProblem<T>& p = task.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Place<T>* const places = shared_places[threadIdx.x / kWarp];
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
          show(places, lane, locate(p, order[first + (lane < count ? lane : count - 1)]));
          for (int q = 0; q < count; ++q) grad.add(task, filter, places[q], grad_out, out);
        }
        T* const target = grad_map + (latent * task.outs + out) * task.row;
        grad.give(task.row, task.outs - out, unit, [&](int at, T value) { target[at] = value; });
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) metasr_latents_kernel(Task<T> task, int64_t* __restrict__ latents) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t at = grid_warp() * kWarp + lane; at < task.queries; at += grid_warps() * kWarp)
    latents[at] = locate(task.p, at).latent;
}

// Offsets inside a latent are ints.
constexpr const char* kTooWide = "a latent of MetaSR's map holds more than 2^28 numbers";
template <class T>
bool is_too_wide(const MetasrProblem<T>& p) {
  return p.outs * (p.hidden + 1) > int64_t{1} << 28;
}

template <class T>
int64_t piece_count(const MetasrProblem<T>& p) {
  const int64_t runs = make_task(p).runs, blocks = (runs + kWarps - 1) / kWarps;
  return blocks < kMaxPieces ? blocks : kMaxPieces;
}

template <class T, class E>
const char* launch_filter_backward(const Task<T>& task, const E* latent_map, const MetasrGrads<T>& grads, T* workspace,
                                   void* stream) {
  const int64_t pieces = piece_count(task.p);
  if (pieces > 0) {
    const char* const error = launch(metasr_backward_filter_kernel<T, E>, static_cast<unsigned>(pieces), stream, task,
                                     latent_map, grads, pieces, workspace);
    if (error) return error;
  }
  return launch(metasr_backward_weight_kernel<T>, blocks_for(kTerms * task.hidden), stream, workspace, pieces,
                task.hidden, grads.weight, grads.bias);
}

}  // namespace

template <class T>
const char* launch_metasr_forward(const MetasrProblem<T>& problem, Dtype dtype, const void* latent_map, void* stream) {
  const Task<T> task = make_task(problem);
  if (task.queries == 0) return nullptr;
  if (is_too_wide(problem)) return kTooWide;
  return with_type<T>(dtype, [&](auto element) {
    using E = decltype(element);
    const auto run = [&](auto kernel) {
      return launch(kernel, blocks_for(task.runs), stream, task, static_cast<const E*>(latent_map));
    };
    if constexpr (std::is_same_v<T, float>)
      if (problem.hidden % (kUnits<T> * kWarp) == 0) return run(metasr_forward_kernel<T, E, true>);
    return run(metasr_forward_kernel<T, E, false>);
  });
}

template <class T>
int64_t metasr_workspace(const MetasrProblem<T>& problem) {
  return piece_count(problem) * kTerms * problem.hidden;
}

template <class T>
const char* launch_metasr_latents(const MetasrProblem<T>& problem, int64_t* latents, void* stream) {
  const Task<T> task = make_task(problem);
  if (task.queries == 0) return nullptr;
  return launch(metasr_latents_kernel<T>, blocks_for(task.runs), stream, task, latents);
}

template <class T>
const char* launch_metasr_backward(const MetasrProblem<T>& problem, Dtype dtype, const void* latent_map,
                                   const MetasrGrads<T>& grads, const int64_t* order, const int64_t* starts,
                                   T* workspace, void* stream) {
  const Task<T> task = make_task(problem);
  if (is_too_wide(problem)) return kTooWide;
  const char* const error = with_type<T>(dtype, [&](auto element) {
    using E = decltype(element);
    return launch_filter_backward(task, static_cast<const E*>(latent_map), grads, workspace, stream);
  });
  if (error || problem.batch == 0) return error;
  if (order)
    return launch(metasr_backward_map_ordered_kernel<T>,
                  blocks_for(problem.batch * problem.region_height * problem.region_width), stream, task,
                  grads.grad_out, order, starts, grads.latent_map);
  if (task.queries == 0) return nullptr;
  return launch(metasr_backward_map_kernel<T>, blocks_for(task.runs), stream, task, grads.grad_out, grads.latent_map);
}

#define LIIF_INSTANTIATE(T)                                                                                       \
  template const char* launch_metasr_forward(const MetasrProblem<T>&, Dtype, const void*, void*);                 \
  template int64_t metasr_workspace(const MetasrProblem<T>&);                                                     \
  template const char* launch_metasr_latents(const MetasrProblem<T>&, int64_t*, void*);                           \
  template const char* launch_metasr_backward(const MetasrProblem<T>&, Dtype, const void*, const MetasrGrads<T>&, \
                                              const int64_t*, const int64_t*, T*, void*);
LIIF_INSTANTIATE(double)
LIIF_INSTANTIATE(float)
#undef LIIF_INSTANTIATE

}  // namespace liif_fast
