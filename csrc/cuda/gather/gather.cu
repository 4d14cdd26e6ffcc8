// gather on the GPU: imnet inputs and area weights from feat, coord and cell in one pass, and the backward.
//
// A warp owns 32 consecutive rows of x (a row is one corner of one query, so without a remainder 8 queries x 4
// corners). First each lane finds the latent of one row, with the corner in the lane's two low bits. Then all lanes
// write one row after the other, in consecutive features, so that x, by far the largest array, is written in whole
// segments. The value of a feature (channel, neighbor in the 3x3) is at the same offset from every row's latent, so the
// offset is computed once for 32 rows. No unfolded map exists.
//
// Rounding: geometry.h is the only arithmetic that decides on an index, and none of it may contract to FMA (it uses the
// _rn intrinsics, and setup.py passes --fmad=false). torch's own CUDA grid_sample contracts ((x + 1) * size - 1) / 2 to
// an FMA and rounds once fewer. Both agree unless the product's rounding moves a position across a tie, which the shift
// of 1e-6 keeps away from pixel centers on maps of up to about a thousand latents. We follow the order of operations of
// torch's CPU kernel.
#include "cuda/common.cuh"
#include "cuda/gather/patch_backward.cuh"
#include "cuda/gather/patch_forward.cuh"
#include "geometry.h"

