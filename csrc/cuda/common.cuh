// Shared by every .cu: the size of a launch, the launch, conversions at loads and stores, the dtype switch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"

namespace liif_fast {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarp * kWarps;
constexpr unsigned kAllLanes = 0xffffffffu;
// Kernels stride over their work by the grid, so this limits only the launch. With 2^19 warps, the last wave's share of
// the time is negligible on any device.
constexpr int64_t kMaxBlocks = int64_t{1} << 16;

// Blocks for the independent work of `warps` warps.
inline unsigned blocks_for(int64_t warps) {
  const int64_t blocks = (warps + kWarps - 1) / kWarps;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// bytes: of dynamic shared memory. cluster: blocks that run at the same time and may use each other's shared memory.
struct LaunchSize {
  unsigned blocks;
  int bytes, threads = kThreads;
  unsigned cluster = 1;
};

// `cluster` outlives the configuration.
inline cudaLaunchConfig_t launch_config(const LaunchSize& size, cudaLaunchAttribute& cluster, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(size.blocks);
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = static_cast<size_t>(size.bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  if (size.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {size.cluster, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  return config;
}

// Returns nullptr, or CUDA's error message if the kernel was not launched.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchSize& size, void* stream, const Arguments&... arguments) {
  cudaLaunchAttribute cluster = {};
  const cudaLaunchConfig_t config = launch_config(size, cluster, stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), unsigned blocks, void* stream, const Arguments&... arguments) {
  return launch(kernel, LaunchSize{blocks, 0}, stream, arguments...);
}

// Allows a kernel on the current device `most_bytes` of dynamic shared memory, which bounds that of all its launches.
// The driver is asked once for each kernel and device.
template <auto kKernel>
const char* allow_shared(int most_bytes) {
  static std::atomic<uint64_t> allowed{0};  // a bit for each of the first devices
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error == cudaSuccess && !(allowed & bit)) {
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
    if (error == cudaSuccess) allowed |= bit;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The index of this thread's warp in the grid, and the number of warps in the grid.
__device__ __forceinline__ int64_t grid_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int64_t>(threadIdx.x) / kWarp;
}
__device__ __forceinline__ int64_t grid_warps() { return static_cast<int64_t>(gridDim.x) * kWarps; }

// Conversions between the stored dtype and the dtype of arithmetic; they round to nearest even.
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

template <class E, class T>
__device__ __forceinline__ E narrow(T value) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<E, __half>) {
    return __float2half_rn(value);
  } else {
    return static_cast<E>(value);
  }
}

// f(E{}) with the C++ type of a dtype; only the types that belong to geometry in T are compiled.
template <class T, class F>
const char* with_type(Dtype dtype, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    if (dtype == Dtype::kFloat64) return f(double{});
  } else {
    if (dtype == Dtype::kFloat32) return f(float{});
    if (dtype == Dtype::kBFloat16) return f(__nv_bfloat16{});
    if (dtype == Dtype::kFloat16) return f(__half{});
  }
  return "this dtype does not belong to the geometry's dtype";
}

}  // namespace liif_fast
