// ensemble on the GPU: the area-weighted blend of the corners' predictions, and its backward.
//
// A few neighboring lanes share a query: as many as it has outputs, rounded up to a power of two, at most a warp. Their
// reads and writes are consecutive, no index needs a division, and the backward's sums over the outputs are a fixed
// tree of shuffles, so results never depend on the launch.
#include "cuda/common.cuh"

namespace liif_fast {
namespace {

// Lanes that share a row.
__host__ __device__ inline int lanes_for(int64_t outs) {
  int lanes = 1;
  while (lanes < kWarp && lanes < outs) lanes *= 2;
  return lanes;
}

struct Sizes {
  int64_t rows, corners, outs;
  int lanes;
};

template <class T>
Sizes make_sizes(const EnsembleProblem<T>& p) {
  return {p.rows, p.corners, p.outs, lanes_for(p.outs)};
}

template <class T, class E>
__global__ void __launch_bounds__(kThreads)
    ensemble_forward_kernel(const E* __restrict__ pred, const T* __restrict__ area_weight, int64_t rows,
                            int64_t corners, int64_t outs, int lanes, T* __restrict__ out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, rows_per_warp = kWarp / lanes;
  for (int64_t row = grid_warp() * rows_per_warp + lane / lanes; row < rows; row += grid_warps() * rows_per_warp) {
    for (int64_t o = lane % lanes; o < outs; o += lanes) {
      T sum = 0;
#pragma unroll 4
      for (int64_t corner = row * corners; corner < (row + 1) * corners; ++corner)
        sum += widen(pred[corner * outs + o]) * area_weight[corner];
      out[row * outs + o] = sum;
    }
  }
}

template <class T, class E>
__global__ void __launch_bounds__(kThreads)
    ensemble_backward_kernel(Sizes sizes, const T* __restrict__ grad_out, const E* __restrict__ pred,
                             const T* __restrict__ area_weight, T* __restrict__ grad_pred,
                             T* __restrict__ grad_area_weight) {
  const auto [rows, corners, outs, lanes] = sizes;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, rows_per_warp = kWarp / lanes;
  // All lanes stay until the warp's last row is done, because they take part in its shuffles.
  for (int64_t first = grid_warp() * rows_per_warp; first < rows; first += grid_warps() * rows_per_warp) {
    const int64_t row = first + lane / lanes;
    const bool active = row < rows;
    for (int64_t s = 0; s < corners; ++s) {
      const int64_t corner = row * corners + s;
      const T weight = active ? area_weight[corner] : T(0);
      T sum = 0;
      if (active) {
        for (int64_t o = lane % lanes; o < outs; o += lanes) {
          const T grad = grad_out[row * outs + o];
          sum += grad * widen(pred[corner * outs + o]);
          grad_pred[corner * outs + o] = grad * weight;
        }
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (active && lane % lanes == 0) grad_area_weight[corner] = sum;
    }
  }
}

unsigned blocks_for_rows(const Sizes& sizes) {
  const int64_t rows_per_warp = kWarp / sizes.lanes;
  return blocks_for((sizes.rows + rows_per_warp - 1) / rows_per_warp);
}

}  // namespace

template <class T>
const char* launch_ensemble_forward(const EnsembleProblem<T>& p, Dtype dtype, T* out, void* stream) {
  if (p.rows == 0 || p.outs == 0) return nullptr;
  const Sizes sizes = make_sizes(p);
  return with_type<T>(dtype, [&](auto element) {
    using E = decltype(element);
    return launch(ensemble_forward_kernel<T, E>, blocks_for_rows(sizes), stream, static_cast<const E*>(p.pred),
                  p.area_weight, p.rows, p.corners, p.outs, sizes.lanes, out);
  });
}

template <class T>
const char* launch_ensemble_backward(const EnsembleProblem<T>& p, Dtype dtype, const EnsembleGrads<T>& grads,
                                     void* stream) {
  if (p.rows == 0 || p.corners == 0) return nullptr;
  const Sizes sizes = make_sizes(p);
  return with_type<T>(dtype, [&](auto element) {
    using E = decltype(element);
    return launch(ensemble_backward_kernel<T, E>, blocks_for_rows(sizes), stream, sizes, grads.out,
                  static_cast<const E*>(p.pred), p.area_weight, grads.pred, grads.area_weight);
  });
}

#define LIIF_INSTANTIATE(T)                                                                  \
  template const char* launch_ensemble_forward(const EnsembleProblem<T>&, Dtype, T*, void*); \
  template const char* launch_ensemble_backward(const EnsembleProblem<T>&, Dtype, const EnsembleGrads<T>&, void*);
LIIF_INSTANTIATE(double)
LIIF_INSTANTIATE(float)
#undef LIIF_INSTANTIATE

}  // namespace liif_fast