namespace liif_fast {
namespace {

constexpr int kUnroll = 4;        // features of a row that a lane loads at a time
constexpr int kRowsInFlight = 4;  // gradients a lane loads ahead in the deterministic backward
constexpr int kWidth = 3;         // of the neighborhood that feat_unfold concatenates
constexpr int kNeighbors = kWidth * kWidth;
constexpr int kCenter = kNeighbors / 2;
static_assert(kNeighbors <= 32, "the neighbors inside the map are bits of one word");

// A problem, and the numbers that every thread of its kernels would otherwise compute.
template <class T>
struct GatherTask {
  GatherProblem<T> p;
  FeatStrides strides;                     // of feat in the forward, of grad_feat in the backward
  int64_t queries, rows, features, depth;  // queries and rows of all maps together
};

template <class T>
GatherTask<T> make_task(const GatherProblem<T>& p, const FeatStrides& strides) {
  const int64_t queries = p.batch * p.queries;
  return {p, strides, queries, queries * p.corners, p.features(), p.depth()};
}

// The latent of a row of x.
struct alignas(16) GatherSource {
  int64_t offset;   // of the latent's first channel, in elements
  unsigned inside;  // bit k: neighbor k of the 3x3 is in the map
};

template <class T>
struct LocatedRow {
  GatherSource source;
  T rel_row, rel_col;
};

// One feature of a row, relative to the row's latent.
struct Feature {
  int64_t offset;  // in elements
  unsigned bit;    // its neighbor's bit; 0 for no feature
};

__device__ __forceinline__ Feature make_feature(int64_t channel, int neighbor, const FeatStrides& strides) {
  const int ky = neighbor / kWidth - 1, kx = neighbor % kWidth - 1;
  return {channel * strides.channel + ky * strides.row + kx * strides.col, 1u << neighbor};
}

// Feature number `index` of a row.
template <class T>
__device__ __forceinline__ Feature feature_at(const GatherTask<T>& task, int64_t index) {
  if (index >= task.features) return {0, 0};
  if (!task.p.feat_unfold) return make_feature(index, kCenter, task.strides);
  const int64_t channel = index / kNeighbors;
  return make_feature(channel, static_cast<int>(index - channel * kNeighbors), task.strides);
}

template <class T>
__device__ __forceinline__ LocatedRow<T> locate_row(const GatherTask<T>& task, int64_t index) {
  const GatherProblem<T>& p = task.p;
  const FeatStrides& strides = task.strides;
  const bool ensemble = p.corners == 4;
  const int64_t at = ensemble ? index / 4 : index;
  const int corner = static_cast<int>(index & 3);
  const T coord[2] = {p.coord[2 * at], p.coord[2 * at + 1]};
  const Neighbor<T> row = find_neighbor(coord[0], ensemble ? (corner & 2) - 1 : 0, p.height);
  const Neighbor<T> col = find_neighbor(coord[1], ensemble ? 2 * (corner & 1) - 1 : 0, p.width);
  LocatedRow<T> found;
  found.source.offset = at / p.queries * strides.batch + row.index * strides.row + col.index * strides.col;
  const unsigned cols = is_place(coord) ? (col.index > 0 ? 1u : 0u) | 2u | (col.index + 1 < p.width ? 4u : 0u) : 0u;
  found.source.inside =
      (row.index > 0 ? cols : 0u) | cols << kWidth | (row.index + 1 < p.height ? cols << 2 * kWidth : 0u);
  found.rel_row = is_place(coord) ? row.rel : mul_rounded(coord[0], static_cast<T>(p.height));
  found.rel_col = is_place(coord) ? col.rel : mul_rounded(coord[1], static_cast<T>(p.width));
  return found;
}

// The lane's own area weight. All lanes of the warp take part; four neighboring lanes hold a query's corners.
template <class T>
__device__ __forceinline__ T find_area_weight(const LocatedRow<T>& found, int corner, int corners) {
  const T other_row = __shfl_xor_sync(kAllLanes, found.rel_row, 2);
  const T other_col = __shfl_xor_sync(kAllLanes, found.rel_col, 1);
  if (corners == 1) return single_corner_weight(found.rel_row, found.rel_col);
  const T rel_row[2] = {corner & 2 ? other_row : found.rel_row, corner & 2 ? found.rel_row : other_row};
  const T rel_col[2] = {corner & 1 ? other_col : found.rel_col, corner & 1 ? found.rel_col : other_col};
  T weight[4];
  area_weights(rel_row, rel_col, weight);
  const T upper = corner & 1 ? weight[1] : weight[0], lower = corner & 1 ? weight[3] : weight[2];
  return corner & 2 ? lower : upper;
}

template <class T, class E>
__global__ void __launch_bounds__(kThreads) gather_forward_kernel(GatherTask<T> task, const E* __restrict__ feat,
                                                                  E* __restrict__ x, T* __restrict__ area_weight) {
  __shared__ GatherSource shared_rows[kWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  GatherSource* const my_rows = shared_rows[threadIdx.x / kWarp];
  const int64_t rows = task.rows, features = task.features, depth = task.depth;
  for (int64_t first = grid_warp() * kWarp; first < rows; first += grid_warps() * kWarp) {
    const int count = static_cast<int>(rows - first < kWarp ? rows - first : kWarp);
    const int64_t mine = first + (lane < count ? lane : count - 1);
    const LocatedRow<T> found = locate_row(task, mine);
    const T weight = find_area_weight(found, lane & 3, task.p.corners);
    __syncwarp();  // wait until all lanes have read the previous rows
    my_rows[lane] = found.source;
    __syncwarp();
    if (lane < count) {
      area_weight[mine] = weight;
      E* const geometry = x + mine * depth + features;
      geometry[0] = narrow<E>(found.rel_row);
      geometry[1] = narrow<E>(found.rel_col);
      const GatherProblem<T>& p = task.p;
      if (p.has_cell) {
        const int64_t at = p.corners == 4 ? mine / 4 : mine;
        geometry[2] = narrow<E>(mul_rounded(p.cell[2 * at], static_cast<T>(p.height)));
        geometry[3] = narrow<E>(mul_rounded(p.cell[2 * at + 1], static_cast<T>(p.width)));
      }
    }
    for (int64_t begin = lane; begin < features + lane; begin += kUnroll * kWarp) {
      Feature feature[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) feature[u] = feature_at(task, begin + u * kWarp);
      E* out = x + first * depth + begin;
      for (int r = 0; r < count; ++r, out += depth) {
        const GatherSource row = my_rows[r];
        E value[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          value[u] = row.inside & feature[u].bit ? feat[row.offset + feature[u].offset] : E{};
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (feature[u].bit) out[u * kWarp] = value[u];
      }
    }
  }
}

// Rows and lanes as in the forward. Gradients are added to the values that the forward read, in the hardware's order.
template <class T, class E>
__global__ void __launch_bounds__(kThreads)
    gather_backward_feat_kernel(GatherTask<T> task, const E* __restrict__ grad_x, T* __restrict__ grad_feat) {
  __shared__ GatherSource shared_rows[kWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  GatherSource* const my_rows = shared_rows[threadIdx.x / kWarp];
  const int64_t rows = task.rows, features = task.features, depth = task.depth;
  for (int64_t first = grid_warp() * kWarp; first < rows; first += grid_warps() * kWarp) {
    const int count = static_cast<int>(rows - first < kWarp ? rows - first : kWarp);
    const GatherSource found = locate_row(task, first + (lane < count ? lane : count - 1)).source;
    __syncwarp();
    my_rows[lane] = found;
    __syncwarp();
    for (int64_t begin = lane; begin < features + lane; begin += kUnroll * kWarp) {
      Feature feature[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) feature[u] = feature_at(task, begin + u * kWarp);
      const E* grad = grad_x + first * depth + begin;
      for (int r = 0; r < count; ++r, grad += depth) {
        const GatherSource row = my_rows[r];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          if (row.inside & feature[u].bit)
            atomicAdd(grad_feat + (row.offset + feature[u].offset), widen(grad[u * kWarp]));
      }
    }
  }
}

// Features of a warp in the ordered backward: whole neighborhoods, so that no two warps write to one channel.
template <class T>
__host__ __device__ inline int64_t ordered_features(const GatherTask<T>& task) {
  return task.p.feat_unfold ? kWarp / kNeighbors * kNeighbors : kWarp;
}

// Shards of a map in the ordered backward, each of which a warp owns.
template <class T>
__host__ __device__ inline int64_t ordered_shards(const GatherTask<T>& task) {
  return (task.features + ordered_features(task) - 1) / ordered_features(task);
}

// The same sums in a fixed order: a warp owns a few channels of one map and walks that map's rows from first to last.
// Within a row the lanes' latents differ, between rows the warp's barrier orders them, so no atomics are needed.
template <class T, class E>
__global__ void __launch_bounds__(kThreads)
    gather_backward_feat_ordered_kernel(GatherTask<T> task, const E* __restrict__ grad_x, T* grad_feat) {
  __shared__ GatherSource shared_rows[kWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  GatherSource* const my_rows = shared_rows[threadIdx.x / kWarp];
  const GatherProblem<T>& p = task.p;
  const int64_t depth = task.depth, rows = p.queries * p.corners;  // rows of one map
  const int64_t lanes = ordered_features(task), shards = ordered_shards(task);
  for (int64_t shard = grid_warp(); shard < p.batch * shards; shard += grid_warps()) {
    const int64_t batch = shard / shards, index = (shard - batch * shards) * lanes + lane;
    const Feature feature = feature_at(task, lane < lanes ? index : task.features);
    for (int64_t first = batch * rows; first < (batch + 1) * rows; first += kWarp) {
      const int64_t left = (batch + 1) * rows - first;
      const int count = static_cast<int>(left < kWarp ? left : kWarp);
      const GatherSource found = locate_row(task, first + (lane < count ? lane : count - 1)).source;
      __syncwarp();
      my_rows[lane] = found;
      __syncwarp();
      for (int begin = 0; begin < count; begin += kRowsInFlight) {
        T grad[kRowsInFlight];
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r)
          grad[r] = feature.bit && begin + r < count ? widen(grad_x[(first + begin + r) * depth + index]) : T(0);
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
          if (begin + r < count && my_rows[begin + r].inside & feature.bit)
            grad_feat[my_rows[begin + r].offset + feature.offset] += grad[r];
          __syncwarp();
        }
      }
    }
  }
}

// One thread per query: gradients through the relative coordinates, the relative cells and the area weights.
template <class T, class E>
__global__ void __launch_bounds__(kThreads)
    gather_backward_geometry_kernel(GatherTask<T> task, const E* __restrict__ grad_x,
                                    const T* __restrict__ grad_area_weight, T* __restrict__ grad_coord,
                                    T* __restrict__ grad_cell) {
  const GatherProblem<T>& p = task.p;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t at = grid_warp() * kWarp + lane; at < task.queries; at += grid_warps() * kWarp) {
    T grad_row[2] = {0, 0}, grad_col[2] = {0, 0}, cell_row = 0, cell_col = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (corner >= p.corners) break;
      const E* const grad = grad_x + (at * p.corners + corner) * task.depth + task.features;
      grad_row[corner >> 1] += widen(grad[0]);
      grad_col[corner & 1] += widen(grad[1]);
      if (p.has_cell) {
        cell_row += widen(grad[2]);
        cell_col += widen(grad[3]);
      }
    }
    if (p.corners == 4) {
      T rel_row[2], rel_col[2], grad_weight[4];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        rel_row[side] = find_neighbor(p.coord[2 * at], 2 * side - 1, p.height).rel;
        rel_col[side] = find_neighbor(p.coord[2 * at + 1], 2 * side - 1, p.width).rel;
      }
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) grad_weight[corner] = grad_area_weight[at * 4 + corner];
      area_weights_backward(rel_row, rel_col, grad_weight, grad_row, grad_col);
    }
    grad_coord[2 * at] = (grad_row[0] + grad_row[1]) * static_cast<T>(p.height);
    grad_coord[2 * at + 1] = (grad_col[0] + grad_col[1]) * static_cast<T>(p.width);
    if (p.has_cell) {
      grad_cell[2 * at] = cell_row * static_cast<T>(p.height);
      grad_cell[2 * at + 1] = cell_col * static_cast<T>(p.width);
    }
  }
}

