// From a variant to its kernels' launches; each query_*.cu instantiates one kind of products.
#pragma once

#include "cuda/decode/backward.cuh"
#include "cuda/decode/forward.cuh"
#include "cuda/decode/variant.h"

namespace liif_fast {

template <class Kernel, class... Arguments>
const char* launch_tiles(Kernel kernel, const QueryVariant& variant, const QueryTask& task, int bytes, void* stream,
                         const Arguments&... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(variant.blocks < task.tiles ? variant.blocks : task.tiles));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, task, arguments...);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// f(Tile{}) with the tile of a variant.
template <class P, class F>
const char* with_tile(const QueryVariant& variant, const F& f) {
  constexpr int kBytes = sizeof(typename P::Element);
  if (variant.width == 64) return f(Tile<P, 64, kBytes == 2 ? 128 : 64>{});
  if (variant.width == 128) return f(Tile<P, 128, kBytes == 2 ? 128 : 64>{});
  if (variant.rows == large_rows(kBytes)) return f(Tile<P, 256, large_rows(kBytes)>{});
  return f(Tile<P, 256, small_rows(kBytes)>{});
}

template <class P>
const char* launch_forward_of(const QueryTask& task, const QueryVariant& variant, const Saved& saved, void* stream) {
  return with_tile<P>(variant, [&](auto tile) {
    using T = decltype(tile);
    return launch_tiles(query_forward_kernel<T>, variant, task, shared_bytes<T>(), stream, saved);
  });
}

template <class P>
const char* launch_backward_of(const QueryTask& task, const QueryVariant& variant, const Saved& saved,
                               const QueryBackward& backward, void* stream) {
  return with_tile<P>(variant, [&](auto tile) {
    using T = decltype(tile);
    static_assert(T::kWarpRows == row_sums_of(T::kRows, T::kWidth, sizeof(typename T::Element)), "as the host says");
    const int bytes =
        shared_bytes<T>() + T::kRows / task.corners * task.outs * 4 + (backward.coord ? row_dots_bytes<T>() : 0);
    return launch_tiles(query_backward_kernel<T>, variant, task, bytes, stream, saved, backward);
  });
}

#define LIIF_INSTANTIATE_QUERY(P)                                                                        \
  template const char* launch_forward_of<P>(const QueryTask&, const QueryVariant&, const Saved&, void*); \
  template const char* launch_backward_of<P>(const QueryTask&, const QueryVariant&, const Saved&,        \
                                             const QueryBackward&, void*);

}  // namespace liif_fast