int64_t warps_for(int64_t items) { return (items + kWarp - 1) / kWarp; }

}  // namespace

template <class T>
const char* launch_gather_forward(const GatherProblem<T>& problem, Dtype dtype, const void* feat,
                                  const FeatStrides& strides, void* x, T* area_weight, void* stream) {
  const GatherTask<T> task = make_task(problem, strides);
  if (task.rows == 0) return nullptr;
  return with_type<T>(dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      if (fits_patches<E>(problem, strides, feat, x))
        return launch(gather_forward_patch_kernel<E>, blocks_for(task.queries), stream,
                      PatchTask{problem, strides, task.queries, task.depth}, static_cast<const E*>(feat),
                      static_cast<E*>(x), area_weight);
    }
    return launch(gather_forward_kernel<T, E>, blocks_for(warps_for(task.rows)), stream, task,
                  static_cast<const E*>(feat), static_cast<E*>(x), area_weight);
  });
}

template <class T>
const char* launch_gather_backward(const GatherProblem<T>& problem, Dtype dtype, const FeatStrides& strides,
                                   const GatherGrads<T>& grads, bool deterministic, void* stream) {
  const GatherTask<T> task = make_task(problem, strides);
  if (task.rows == 0) return nullptr;
  return with_type<T>(dtype, [&](auto element) {
    using E = decltype(element);
    const E* const grad_x = static_cast<const E*>(grads.x);
    const char* const error = launch(gather_backward_geometry_kernel<T, E>, blocks_for(warps_for(task.queries)), stream,
                                     task, grad_x, grads.area_weight, grads.coord, grads.cell);
    if (error) return error;
    if (deterministic)
      return launch(gather_backward_feat_ordered_kernel<T, E>, blocks_for(problem.batch * ordered_shards(task)), stream,
                    task, grad_x, grads.feat);
    if constexpr (std::is_same_v<T, float>) {
      if (fits_patches_backward<E>(problem, strides, grad_x, grads.feat))
        return launch(gather_backward_patch_kernel<E>, blocks_for(task.queries), stream,
                      PatchTask{problem, strides, task.queries, task.depth}, grad_x, grads.feat);
    }
    return launch(gather_backward_feat_kernel<T, E>, blocks_for(warps_for(task.rows)), stream, task, grad_x,
                  grads.feat);
  });
}

#define LIIF_INSTANTIATE(T)                                                                                          \
  template const char* launch_gather_forward(const GatherProblem<T>&, Dtype, const void*, const FeatStrides&, void*, \
                                             T*, void*);                                                             \
  template const char* launch_gather_backward(const GatherProblem<T>&, Dtype, const FeatStrides&,                    \
                                              const GatherGrads<T>&, bool, void*);
LIIF_INSTANTIATE(double)
LIIF_INSTANTIATE(float)
#undef LIIF_INSTANTIATE

}  // namespace liif_fast
